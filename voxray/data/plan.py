"""The plan: which rows make up which optimizer step.

A pure function of (tasks of the rows, task weights, seed, batch sizes, step). It knows nothing of workers: a step is
a list of packs, and pack i belongs to rank i mod world size. So any number of workers sees the same global sequence,
and a step number is all that a run needs to go on from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from voxray.errors import SettingsError
from voxray.tasks import TASKS


@dataclass(frozen=True)
class Pack:
    """The rows of one forward pass.

    Attributes:
        number: Position within its step.
        rows: Row numbers.
        counts: False for a filler: computed so that every rank has something to do, but with weight 0 in the loss.
    """

    number: int
    rows: np.ndarray
    counts: bool = True


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

    def of_epoch(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Put in the place of first variants those that an epoch takes: drawn by (seed, epoch, sample)."""
        if len(self._rows) == len(self.first):
            return rows
        drawn = np.random.default_rng([self._seed, epoch, len(TASKS) + 1]).random(len(self.first))
        taken = self._start + (drawn * self._count).astype(np.int64)
        return self._rows[taken[np.searchsorted(self.first, rows)]]


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
        pack_size: Rows of a forward pass.
        packs_per_step: Forward passes of an optimizer step, over all workers.
        drop_last: Leave out the rows that do not fill an epoch's last step; else that step is smaller.
        variants: What may be drawn in the place of ``rows``.
    Raises:
        SettingsError: A task with a positive weight has no rows, or not even one step can be filled.
    """

    task: np.ndarray
    rows: np.ndarray
    weights: Mapping[str, float] | None
    seed: int
    pack_size: int
    packs_per_step: int
    drop_last: bool = False
    variants: Variants | None = None
    _cached: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.task) == len(self.rows)
        names = list(TASKS)
        self.rows_of_task = {names[code]: self.rows[self.task == code] for code in np.unique(self.task)}
        for name, weight in (self.weights or {}).items():
            if weight > 0 and name not in self.rows_of_task:
                raise SettingsError(f"--task_weights: {name} has weight {weight:g}, but there is no {name} row")
        if not len(self.rows):
            raise SettingsError("--train_jsonl: no row to train on")
        if not self.steps_per_epoch:
            raise SettingsError(f"--drop_last: {len(self.rows)} rows do not fill one step of {self.rows_per_step}")
        self._quota = self._quotas()

    @property
    def rows_per_step(self) -> int:
        return self.pack_size * self.packs_per_step

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(len(self.rows), self.rows_per_step)
        return full + bool(rest and not self.drop_last)

    def _quotas(self) -> dict[str, int]:
        """Draws of each task in an epoch: the shares by largest remainder, so they add up exactly."""
        if self.weights is None:
            return {name: len(rows) for name, rows in self.rows_of_task.items()}
        total = sum(self.weights.values())
        exact = {name: len(self.rows) * weight / total for name, weight in self.weights.items() if weight > 0}
        quota = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
        for name in by_remainder[: len(self.rows) - sum(quota.values())]:
            quota[name] += 1
        return quota

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Row numbers in the order in which an epoch draws them."""
        if self._cached is None or self._cached[0] != epoch:
            drawn = [self._draws(name, epoch * count, count) for name, count in self._quota.items()]
            order = np.random.default_rng([self.seed, epoch, len(TASKS)]).permutation(sum(map(len, drawn)))
            rows = np.concatenate(drawn)[order]
            self._cached = (epoch, self.variants.of_epoch(rows, epoch) if self.variants else rows)
        return self._cached[1]

    def _draws(self, name: str, start: int, count: int) -> np.ndarray:
        """Draws number ``start`` to ``start + count`` of a task out of its endless row of permutations."""
        rows, code = self.rows_of_task[name], list(TASKS).index(name)
        if self.weights is None:
            return rows
        rounds = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        shuffled = [rows[np.random.default_rng([self.seed, index, code]).permutation(len(rows))] for index in rounds]
        first = start - rounds[0] * len(rows) if count else 0
        return np.concatenate([*shuffled, rows[:0]])[first : first + count]

    def step_packs(self, step: int) -> list[Pack]:
        """The packs of one optimizer step; always ``packs_per_step`` of them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self.epoch_rows(epoch)[place * self.rows_per_step :][: self.rows_per_step]
        packs = []
        for number in range(self.packs_per_step):
            mine = rows[number * self.pack_size :][: self.pack_size]
            packs.append(Pack(number, mine) if len(mine) else Pack(number, rows[:1], counts=False))
        return packs

    def rank_packs(self, step: int, rank: int, world_size: int) -> list[Pack]:
        """The packs that one rank computes; every rank gets equally many, short ones a filler."""
        packs = self.step_packs(step)
        filler = Pack(len(packs), packs[0].rows[:1], counts=False)
        mine = packs[rank::world_size]
        longest = -(-len(packs) // world_size)
        return mine + [filler] * (longest - len(mine))
