"""Checkpoints: everything a run needs to go on, independent of the number of workers.

A checkpoint is a folder ``checkpoints/step-000200`` with the adapter in PEFT's format (so it serves for inference as
it is), the optimizer's moments and the step. Since the data order and all randomness follow from (seed, step, pack),
there is nothing else to keep. It is written under another name and renamed when complete.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxray.errors import RunError
from voxray.models.lora import load_adapter_weights, save_adapter, trainable_parameters

KEPT = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        packs_per_step: Forward passes per step over all workers, fixed when the run starts.
        data: Fingerprint of the training features.
        guard: State of the ``Guard``: the loss scale and what was skipped.
    """

    step: int
    packs_per_step: int
    data: str
    guard: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(run_dir: Path, model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a checkpoint and drop all but the newest few. Only rank 0 calls this."""
    final = run_dir / "checkpoints" / f"step-{progress.step:06d}"
    partial = final.with_name(f".{final.name}.part")
    for leftover in (partial, final):
        shutil.rmtree(leftover, ignore_errors=True)
    save_adapter(model, partial)
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in trainable_parameters(model)]
    torch.save({names[number]: entry for number, entry in state.items()}, partial / "optimizer.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
    for path in partial.iterdir():
        _flush_to_disk(path)
    os.replace(partial, final)
    for _, old in list_checkpoints(run_dir)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / "progress.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def read_progress(folder: Path) -> Progress:
    """Read where a checkpoint stands.

    Raises:
        RunError: The file is damaged.
    """
    try:
        return Progress(**json.loads((folder / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{folder / 'progress.json'}: damaged checkpoint ({error}); delete the folder to go on"
        ) from None


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and moments into the model and its optimizer.

    Raises:
        RunError: A file is missing or damaged, or it belongs to another model or optimizer.
    """
    load_adapter_weights(model, folder)
    try:
        stored = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except Exception:  # unpickling a damaged file raises almost anything, none of it fit for people
        raise RunError(f"{folder}: damaged checkpoint (optimizer.pt); delete the folder to go on") from None
    names = [name for name, _ in trainable_parameters(model)]
    if set(stored) != set(names):
        raise RunError(f"{folder / 'optimizer.pt'}: moments of other parameters than the model's")
    state = {number: stored[name] for number, name in enumerate(names)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
