"""Sweep task weights and LoRA ranks of multitask training with Ray Tune."""

from voxray.config.parse import parse
from voxray.config.tune import TuneSettings
from voxray.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(TuneSettings, argv, job="tune", about=__doc__ or "", demo="demo_tune.yaml")
    from voxray.tune import run_sweep

    run_sweep(settings)


if __name__ == "__main__":
    main()
