"""Fine-tune Voxtral on transcription, spoken QA and text QA together: the last of its three training stages.

Example:

    python jobs/train_multitask.py --train_jsonl data/asr.train.jsonl,data/tqa.train.jsonl --output_dir runs/multitask
"""

from voxray.config.parse import parse
from voxray.config.train import MultitaskSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(MultitaskSettings, argv, job="train_multitask", about=__doc__ or "", demo="demo.yaml")
    from voxray.commands.train import run_training

    run_training(settings)


if __name__ == "__main__":
    main()
