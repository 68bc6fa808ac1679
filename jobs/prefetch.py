"""Fetch a model and a corpus into one folder and prepare them, so that training needs no network.

Example:

    python jobs/prefetch.py --dataset cv-corpus-ko.tar.gz --language ko --output_dir runs/prefetch
"""

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
