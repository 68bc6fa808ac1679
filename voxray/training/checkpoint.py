"""Checkpoints hold everything that a run needs to resume, on any number of workers.

A checkpoint is a folder ``checkpoints/step-000200`` with the adapter in PEFT's format (inference can load it as it is),
the optimizer state, and the progress of the run. Nothing else needs to be stored, because the data order and all
randomness follow from (seed, step, microbatch).

A thread writes the folder under a temporary name while the next step is computed, and renames it when it is complete.
Training waits for the thread after that step, so a kill costs at most ``save_steps`` steps.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxray.core.content_hash import CHECKSUMS, write_checksums
from voxray.core.errors import RunError, one_line
from voxray.models.adapters.lora import save_adapter
from voxray.models.adapters.read_files import check_finite
from voxray.runs.layout import (
    CARD,
    CHECKPOINTS_FOLDER,
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    checkpoint_folder,
    list_checkpoints,
)
from voxray.training.engine import CheckpointState, OptimizerState

STORED_NAMES = {"microbatches_per_step": "packs_per_step", "loss_scaler": "guard", "best": "selection"}
"""Fields of ``Progress`` with another name in ``progress.json``. All versions of the file have these names."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run, stored in ``progress.json``.

    Attributes:
        step: Optimizer steps done.
        microbatches_per_step: Forward passes per step over all workers, fixed when the run starts.
        data: Fingerprint of the training features.
        prompts: Fingerprint of the prompts that are sampled for them; "" if prompts are not sampled.
        loss_scaler: State of the ``LossScaler``.
        best: State of the ``BestCheckpoint``.
    """

    step: int
    microbatches_per_step: int
    data: str
    prompts: str = ""
    loss_scaler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and deletes old ones. Only rank 0 has one.

    Args:
        run_dir: The run folder.
        keep_last: Number of the newest checkpoints to keep.
        on_saved: Called in the background after each checkpoint.
    """

    def __init__(self, run_dir: Path, keep_last: int, on_saved: Callable[[], None] = lambda: None) -> None:
        self._run_dir, self._keep_last, self._on_saved = run_dir, keep_last, on_saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for leftover in (run_dir / CHECKPOINTS_FOLDER).glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)

    def write(self, model: Any, state: CheckpointState, progress: Progress, best_step: int | None) -> None:
        """Start writing a checkpoint, once the previous one is complete.

        Args:
            model: Model with the configuration of the adapter.
            best_step: Step of a checkpoint that is kept regardless of its age.
        Raises:
            RunError: The previous checkpoint could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, model, state, progress, best_step)

    def wait(self) -> None:
        """Wait until the checkpoint is on disk.

        Raises:
            RunError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait for the thread and end it. An error of the thread is not raised, because another one is being raised."""
        self._thread.shutdown()

    def _write(self, model: Any, state: CheckpointState, progress: Progress, best_step: int | None) -> None:
        final = checkpoint_folder(self._run_dir, progress.step)
        partial = final.with_name(f".{final.name}.part")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(model, partial, state.tensors)
            torch.save(state.optimizer_state, partial / OPTIMIZER_FILE)
            write_progress(partial, progress)
            write_checksums(partial)
            for path in partial.iterdir():
                _flush_to_disk(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _flush_to_disk(final.parent)
        except Exception as error:  # a full disk raises different types in safetensors, PyTorch and Python
            shutil.rmtree(partial, ignore_errors=True)
            reason = one_line(error, 200)
            raise RunError(f"{final}: cannot write the checkpoint: {reason}; {_resume_hint(self._run_dir)}") from None
        for step, folder in list_checkpoints(self._run_dir)[: -self._keep_last]:
            if step != best_step:
                shutil.rmtree(folder, ignore_errors=True)
        self._on_saved()


def _resume_hint(run_dir: Path) -> str:
    checkpoints = list_checkpoints(run_dir)
    return f"the same command resumes from step {checkpoints[-1][0]}" if checkpoints else "there is no earlier one"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_progress(folder: Path, progress: Progress) -> None:
    """Write ``progress.json``."""
    stored = {STORED_NAMES.get(name, name): value for name, value in asdict(progress).items()}
    (folder / PROGRESS_FILE).write_text(json.dumps(stored, indent=1))


def read_progress(folder: Path) -> Progress:
    """Read the ``progress.json`` of a checkpoint.

    Raises:
        RunError: The file is damaged.
    """
    try:
        stored: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
        names = {stored_name: name for name, stored_name in STORED_NAMES.items()}
        return Progress(**{names.get(name, name): value for name, value in stored.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / PROGRESS_FILE}: damaged checkpoint ({error}); delete its folder to resume") from None


def read_optimizer_state(folder: Path) -> OptimizerState:
    """Read the optimizer state of a checkpoint.

    Raises:
        RunError: The file is missing or damaged, or has values that are not finite.
    """
    try:
        state: OptimizerState = torch.load(folder / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
    except Exception:  # unpickling a damaged file can raise almost any type, with a message that helps nobody
        raise RunError(f"{folder}: damaged checkpoint ({OPTIMIZER_FILE}); delete the folder to resume") from None
    for name, tensors in state.items():
        check_finite({f"{name} ({part})": tensor for part, tensor in tensors.items()}, folder / OPTIMIZER_FILE)
    return state


def publish_adapter(checkpoint: Path, folder: Path, card: str = "") -> None:
    """Copy a checkpoint's adapter to ``folder``, which is replaced atomically.

    Args:
        card: Text of its model card; empty for none.
    """
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name not in {OPTIMIZER_FILE, PROGRESS_FILE, CHECKSUMS}:
            shutil.copyfile(path, partial / path.name)
            _flush_to_disk(partial / path.name)
    if card:
        (partial / CARD).write_text(card, encoding="utf-8")
        _flush_to_disk(partial / CARD)
    write_checksums(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
