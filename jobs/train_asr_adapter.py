"""Fine-tune Voxtral's projector on transcripts: the second of its three training stages.

Example:

    python jobs/train_asr_adapter.py --train_jsonl data/asr.train.jsonl --output_dir runs/asr
"""

from voxray.config.parse import parse
from voxray.config.train import AsrAdapterSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_train_asr_adapter.yaml"
    settings = parse(AsrAdapterSettings, argv, job="train_asr_adapter", about=about, demo=demo)
    from voxray.commands.train import run_training

    run_training(settings)


if __name__ == "__main__":
    main()
