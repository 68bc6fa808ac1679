"""Our greedy loop against transformers' own generate, token for token."""

from typing import Any

import pytest
import torch
from conftest import TINY
from transformers import VoxtralForConditionalGeneration

from voxray.batches.collate import collate_packed, collate_prompts
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import FeatureRow, Features
from voxray.generation import continuous_batching as greedy_module
from voxray.generation.continuous_batching import generate_greedy
from voxray.generation.generate import SamplingParams, generate, generate_texts
from voxray.models.adapters.lora import add_lora
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.registry import get_family
from voxray.training.loop import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY = get_family(TINY)
LIMIT = 40


@pytest.fixture(scope="module")
def rows(small, make_features) -> list[FeatureRow]:
    """Audio and text rows in turn, so that every batch is mixed."""
    features = Features(make_features(*(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))))
    third = len(features) // 3
    return [features.row(number + part * third) for number in range(4) for part in range(3)]


@pytest.fixture(scope="module")
def front_end() -> Any:
    return FAMILY.front_end(TINY)


def load() -> Any:
    return FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))


def library(model: Any, front_end: Any, rows: list[FeatureRow], limit: int = LIMIT) -> list[list[int]]:
    """Tokens by the library's generate, each row by itself."""
    found = []
    for row in rows:
        batch = collate_prompts([row], front_end)
        ids = model.generate(**batch, max_new_tokens=limit, do_sample=False, pad_token_id=11, eos_token_id=2)
        ids = ids[0, batch["input_ids"].shape[1] :].tolist()
        found.append(ids[: ids.index(2)] if 2 in ids else ids)
    return found


def ours(model: Any, front_end: Any, rows: list[FeatureRow], size: int, limits: list[int] | None = None) -> Any:
    options = {"batch_size": size, "limits": limits or [LIMIT] * len(rows)}
    found = list(generate_greedy(model, FAMILY, front_end, rows, **options))
    assert sorted(answer.number for answer in found) == list(range(len(rows))), "every row once"
    return [answer.ids for answer in sorted(found, key=lambda answer: answer.number)]


@pytest.fixture(scope="module")
def wanted(rows, front_end) -> list[list[int]]:
    plain = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    found = library(plain, front_end, rows)
    assert len({len(ids) for ids in found}) > 4, "answers end at different times, or rows would never leave"
    return found


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_tokens_are_those_of_transformers(rows, front_end, wanted, size, share, monkeypatch) -> None:
    """Whether a row leaves at once, with others, or when all of its batch are done."""
    monkeypatch.setattr(greedy_module, "MIN_IDLE_SHARE", share)
    assert ours(load(), front_end, rows, size) == wanted
    assert ours(load(), front_end, rows[::-1], size) == wanted[::-1]


def test_rows_leave_and_others_come(rows, front_end, wanted, monkeypatch) -> None:
    sizes: list[int] = []
    step = CausalDecodeState.decode_step

    def counted(state: CausalDecodeState, ids_B: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids_B))
        return step(state, ids_B)

    monkeypatch.setattr(CausalDecodeState, "decode_step", counted)
    ours(load(), front_end, rows, 4)
    needed = sum(map(len, wanted))
    together = sum(4 * max(map(len, wanted[at : at + 4])) for at in range(0, len(rows), 4))
    assert max(sizes) == 4
    assert sum(sizes) < 0.5 * (needed + together), "most of what waiting for the longest answer costs is saved"


def test_a_limit_of_each_row_cuts_its_answer(rows, front_end, wanted) -> None:
    limits = [1 + number % 5 for number in range(len(rows))]
    found = ours(load(), front_end, rows, 4, limits)
    assert found == [ids[:limit] for ids, limit in zip(wanted, limits, strict=True)]
    model, search = load(), SamplingParams(max(map(len, wanted)))
    for place, answer in generate(model, FAMILY, front_end, rows, batch_size=5, search=search):
        assert answer.text == front_end.decode(wanted[place]).strip()
        assert answer.num_new_tokens == len(wanted[place]) and answer.sec > 0
        assert answer.hit_max == (len(wanted[place]) == search.max_new_tokens)


def test_it_works_on_models_that_were_changed(rows, front_end, wanted) -> None:
    """Packed attention, LoRA, bfloat16 and 4 bits: as generate on the very same model, a row at a time."""
    packed = load()
    with torch.no_grad():
        answer_loss(packed, FAMILY, collate_packed(rows[:3], front_end), 0.0)
    assert ours(packed, front_end, rows, 4) == wanted
    torch.manual_seed(0)
    tuned = add_lora(load(), FAMILY, ("projector", "llm"), model_id=TINY, r=4, alpha=64, dropout=0.1).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs = library(tuned, front_end, rows, 12)
    assert theirs != [ids[:12] for ids in wanted]
    assert ours(tuned, front_end, rows, 4, [12] * len(rows)) == theirs
    small = FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"), quantize="4bit")
    theirs = library(small, front_end, rows, 12)
    assert ours(small, front_end, rows, 4, [12] * len(rows)) == theirs


def test_stored_encoder_outputs_and_trimmed_audio(small, wanted, rows, front_end, tmp_path) -> None:
    storing = FeatureSpec("encoder", dtype="float32")
    folders = featurize([small["asr.train"]], Extractor(TINY, storing), tmp_path, rows_per_shard=8, use_ray=False)
    features, model = Features(folders.folders), load()
    FAMILY.skip_encoder(model)
    stored = [features.row(number) for number in range(4)]
    assert ours(model, front_end, stored, 4) == wanted[::3], "the first four ASR rows"
    trimming, model = FeatureSpec(trim_audio=True), load()
    folders = featurize([small["asr.train"]], Extractor(TINY, trimming), tmp_path, rows_per_shard=8, use_ray=False)
    features, trimmed = Features(folders.folders), FAMILY.front_end(TINY, trim_audio=True)
    stored = [features.row(number) for number in range(6)]
    alone = [ours(model, trimmed, [row], 1)[0] for row in stored]
    assert ours(model, trimmed, stored, 4) == alone
    batch = collate_prompts(stored, trimmed)
    options = {"max_new_tokens": LIMIT, "do_sample": False, "pad_token_id": 11, "eos_token_id": 2}
    theirs = FAMILY.generate(model, batch, **options).tolist()
    assert [ids[: ids.index(2)] if 2 in ids else ids for ids in theirs] == alone


def test_beams_are_those_of_transformers(rows, front_end, wanted) -> None:
    model, search = load(), SamplingParams(LIMIT, num_beams=3)
    found = dict(generate(model, FAMILY, front_end, rows[:4], batch_size=4, search=search))
    plain: Any = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    texts = []
    for row in rows[:4]:
        batch = collate_prompts([row], front_end)
        ids = plain.generate(**batch, max_new_tokens=LIMIT, num_beams=3, do_sample=False, eos_token_id=2)
        texts.append(front_end.decode(ids[0, batch["input_ids"].shape[1] :].tolist()).strip())
    assert [found[place].text for place in range(4)] == texts
    greedy_texts = generate_texts(model, FAMILY, front_end, rows[:4], max_new_tokens=LIMIT)
    assert greedy_texts == [front_end.decode(ids).strip() for ids in wanted[:4]]
