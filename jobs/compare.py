"""Compare evaluations on the same rows, with intervals, p-values and a verdict in words; explain the errors of one."""

from voxray.config.compare import CompareSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_compare.yaml"
    settings = parse(CompareSettings, argv, job="compare", about=about, demo=demo, words="runs")
    from voxray.commands.compare import run_compare

    run_compare(settings)


if __name__ == "__main__":
    main()
