"""Turn a raw corpus into checked, cleaned and split manifests, with a ledger of every dropped row.

Example:

    python jobs/prepare.py --input data/raw_corpus --train_output data/asr.train.jsonl --val_output data/asr.val.jsonl
"""

from voxray.config.parse import parse
from voxray.config.prepare import PrepareSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(PrepareSettings, argv, job="prepare", about=__doc__ or "", demo="demo_prepare.yaml")
    from voxray.commands.prepare import run_prepare_job

    run_prepare_job(settings)


if __name__ == "__main__":
    main()
