"""The plan: which rows make up which optimizer step.

A pure function of (tasks and lengths of the rows, task weights, curriculum, seed, batching, step). It knows nothing of
workers: a step is a list of microbatches, and microbatch i belongs to rank i mod world size. So any number of workers
sees the same global sequence, and a run can resume from a step number alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from voxray.batches.packing import Batching, Microbatches, make_microbatches
from voxray.core.errors import SettingsError
from voxray.core.tasks import TASKS

REPLAY = "replay"
"""Name under which the plan counts replayed rows, as if they were a task."""
ORDER_STREAM, VARIANT_STREAM, MICROBATCH_STREAM, REPLAY_STREAM = 3, 4, 5, 1 << 20
"""Random streams of an epoch. Each task draws its rows from a stream of its own (see ``_stream``)."""


def _stream(code: int) -> int:
    """Random stream of a task: its code for the first three tasks, then the numbers after the streams above.

    Adding a task to the table changes no other task's stream.
    """
    return code if code < ORDER_STREAM else code + MICROBATCH_STREAM + 1 - ORDER_STREAM


@dataclass(frozen=True)
class Microbatch:
    """The rows of one forward and backward pass of one worker.

    Attributes:
        number: Position within its step.
        rows: Row numbers.
        is_filler: Whether its loss has weight 0. Fillers complete the last step of an epoch, and give every rank the
            same number of passes.
    """

    number: int
    rows: np.ndarray
    is_filler: bool = False


class Variants:
    """The usable variants of every sample, and the draw of one of them per epoch.

    Args:
        rows: Row numbers, ascending; variants of a sample are neighbours.
        sample: Sample number of every row.
        seed: Seed of the draws.
    Attributes:
        first: Row number of every sample's first usable variant. It represents the sample in the plan.
    """

    def __init__(self, rows: np.ndarray, sample: np.ndarray, seed: int) -> None:
        is_first = np.append(True, np.diff(sample) > 0)[: len(sample)]
        self._start = None if is_first.all() else np.flatnonzero(is_first)
        self._rows, self._seed, self.first = rows, seed, rows if self._start is None else rows[self._start]

    def first_variants(self, rows: np.ndarray) -> np.ndarray:
        """Map each row to the first variant of its sample."""
        return self.first[np.searchsorted(self.first, rows, side="right") - 1]

    def draw(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Replace first variants by the variants that an epoch uses, drawn by (seed, epoch, sample)."""
        if self._start is None:
            return rows
        drawn = np.random.default_rng([self._seed, epoch, VARIANT_STREAM]).random(len(self.first))
        counts = np.diff(self._start, append=len(self._rows))
        indices = self._start + (drawn * counts).astype(np.int64)
        return self._rows[indices[np.searchsorted(self.first, rows)]]


@dataclass(frozen=True)
class Phase:
    """A part of a curriculum.

    Attributes:
        tasks: Names of the tasks that are drawn.
        epochs: Number of epochs that it lasts.
    """

    tasks: tuple[str, ...]
    epochs: int


@dataclass
class Plan:
    """The global sequence of microbatches of a run.

    Args:
        task: Task code of every usable row (its index in ``TASKS``).
        rows: Row number of every entry of ``task``; with variants, the first one of every sample.
        weights: {task name: relative share of the draws}; None draws every row once per epoch. With weights an epoch
            has as many draws as there are rows. Each task draws from permutations of its own rows, and the next epoch
            continues where the last one ended.
        seed: Seed of all permutations.
        batching: How rows are grouped into microbatches.
        microbatches_per_step: Forward passes of an optimizer step, over all workers.
        drop_last: Drop the microbatches that do not fill an epoch's last step; otherwise that step is smaller.
        variants: Variants that may be drawn instead of ``rows``.
        num_tokens: Tokens by row number; optional for ``fixed`` batching.
        curriculum: Phases; an epoch draws from the rows of its phase's tasks, and the last phase has no end.
            Without phases every epoch draws from all tasks.
        is_replay: Whether an entry of ``rows`` is replayed; None if none is.
        replay_share: Share of the draws that are replayed rows, whatever their task. They come in addition to those of
            the other rows.
    Raises:
        SettingsError: A task with a positive weight or in the curriculum has no rows, or not even one step can be
            filled.
    """

    task: np.ndarray
    rows: np.ndarray
    weights: Mapping[str, float] | None
    seed: int
    batching: Batching
    microbatches_per_step: int
    drop_last: bool = False
    variants: Variants | None = None
    num_tokens: np.ndarray | None = None
    curriculum: Sequence[Phase] = ()
    is_replay: np.ndarray | None = None
    replay_share: float = 0.0
    _microbatches: dict[int, Microbatches] = field(default_factory=dict, init=False, repr=False)  # by epoch
    _ends: list[int] = field(default_factory=list, init=False, repr=False)  # number of steps up to each epoch's end

    def __post_init__(self) -> None:
        assert len(self.task) == len(self.rows)
        names, task, rows = list(TASKS), self.task, self.rows
        replayed = rows[:0]
        if self.is_replay is not None and self.is_replay.any():
            replayed, task, rows = rows[self.is_replay], task[~self.is_replay], rows[~self.is_replay]
        codes = np.unique(task)
        self.rows_by_task = {names[code]: rows[task == code] if len(codes) > 1 else rows for code in codes}
        for name, weight in (self.weights or {}).items():
            if weight > 0 and name not in self.rows_by_task:
                raise SettingsError(f"--task_weights: {name} has weight {weight:g}, but there is no {name} row")
        if not len(rows):
            raise SettingsError("--train_jsonl: no row to train on")
        self.curriculum = tuple(self.curriculum) or (Phase(tuple(self.rows_by_task), 1),)
        self._quotas = [self._quota(phase) for phase in self.curriculum]
        if len(replayed):
            self.rows_by_task[REPLAY] = replayed
            for quota in self._quotas:
                quota[REPLAY] = max(1, round(sum(quota.values()) * self.replay_share / (1 - self.replay_share)))
        self._codes = dict(zip(self.rows.tolist(), self.task.tolist(), strict=True)) if self.batching.per_task else {}
        if not self.steps_in_epoch(0):
            per_step = self.batching.microbatch_size * self.microbatches_per_step
            raise SettingsError(f"--drop_last: {len(self.rows)} rows do not fill one step of {per_step}")

    def _quota(self, phase: Phase) -> dict[str, int]:
        """Draws of each task in an epoch: shares rounded by largest remainder, so that they add up exactly."""
        for name in phase.tasks:
            if name not in self.rows_by_task:
                raise SettingsError(f"--curriculum: there is no {name} row")
        if self.weights is None:
            return {name: len(self.rows_by_task[name]) for name in phase.tasks}
        weights = {name: self.weights.get(name, 0.0) for name in phase.tasks if self.weights.get(name, 0.0) > 0}
        if not weights:
            raise SettingsError(f"--curriculum {'+'.join(phase.tasks)}: none of these tasks has a weight")
        draws = sum(len(self.rows_by_task[name]) for name in phase.tasks)
        exact = {name: draws * weight / sum(weights.values()) for name, weight in weights.items()}
        quota = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
        for name in by_remainder[: draws - sum(quota.values())]:
            quota[name] += 1
        return quota

    @property
    def curriculum_epochs(self) -> int:
        return sum(phase.epochs for phase in self.curriculum)

    def _phase(self, epoch: int) -> int:
        ends = np.cumsum([phase.epochs for phase in self.curriculum])
        return min(int(np.searchsorted(ends, epoch, side="right")), len(self.curriculum) - 1)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Row numbers in the order in which an epoch draws them."""
        earlier = [self._quotas[self._phase(number)] for number in range(epoch)]
        quota = self._quotas[self._phase(epoch)]
        drawn = [self._draws(name, sum(q.get(name, 0) for q in earlier), count) for name, count in quota.items()]
        order = np.random.default_rng([self.seed, epoch, ORDER_STREAM]).permutation(sum(map(len, drawn)))
        rows = np.concatenate(drawn)[order]
        return self.variants.draw(rows, epoch) if self.variants else rows

    def _draws(self, name: str, start: int, count: int) -> np.ndarray:
        """Draws ``start`` to ``start + count`` of a task from its endless sequence of permutations."""
        rows = self.rows_by_task[name]
        if self.weights is None and name != REPLAY:
            return rows
        stream = REPLAY_STREAM if name == REPLAY else _stream(list(TASKS).index(name))
        rounds = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        shuffled = [rows[np.random.default_rng([self.seed, index, stream]).permutation(len(rows))] for index in rounds]
        first = start - rounds[0] * len(rows) if count else 0
        return np.concatenate([*shuffled, rows[:0]])[first : first + count]

    def epoch_microbatches(self, epoch: int) -> Microbatches:
        """All microbatches of an epoch. Only those of this epoch and the one before stay cached."""
        if epoch not in self._microbatches:
            rows = self.epoch_rows(epoch)
            tokens = np.zeros(len(rows), np.int64) if self.num_tokens is None else self.num_tokens[rows]
            rng = np.random.default_rng([self.seed, epoch, MICROBATCH_STREAM])
            self._microbatches = {
                number: cached for number, cached in self._microbatches.items() if number == epoch - 1
            }
            self._microbatches[epoch] = make_microbatches(rows, tokens, self._task_codes(rows), self.batching, rng)
        return self._microbatches[epoch]

    def _task_codes(self, rows: np.ndarray) -> np.ndarray:
        """Task code of each row; all 0 where batching does not depend on the task."""
        if not self.batching.per_task:
            return np.zeros(len(rows), np.int8)
        first = self.variants.first_variants(rows) if self.variants else rows
        return np.array([self._codes[row] for row in first.tolist()], np.int8)

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        microbatches = self.epoch_microbatches(epoch)
        full, rest = divmod(len(microbatches), self.microbatches_per_step)
        if rest == 0 and self.batching.kind == "fixed" and self.drop_last:
            last_is_short = len(microbatches.rows) % self.batching.microbatch_size > 0
            return full - last_is_short
        return full + bool(rest and not self.drop_last)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step and the index of the step within it, from 0."""
        while not self._ends or self._ends[-1] <= step:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.steps_in_epoch(len(self._ends)))
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def total_steps(self, epochs: int) -> int:
        """Optimizer steps of the first ``epochs`` epochs together; also the number of the next epoch's first step."""
        while len(self._ends) < epochs:
            self.locate(self._ends[-1] if self._ends else 0)
        return self._ends[epochs - 1] if epochs else 0

    def epochs_done(self, step: int) -> float:
        """Epochs that a run has completed after ``step`` steps; a whole number at the end of an epoch."""
        epoch, index = self.locate(step)
        return epoch + index / self.steps_in_epoch(epoch)

    def step_microbatches(self, step: int) -> list[Microbatch]:
        """The microbatches of one optimizer step; always ``microbatches_per_step`` of them, fillers included."""
        epoch, index = self.locate(step)
        in_epoch, first = self.epoch_microbatches(epoch), index * self.microbatches_per_step
        filler_rows = in_epoch[first][:1]
        return [
            Microbatch(number, in_epoch[first + number])
            if first + number < len(in_epoch)
            else Microbatch(number, filler_rows, is_filler=True)
            for number in range(self.microbatches_per_step)
        ]

    def rank_microbatches(self, step: int, rank: int, world_size: int) -> list[Microbatch]:
        """The microbatches that one rank computes; fillers give every rank the same number of them."""
        microbatches = self.step_microbatches(step)
        filler = Microbatch(len(microbatches), microbatches[0].rows[:1], is_filler=True)
        own = microbatches[rank::world_size]
        per_rank = -(-len(microbatches) // world_size)
        return own + [filler] * (per_rank - len(own))
