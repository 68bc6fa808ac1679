"""Settings of jobs/submit.py."""

from typing import Literal

from pydantic import Field

from voxray.config.parse import Settings
from voxray.core.errors import SettingsError
from voxray.core.project_files import job_names


class SubmitSettings(Settings):
    """Flags of submit itself; the submitted job and its flags follow after ``--``."""

    address: str = Field(default="", pattern=r"^(https?://[^/@]+(/.*)?)?$")
    """Address of the cluster's dashboard, as forwarded by `ray dashboard cluster.yaml` or `kubectl port-forward`; by
    default that of RAY_API_SERVER_ADDRESS, else the one at http://127.0.0.1:8265, if you confirm it."""
    auth: Literal["auto", "token", "disabled"] = "auto"
    """Authentication: token uses this machine's token (RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or
    ~/.ray/auth_token), disabled uses none, auto uses the token if there is one."""
    entrypoint_num_cpus: float = Field(default=0, ge=0)
    """CPUs of the node on which the job's own process runs. A job that computes in its own process, such as export,
    runs on the head otherwise."""
    entrypoint_num_gpus: float = Field(default=0, ge=0)
    """GPUs that the job's own process uses, such as 1 for infer, export or efficiency."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$", max_length=60)
    """Prefix of the submission's id, to which a unique suffix is added; by default the job's name."""
    wait: bool = True
    """Print the job's output until it ends and exit with its status; Ctrl-C stops the job and waits until it has saved
    its state. --no_wait submits the job and returns."""


def job_and_flags(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Split ``--address X -- train_text --config a.yaml`` into submit's own flags, the job and the job's flags.

    The default job is quickstart. If only a job is given, submit's own flags are its defaults.

    Raises:
        SettingsError: There is no such job.
    """
    separator = argv.index("--") if "--" in argv else len(argv)
    job, *flags = argv[separator + 1 :] or ["quickstart"]
    known = [name for name in job_names() if name != "submit"]
    if job not in known:
        raise SettingsError(f"-- {job}: not one of the jobs {', '.join(known)}")
    return argv[:separator] or (["--wait"] if argv else []), job, flags
