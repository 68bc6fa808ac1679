"""Logits, generated ids, losses, LoRA and stored encoder outputs, against transformers' own class."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import memory_table
import numpy as np
import pytest
import torch
import transformers
from helpers.audio_lm_rows import library_inputs, make_row, mixed_rows, noise, request_text, sample
from helpers.audio_lm_tiny import BASES
from helpers.device_reads import DeviceReads
from torch._dynamo.utils import counters
from transformers import AutoProcessor

from voxray.batches.collate import ON_CPU, collate_packed, collate_prompts, collate_training
from voxray.generation.generate import SamplingParams, generate
from voxray.models.adapters.lora import add_lora, count_parameters, trainable_parameters
from voxray.models.audio_lm.facts import FACTS
from voxray.models.hf_files import unwrap_peft
from voxray.models.parts.losses import pass_inputs, token_losses
from voxray.models.registry import get_family

CPU = torch.device("cpu")
LIMIT = 12
LENGTHS = (1_600, 24_321, 63_999, 64_000)
LONG = (150_001, 64_001, 128_000)  # samples; a window has 64,000
pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("qwen3_asr", "glmasr")  # `make slow` runs the others too


@pytest.fixture(scope="module", params=[pytest.param(t, marks=[pytest.mark.slow] * (t not in QUICK)) for t in BASES])
def base(request: Any, tiny_base: Callable[[str], str]) -> str:
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def family(base: str) -> Any:
    return get_family(base)


@pytest.fixture(scope="module")
def front_end(base: str, family: Any) -> Any:
    return family.front_end(base)


@pytest.fixture(scope="module")
def model(base: str, family: Any) -> Any:
    return family.load_model(base, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def reference(base: str, family: Any) -> Any:
    """transformers' own model."""
    return getattr(transformers, FACTS[family.name].model).from_pretrained(base, dtype=torch.float32).eval()


def lengths(front_end: Any) -> tuple[int, ...]:
    """Lengths that the model takes; some have several windows."""
    return tuple(length for length in (*LENGTHS, *LONG) if length <= front_end.max_audio_sec * 16_000)


def transcriptions(front_end: Any) -> list[Any]:
    return [make_row(front_end, sample(answer=f"일 이 삼 {length}"), length) for length in lengths(front_end)]


def heard(front_end: Any, num_samples: int) -> np.ndarray:
    """The clip for the library. Its Music Flamingo fails at a last window that is too short for a position."""
    heard_samples = sum(front_end.samples_by_window(num_samples)) if front_end.facts.timed else num_samples
    return noise(num_samples)[:heard_samples]


@torch.no_grad()
def losses(family: Any, model: Any, batch: Any) -> torch.Tensor:
    return token_losses(partial(family.answer_logits, model), batch)


@torch.no_grad()
def test_logits_are_the_librarys(base, family, front_end, model, reference):
    """Each row in a batch with the others has the logits of the library for the row alone."""
    rows = transcriptions(front_end)
    batch = collate_training(rows, front_end)
    ours = family.answer_logits(model, pass_inputs(batch), batch["answer_positions"])
    text = request_text(AutoProcessor.from_pretrained(base), Path(base).name)
    start = 0
    for row in rows:
        end = front_end.show(row.target_ids[:-1])
        inputs = library_inputs(base, [f"{text}{end}"], [heard(front_end, row.num_samples)])
        assert inputs["input_ids"][0].tolist() == [*row.prompt_ids, *row.target_ids[:-1]]
        theirs = reference(**inputs).logits[0, len(row.prompt_ids) - 1 :]
        torch.testing.assert_close(ours[start : start + len(theirs)], theirs, atol=2e-5, rtol=1e-4)
        start += len(theirs)
    assert start == len(ours) and ours.std() > 0.01


def library_answers(base: str, reference: Any, rows: list[Any]) -> list[list[int]]:
    """Ids that transformers generates for every row alone, up to the end of the answer."""
    text = request_text(AutoProcessor.from_pretrained(base), Path(base).name)
    front_end = get_family(base).front_end(base)
    answers = []
    for row in rows:
        inputs = library_inputs(base, [text], [heard(front_end, row.num_samples)])
        ids = reference.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append([token for token in ids.tolist() if token not in front_end.stop_ids])
    return answers


@pytest.mark.parametrize("static_cache", [False, True])
def test_steps_give_the_ids_of_generate(base, family, front_end, model, reference, static_cache, monkeypatch):
    """All lengths in one batch, in which rows finish and join."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    rows = transcriptions(front_end)
    options = {"batch_size": 3, "sampling": SamplingParams(LIMIT), "static_cache": static_cache}
    results = dict(generate(model, family, front_end, rows, **options))
    expected = [front_end.decode(ids).strip() for ids in library_answers(base, reference, rows)]
    assert [results[row].text for row in range(len(rows))] == expected
    assert len(set(expected)) > 1, "the audio makes no difference"


def test_beam_search_is_the_librarys(base, family, front_end, model, reference):
    rows = transcriptions(front_end)[:2]
    stops = front_end.stop_ids
    options = {"max_new_tokens": LIMIT, "num_beams": 3, "do_sample": False}
    text = request_text(AutoProcessor.from_pretrained(base), Path(base).name)
    for row in rows:
        with torch.inference_mode():
            ids_BL = family.generate(model, collate_prompts([row], front_end), **options)
        inputs = library_inputs(base, [text], [heard(front_end, row.num_samples)])
        theirs = reference.generate(**inputs, **options)[0, len(row.prompt_ids) :].tolist()
        assert [t for t in ids_BL[0].tolist() if t not in stops] == [t for t in theirs if t not in stops]


def test_any_of_the_stop_ids_ends_an_answer(family, front_end, model, monkeypatch):
    """GLM-ASR answers may end with the mark of the next turn."""
    [row] = transcriptions(front_end)[1:2]
    prompt = collate_prompts([row], front_end)
    with torch.inference_mode():
        ids = family.generate(model, prompt, max_new_tokens=LIMIT, do_sample=False, eos_token_id=-1)[0].tolist()
    stop = ids[2]
    monkeypatch.setattr(front_end, "stop_ids", frozenset({stop, front_end.eos_id}))
    for options in ({}, {"temperature": 1e-6}):  # greedy steps, and transformers' generate
        sampling = SamplingParams(LIMIT, **options)
        [(_, answer)] = generate(model, family, front_end, [row], batch_size=1, sampling=sampling)
        assert answer.text == front_end.decode(ids[: ids.index(stop)]).strip()


def test_packed_losses_are_the_padded_ones(family, front_end, model):
    rows = mixed_rows(front_end, lengths(front_end))
    packed = losses(family, model, collate_packed(rows, front_end))
    padded = losses(family, model, collate_training(rows, front_end))
    alone = torch.cat([losses(family, model, collate_training([row], front_end)) for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    assert len(packed) == sum(len(row.target_ids) for row in rows)


def stored(family: Any, encoder: Any, batch: Any) -> Any:
    states = family.encode(encoder, batch["input_features"], batch["num_samples"])
    return {**batch, "input_features": states.clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_encoder_outputs_give_the_same_losses(base, family, front_end, dtype):
    """Also in bfloat16: the encoder that is loaded alone is the model's, buffers included."""
    model = family.load_model(base, dtype=dtype, device=CPU)
    batch = collate_training(mixed_rows(front_end, lengths(front_end)), front_end)
    direct = losses(family, model, batch)
    encoder = family.load_encoder(base, dtype=dtype, device=CPU)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, model.model.audio_tower.get_buffer(name)), name
    cached = stored(family, encoder, batch)
    states = cached["input_features"]
    assert states.shape[1:] == (front_end.encoder_positions, front_end.encoder_dim)
    family.skip_encoder(model)
    assert torch.equal(losses(family, model, cached), direct)


def test_lora_by_role_has_no_leaks(base, family, front_end):
    """Every trained weight gets a gradient; no other weight has one."""
    for roles in (("llm",), ("projector",), ("projector", "llm"), ("encoder", "projector", "llm")):
        torch.manual_seed(0)
        model = add_lora(
            family.load_model(base, dtype=torch.float32, device=CPU),
            family,
            roles,
            model_id=base,
            r=4,
            alpha=8,
            dropout=0,
        )
        counts = count_parameters(model, family)
        assert {role for role, entry in counts.items() if entry["trainable"]} == set(roles)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        batch = collate_packed(mixed_rows(front_end, lengths(front_end)), front_end)
        token_losses(partial(family.answer_logits, model), batch).sum().backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not without
        assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        if "encoder" in roles:
            trained = {
                name.split(".lora_")[0].rpartition(".")[2]
                for name, _ in trainable_parameters(model)
                if "audio_tower" in name
            }
            assert trained == set(family.lora_targets["encoder"])


@torch.no_grad()
@pytest.mark.parametrize("collate", [collate_training, collate_packed])
def test_only_the_librarys_encoder_reads_the_device(family, front_end, model, collate):
    """On a GPU each read waits for what was computed before it. With stored encoder outputs there is none."""
    batch = collate(mixed_rows(front_end, lengths(front_end)), front_end)
    on_cpu = [batch[name] for name in ON_CPU if name in batch]
    with DeviceReads(on_cpu) as in_encoder:
        family.audio_embeds(model, batch)
    with DeviceReads(on_cpu) as in_pass:
        losses(family, model, batch)
    assert in_pass.reads == in_encoder.reads


def test_4_bits_are_the_language_models(base, family, front_end):
    """Also where the output layer shares the weights of the token embeddings."""
    model = family.load_model(base, dtype=torch.float32, device=CPU, quantize="4bit")
    quantized = [n for n, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")]
    assert len(quantized) == 2 * 7 and all(".language_model.layers." in name for name in quantized)
    assert type(model.lm_head) is torch.nn.Linear
    plain = family.load_model(base, dtype=torch.float32, device=CPU)
    batch = collate_packed(mixed_rows(front_end, lengths(front_end)), front_end)
    assert float(losses(family, model, batch).mean()) == pytest.approx(
        float(losses(family, plain, batch).mean()), rel=0.1
    )


def test_a_batch_without_audio_gives_the_audio_roles_zero_gradients(base, family, front_end):
    """So that workers whose batches differ compute with the same weights."""
    text = make_row(front_end, sample(), 16_000)
    text = collate_training([text], front_end)
    audio = ("input_features", "num_samples", "audio_positions", "audio_outputs")
    text = {name: tensor for name, tensor in text.items() if name not in audio}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != front_end.audio_id, front_end.eos_id)
    roles = ("encoder", "projector", "llm")
    for skip in (False, True):
        base_model = family.load_model(base, dtype=torch.float32, device=CPU)
        if skip:
            family.skip_encoder(base_model)
            roles = ("projector", "llm")
        model = add_lora(base_model, family, roles, model_id=base, r=4, alpha=8, dropout=0)
        logits = partial(family.answer_logits, model, roles_in_every_pass=roles)
        token_losses(logits, text).sum().backward()
        audio = [p for n, p in model.named_parameters() if p.requires_grad and ("audio_tower" in n or "projector" in n)]
        assert audio and all(p.grad is not None and not p.grad.any() for p in audio)


def test_compiled_audio_path_is_the_models(base, family, front_end, model):
    from voxray.core.errors import RunError

    batch = collate_training(transcriptions(front_end), front_end)
    if not family.facts.compiles:
        with pytest.raises(RunError, match=f"the audio path of a {family.name} model depends on whole clips"):
            family.audio_path(model)
        return
    direct = losses(family, model, batch)
    other = family.load_model(base, dtype=torch.float32, device=CPU)
    path = family.audio_path(model)
    calls = []

    def run(mel_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        calls.append(len(mel_WFT))
        return path(mel_WFT, num_samples_W)

    family.use_audio_path(other, run)
    assert torch.equal(losses(family, other, batch), direct) and calls == [len(batch["input_features"])]
    exported = torch.export.export(path, (batch["input_features"], batch["num_samples"]))
    torch.testing.assert_close(
        exported.module()(batch["input_features"], batch["num_samples"]),
        path(batch["input_features"], batch["num_samples"]),
    )


def test_positions_of_the_encoders_layers(base, family, front_end):
    """Preflight counts their memory by them."""
    model = family.load_model(base, dtype=torch.float32, device=CPU)
    shapes: list[tuple[int, ...]] = []
    layer = model.model.audio_tower.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    losses(family, model, collate_training([make_row(front_end, sample(), 64_000)], front_end))
    [shape] = shapes
    assert shape[-1] == front_end.encoder_dim
    assert shape.numel() == shape[-1] * family.encoder_layer_positions(model.config, front_end)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(base, family, front_end, model, fresh, without_inductor):
    batch = collate_packed(mixed_rows(front_end, lengths(front_end)), front_end)
    expected = losses(family, model, batch)
    compiled = family.load_model(base, dtype=torch.float32, device=CPU)
    family.compile_layers(compiled)
    torch.testing.assert_close(losses(family, compiled, batch), expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 2, "the layers are compiled, not just the probe"


def test_released_sizes_on_the_meta_device(base, family, tmp_path):
    """LoRA by role, nothing else trains. The library's defaults are the released sizes where no table has others."""
    released = {model_type: name for name, (model_type, _) in memory_table.MODELS.items()}.get(family.name)
    config = memory_table.released_config(released) if released else getattr(transformers, family.facts.config)()
    config.save_pretrained(tmp_path)
    for roles in (("projector",), ("projector", "llm"), ("encoder", "projector", "llm")):
        built = family.build_on_meta(str(tmp_path), dtype=torch.bfloat16)
        with torch.device("meta"):
            model = add_lora(built, family, roles, model_id=str(tmp_path), r=8, alpha=16, dropout=0)
        counts = count_parameters(model, family)
        assert {role for role, entry in counts.items() if entry["trainable"]} == set(roles)
        assert sum(entry["total"] for entry in counts.values()) > 5e8
        layers = len(unwrap_peft(model).model.audio_tower.layers)
        if "encoder" in roles:
            per_layer = 4 * 8 * 2 * config.audio_config.hidden_size
            assert counts["encoder"]["trainable"] == layers * per_layer
