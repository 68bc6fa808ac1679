"""Fine-tune Voxtral's language model on text QA: the first of its three training stages.

Example:

    python jobs/train_text.py --train_jsonl data/tqa.train.jsonl --val_jsonl data/tqa.val.jsonl --output_dir runs/text
"""

from voxray.config.parse import parse
from voxray.config.train import TextSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(TextSettings, argv, job="train_text", about=__doc__ or "", demo="demo_train_text.yaml")
    from voxray.commands.train import run_training

    run_training(settings)


if __name__ == "__main__":
    main()
