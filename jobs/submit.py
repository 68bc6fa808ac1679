"""Hand a job in to a running cluster (submit.py [flags] -- JOB [its flags]), follow its output, and exit as it does."""

import sys

from voxray.config.parse import parse
from voxray.config.submit import SubmitSettings, job_and_flags
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    own, name, flags = job_and_flags(sys.argv[1:] if argv is None else argv)
    settings = parse(SubmitSettings, own, job="submit", about=__doc__ or "", demo="demo_submit.yaml")
    from voxray.commands.submit import run_submit

    if status := run_submit(settings, name, flags):
        sys.exit(status)


if __name__ == "__main__":
    main()
