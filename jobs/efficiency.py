"""Measure a model: time to the first token, time per token, speed against the clip's length, memory."""

from voxray.config.efficiency import EfficiencySettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(EfficiencySettings, argv, job="efficiency", about=__doc__ or "", demo="demo_efficiency.yaml")
    from voxray.commands.efficiency import run_efficiency

    run_efficiency(settings)


if __name__ == "__main__":
    main()
