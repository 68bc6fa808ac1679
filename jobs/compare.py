"""Compare evaluations of the same rows, with confidence intervals, p-values and a verdict; or report the errors of one.

Example:

    python jobs/compare.py runs/eval-base runs/eval-tuned
"""

from voxray.config.compare import CompareSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_compare.yaml"
    settings = parse(CompareSettings, argv, job="compare", about=about, demo=demo, positional="runs")
    from voxray.commands.compare import run_compare

    run_compare(settings)


if __name__ == "__main__":
    main()
