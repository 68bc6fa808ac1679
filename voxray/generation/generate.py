"""Generate answers to stored rows: evaluation, ``infer``, the demo, and validation and previews in training."""

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
import torch

from voxray.batches.collate import collate_prompts, to_device
from voxray.core.errors import RunError, one_line, quoted_line
from voxray.core.tasks import template_codes
from voxray.features.reader import FeatureRow, Features
from voxray.generation.continuous_batching import generate_greedy
from voxray.models.front_end import FrontEnd, stop_ids
from voxray.models.interface import ModelFamily

Result = TypeVar("Result")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: greedy, beam search or sampling.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams of beam search; 1 takes the likeliest token at every step.
        temperature: 0 does not sample. Otherwise tokens are sampled, seeded by ``seed`` and the ids of the rows in the
            batch.
        top_p: Sample among the likeliest tokens that together have this probability; 1 samples among all.
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
    """A finished answer.

    Attributes:
        text: Without control tokens.
        num_new_tokens: Tokens, without the end-of-text token.
        hit_max: Whether it was cut off at ``max_new_tokens``.
        sec: The row's share of the time that its batches took, prefill included.
        language: Language of the prompt, which the row named or the model detected; "" if the family does not say.
    """

    text: str
    num_new_tokens: int
    hit_max: bool
    sec: float
    language: str = ""


def answer_limits(rows: Sequence[FeatureRow], front_end: FrontEnd, sampling: SamplingParams) -> list[int]:
    """Longest answer of every row, in tokens."""
    return [max(1, min(sampling.max_new_tokens, front_end.max_positions - len(row.prompt_ids))) for row in rows]


def sort_by_expected_length(features: Features, rows: Sequence[int]) -> list[int]:
    """Sort rows so that the longest answers come first and rows with similar prompts are neighbours.

    The length of a transcript or translation follows from its clip. The length of a chat answer is unknown, so these
    rows come first; the short transcripts at the end then fill the batch while the long answers finish.
    """
    is_chat = np.isin(features.task, template_codes("chat", "conversation"))

    def key(row: int) -> tuple[int, ...]:
        by_clip, by_prompt = -int(features.num_samples[row]), -int(features.num_prompt_tokens[row])
        return (0, by_prompt, by_clip, row) if is_chat[row] else (1, by_clip, by_prompt, row)

    return sorted(rows, key=key)


def length_batches(features: Features, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of rows in the order of ``sort_by_expected_length``."""
    order = sort_by_expected_length(features, rows)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    batch_size: int,
    sampling: SamplingParams,
    static_cache: bool = False,
) -> Iterator[tuple[int, Completion]]:
    """Answer rows, ``batch_size`` at a time, and yield (index of the row, answer) as soon as the answer is finished.

    Args:
        static_cache: See ``models.parts.static_kv_cache``. Only greedy answers use it.
    """
    limits = answer_limits(rows, front_end, sampling)
    is_sequential = [front_end.needs_sequential_generate(row.prompt_ids, row.num_windows) for row in rows]
    together = [index for index in range(len(rows)) if not is_sequential[index]]
    batches = [[index] for index in range(len(rows)) if is_sequential[index] and rows[index].num_windows == 1]
    recordings = [index for index in range(len(rows)) if is_sequential[index] and rows[index].num_windows > 1]
    recordings.sort(key=lambda index: -rows[index].num_windows)  # those that end leave a batch, and none joins it
    batches += [recordings[start : start + batch_size] for start in range(0, len(recordings), batch_size)]
    if sampling.is_greedy:
        options: dict[str, Any] = {"batch_size": batch_size, "limits": [limits[index] for index in together]}
        batched_rows = [rows[index] for index in together]
        for completion in generate_greedy(model, family, front_end, batched_rows, static_cache=static_cache, **options):
            index = together[completion.index]
            yield index, make_completion(completion.ids, front_end, limits[index], completion.sec, completion.language)
    else:
        batches += [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    for batch in batches:
        start_sec, limit = time.perf_counter(), min(limits[index] for index in batch)
        ids_per_row, languages = _library_ids(
            model, family, front_end, [rows[index] for index in batch], sampling, limit
        )
        sec = (time.perf_counter() - start_sec) / len(batch)
        for index, ids, language in zip(batch, ids_per_row, languages, strict=True):
            # a row that is generated window by window may reach the limit in each window
            longest = limit * rows[index].num_windows if is_sequential[index] else limit
            yield index, make_completion(ids, front_end, longest, sec, language)


def bisect_failures(
    rows: Sequence[int], batch_size: int, work: Callable[[Sequence[int], int], Iterator[tuple[int, Result]]]
) -> Iterator[tuple[int, Result | Exception]]:
    """Run ``work`` on rows. Where it fails, retry both halves, down to the single row that fails.

    Args:
        rows: Row numbers.
        work: Takes row numbers and a batch size; yields (index among these row numbers, result).
    Yields:
        (row number, result or the exception that prevented it).
    Raises:
        RunError: The device has failed, so no further row can be answered.
    """
    remaining = dict.fromkeys(rows)
    try:
        for index, result in work(rows, batch_size):
            del remaining[rows[index]]
            yield rows[index], result
    except RunError:
        raise
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise RunError(f"the device failed, so no further row can be answered: {failure_reason(error)}") from error
        if len(remaining) == 1:
            yield next(iter(remaining)), error
            return
    if remaining:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        retries, half = list(remaining), (len(remaining) + 1) // 2
        for part in (retries[:half], retries[half:]):
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
    sampling = SamplingParams(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    completions = dict(generate(model, family, front_end, rows, batch_size=len(rows), sampling=sampling))
    return [completions[index].text for index in range(len(rows))]


@torch.inference_mode()
def _library_ids(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    sampling: SamplingParams,
    limit: int,
) -> tuple[list[list[int]], list[str]]:
    """Token ids of the answers by transformers' ``generate`` without the end of text, and languages of the prompts.

    Args:
        limit: Longest answer, in tokens.
    """
    batch = to_device(collate_prompts(rows, front_end), next(model.parameters()).device)
    options: dict[str, Any] = {"do_sample": False, "num_beams": sampling.num_beams}
    if sampling.temperature > 0:
        ids_hash = zlib.crc32("\n".join(row.id for row in rows).encode())
        torch.manual_seed(int(np.random.SeedSequence([sampling.seed, ids_hash]).generate_state(1)[0]))
        # transformers samples among the 50 likeliest tokens unless top_k is 0
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    stops = stop_ids(front_end)
    special = {"pad_token_id": front_end.pad_id, "eos_token_id": sorted(stops) if len(stops) > 1 else front_end.eos_id}
    num_samples = [row.num_samples for row in rows]
    ids_BL = family.generate(model, batch, num_samples=num_samples, max_new_tokens=limit, **special, **options)
    answers = [_before_stop(ids, stops) for ids in ids_BL.tolist()]
    return answers, list(map(front_end.prompt_language, batch["input_ids"].tolist()))


def make_completion(ids: list[int], front_end: FrontEnd, limit: int, sec: float, language: str) -> Completion:
    """The answer that these token ids are. It was cut off if there are ``limit`` of them."""
    return Completion(front_end.decode(ids).strip(), len(ids), len(ids) >= limit, sec, language)


def _before_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stops, ids))
