"""The cluster: a Ray to work with, started here or joined, and what it has or can get."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from voxray.core.errors import RunError, one_line

RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports travel with this poll; the default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # autoscaled nodes take minutes to come up
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train page shows the run
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints a box of text even when told to be silent, unless this is off
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends every other job
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # else a trial that fails before its first validation ends the sweep
}


@contextmanager
def ray_session(log_path: Path, num_processes: int = 1) -> Iterator[None]:
    """A Ray to work with: the cluster named by RAY_ADDRESS (set in submitted jobs), else one started here and stopped
    after.

    Args:
        log_path: File that takes Ray's own messages.
        num_processes: Processes that will run at a time. A Ray started here gets one CPU more than that, and not fewer
            than the machine has, because Ray Data hangs when training holds every CPU.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, num_processes + 1), **quiet)
    except Exception as error:  # Ray's start fails in many ways, none of which the user caused by a setting
        raise RunError(f"Ray could not be started or reached: {one_line(error, 300)}") from error
    _quiet_loggers(log_path)
    try:
        with stderr_to(log_path), term_is_interrupt():
            yield
            ray.shutdown()
    finally:
        ray.shutdown()


@contextmanager
def stderr_to(log_path: Path) -> Iterator[None]:
    """Send what C++ code writes to the standard error of this process to a file; Python's own stays on the terminal."""
    sys.stderr.flush()
    terminal, log = os.dup(2), os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = sys.stderr
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def term_is_interrupt() -> Iterator[None]:
    """Let SIGTERM, at which Ray ends the driver without a word, end a job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet_loggers(log_path: Path) -> None:
    """Send the messages of Ray's Python side to a file instead of the terminal."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    handler = logging.FileHandler(log_path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            if isinstance(old, logging.StreamHandler) and not isinstance(old, logging.FileHandler):
                logger.removeHandler(old)
    logger = logging.getLogger("ray")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


CLUSTER_FILE = "ray_bootstrap_config.yaml"
"""What ``ray up`` leaves in the home folder of a head: cluster.yaml, which says how many nodes may be started."""


def max_resource(resource: str) -> int:
    """How many CPUs or GPUs (``CPU``, ``GPU``) the cluster has, counting nodes that its autoscaler may still start."""
    import ray
    from ray._private.state import state

    present = ray.cluster_resources().get(resource, 0)
    reported = state.get_max_resources_from_cluster_config() or {}  # by Ray's own service; the open one reports none
    return int(max(present, reported.get(resource, 0), _autoscaled(resource)))


def max_gpus() -> int:
    """GPUs of the cluster, counting nodes that its autoscaler has not started yet."""
    return max_resource("GPU")


def cpus_for_data() -> int:
    """CPUs that work without a GPU may take: those there are, and those of nodes that may still be started and have no
    GPU, which nobody should pay for to have its CPUs.
    """
    import ray

    return int(max(ray.cluster_resources().get("CPU", 0), _autoscaled("CPU", gpu_nodes=False)))


def cluster_resources(log_path: Path) -> dict[str, float] | None:
    """CPUs, GPUs and memory of the cluster that RAY_ADDRESS names; None without one.

    Raises:
        RunError: It is out of reach.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    with ray_session(log_path):
        import ray

        return dict(ray.cluster_resources())


def _autoscaled(resource: str, *, gpu_nodes: bool = True) -> int:
    """What all nodes together have once the autoscaler of this head has started as many as it may.

    Args:
        gpu_nodes: Whether nodes with GPUs are among them.
    """
    path = Path.home() / CLUSTER_FILE
    if not (os.environ.get("RAY_ADDRESS") and path.is_file()):
        return 0
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    counts, left = [], config.get("max_workers", 0)
    kinds = config.get("available_node_types", {})
    of_head = kinds.get(config.get("head_node_type"), {}).get("resources", {}).get(resource, 0)
    for name, kind in kinds.items():
        if name != config.get("head_node_type") and (gpu_nodes or not kind.get("resources", {}).get("GPU")):
            counts += [kind.get("resources", {}).get(resource, 0)] * kind.get("max_workers", left)
    return int(of_head + sum(sorted(counts, reverse=True)[:left]))
