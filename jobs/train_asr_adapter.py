"""Fine-tune the projector of Voxtral on transcripts, the second of its three stages."""

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
