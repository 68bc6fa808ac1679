"""The likeliest token at every step, in batches that finished rows leave and waiting rows join.

transformers' generate keeps a batch together until its longest answer is done; here a row costs what its own answer is
long.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from voxray.batches.collate import collate_prompts
from voxray.features.reader import FeatureRow
from voxray.models.interface import DecodeState, FrontEnd, ModelFamily

MIN_IDLE_SHARE = 0.25
"""Share of a batch that has to be done before its rows leave and others come: that copies the rest's memory."""


@dataclass
class PartialCompletion:
    """One row's answer so far.

    Attributes:
        number: Place of the row among those to answer.
        limit: Longest answer, in tokens.
        ids: Its tokens, without the one that ends it.
        sec: Its share of the time that its batches took.
    """

    number: int
    limit: int
    ids: list[int] = field(default_factory=list)
    sec: float = 0.0
    is_done: bool = False

    def take(self, token: int, eos_id: int) -> None:
        if token == eos_id:
            self.is_done = True
        else:
            self.ids.append(token)
            self.is_done = len(self.ids) >= self.limit


class _Batch:
    """The rows that are being answered together; some of them may be done."""

    def __init__(self, model: Any, family: ModelFamily, front_end: FrontEnd) -> None:
        self.model, self.family, self.front_end = model, family, front_end
        self.device = next(model.parameters()).device
        self.answers: list[PartialCompletion] = []
        self.state: DecodeState | None = None

    @property
    def num_live(self) -> int:
        return sum(not answer.is_done for answer in self.answers)

    def drop(self) -> None:
        """Let the rows go that are done."""
        kept = [place for place, answer in enumerate(self.answers) if not answer.is_done]
        if not kept:
            self.state = None
        elif self.state and len(kept) < len(self.answers):
            self.state.select_rows(kept)
        self.answers = [self.answers[place] for place in kept]

    def admit(self, answers: list[PartialCompletion], rows: Sequence[FeatureRow]) -> list[PartialCompletion]:
        """Read new rows' prompts, whose first tokens come with it; returns the rows that got a token."""
        batch = {name: tensor.to(self.device) for name, tensor in collate_prompts(rows, self.front_end).items()}
        state, logits_BV = self.family.prefill(self.model, batch)
        self._give(answers, logits_BV)
        if self.state is None:
            self.state = state
        else:
            self.state.merge(state)
        self.answers += answers
        return answers

    def step(self) -> list[PartialCompletion]:
        """One token for each row; what rows that are done get is not looked at."""
        assert self.state is not None
        eos_id, live = self.front_end.eos_id, [answer for answer in self.answers if not answer.is_done]
        last = [eos_id if answer.is_done else answer.ids[-1] for answer in self.answers]
        self._give(self.answers, self.state.decode_step(torch.tensor(last, device=self.device)))
        return live

    def _give(self, answers: Sequence[PartialCompletion], logits_BV: torch.Tensor) -> None:
        for answer, token in zip(answers, logits_BV.argmax(-1).tolist(), strict=True):
            if not answer.is_done:
                answer.take(token, self.front_end.eos_id)


@torch.inference_mode()
def generate_greedy(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    batch_size: int,
    limits: Sequence[int],
) -> Iterator[PartialCompletion]:
    """Answer rows, and yield each as soon as it is done.

    Args:
        rows: In the order in which they begin; neighbours of similar prompts waste the least.
        batch_size: Rows at a time.
        limits: Longest answer of every row, in tokens.
    """
    waiting = deque(PartialCompletion(number, limit) for number, limit in enumerate(limits))
    batch = _Batch(model, family, front_end)
    while waiting or batch.answers:
        began = time.perf_counter()
        size = batch_size if waiting else len(batch.answers)
        if size - batch.num_live >= max(1, size * MIN_IDLE_SHARE):
            batch.drop()
        fresh = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(batch.answers)))]
        if fresh:
            worked = batch.admit(fresh, [rows[answer.number] for answer in fresh])
        elif batch.answers:
            worked = batch.step()
        else:
            return
        sec = time.perf_counter() - began
        for answer in worked:
            answer.sec += sec / len(worked)
        yield from (answer for answer in worked if answer.is_done)
