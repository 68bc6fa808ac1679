"""Chooses the rows that a run trains on and validates with, and explains why others are left out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError
from voxray.core.languages import NO_LANGUAGE
from voxray.core.tasks import TASKS
from voxray.features.reader import Features, RowLengths
from voxray.features.shards import TASK_CODES
from voxray.models.front_end import FrontEnd
from voxray.recipes.stages import Stage
from voxray.training.validate import first_rows_per_task

NO_ANSWER = "the row has no answer to train on or to compare with"
EMPTY = "the transcript is empty; --allow_empty trains on such clips as silence"
DEBUG_ROWS, DEBUG_VALIDATION_ROWS = 8, 4

LostRow = tuple[Features, int, str, str]
"""A row that is left out: (features, row number, reason, message)."""
RowsT = TypeVar("RowsT", bound=RowLengths)


def choose_rows(
    stage: Stage,
    settings: TrainSettings,
    features: RowsT,
    held_out: RowsT,
    front_end: FrontEnd,
    divided: frozenset[str] = frozenset(),
) -> tuple[np.ndarray, np.ndarray, list[tuple[RowsT, int, str, str]]]:
    """Choose rows by task, by length and by the requirements of the family.

    Args:
        features: Training rows.
        held_out: Validation rows.
        divided: Sources of rows that were divided (see ``TrainingData``).
    Returns:
        Row numbers for training, row numbers for validation, and the rows that are left out.
    Raises:
        RunError: No row is left to train on.
    """
    lost: list[tuple[RowsT, int, str, str]] = []
    chosen = []
    for part in (features, held_out):
        rows, lost_of_part = _usable_rows(stage, settings, part, front_end, divided)
        rows, unlabelled = _split_off_empty(part, rows, front_end, transcripts=False)
        lost_of_part += [(part, row, "unlabelled", NO_ANSWER) for row in unlabelled]
        if part is features and not settings.allow_empty:
            rows, empty = _split_off_empty(part, rows, front_end, transcripts=True)
            lost_of_part += [(part, row, "empty_text", EMPTY) for row in empty]
        chosen.append(rows)
        lost += lost_of_part
    rows, held_out_rows = chosen
    limit = DEBUG_VALIDATION_ROWS if settings.debug else settings.eval_max_rows
    held_out_rows = first_rows_per_task(held_out, held_out_rows, limit)
    if settings.debug:
        parts = (rows[rows < features.first_replay], rows[rows >= features.first_replay])
        rows = np.concatenate([first_rows_per_task(features, part, DEBUG_ROWS) for part in parts])
    if not len(rows):
        reasons = [(reason, message) for part, _, reason, message in lost if part is features]
        raise RunError(f"--train_jsonl: {_why_no_row(stage, settings, features, reasons)}")
    if settings.replay_jsonl and rows[-1] < features.first_replay:
        raise RunError("--replay_jsonl: no row is left to train on")
    return rows, held_out_rows, lost


def _usable_rows(
    stage: Stage, settings: TrainSettings, part: RowsT, front_end: FrontEnd, divided: frozenset[str]
) -> tuple[np.ndarray, list[tuple[RowsT, int, str, str]]]:
    max_len = min(settings.max_len, front_end.max_positions)
    rows, too_long = part.within(max_len)
    of_stage = np.isin(part.task, [TASK_CODES[name] for name in stage.tasks])
    too_long = too_long[of_stage[too_long]]
    limit = f"tokens, over --max_len {max_len}"
    lost = [(part, int(row), "too_long", f"{part.longest_tokens[row]} {limit}") for row in too_long]
    others = np.flatnonzero(~of_stage)
    others = others[np.unique(part.sample[others], return_index=True)[1]]  # one variant of every clip
    names = {code: name for name, code in TASK_CODES.items()}
    message = f"this job trains on {', '.join(stage.tasks)} rows"
    lost += [(part, int(row), "other_task", f"{names[int(part.task[row])]}: {message}") for row in others]
    rows = rows[of_stage[rows]] if len(others) else rows
    unfit = list(_unfit_rows(part, rows, front_end, divided))
    lost += [(part, row, reason, message) for row, reason, message in unfit if reason]
    return rows[~np.isin(rows, [row for row, *_ in unfit])], lost


def _split_off_empty(
    part: RowLengths, rows: np.ndarray, front_end: FrontEnd, *, transcripts: bool
) -> tuple[np.ndarray, list[int]]:
    """Divide rows into those with an answer, and one row of every clip without one.

    Args:
        transcripts: Divide rows of tasks that allow an empty answer (silence); else rows of the other tasks.
    """
    codes = [TASK_CODES[name] for name, task in TASKS.items() if task.allows_empty_answer == transcripts]
    is_empty = np.isin(part.task[rows], codes) & (part.num_target_tokens[rows] <= len(front_end.target_ids("")))
    empty = rows[is_empty]
    return rows[~is_empty], empty[np.unique(part.sample[empty], return_index=True)[1]].tolist()


def _unfit_rows(
    part: RowLengths, rows: np.ndarray, front_end: FrontEnd, divided: frozenset[str]
) -> Iterator[tuple[int, str, str]]:
    """Rows within the token limit that the family cannot be trained on, as (row, reason, message).

    The reason is empty for a row whose parts are rows of another set, because nothing of it is lost.
    """
    window_sec = front_end.window_frames * HOP_SAMPLES / front_end.sample_rate_hz
    for row in rows[part.num_windows[rows] > (front_end.max_windows or np.inf)].tolist():
        seconds = part.num_samples[row] / front_end.sample_rate_hz
        message = (
            f"{seconds:.1f} s, and the model is trained on {window_sec * (front_end.max_windows or 1):g} s at most;"
            " give the row segments ({start, end, text}) at which to divide it"
        )
        yield row, "" if part.source(row) in divided else "audio_too_long", message
    if front_end.needs_language:
        for row in rows[~part.has_language[rows]].tolist():
            yield row, "no_language", NO_LANGUAGE


def _why_no_row(stage: Stage, settings: TrainSettings, features: RowLengths, lost: Sequence[tuple[str, str]]) -> str:
    """Why there is no row to train on.

    Args:
        lost: (reason, message) of every training row that is left out.
    """
    counts = Counter(reason for reason, _ in lost if reason != "other_task")
    if set(counts) - {"too_long"}:
        [(worst, _)] = counts.most_common(1)
        numbers = ", ".join(f"{reason} {num_rows}" for reason, num_rows in counts.most_common())
        return f"no row is left ({numbers}): {next(message for reason, message in lost if reason == worst)}"
    if np.isin(features.task, [TASK_CODES[name] for name in stage.tasks]).any() or len(stage.tasks) == len(TASKS):
        return f"no row is within --max_len {settings.max_len} tokens"
    keys = "; ".join(f"{name}: {', '.join(TASKS[name].keys)}" for name in stage.tasks)
    return f"holds no row of the task that this job trains on ({keys})"


def count_lost(stage: Stage, lost: Sequence[LostRow]) -> str:
    """A log line on the rows of other tasks that are left out; "" if there are none."""
    num_others = sum(reason == "other_task" for _, _, reason, _ in lost)
    tasks = ", ".join(stage.tasks)
    return f"left out: {num_others} rows of other tasks than {tasks}, listed in quarantine.jsonl" if num_others else ""
