"""Continuous batching against transformers' ``generate``, token for token."""

from typing import Any

import pytest
import torch
from conftest import TINY
from helpers.library import library_batch
from torch._dynamo.utils import counters
from transformers import VoxtralForConditionalGeneration

from voxray.batches.collate import collate_packed, collate_prompts
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import FeatureRow, Features
from voxray.generation import continuous_batching
from voxray.generation.continuous_batching import generate_greedy
from voxray.generation.generate import SamplingParams, bisect_failures, generate, generate_texts
from voxray.models.adapters.lora import add_lora
from voxray.models.parts import static_kv_cache
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.static_kv_cache import StaticDecodeState
from voxray.models.registry import get_family
from voxray.training.loop import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY = get_family(TINY)
LIMIT = 40


@pytest.fixture(scope="module")
def rows(small, make_features) -> list[FeatureRow]:
    """Audio and text rows alternate, so that every batch has both."""
    features = Features(make_features(*(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))))
    third = len(features) // 3
    return [features.row(number + part * third) for number in range(4) for part in range(3)]


@pytest.fixture(scope="module")
def front_end() -> Any:
    return FAMILY.front_end(TINY)


def load() -> Any:
    return FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))


def library_ids(model: Any, front_end: Any, rows: list[FeatureRow], limit: int = LIMIT) -> list[list[int]]:
    """Token ids by transformers' ``generate``, one row at a time."""
    ids_per_row = []
    for row in rows:
        batch = library_batch(collate_prompts([row], front_end))
        ids = model.generate(**batch, max_new_tokens=limit, do_sample=False, pad_token_id=11, eos_token_id=2)
        ids = ids[0, batch["input_ids"].shape[1] :].tolist()
        ids_per_row.append(ids[: ids.index(2)] if 2 in ids else ids)
    return ids_per_row


def greedy_ids(
    model: Any, front_end: Any, rows: list[FeatureRow], size: int, limits: list[int] | None = None, **options: Any
) -> Any:
    options |= {"batch_size": size, "limits": limits or [LIMIT] * len(rows)}
    completions = sorted(generate_greedy(model, FAMILY, front_end, rows, **options), key=lambda row: row.index)
    assert [completion.index for completion in completions] == list(range(len(rows))), "every row once"
    return [completion.ids for completion in completions]


@pytest.fixture(scope="module")
def expected(rows, front_end) -> list[list[int]]:
    model = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    ids_per_row = library_ids(model, front_end, rows)
    assert len({len(ids) for ids in ids_per_row}) > 4, "answers of different lengths, so that rows leave the batch"
    return ids_per_row


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_tokens_equal_transformers(rows, front_end, expected, size, share, monkeypatch) -> None:
    """Whether a finished row leaves at once, together with others, or when the whole batch is finished."""
    monkeypatch.setattr(continuous_batching, "MIN_IDLE_SHARE", share)
    assert greedy_ids(load(), front_end, rows, size) == expected
    assert greedy_ids(load(), front_end, rows[::-1], size) == expected[::-1]


@pytest.mark.parametrize("num_steps", [3, 8, 100])
def test_tokens_may_be_read_every_few_steps(rows, front_end, expected, num_steps, monkeypatch) -> None:
    """A row that ends in between gives the same answer, and the others stay what they are."""
    num_reads = 0
    append = continuous_batching._Batch._append_tokens

    def counting(*args: Any) -> None:
        nonlocal num_reads
        num_reads += 1
        append(*args)

    monkeypatch.setattr(continuous_batching._Batch, "_append_tokens", counting)
    greedy_ids(load(), front_end, rows, 4)
    num_reads_before, num_reads = num_reads, 0
    monkeypatch.setattr(continuous_batching, "STEPS_PER_READ", num_steps)
    assert greedy_ids(load(), front_end, rows, 4) == expected
    assert num_reads < 0.6 * num_reads_before
    limits = [1 + number % 5 for number in range(len(rows))]
    ids_per_row = greedy_ids(load(), front_end, rows, 4, limits)
    assert ids_per_row == [ids[:limit] for ids, limit in zip(expected, limits, strict=True)]


@pytest.mark.parametrize("size", [1, 4])
def test_tokens_of_a_static_cache(rows, front_end, expected, size, monkeypatch) -> None:
    """Rows join and leave slots, the cache grows, and a second call uses the same cache again."""
    num_steps = 0

    def not_compiled(step: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        return step

    monkeypatch.setattr(torch, "compile", not_compiled)
    monkeypatch.setattr(static_kv_cache, "PAGE", 8)
    model = load()
    assert greedy_ids(model, front_end, rows, size, static_cache=True) == expected
    assert num_steps > 1, "the cache grows"
    num_steps, cache = 0, model.voxray_static_state
    assert greedy_ids(model, front_end, rows[::-1], size, static_cache=True) == expected[::-1]
    assert num_steps == 0 and model.voxray_static_state is cache
    monkeypatch.setattr(continuous_batching, "STEPS_PER_READ", 3)
    assert greedy_ids(model, front_end, rows, size + 2, static_cache=True) == expected


def test_a_static_cache_has_one_user_at_a_time(rows, front_end, expected, monkeypatch) -> None:
    """Two loops that take turns, and one that is given up, do not change each other's answers."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    model, options = load(), {"batch_size": 3, "limits": [LIMIT] * len(rows), "static_cache": True}
    next(generate_greedy(model, FAMILY, front_end, rows, **options))
    loops = [generate_greedy(model, FAMILY, front_end, each, **options) for each in (rows, rows[::-1])]
    ids: list[dict[int, list[int]]] = [{}, {}]
    for pair in zip(*loops, strict=True):
        for answers, completion in zip(ids, pair, strict=True):
            answers[completion.index] = completion.ids
    assert [ids[0][index] for index in range(len(rows))] == expected
    assert [ids[1][index] for index in range(len(rows))] == expected[::-1]


@pytest.mark.parametrize("limit", ["memory for growth", "memory for four rows"])
def test_a_static_cache_is_not_used_again_after_an_error(rows, front_end, expected, limit, monkeypatch) -> None:
    """Rows are answered after memory ran out while the cache grew, or with fewer rows at a time."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    monkeypatch.setattr(static_kv_cache, "PAGE", 8)
    has_failed, grow, step = False, StaticDecodeState._resize, StaticDecodeState._step

    def failing_growth(state: StaticDecodeState, layer: Any, num_columns: int) -> None:
        """Fail once, when the first layer has grown and the second one has not."""
        nonlocal has_failed
        if layer is state._layers[1] and num_columns > layer.keys.shape[2] and not has_failed:
            has_failed = True
            raise torch.OutOfMemoryError("out of memory")
        grow(state, layer, num_columns)

    def failing_step(state: StaticDecodeState) -> torch.Tensor:
        if state.num_slots > 4:
            raise torch.OutOfMemoryError("out of memory")
        return step(state)

    name, fails = ("_resize", failing_growth) if limit == "memory for growth" else ("_step", failing_step)
    monkeypatch.setattr(StaticDecodeState, name, fails)
    model, sampling = load(), SamplingParams(LIMIT)

    def work(numbers: Any, batch_size: int) -> Any:
        batch = [rows[number] for number in numbers]
        return generate(model, FAMILY, front_end, batch, batch_size=batch_size, sampling=sampling, static_cache=True)

    answers = dict(bisect_failures(range(len(rows)), 8, work))
    assert has_failed == (limit == "memory for growth")
    texts = [answers[number].text for number in range(len(rows))]
    assert texts == [front_end.decode(ids).strip() for ids in expected]


@pytest.mark.parametrize("static_cache", [False, True])
def test_finished_rows_do_not_pass_the_last_position(front_end, rows, static_cache, monkeypatch) -> None:
    """A row that ended stays in its batch for some steps, but never beyond its limit."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    monkeypatch.setattr(continuous_batching, "MIN_IDLE_SHARE", 1.0)
    longest: list[int] = []
    step = continuous_batching._Batch.step

    def watched(batch: Any) -> Any:
        advanced = step(batch)
        longest.extend(completion.num_decoded - completion.limit for completion in batch.completions)
        return advanced

    monkeypatch.setattr(continuous_batching._Batch, "step", watched)
    limits = [2 + 5 * (number % 4) for number in range(len(rows))]
    greedy_ids(load(), front_end, rows, 6, limits, static_cache=static_cache)
    assert max(longest) == 0


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [0, 17_000])
def test_a_static_cache_is_compiled(rows, front_end, vocabulary, monkeypatch) -> None:
    """Also with an output layer that ``cpu_lm_head`` speeds up where nothing is compiled."""
    model = load()
    if vocabulary:
        torch.manual_seed(0)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model.requires_grad_(False)
    limits = [8] * len(rows)
    expected = greedy_ids(model, front_end, rows, 4, limits)
    counters.clear()
    assert greedy_ids(model, front_end, rows, 4, limits, static_cache=True) == expected
    assert counters["stats"]["calls_captured"] > 100


def test_waiting_rows_replace_finished_ones(rows, front_end, expected, monkeypatch) -> None:
    sizes: list[int] = []
    step = CausalDecodeState.decode_step

    def record_size(state: CausalDecodeState, ids_B: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids_B))
        return step(state, ids_B)

    monkeypatch.setattr(CausalDecodeState, "decode_step", record_size)
    greedy_ids(load(), front_end, rows, 4)
    num_tokens = sum(map(len, expected))
    num_static_steps = sum(4 * max(map(len, expected[start : start + 4])) for start in range(0, len(rows), 4))
    assert max(sizes) == 4
    assert sum(sizes) < 0.5 * (num_tokens + num_static_steps), "most of the waste of static batches is saved"


def test_limits_of_rows_and_completions(rows, front_end, expected) -> None:
    limits = [1 + number % 5 for number in range(len(rows))]
    ids_per_row = greedy_ids(load(), front_end, rows, 4, limits)
    assert ids_per_row == [ids[:limit] for ids, limit in zip(expected, limits, strict=True)]
    model, sampling = load(), SamplingParams(max(map(len, expected)))
    for index, completion in generate(model, FAMILY, front_end, rows, batch_size=5, sampling=sampling):
        assert completion.text == front_end.decode(expected[index]).strip()
        assert completion.num_new_tokens == len(expected[index]) and completion.sec > 0
        assert completion.hit_max == (len(expected[index]) == sampling.max_new_tokens)


def test_packed_lora_and_quantized_models(rows, front_end, expected) -> None:
    """Packed attention, LoRA and 4 bits give the tokens of transformers' ``generate`` on the same model."""
    packed = load()
    with torch.no_grad():
        answer_loss(packed, FAMILY, collate_packed(rows[:3], front_end), 0.0)
    assert greedy_ids(packed, front_end, rows, 4) == expected
    torch.manual_seed(0)
    tuned = add_lora(load(), FAMILY, ("projector", "llm"), model_id=TINY, r=4, alpha=64, dropout=0.1).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned_ids = library_ids(tuned, front_end, rows, 12)
    assert tuned_ids != [ids[:12] for ids in expected]
    assert greedy_ids(tuned, front_end, rows, 4, [12] * len(rows)) == tuned_ids
    quantized = FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"), quantize="4bit")
    quantized_ids = library_ids(quantized, front_end, rows, 12)
    assert greedy_ids(quantized, front_end, rows, 4, [12] * len(rows)) == quantized_ids


def test_stored_encoder_outputs_and_trimmed_audio(small, expected, rows, front_end, tmp_path) -> None:
    spec = FeatureSpec("encoder", dtype="float32")
    folders = featurize([small["asr.train"]], Extractor(TINY, spec), tmp_path, rows_per_shard=8, use_ray=False)
    features, model = Features(folders.folders), load()
    FAMILY.skip_encoder(model)
    stored = [features.row(number) for number in range(4)]
    assert greedy_ids(model, front_end, stored, 4) == expected[::3], "the first four ASR rows"
    spec, model = FeatureSpec(trim_audio=True), load()
    folders = featurize([small["asr.train"]], Extractor(TINY, spec), tmp_path, rows_per_shard=8, use_ray=False)
    features, trimmed = Features(folders.folders), FAMILY.front_end(TINY, trim_audio=True)
    stored = [features.row(number) for number in range(6)]
    alone = [greedy_ids(model, trimmed, [row], 1)[0] for row in stored]
    assert greedy_ids(model, trimmed, stored, 4) == alone
    batch = collate_prompts(stored, trimmed)
    options = {"max_new_tokens": LIMIT, "do_sample": False, "pad_token_id": 11, "eos_token_id": 2}
    library = FAMILY.generate(model, batch, **options).tolist()
    assert [ids[: ids.index(2)] if 2 in ids else ids for ids in library] == alone


def test_beam_search_equals_transformers(rows, front_end, expected) -> None:
    model, sampling = load(), SamplingParams(LIMIT, num_beams=3)
    completions = dict(generate(model, FAMILY, front_end, rows[:4], batch_size=4, sampling=sampling))
    library: Any = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    texts = []
    for row in rows[:4]:
        batch = library_batch(collate_prompts([row], front_end))
        ids = library.generate(**batch, max_new_tokens=LIMIT, num_beams=3, do_sample=False, eos_token_id=2)
        texts.append(front_end.decode(ids[0, batch["input_ids"].shape[1] :].tolist()).strip())
    assert [completions[index].text for index in range(4)] == texts
    greedy_texts = generate_texts(model, FAMILY, front_end, rows[:4], max_new_tokens=LIMIT)
    assert greedy_texts == [front_end.decode(ids).strip() for ids in expected[:4]]
