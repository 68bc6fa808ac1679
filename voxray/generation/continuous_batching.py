"""Greedy decoding with continuous batching: finished rows leave the batch and waiting rows join it.

The ``generate`` of transformers keeps a batch together until its longest answer is finished. Here a row costs only as
many steps as its own answer has tokens.
"""

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from voxray.batches.collate import collate_prompts, pinned, to_device, with_model_input
from voxray.features.reader import FeatureRow
from voxray.models.front_end import FrontEnd, stop_ids
from voxray.models.interface import DecodeState, ModelFamily
from voxray.models.parts.static_kv_cache import StaticDecodeState, give_back, take_static_state

MIN_IDLE_SHARE = 0.25
"""Share of a batch that must be finished before its rows are replaced. Replacing copies the KV cache of the others."""
STEPS_PER_READ = 1
"""Tokens that are decoded for every row before they are read from the device. With a larger number a GPU waits less
often, but a row that ends in between is decoded for nothing until the next read. ``benchmarks/gpu.py`` measures it."""


@dataclass
class PartialCompletion:
    """The answer to one row so far.

    Attributes:
        index: Index of the row among the rows to answer.
        limit: Longest answer, in tokens.
        ids: Token ids, without the end-of-text token.
        sec: The row's share of the time that its batches took.
        language: See ``FrontEnd.prompt_language``.
        num_decoded: Tokens that were decoded for the row, also after its end.
    """

    index: int
    limit: int
    ids: list[int] = field(default_factory=list)
    sec: float = 0.0
    is_done: bool = False
    language: str = ""
    num_decoded: int = 0

    def append(self, token: int, stops: Collection[int]) -> None:
        """Add the next token; a token that ends the answer or the limit finishes it."""
        if token in stops:
            self.is_done = True
        else:
            self.ids.append(token)
            self.is_done = len(self.ids) >= self.limit


class _Batch:
    """The rows that are decoded together; some of them may be finished.

    Args:
        num_slots: Slots of a cache of fixed size; 0 for a cache that grows.
    """

    def __init__(self, model: Any, family: ModelFamily, front_end: FrontEnd, num_slots: int) -> None:
        self.model, self.family, self.front_end, self.num_slots = model, family, front_end, num_slots
        self.stops = stop_ids(front_end)
        self.device = next(model.parameters()).device
        self.completions: list[PartialCompletion] = []
        self.state: DecodeState | None = None

    @property
    def num_live(self) -> int:
        return sum(not completion.is_done for completion in self.completions)

    @property
    def is_at_the_end(self) -> bool:
        """Whether the next tokens of a finished row could be beyond the model's last position."""
        done = (completion for completion in self.completions if completion.is_done)
        return any(completion.num_decoded + STEPS_PER_READ > completion.limit for completion in done)

    def drop_finished(self) -> None:
        live = [index for index, completion in enumerate(self.completions) if not completion.is_done]
        if not live:
            self.close()
        elif self.state and len(live) < len(self.completions):
            self.state.select_rows(live)
        self.completions = [self.completions[index] for index in live]

    def close(self) -> None:
        """End with the rows of this batch."""
        if isinstance(self.state, StaticDecodeState):
            give_back(self.model, self.state)
        self.state = None

    def admit(self, completions: list[PartialCompletion], rows: Sequence[FeatureRow]) -> list[PartialCompletion]:
        """Prefill the prompts of new rows, which also gives their first tokens; returns the rows that got a token."""
        batch = collate_prompts(rows, self.front_end)
        batch = to_device(pinned(batch) if self.device.type == "cuda" else batch, self.device)
        state, logits_BV = self.family.prefill(self.model, batch)
        self._append_tokens(completions, logits_BV.argmax(-1)[None])
        languages = map(self.front_end.prompt_language, batch["input_ids"].tolist())
        for completion, language in zip(completions, languages, strict=True):
            completion.language = language
        if self.state is None:
            self.state = take_static_state(self.model, state, self.num_slots) if self.num_slots else state
        else:
            self.state.merge(state)
        self.completions += completions
        return completions

    def step(self) -> list[PartialCompletion]:
        """Decode tokens of every row; those of finished rows are ignored. Returns the rows that got a token."""
        assert self.state is not None
        eos_id, live = self.front_end.eos_id, [completion for completion in self.completions if not completion.is_done]
        last_ids = [eos_id if completion.is_done else completion.ids[-1] for completion in self.completions]
        ids_B = torch.tensor(last_ids, device=self.device)
        new_ids: list[torch.Tensor] = []
        num_steps = min([STEPS_PER_READ, *(completion.limit - len(completion.ids) for completion in live)])
        for _ in range(num_steps):
            ids_B = self.state.decode_step(ids_B).argmax(-1)
            new_ids.append(ids_B)
        self._append_tokens(self.completions, torch.stack(new_ids))
        return live

    def _append_tokens(self, completions: Sequence[PartialCompletion], ids_NB: torch.Tensor) -> None:
        """Add N tokens to every row. This waits for the device."""
        for ids in ids_NB.tolist():
            for completion, token in zip(completions, ids, strict=True):
                completion.num_decoded += 1
                if not completion.is_done:
                    completion.append(token, self.stops)


def _prepare_ahead(rows: Sequence[FeatureRow], front_end: FrontEnd, num_ahead: int) -> Iterator[FeatureRow]:
    """Yield the rows with their model inputs, which a thread computes while the model answers earlier rows."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        futures: deque[Future[FeatureRow]] = deque()
        try:
            for row in rows:
                futures.append(pool.submit(with_model_input, row, front_end))
                if len(futures) > num_ahead:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def generate_greedy(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    batch_size: int,
    limits: Sequence[int],
    static_cache: bool = False,
) -> Iterator[PartialCompletion]:
    """Answer rows and yield each answer as soon as it is finished.

    Args:
        rows: In the order in which they start. Neighbours with prompts of similar length waste the least padding.
        batch_size: Rows decoded at a time.
        limits: Longest answer of every row, in tokens.
        static_cache: See ``models.parts.static_kv_cache``.
    """
    waiting = deque(PartialCompletion(index, limit) for index, limit in enumerate(limits))
    batch = _Batch(model, family, front_end, min(batch_size, len(limits)) if static_cache else 0)
    prepared = _prepare_ahead(rows, front_end, batch_size)
    while waiting or batch.completions:
        start_sec = time.perf_counter()
        size = batch_size if waiting else len(batch.completions)
        if size - batch.num_live >= max(1, size * MIN_IDLE_SHARE) or batch.is_at_the_end:
            batch.drop_finished()
        new = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(batch.completions)))]
        if new:
            advanced = batch.admit(new, list(islice(prepared, len(new))))
        elif batch.completions:
            advanced = batch.step()
        else:
            break
        sec = time.perf_counter() - start_sec
        for completion in advanced:
            completion.sec += sec / len(advanced)
        yield from (completion for completion in advanced if completion.is_done)
    batch.close()
