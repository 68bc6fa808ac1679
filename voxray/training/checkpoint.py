"""Checkpoints: everything a run needs to go on, independent of the number of workers.

A checkpoint is a folder ``checkpoints/step-000200`` with the adapter in PEFT's format (so it serves for inference as
it is), the optimizer's moments and where the run stands. Since the data order and all randomness follow from (seed,
step, pack), there is nothing else to keep. It is written under another name and renamed when complete, in the
background while the next step is computed; only then does training wait for it, so that a kill costs at most
``save_steps`` steps.
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

from voxray.core.errors import RunError, one_line
from voxray.models.adapters.lora import save_adapter
from voxray.runs.layout import CHECKPOINTS_FOLDER, OPTIMIZER_FILE, PROGRESS_FILE, checkpoint_folder, list_checkpoints
from voxray.training.engine import CheckpointState

STORED_NAMES = {"microbatches_per_step": "packs_per_step"}
"""Fields of ``Progress`` that have another name in ``progress.json``."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        microbatches_per_step: Forward passes per step over all workers, fixed when the run starts.
        data: Fingerprint of the training features.
        prompts: That of the prompts that are drawn for them, "" without any.
        guard: State of the ``Guard``: the loss scale and what was skipped.
        selection: State of the ``Selection``: what the validations found.
    """

    step: int
    microbatches_per_step: int
    data: str
    prompts: str = ""
    guard: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and drops old ones. Only rank 0 has one.

    Args:
        run_dir: The run folder.
        kept: How many of the newest checkpoints stay.
        after: Called in the background after each of them.
    """

    def __init__(self, run_dir: Path, kept: int, after: Callable[[], None] = lambda: None) -> None:
        self._run_dir, self._kept, self._after = run_dir, kept, after
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        for leftover in (run_dir / CHECKPOINTS_FOLDER).glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)

    def write(self, model: Any, state: CheckpointState, progress: Progress, best_step: int | None) -> None:
        """Begin to write a checkpoint, after the one before it is done.

        Args:
            model: Gives the adapter's configuration.
            best_step: Step of a checkpoint that stays however old it is.
        Raises:
            RunError: The one before it could not be written.
        """
        self.wait()
        self._under_way = self._thread.submit(self._write, model, state, progress, best_step)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunError: It could not be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()

    def close(self) -> None:
        """Wait, and end the thread; an error that was not asked for yet is dropped, another one is on its way."""
        self._thread.shutdown()

    def _write(self, model: Any, state: CheckpointState, progress: Progress, best_step: int | None) -> None:
        final = checkpoint_folder(self._run_dir, progress.step)
        partial = final.with_name(f".{final.name}.part")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(model, partial, state.tensors)
            torch.save(state.moments, partial / OPTIMIZER_FILE)
            write_progress(partial, progress)
            for path in partial.iterdir():
                _flush_to_disk(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _flush_to_disk(final.parent)
        except Exception as error:  # a full disk has another type in safetensors, in PyTorch and in Python
            shutil.rmtree(partial, ignore_errors=True)
            reason = one_line(error, 200)
            raise RunError(f"{final}: cannot write the checkpoint: {reason}; {_left(self._run_dir)}") from None
        for step, old in list_checkpoints(self._run_dir)[: -self._kept]:
            if step != best_step:
                shutil.rmtree(old, ignore_errors=True)
        self._after()


def _left(run_dir: Path) -> str:
    steps = [step for step, _ in list_checkpoints(run_dir)]
    return f"the same command goes on from step {steps[-1]}" if steps else "there is no earlier one"


def _flush_to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_progress(folder: Path, progress: Progress) -> None:
    """Write ``progress.json``, with the names that all versions of the file have."""
    stored = {STORED_NAMES.get(name, name): value for name, value in asdict(progress).items()}
    (folder / PROGRESS_FILE).write_text(json.dumps(stored, indent=1))


def read_progress(folder: Path) -> Progress:
    """Read where a checkpoint stands.

    Raises:
        RunError: The file is damaged.
    """
    try:
        stored: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
        names = {stored_name: name for name, stored_name in STORED_NAMES.items()}
        return Progress(**{names.get(name, name): value for name, value in stored.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / PROGRESS_FILE}: damaged checkpoint ({error}); delete the folder to go on") from None


def read_optimizer_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the optimizer's moments of a checkpoint.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return torch.load(folder / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
    except Exception:  # unpickling a damaged file raises almost anything, none of it fit for people
        raise RunError(f"{folder}: damaged checkpoint ({OPTIMIZER_FILE}); delete the folder to go on") from None


def publish_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's adapter to where the run's result belongs, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name not in {OPTIMIZER_FILE, PROGRESS_FILE}:
            shutil.copyfile(path, partial / path.name)
            _flush_to_disk(partial / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
