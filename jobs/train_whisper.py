"""Fine-tune Whisper on transcripts, with LoRA on encoder and decoder.

Example:

    python jobs/train_whisper.py --train_jsonl data/asr.train.jsonl --output_dir runs/whisper
"""

from voxray.config.parse import parse
from voxray.config.train import WhisperSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_train_whisper.yaml"
    settings = parse(WhisperSettings, argv, job="train_whisper", about=about, demo=demo)
    from voxray.commands.train import run_training

    run_training(settings)


if __name__ == "__main__":
    main()
