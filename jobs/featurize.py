"""Decode the audio of manifests once and store features, token ids and lengths as Arrow shards.

Example:

    python jobs/featurize.py --manifest data/asr.train.jsonl --output_dir runs/features
"""

from voxray.config.featurize import FeaturizeSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(FeaturizeSettings, argv, job="featurize", about=__doc__ or "", demo="demo_featurize.yaml")
    from voxray.commands.featurize import run_featurize_job

    run_featurize_job(settings)


if __name__ == "__main__":
    main()
