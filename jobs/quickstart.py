"""Run the whole pipeline once: compute features, evaluate the base, train, evaluate again, and compare.

Example:

    python jobs/quickstart.py --train_jsonl data/asr.train.jsonl --output_dir runs/quickstart
"""

from voxray.config.parse import parse
from voxray.config.quickstart import QuickstartSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(QuickstartSettings, argv, job="quickstart", about=__doc__ or "", demo="quickstart.yaml")
    from voxray.commands.quickstart import run_quickstart

    run_quickstart(settings)


if __name__ == "__main__":
    main()
