"""Settings of jobs/submit.py."""

from typing import Literal

from pydantic import Field

from voxray.config.parse import REPOSITORY, Settings
from voxray.core.errors import SettingsError


class SubmitSettings(Settings):
    """Flags of submit itself; what follows ``--`` is the job that it hands in."""

    address: str = Field(default="http://127.0.0.1:8265", pattern=r"^https?://[^/@]+/?$")
    """The cluster's dashboard, as `ray dashboard cluster.yaml` or `kubectl port-forward` bring it to this machine."""
    auth: Literal["auto", "token", "disabled"] = "auto"
    """How the cluster is asked: with this machine's token (~/.ray/auth_token), without one, or auto: with it if it is
    there."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$", max_length=60)
    """Start of the submission's id, to which a unique ending is added; by default the job's name."""
    wait: bool = True
    """Follow the job's output to its end and exit as it did; Ctrl-C stops the job, and waits until it has saved itself.
    --no_wait hands it in and returns."""


def job_and_flags(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Split ``--address X -- train_text --config a.yaml`` into submit's own flags, the job and its flags.

    Without a job it is the quickstart.

    Raises:
        SettingsError: There is no such job.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    job, *flags = argv[at + 1 :] or ["quickstart"]
    known = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if path.stem != "submit")
    if job not in known:
        raise SettingsError(f"-- {job}: not one of the jobs {', '.join(known)}")
    return argv[:at], job, flags
