"""Starts Ray on this machine or connects to a cluster, and reports the resources of the cluster."""

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError, one_line
from voxray.core.tasks import VARIABLE, own_definitions

RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray fetches reports at this interval; the default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # autoscaled nodes take minutes to start
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train page shows the run
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints a box of text even in silent mode
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep like every other job
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first validation
}


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
MAXIMUM = {"CPU": "VOXRAY_MAX_CPUS", "GPU": "VOXRAY_MAX_GPUS"}
"""Environment variables for a cluster whose autoscaler does not tell drivers its limits, as that of KubeRay: CPUs of
all nodes without GPUs, and GPUs, when the cluster is at its largest."""
GPUS_WITH_BFLOAT16 = re.compile(r"(A|L|H|B|GH|GB|RTX-A)\d.*|RTX-(30[5-9]|40[5-9]|50[5-9])0.*")
"""Ray's names of NVIDIA's GPUs from Ampere on. Others, such as RTX-6000, may be of an older generation."""
CONNECT_SEC = 20.0
RETRY_AFTER_SEC = (5.0, 20.0, 60.0)
"""Waits between the attempts to start Ray on a machine that is busy. Ray itself gives up after 30 s."""


@contextmanager
def ray_session(log_path: Path, num_processes: int = 1) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS (Ray sets it in submitted jobs), or start Ray here and stop it afterwards.

    Args:
        log_path: File for Ray's own messages.
        num_processes: Processes that will run at a time. If Ray is started here, it gets one CPU more than that, and at
            least as many as the machine has, because Ray Data hangs when training holds every CPU.
    Raises:
        RunError: Ray cannot be started or reached, or runs already and its processes know other tasks.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _require_same_tasks()
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        _connect()
    else:
        _start(max(os.cpu_count() or 1, num_processes + 1))
    _quiet_loggers(log_path)
    try:
        with stderr_to(log_path), term_is_interrupt():
            yield
            ray.shutdown()
    finally:
        ray.shutdown()


def is_connected() -> bool:
    """Whether this process is connected to Ray, on this machine or on a cluster."""
    import ray

    return ray.is_initialized()


def dashboard_line() -> str:
    """Where the dashboard of this Ray is and how to log in; "" if it has none."""
    import ray
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url() if ray.is_initialized() else ""
    login = "; it asks for the token in ~/.ray/auth_token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"Ray's dashboard: http://{url}{login}" if url else ""


def _connect() -> None:
    """Connect to the cluster at RAY_ADDRESS."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():  # else it is a word such as "auto"
            socket.create_connection((host, int(port)), timeout=CONNECT_SEC).close()
        options: dict[str, Any] = {"runtime_env": _environment()} if own_definitions() else {}
        ray.init(**QUIET, **options)
    except OSError as error:
        raise RunError(f"RAY_ADDRESS {address}: no cluster answers there: {one_line(error, 200)}") from None
    except Exception as error:  # Ray raises many types here, none of them because of a setting
        raise RunError(f"RAY_ADDRESS {address}: Ray could not be reached: {one_line(error, 300)}") from error


def set_address() -> None:
    """Tell the libraries of a Ray worker process the address of its Ray. With several on a machine they cannot find it.

    Ray Train needs it to free what a killed training reserved, such as a trial that a sweep stops.
    """
    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


LOCAL: dict[str, Any] = {**QUIET, "address": "local", "runtime_env": {"worker_process_setup_hook": set_address}}
"""Arguments of ``ray.init`` that start Ray on this machine."""


def _environment() -> dict[str, Any]:
    """The part of the runtime environment that makes the job's own tasks known to all of its processes."""
    definitions = own_definitions()
    return {"env_vars": {VARIABLE: json.dumps(definitions)}} if definitions else {}


def _require_same_tasks() -> None:
    """Check that the Ray of this process was started with the job's own tasks.

    Raises:
        RunError: It was not.
    """
    import ray

    definitions = own_definitions()
    variables = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    if variables.get(VARIABLE, "{}") != json.dumps(definitions):
        raise RunError("--tasks_file: Ray was started in this process with other tasks; call ray.shutdown() first")


def _start(num_cpus: int) -> None:
    """Start Ray on this machine. A start that takes too long, because the machine is busy, is tried again."""
    import ray

    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, exist_ok=True)
    for wait_sec in (*RETRY_AFTER_SEC, 0.0):
        try:
            ray.init(num_cpus=num_cpus, **{**LOCAL, "runtime_env": {**LOCAL["runtime_env"], **_environment()}})
            break
        except Exception as error:  # as above
            message = one_line(error, 300)
            if "AF_UNIX path" in message:
                flag = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
                folder = os.environ.get(flag, "")
                raise RunError(f"{flag} {folder}: too long for Ray's sockets; set {flag} to a short path") from None
            if "timed out during startup" not in message or not wait_sec:
                raise RunError(f"Ray could not be started: {message}") from error
            console.print(f"Ray did not start in time: this machine is busy; next attempt in {wait_sec:.0f} s")
            ray.shutdown()
            time.sleep(wait_sec)
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)  # whoever can read it can run code on the cluster


@contextmanager
def stderr_to(log_path: Path) -> Iterator[None]:
    """Redirect the stderr of C++ code in this process to a file. Python's own stderr stays on the terminal."""
    sys.stderr.flush()
    terminal, log = os.dup(2), os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    python_stderr = sys.stderr
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def term_is_interrupt() -> Iterator[None]:
    """Make SIGTERM end a job like Ctrl-C. Ray's own handler ends the driver without a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _quiet_loggers(log_path: Path) -> None:
    """Redirect the messages of Ray's Python code from the terminal to a file.

    Ray prints errors of other processes, such as a worker that was killed, even without ``log_to_driver``, and has no
    setting for them. The jobs say by themselves what failed.
    """
    import ray
    from ray._private import worker

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    handler = logging.FileHandler(log_path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logger = logging.getLogger(name)
        for existing in list(logger.handlers):
            if isinstance(existing, logging.StreamHandler) and not isinstance(existing, logging.FileHandler):
                logger.removeHandler(existing)
    logger = logging.getLogger("ray")
    logger.addHandler(handler)
    worker.print_to_stdstream = lambda data, ignore_prefix: [logger.info(line) for line in data["lines"]]
    logger.setLevel(logging.INFO)
    logger.propagate = False


CLUSTER_FILE = "ray_bootstrap_config.yaml"
"""Copy of cluster.yaml that ``ray up`` writes to the home folder of the head. It has the maximum numbers of nodes."""


def max_resource(resource: str) -> int:
    """Number of CPUs or GPUs (``CPU``, ``GPU``) of the cluster, including nodes that its autoscaler may still start."""
    import ray
    from ray._private.state import state

    present = ray.cluster_resources().get(resource, 0)
    reported = state.get_max_resources_from_cluster_config() or {}  # Anyscale reports them, open-source Ray does not
    return int(max(present, reported.get(resource, 0), _autoscaled(resource), _stated(resource)))


def _stated(resource: str) -> int:
    """The maximum that the environment states; 0 if it does not.

    Raises:
        SettingsError: The variable is not a whole number.
    """
    value = os.environ.get(MAXIMUM[resource], "0")
    if not value.isdecimal():
        raise SettingsError(f"{MAXIMUM[resource]} {value}: must be a whole number")
    return int(value)


def maximum_hint() -> str:
    """End of a message on KubeRay, which may start more nodes but does not tell how many; "" elsewhere."""
    missing = [name for name in MAXIMUM.values() if name not in os.environ]
    is_kuberay = os.environ.get("RAY_USAGE_STATS_KUBERAY_IN_USE") == "1"
    return f"; set {' and '.join(missing)} to what all groups have at maxReplicas" if is_kuberay and missing else ""


def max_gpus() -> int:
    """Number of GPUs of the cluster, including nodes that its autoscaler may still start."""
    return max_resource("GPU")


def cluster_has_bfloat16() -> bool:
    """Whether the cluster at RAY_ADDRESS has GPUs now, and all of their types compute in bfloat16.

    Raises:
        RunError: The cluster cannot be reached.
    """
    import ray

    with nullcontext() if ray.is_initialized() else ray_session(Path(os.devnull)):
        resources = ray.cluster_resources()
    types = {name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")}
    return bool(resources.get("GPU") and types) and all(map(GPUS_WITH_BFLOAT16.fullmatch, types))


def cpus_for_data() -> int:
    """Number of CPUs for tasks without a GPU: all CPUs of the cluster, and those of nodes that may still be started.

    Nodes with GPUs that have not been started do not count, because they are too expensive to start for their CPUs.
    """
    import ray

    return int(max(ray.cluster_resources().get("CPU", 0), _autoscaled("CPU", gpu_nodes=False), _stated("CPU")))


def cluster_resources(log_path: Path) -> dict[str, int] | None:
    """CPUs and GPUs of the cluster at RAY_ADDRESS, with those that it can still start; None without RAY_ADDRESS.

    Raises:
        RunError: The cluster cannot be reached.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    with ray_session(log_path):
        return {resource: max_resource(resource) for resource in MAXIMUM}


def _autoscaled(resource: str, *, gpu_nodes: bool = True) -> int:
    """Total of a resource once the autoscaler of this head has started as many nodes as it may.

    Args:
        gpu_nodes: Whether to count nodes with GPUs.
    """
    path = Path.home() / CLUSTER_FILE
    if not (os.environ.get("RAY_ADDRESS") and path.is_file()):
        return 0
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    node_types, max_workers = config.get("available_node_types", {}), config.get("max_workers", 0)
    resources = {name: node_type.get("resources", {}) for name, node_type in node_types.items()}
    head = config.get("head_node_type")
    counts = []  # of every node that may be started
    for name, node_type in node_types.items():
        if name != head and (gpu_nodes or not resources[name].get("GPU")):
            counts += [resources[name].get(resource, 0)] * node_type.get("max_workers", max_workers)
    return int(resources.get(head, {}).get(resource, 0) + sum(sorted(counts, reverse=True)[:max_workers]))
