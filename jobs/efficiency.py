"""Measure a model: time to first token, time per output token, real-time factor and memory.

Example:

    python jobs/efficiency.py --model_id mistralai/Voxtral-Mini-3B-2507 --bf16 --batch_sizes 1,4
"""

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
