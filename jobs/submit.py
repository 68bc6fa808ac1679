"""Submit a job to a running Ray cluster, print its output, and exit with its status.

The job and its flags follow after --. The file of --config may be anywhere on this machine; it is sent with the job.

Example:

    python jobs/submit.py --address http://127.0.0.1:8265 -- train_text --config jobs/configs/train_text.yaml
"""

import sys

from voxray.config.parse import CHECK, parse
from voxray.config.submit import SubmitSettings, job_and_flags
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    own, name, flags = job_and_flags(sys.argv[1:] if argv is None else argv)
    from voxray.commands.submit import check_flags, run_submit

    if CHECK & set(own):
        check_flags(name, flags)
    settings = parse(SubmitSettings, own, job="submit", about=__doc__ or "", demo="demo_submit.yaml")
    if status := run_submit(settings, name, flags):
        sys.exit(status)


if __name__ == "__main__":
    main()
