"""Previews of a run: prompt, reference and generated answer of a few validation rows.

``previews.yaml`` in the run folder holds the generation settings. It is read before each validation, so users may edit
it while the run trains. Previews do not affect training, because sampling restores the random state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from voxray.batches.rank import Worker
from voxray.config.parse import Settings
from voxray.core.storage import write_atomically
from voxray.core.yaml_file import read_yaml
from voxray.generation.generate import generate_texts
from voxray.training.engine import gather
from voxray.training.loop import TrainState
from voxray.training.validate import (
    Validation,
    ValidationRows,
    first_rows_per_task,
    gather_lists,
    in_eval_mode,
    shared_batches,
)

PREVIEWS_YAML = "previews.yaml"
MAX_TOKENS = 8192
_TEMPLATE = """\
# Generation settings of this run's previews. Read before each validation, so you may edit it while the run trains.
temperature: {temperature}  # 0 takes the most likely token each time; higher values, up to 5, sample
top_p: {top_p}  # sample among the most likely tokens with this total probability, up to 1
max_new_tokens: {max_new_tokens}  # maximum length of an answer, in tokens
rows: {rows}  # first validation rows of every task to show; 0 shows none
"""


class PreviewSettings(Settings):
    """Content of ``previews.yaml``."""

    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 256
    rows: Annotated[int, Field(ge=0, le=10_000)] = 2


@dataclass
class Previews:
    """The previews of a run.

    Attributes:
        path: The run's previews.yaml.
        say: Writes a log line.
        settings: The last valid content of the file.
    """

    path: Path
    say: Callable[[str], None]
    settings: PreviewSettings = field(default_factory=PreviewSettings)
    _last_fault: str = ""

    @classmethod
    def of_run(cls, run_dir: Path, say: Callable[[str], None], defaults: PreviewSettings) -> "Previews":
        """Write ``defaults`` to the run folder if it has no previews.yaml yet. Only rank 0 calls this."""
        path = run_dir / PREVIEWS_YAML
        if not path.exists():
            write_atomically(path, _TEMPLATE.format(**defaults.model_dump()).encode())
        previews = cls(path, say, defaults)
        previews.read()
        return previews

    def read(self) -> PreviewSettings:
        """Read the file again. An invalid file is reported once, and the last valid settings are used."""
        try:
            self.settings, fault = read_settings(self.path), ""
        except ValueError as error:
            fault = str(error)
        if fault and fault != self._last_fault:
            self.say(f"warning: {self.path}: {fault}; previews keep {format_settings(self.settings)}")
        self._last_fault = fault
        return self.settings


def read_settings(path: Path) -> PreviewSettings:
    """Read a previews.yaml. Missing keys have default values.

    Raises:
        ValueError: The file cannot be read or is invalid. The message is one line and names the key.
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


def format_settings(settings: PreviewSettings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.model_dump().items())


def read_on_all_workers(previews: Previews | None, worker: Worker) -> PreviewSettings:
    """Read the file on rank 0 and send the settings to every worker.

    Args:
        previews: The run's previews on rank 0; None on other ranks.
    """
    gathered: Any = gather(previews.read() if previews else None, worker)
    return gathered[0]


def preview(
    settings: PreviewSettings,
    state: TrainState,
    held_out: ValidationRows,
    validation: Validation,
    *,
    seeds: tuple[int, int],
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Show the first validation rows of every task. Every worker calls it.

    Args:
        validation: Result whose answers, of at most ``max_new_tokens`` tokens, are shown if ``settings`` are the same.
            Otherwise answers are generated again.
        seeds: Seed of the run, and step. Together with the batch they determine the samples.
    Returns:
        On rank 0, one entry per row: task, id, prompt, reference, prediction and generation settings. Empty on others.
    """
    features = held_out.features
    rows = first_rows_per_task(features, held_out.rows, settings.rows) if settings.rows else held_out.rows[:0]
    texts = validation.texts
    if settings.temperature > 0 or settings.max_new_tokens != max_new_tokens:
        local = _generate(settings, state, held_out, rows, seeds, batch_size)
        texts = {row: text for part in gather_lists(local, state.worker) for row, text in part}
    entries = []
    for number in map(int, rows if state.worker.is_first else ()):
        row = features.row(number)
        entry = {"task": row.task, "id": row.id, "prompt": row.prompt, "reference": row.answer}
        entries.append({**entry, "prediction": texts[number], **settings.model_dump(exclude={"rows"})})
    return entries


def _generate(
    settings: PreviewSettings,
    state: TrainState,
    held_out: ValidationRows,
    rows: np.ndarray,
    seeds: tuple[int, int],
    batch_size: int,
) -> list[tuple[int, str]]:
    """(row number, answer) of this worker's share of the rows."""
    worker, answers = state.worker, []
    options = settings.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    devices = [worker.device] if worker.device.type == "cuda" else []
    with in_eval_mode(state.model), torch.random.fork_rng(devices), state.engine.own_passes():
        for batch in shared_batches(held_out.features, rows, batch_size, worker):
            seed = int(np.random.SeedSequence([*seeds, batch[0]]).generate_state(1)[0])
            batch_rows = [held_out.features.row(number) for number in batch]
            texts = generate_texts(state.model, state.family, held_out.front_end, batch_rows, seed=seed, **options)
            answers += zip(batch, texts, strict=True)
    return answers
