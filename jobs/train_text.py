"""Fine-tune the language model of Voxtral on text QA, the first of its three stages."""

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
