"""Programs that show the records of a run: TensorBoard, Weights & Biases, MLflow (``--report_to``).

Only rank 0 opens them. metrics.jsonl is written in any case and is the record that voxray itself reads.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from voxray.core.errors import library_errors
from voxray.core.storage import write_atomically

WANDB_FILE, MLFLOW_FILE = "wandb.json", "mlflow.json"
"""Ids of the run in these programs, with which a resumed run continues them."""


class Tracker(Protocol):
    """Shows the records of one run.

    Attributes:
        place: Where the run can be seen: an address, or the command that shows or uploads it.
    """

    place: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show values by name, such as ``train/loss``."""
        ...

    def log_text(self, name: str, markdown: str, step: int) -> None:
        """Show a text, such as a table of previews."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder.

    Args:
        first_step: Steps done so far; TensorBoard hides what an interrupted run wrote about later ones.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place = f"tensorboard --logdir {run_dir / 'tensorboard'}"
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, name: str, markdown: str, step: int) -> None:
        self._writer.add_text(name, markdown, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the project of WANDB_PROJECT or ``voxray``. WANDB_MODE=offline needs no network."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        wandb: Any = import_module("wandb")
        known = _read(run_dir / WANDB_FILE)
        with library_errors("--report_to wandb"):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "voxray"),
                name=os.environ.get("WANDB_NAME") or run_dir.name,
                id=known.get("id"),
                resume="allow",
                dir=str(run_dir),
                config=dict(settings),
                settings=wandb.Settings(silent=True),
            )
        # a resumed run repeats steps, which W&B's own counter refuses
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.place = f"Weights & Biases: {self._run.url or f'wandb sync {Path(self._run.dir).parent}'}"
        write_atomically(run_dir / WANDB_FILE, json.dumps({"id": self._run.id}).encode())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def log_text(self, name: str, markdown: str, step: int) -> None:
        wandb: Any = import_module("wandb")
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
        self._run.log({name: wandb.Table(columns=header, data=rows), "step": step})

    def close(self) -> None:
        self._run.finish()


class MlFlow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in ``mlflow.db`` and ``mlflow/`` of the run folder."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        mlflow: Any = import_module("mlflow")
        uri, texts = os.environ.get("MLFLOW_TRACKING_URI", ""), None
        if not uri:
            uri, texts = f"sqlite:///{run_dir / 'mlflow.db'}", (run_dir / "mlflow").as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "voxray")
        with library_errors("--report_to mlflow"):
            self._client = mlflow.MlflowClient(uri)
            known = _read(run_dir / MLFLOW_FILE)
            if known.get("uri") == uri:
                self._run_id = known["id"]
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                experiment = self._client.get_experiment_by_name(name)
                experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name, texts)
                self._run_id = self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id
                for key, value in settings.items():
                    self._client.log_param(self._run_id, key, value)
        self.place = f"MLflow: run {self._run_id} of {uri.rpartition('@')[2]}"  # without a user's password
        write_atomically(run_dir / MLFLOW_FILE, json.dumps({"id": self._run_id, "uri": uri}).encode())

    def log(self, values: Mapping[str, float], step: int) -> None:
        entities: Any = import_module("mlflow.entities")
        now_ms = time.time_ns() // 1_000_000
        metrics = [entities.Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_text(self, name: str, markdown: str, step: int) -> None:
        self._client.log_text(self._run_id, markdown, f"{name}/step-{step:06d}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MlFlow,
}


def open_trackers(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """Open the programs of ``--report_to``.

    Args:
        settings: Settings of the run, for programs that show them.
        first_step: Steps done so far.
    Raises:
        RunError: A program cannot be reached or refuses the run.
    """
    return [TRACKERS[name](run_dir, settings, first_step) for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
