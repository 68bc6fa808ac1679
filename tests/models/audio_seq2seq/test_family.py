"""Logits, generated ids, losses, LoRA and stored encoder outputs, against transformers' own class."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.audio_lm_rows import make_row, noise, sample
from helpers.audio_seq2seq_tiny import library_inputs
from helpers.device_reads import DeviceReads
from torch._dynamo.utils import counters

from voxray.batches.collate import ON_CPU, collate_packed, collate_prompts, collate_training
from voxray.core.errors import RunError, SettingsError
from voxray.generation.generate import SamplingParams, generate
from voxray.models.adapters.lora import add_lora, count_parameters
from voxray.models.audio_seq2seq.facts import FACTS
from voxray.models.hf_files import unwrap_peft
from voxray.models.parts.losses import pass_inputs, token_losses
from voxray.models.registry import UNSUPPORTED, families, get_family

CPU = torch.device("cpu")
LIMIT = 12
LENGTHS = (1_600, 24_321, 63_999, 100_001, 7_000)
pytestmark = pytest.mark.usefixtures("one_thread")


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


def rows(front_end: Any) -> list[Any]:
    languages = ("de", "en", "fr", "es", "de") if front_end.needs_language else ("",) * len(LENGTHS)
    pairs = zip(LENGTHS, languages, strict=True)
    return [make_row(front_end, sample(answer=f"일 이 {n}", language=code), n) for n, code in pairs]


def clip_inputs(base: str, row: Any) -> dict[str, Any]:
    inputs = library_inputs(base, [noise(row.num_samples)], row.language)
    return {name: inputs[name] for name in ("input_features", "input_values", "attention_mask") if name in inputs}


@torch.no_grad()
def losses(family: Any, model: Any, batch: Any) -> torch.Tensor:
    return token_losses(partial(family.answer_logits, model), batch)


@torch.no_grad()
def test_logits_are_the_librarys(base, family, front_end, model, reference):
    """Each row in a batch with the others has the logits of the library for the row alone."""
    batch = collate_training(rows(front_end), front_end)
    ours = family.answer_logits(model, pass_inputs(batch), batch["answer_positions"])
    start = 0
    for row in rows(front_end):
        ids = torch.tensor([[*row.prompt_ids, *row.target_ids[:-1]]])
        theirs = reference(**clip_inputs(base, row), decoder_input_ids=ids).logits[0, len(row.prompt_ids) - 1 :]
        torch.testing.assert_close(ours[start : start + len(theirs)], theirs, atol=2e-5, rtol=1e-4)
        start += len(theirs)
    assert start == len(ours) and ours.std() > 0.01


def library_ids(base: str, reference: Any, row: Any, **options: Any) -> list[int]:
    """Ids that transformers generates for a row alone, up to the end of the answer."""
    prompt = torch.tensor([row.prompt_ids.tolist()])
    options = {"max_new_tokens": LIMIT, "do_sample": False, **options}
    ids = reference.generate(**clip_inputs(base, row), decoder_input_ids=prompt, **options)[0].tolist()
    end = reference.config.eos_token_id
    answer = ids[len(row.prompt_ids) :]
    return answer[: answer.index(end)] if end in answer else answer


@pytest.mark.parametrize("static_cache", [False, True])
def test_steps_give_the_ids_of_generate(base, family, front_end, model, reference, static_cache, monkeypatch):
    """All lengths in batches of two, in which rows finish and join."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    options = {"batch_size": 2, "sampling": SamplingParams(LIMIT), "static_cache": static_cache}
    results = dict(generate(model, family, front_end, rows(front_end), **options))
    expected = [front_end.decode(library_ids(base, reference, row)).strip() for row in rows(front_end)]
    assert [results[number].text for number in range(len(LENGTHS))] == expected
    assert len(set(expected)) > 1, "the audio makes no difference"


def test_beam_search_is_the_librarys(base, family, front_end, model, reference):
    for row in rows(front_end)[:3]:
        options = {"max_new_tokens": LIMIT, "num_beams": 3, "do_sample": False}
        with torch.inference_mode():
            ids = family.generate(model, collate_prompts([row], front_end), **options)[0].tolist()
        ids = ids[: ids.index(front_end.eos_id)] if front_end.eos_id in ids else ids
        assert ids == library_ids(base, reference, row, num_beams=3)


def test_packed_losses_are_the_padded_ones(family, front_end, model):
    packed = losses(family, model, collate_packed(rows(front_end), front_end))
    padded = losses(family, model, collate_training(rows(front_end), front_end))
    alone = torch.cat([losses(family, model, collate_training([row], front_end)) for row in rows(front_end)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_training_mode_computes_the_same(base, family, front_end):
    """Batch statistics and the base's own dropout would mix the rows, and stored encoder outputs would not fit."""
    model = family.load_model(base, dtype=torch.float32, device=CPU)
    batch = collate_training(rows(front_end), front_end)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    evaluated = losses(family, model, batch)
    assert torch.equal(losses(family, model.train(), batch), evaluated)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_encoder_outputs_give_the_same_losses(base, family, front_end, dtype):
    model = family.load_model(base, dtype=dtype, device=CPU)
    batch = collate_training(rows(front_end), front_end)
    direct = losses(family, model, batch)
    encoder = family.load_encoder(base, dtype=dtype, device=CPU)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, model.model.encoder.get_buffer(name)), name
    states = family.encode(encoder, batch["input_features"], batch["num_samples"]).clone()
    assert states.shape[1:] == (front_end.encoder_positions, front_end.encoder_dim)
    family.skip_encoder(model)
    assert torch.equal(losses(family, model, {**batch, "input_features": states}), direct)


def test_lora_by_role_has_no_leaks(base, family, front_end):
    """Every trained weight gets a gradient; no other weight has one."""
    for roles in (("decoder",), ("encoder", "decoder")):
        torch.manual_seed(0)
        loaded = family.load_model(base, dtype=torch.float32, device=CPU)
        model = add_lora(loaded, family, roles, model_id=base, r=4, alpha=8, dropout=0)
        counts = count_parameters(model, family)
        assert {role for role, entry in counts.items() if entry["trainable"]} == set(roles)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        token_losses(partial(family.answer_logits, model), collate_packed(rows(front_end), front_end)).sum().backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not without
        assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("collate", [collate_training, collate_packed])
def test_a_pass_does_not_read_the_device(family, front_end, model, collate):
    batch = collate(rows(front_end), front_end)
    with DeviceReads(batch[name] for name in ON_CPU if name in batch) as counts:
        losses(family, model, batch)
    assert not counts.reads


def test_4_bits_leave_the_output_layer(base, family, front_end):
    model = family.load_model(base, dtype=torch.float32, device=CPU, quantize="4bit")
    quantized = [n for n, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")]
    assert any(".encoder." in name for name in quantized) and any(".decoder." in name for name in quantized)
    assert type(model.proj_out) is torch.nn.Linear
    plain = family.load_model(base, dtype=torch.float32, device=CPU)
    batch = collate_training(rows(front_end), front_end)
    mean, expected = losses(family, model, batch).mean(), losses(family, plain, batch).mean()
    assert float(mean) == pytest.approx(float(expected), rel=0.2)


def test_compiling_the_audio_path_is_refused(family, model):
    with pytest.raises(RunError, match=f"the encoder of a {family.name} model reads clips at their own length"):
        family.audio_path(model)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(base, family, front_end, model, fresh, without_inductor):
    batch = collate_packed(rows(front_end), front_end)
    expected = losses(family, model, batch)
    compiled = family.load_model(base, dtype=torch.float32, device=CPU)
    family.compile_layers(compiled)
    torch.testing.assert_close(losses(family, compiled, batch), expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 2, "the layers are compiled, not just the probe"


def test_released_sizes_on_the_meta_device(base, family, tmp_path):
    """The configuration of the library's defaults, which are the released sizes: LoRA by role, nothing else trains."""
    getattr(transformers, FACTS[family.name].config)().save_pretrained(tmp_path)
    for roles in (("decoder",), ("encoder", "decoder")):
        built = family.build_on_meta(str(tmp_path), dtype=torch.bfloat16)
        with torch.device("meta"):
            model = add_lora(built, family, roles, model_id=str(tmp_path), r=8, alpha=16, dropout=0)
        counts = count_parameters(model, family)
        assert {role for role, entry in counts.items() if entry["trainable"]} == set(roles)
        smallest = {"cohere_asr": 1e9, "canary": 5e8, "moonshine": 2e7}[family.name]
        assert sum(entry["total"] for entry in counts.values()) > smallest
        layers = unwrap_peft(model).model.decoder.layers
        width = layers[0].self_attn.q_proj.in_features
        trained = counts["decoder"]["trainable"]
        assert trained >= len(layers) * 2 * 2 * 8 * 2 * width, "self-attention and cross-attention, two matrices each"


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_other_speech_models_are_refused_in_one_line(model_type, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    assert model_type not in families() and model_type in transformers.CONFIG_MAPPING
    with pytest.raises(SettingsError, match=f"model type '{model_type}' is not supported: ") as error:
        get_family(str(tmp_path))
    assert "\n" not in str(error.value) and str(Path(tmp_path)) in str(error.value)
