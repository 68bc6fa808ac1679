"""A look at what the model says while it trains: a few validation rows as prompt, reference and generated answer.

How they are generated stands in ``previews.yaml`` of the run folder, which is read again before each validation, so it
may be edited while the run goes on. Nothing of it reaches the model: sampling leaves the random state as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from voxray.batches.rank import Worker
from voxray.config.parse import Settings, read_yaml
from voxray.core.storage import write_atomically
from voxray.features.reader import Features
from voxray.generation.generate import generate_texts
from voxray.models.interface import FrontEnd
from voxray.training.engine import gather
from voxray.training.loop import TrainState
from voxray.training.validate import Validation, first_rows_per_task, gather_lists, in_eval_mode, shared_batches

PREVIEWS_YAML = "previews.yaml"
MAX_TOKENS = 8192
_TEMPLATE = """\
# How this run's previews are generated; read again before each validation, so edit it while the run goes on.
temperature: {temperature}  # 0 takes the most likely token each time; above it tokens are drawn, up to 5
top_p: {top_p}  # with a temperature: draw among the likeliest tokens that have this probability together, up to 1
max_new_tokens: {max_new_tokens}  # longest answer, in tokens
rows: {rows}  # validation rows shown of every task, the first ones; 0 shows none
"""


class PreviewSettings(Settings):
    """What ``previews.yaml`` holds."""

    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 256
    rows: Annotated[int, Field(ge=0, le=10_000)] = 2


@dataclass
class Previews:
    """The previews of a run.

    Attributes:
        path: The run's previews.yaml.
        say: Takes lines for people.
        settings: What was last read without a fault.
    """

    path: Path
    say: Callable[[str], None]
    settings: PreviewSettings = field(default_factory=PreviewSettings)
    _last_fault: str = ""

    @classmethod
    def of_run(cls, run_dir: Path, say: Callable[[str], None], first: PreviewSettings) -> "Previews":
        """Write ``first`` to the run folder if there is no previews.yaml yet. Only rank 0 calls this."""
        path = run_dir / PREVIEWS_YAML
        if not path.exists():
            write_atomically(path, _TEMPLATE.format(**first.model_dump()).encode())
        found = cls(path, say, first)
        found.read()
        return found

    def read(self) -> PreviewSettings:
        """Read the file again; a fault is told once, in one line, and leaves the last good values."""
        try:
            self.settings, fault = read_settings(self.path), ""
        except ValueError as error:
            fault = str(error)
        if fault and fault != self._last_fault:
            self.say(f"warning: {self.path}: {fault}; previews go on with {shown(self.settings)}")
        self._last_fault = fault
        return self.settings


def read_settings(path: Path) -> PreviewSettings:
    """Read a previews.yaml; a key that is not there has its first value.

    Raises:
        ValueError: It cannot be read or holds something else; one line, with the key where there is one.
    """
    try:
        loaded = read_yaml(path)
    except ValueError as error:
        raise ValueError(str(error)[:300]) from None
    for key, value in loaded.items():
        if isinstance(value, bool):
            raise ValueError(f"{key}: must be a number (got {value})")
    try:
        return PreviewSettings.model_validate({str(key): value for key, value in loaded.items()})
    except ValidationError as error:
        faults = (f"{item['loc'][0]}: {item['msg']} (got {item['input']!r})" for item in error.errors())
        raise ValueError("; ".join(faults)) from None


def shown(settings: PreviewSettings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.model_dump().items())


def agreed(previews: Previews | None, worker: Worker) -> PreviewSettings:
    """What rank 0 reads in the file, on every worker.

    Args:
        previews: On rank 0; None on the others.
    """
    found: Any = gather(previews.read() if previews else None, worker)
    return found[0]


def preview(
    how: PreviewSettings,
    trainee: TrainState,
    front_end: FrontEnd,
    features: Features,
    rows: np.ndarray,
    validation: Validation,
    *,
    step: int,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Show the first validation rows of every task. Every worker calls it.

    Args:
        rows: The validation rows.
        validation: What validating them gave, with answers of ``max_new_tokens`` at most; they are shown again where
            ``how`` asks for the same.
        seed: Of the run; with the step and the batch it decides what is drawn.
    Returns:
        One entry per row on rank 0, none on others: task, id, prompt, reference, prediction, and how it was generated.
    """
    wanted = first_rows_per_task(features, rows, how.rows) if how.rows else rows[:0]
    texts = validation.texts
    if how.temperature > 0 or how.max_new_tokens != max_new_tokens:
        mine = _generate(how, trainee, front_end, features, wanted, [seed, step], batch_size)
        texts = {row: text for part in gather_lists(mine, trainee.worker) for row, text in part}
    entries = []
    for row in map(int, wanted if trainee.worker.is_first else ()):
        stored = features.row(row)
        shown = {"task": stored.task, "id": stored.id, "prompt": stored.prompt, "reference": stored.answer}
        entries.append({**shown, "prediction": texts[row], **how.model_dump(exclude={"rows"})})
    return entries


def _generate(
    how: PreviewSettings,
    trainee: TrainState,
    front_end: FrontEnd,
    features: Features,
    rows: np.ndarray,
    seeds: list[int],
    batch_size: int,
) -> list[tuple[int, str]]:
    """(row number, answer) of this worker's share."""
    worker, found = trainee.worker, []
    options = how.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    devices = [worker.device] if worker.device.type == "cuda" else []
    with in_eval_mode(trainee.model), torch.random.fork_rng(devices):
        for batch in shared_batches(features, rows, batch_size, worker):
            seed = int(np.random.SeedSequence([*seeds, batch[0]]).generate_state(1)[0])
            stored = [features.row(number) for number in batch]
            texts = generate_texts(trainee.model, trainee.family, front_end, stored, seed=seed, **options)
            found += zip(batch, texts, strict=True)
    return found
