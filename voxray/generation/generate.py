"""Answers of a model to stored rows: in evaluation, in ``infer``, in validation and previews during training."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from voxray.batches.collate import collate_prompts
from voxray.core.errors import RunError, one_line, quoted_line
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow, Features
from voxray.features.shards import TASK_CODES
from voxray.generation.continuous_batching import generate_greedy
from voxray.models.interface import FrontEnd, ModelFamily

Result = TypeVar("Result")
_TRANSCRIPTION = [TASK_CODES[name] for name, task in TASKS.items() if task.template == "transcription"]


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is looked for.

    Attributes:
        max_new_tokens: Longest answer.
        num_beams: 1 takes the likeliest token at every step, more follow so many beginnings at a time.
        temperature: 0 draws nothing; else tokens are drawn, seeded by ``seed`` and the ids of the rows in a batch.
        top_p: Draw among the likeliest tokens that have this probability together; 1 draws among all.
    """

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.num_beams == 1 and self.temperature == 0


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: Without control tokens.
        num_new_tokens: Its tokens, without the one that ends it.
        hit_max: Whether it was cut off at ``max_new_tokens``.
        sec: The row's share of the time that its batches took, reading the prompt included.
    """

    text: str
    num_new_tokens: int
    hit_max: bool
    sec: float


def by_expected_length(features: Features, rows: Sequence[int]) -> list[int]:
    """Rows in the order in which they are best answered: the longest answers first, similar prompts side by side.

    A transcript is as long as its clip. How long a chat answer gets nobody knows, so these come first; the short ones
    at the end then fill the batch while the long ones finish.
    """
    chat = ~np.isin(features.task, _TRANSCRIPTION)
    lengths = (features.num_samples, features.num_prompt_tokens)

    def key(row: int) -> tuple[int, ...]:
        by_clip, by_prompt = (-int(column[row]) for column in lengths)
        return (0, by_prompt, by_clip, row) if chat[row] else (1, by_clip, by_prompt, row)

    return sorted(rows, key=key)


def length_batches(features: Features, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Those rows in batches."""
    order = by_expected_length(features, rows)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    batch_size: int,
    search: SamplingParams,
) -> Iterator[tuple[int, Completion]]:
    """Answer rows, ``batch_size`` at a time, and yield each answer with its row's place as soon as it is there."""
    limits = [max(1, min(search.max_new_tokens, front_end.max_positions - len(row.prompt_ids))) for row in rows]
    is_alone = [front_end.needs_sequential_generate(row.prompt_ids, row.num_windows) for row in rows]
    together = [place for place in range(len(rows)) if not is_alone[place]]
    batches = [[place] for place in range(len(rows)) if is_alone[place]]
    if search.is_greedy:
        some, limits_of = [rows[place] for place in together], [limits[place] for place in together]
        for answer in generate_greedy(model, family, front_end, some, batch_size=batch_size, limits=limits_of):
            place = together[answer.number]
            yield place, _finished(answer.ids, front_end, limits[place], answer.sec)
    else:
        batches += [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    for places in batches:
        began, limit = time.perf_counter(), min(limits[place] for place in places)
        found = _library_ids(model, family, front_end, [rows[place] for place in places], search, limit)
        sec = (time.perf_counter() - began) / len(places)
        for place, ids in zip(places, found, strict=True):
            # window by window, each of them may take the limit
            longest = limit * rows[place].num_windows if is_alone[place] else limit
            yield place, _finished(ids, front_end, longest, sec)


def bisect_failures(
    rows: Sequence[int], batch_size: int, work: Callable[[Sequence[int], int], Iterator[tuple[int, Result]]]
) -> Iterator[tuple[int, Result | Exception]]:
    """Let the model work on rows; where it fails, halves are tried, down to the row at which it fails.

    Args:
        rows: Their numbers.
        work: Given some of them and a batch size, yields (place among them, what it found).
    Yields:
        (row number, what was found or why nothing was).
    Raises:
        RunError: The device has failed, so that no row can be answered any more.
    """
    left = dict.fromkeys(rows)
    try:
        for place, found in work(rows, batch_size):
            del left[rows[place]]
            yield rows[place], found
    except RunError:
        raise
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise RunError(f"the device failed, and answers nothing any more: {failure_reason(error)}") from error
        if len(left) == 1:
            yield next(iter(left)), error
            return
    if left:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        again, half = list(left), (len(left) + 1) // 2
        for part in (again[:half], again[half:]):
            yield from bisect_failures(part, min(batch_size, half), work)


def failure_reason(error: Exception) -> str:
    """Why a row has no answer, in one line."""
    return quoted_line(f"{type(error).__name__}: {one_line(error)}"[:300])


def generate_texts(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Texts of the answers to one batch of rows (see ``SamplingParams``)."""
    search = SamplingParams(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    found = dict(generate(model, family, front_end, rows, batch_size=len(rows), search=search))
    return [found[place].text for place in range(len(rows))]


@torch.inference_mode()
def _library_ids(
    model: Any, family: ModelFamily, front_end: FrontEnd, rows: Sequence[FeatureRow], search: SamplingParams, limit: int
) -> list[list[int]]:
    """Tokens of answers by transformers' generate, without the end-of-text token.

    Args:
        limit: Longest answer, in tokens.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate_prompts(rows, front_end).items()}
    options: dict[str, Any] = {"do_sample": False, "num_beams": search.num_beams}
    if search.temperature > 0:
        ids = zlib.crc32("\n".join(row.id for row in rows).encode())
        torch.manual_seed(int(np.random.SeedSequence([search.seed, ids]).generate_state(1)[0]))
        # transformers would draw among 50 tokens unless told that top_k is off
        options |= {"do_sample": True, "temperature": search.temperature, "top_p": search.top_p, "top_k": 0}
    special = {"pad_token_id": front_end.pad_id, "eos_token_id": front_end.eos_id}
    num_samples = [row.num_samples for row in rows]
    ids_BL = family.generate(model, batch, num_samples=num_samples, max_new_tokens=limit, **special, **options)
    return [_until(ids, front_end.eos_id) for ids in ids_BL.tolist()]


def _finished(ids: list[int], front_end: FrontEnd, limit: int, sec: float) -> Completion:
    return Completion(front_end.decode(ids).strip(), len(ids), len(ids) >= limit, sec)


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
