"""Fetch a model and a corpus into one folder, ready to train on with the network off."""

from voxray.config.parse import parse
from voxray.config.prefetch import PrefetchSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(PrefetchSettings, argv, job="prefetch", about=__doc__ or "", demo="demo_prefetch.yaml")
    from voxray.commands.prefetch import run_prefetch

    run_prefetch(settings)


if __name__ == "__main__":
    main()
