"""Search over any flags of a training job with Ray Tune: weak trials are stopped early, the best are repeated.

Example:

    python jobs/tune.py --config jobs/configs/tune_multitask.yaml
"""

import sys

from voxray.config.parse import parse
from voxray.config.tune import sweep_settings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    kind = sweep_settings(sys.argv[1:] if argv is None else argv)
    settings = parse(kind, argv, job="tune", about=__doc__ or "", demo="demo_tune.yaml")
    from voxray.commands.tune import run_sweep

    run_sweep(settings)


if __name__ == "__main__":
    main()
