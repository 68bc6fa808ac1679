"""The plan: which rows make up which optimizer step.

A pure function of (tasks and lengths of the rows, task weights, curriculum, seed, batching, step). It knows nothing of
workers: a step is a list of packs, and pack i belongs to rank i mod world size. So any number of workers sees the same
global sequence, and a step number is all that a run needs to go on from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from voxray.batches.packing import Batching, Packs, make_packs
from voxray.core.errors import SettingsError
from voxray.core.tasks import TASKS

ORDER, VARIANTS, PACKS = 3, 4, 5
"""Streams of random numbers of an epoch, beside those in which tasks draw their rows."""


def _stream(code: int) -> int:
    """Stream of a task's draws: 0, 1, 2 for the first three, then on from those above; never another by a new task."""
    return code if code < ORDER else code + PACKS + 1 - ORDER


@dataclass(frozen=True)
class Microbatch:
    """The rows of one forward pass.

    Attributes:
        number: Position within its step.
        rows: Row numbers.
        is_filler: Computed only so that every rank has the same number of forward passes; its loss has weight 0.
    """

    number: int
    rows: np.ndarray
    is_filler: bool = False


class Variants:
    """The usable variants of every sample, and which of them an epoch takes.

    Args:
        rows: Row numbers, ascending; variants of a sample are neighbours.
        sample: Running number of the sample of every row.
        seed: Seed of the draws.
    Attributes:
        first: Row number of every sample's first usable variant; stands for the sample in the plan.
    """

    def __init__(self, rows: np.ndarray, sample: np.ndarray, seed: int) -> None:
        _, self._start, self._count = np.unique(sample, return_index=True, return_counts=True)
        self._rows, self._seed, self.first = rows, seed, rows[self._start]

    def first_of(self, rows: np.ndarray) -> np.ndarray:
        """The first variants of the samples that some rows are variants of."""
        return self.first[np.searchsorted(self.first, rows, side="right") - 1]

    def of_epoch(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Put in the place of first variants those that an epoch takes: drawn by (seed, epoch, sample)."""
        if len(self._rows) == len(self.first):
            return rows
        drawn = np.random.default_rng([self._seed, epoch, VARIANTS]).random(len(self.first))
        taken = self._start + (drawn * self._count).astype(np.int64)
        return self._rows[taken[np.searchsorted(self.first, rows)]]


@dataclass(frozen=True)
class Phase:
    """A part of a curriculum.

    Attributes:
        tasks: Names of the tasks that are drawn.
        epochs: How many epochs it lasts.
    """

    tasks: tuple[str, ...]
    epochs: int


@dataclass
class Plan:
    """The global sequence of packs of a run.

    Args:
        task: Task code of every usable row (its place in ``TASKS``).
        rows: Row number of every entry of ``task``; with variants, the first one of every sample.
        weights: {task name: relative share of the draws}; None takes every row once per epoch. With weights an epoch
            has as many draws as there are rows, and each task runs through permutations of its own rows, which go on
            from one epoch to the next.
        seed: Seed of all permutations.
        batching: Which rows share a pack.
        microbatches_per_step: Forward passes of an optimizer step, over all workers.
        drop_last: Leave out what does not fill an epoch's last step; else that step is smaller.
        variants: What may be drawn in the place of ``rows``.
        num_tokens: Tokens of every row number; only ``fixed`` batching does without.
        curriculum: Phases; an epoch draws from the rows of its phase's tasks, and the last phase goes on for ever.
            Empty draws from all tasks.
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
    _packs: dict[int, Packs] = field(default_factory=dict, init=False, repr=False)
    _ends: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.task) == len(self.rows)
        names = list(TASKS)
        self.rows_of_task = {names[code]: self.rows[self.task == code] for code in np.unique(self.task)}
        for name, weight in (self.weights or {}).items():
            if weight > 0 and name not in self.rows_of_task:
                raise SettingsError(f"--task_weights: {name} has weight {weight:g}, but there is no {name} row")
        if not len(self.rows):
            raise SettingsError("--train_jsonl: no row to train on")
        self.curriculum = tuple(self.curriculum) or (Phase(tuple(self.rows_of_task), 1),)
        self._quotas = [self._quota(phase) for phase in self.curriculum]
        self._codes = dict(zip(self.rows.tolist(), self.task.tolist(), strict=True)) if self.batching.per_task else {}
        if not self.steps_of(0):
            per_step = self.batching.pack_size * self.microbatches_per_step
            raise SettingsError(f"--drop_last: {len(self.rows)} rows do not fill one step of {per_step}")

    def _quota(self, phase: Phase) -> dict[str, int]:
        """Draws of each task in an epoch: the shares by largest remainder, so they add up exactly."""
        for name in phase.tasks:
            if name not in self.rows_of_task:
                raise SettingsError(f"--curriculum: there is no {name} row")
        if self.weights is None:
            return {name: len(self.rows_of_task[name]) for name in phase.tasks}
        weights = {name: self.weights.get(name, 0.0) for name in phase.tasks if self.weights.get(name, 0.0) > 0}
        if not weights:
            raise SettingsError(f"--curriculum {'+'.join(phase.tasks)}: none of these tasks has a weight")
        draws = sum(len(self.rows_of_task[name]) for name in phase.tasks)
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
        before = [self._quotas[self._phase(earlier)] for earlier in range(epoch)]
        quota = self._quotas[self._phase(epoch)]
        drawn = [self._draws(name, sum(q.get(name, 0) for q in before), count) for name, count in quota.items()]
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(sum(map(len, drawn)))
        rows = np.concatenate(drawn)[order]
        return self.variants.of_epoch(rows, epoch) if self.variants else rows

    def _draws(self, name: str, start: int, count: int) -> np.ndarray:
        """Draws number ``start`` to ``start + count`` of a task out of its endless row of permutations."""
        rows, stream = self.rows_of_task[name], _stream(list(TASKS).index(name))
        if self.weights is None:
            return rows
        rounds = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        shuffled = [rows[np.random.default_rng([self.seed, index, stream]).permutation(len(rows))] for index in rounds]
        first = start - rounds[0] * len(rows) if count else 0
        return np.concatenate([*shuffled, rows[:0]])[first : first + count]

    def epoch_packs(self, epoch: int) -> Packs:
        """All packs of an epoch; the last two epochs asked for are kept."""
        if epoch not in self._packs:
            rows = self.epoch_rows(epoch)
            tokens = np.zeros(len(rows), np.int64) if self.num_tokens is None else self.num_tokens[rows]
            rng = np.random.default_rng([self.seed, epoch, PACKS])
            self._packs = {number: packs for number, packs in self._packs.items() if number == epoch - 1}
            self._packs[epoch] = make_packs(rows, tokens, self._task_of(rows), self.batching, rng)
        return self._packs[epoch]

    def _task_of(self, rows: np.ndarray) -> np.ndarray:
        if not self.batching.per_task:
            return np.zeros(len(rows), np.int8)
        first = self.variants.first_of(rows) if self.variants else rows
        return np.array([self._codes[row] for row in first.tolist()], np.int8)

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        packs = self.epoch_packs(epoch)
        full, rest = divmod(len(packs), self.microbatches_per_step)
        if rest == 0 and self.batching.kind == "fixed" and self.drop_last:
            rest = len(packs.rows) % self.batching.pack_size  # the last pack is a short one
            return full - bool(rest)
        return full + bool(rest and not self.drop_last)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step and its place in it, from 0."""
        while not self._ends or self._ends[-1] <= step:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.steps_of(len(self._ends)))
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps of the first so many epochs."""
        while len(self._ends) < epochs:
            self.locate(self._ends[-1] if self._ends else 0)
        return self._ends[epochs - 1]

    def epochs_done(self, step: int) -> float:
        """Epochs that are behind a run that has done so many steps; whole at the end of one."""
        epoch, place = self.locate(step)
        return epoch + place / self.steps_of(epoch)

    def step_packs(self, step: int) -> list[Microbatch]:
        """The packs of one optimizer step; always ``microbatches_per_step`` of them."""
        epoch, place = self.locate(step)
        packs, first = self.epoch_packs(epoch), place * self.microbatches_per_step
        found = []
        for number in range(self.microbatches_per_step):
            if first + number < len(packs):
                found.append(Microbatch(number, packs.pack(first + number)))
            else:
                found.append(Microbatch(number, found[0].rows[:1], is_filler=True))
        return found

    def rank_packs(self, step: int, rank: int, world_size: int) -> list[Microbatch]:
        """The packs that one rank computes; every rank gets equally many, short ones a filler."""
        packs = self.step_packs(step)
        filler = Microbatch(len(packs), packs[0].rows[:1], is_filler=True)
        mine = packs[rank::world_size]
        longest = -(-len(packs) // world_size)
        return mine + [filler] * (longest - len(mine))
