"""LoRA by role, on the tiny model and on the released model's full configuration."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, WHISPER
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.audio_trim_record import read_trim_record, set_trim_audio
from voxray.models.adapters.lora import (
    add_lora,
    base_of_adapter,
    check_trainable,
    count_parameters,
    find_adapter,
    find_role,
    load_adapter,
    resolve_targets,
    roles_of_adapter,
    save_adapter,
    target_pattern,
    train_fully,
)
from voxray.models.voxtral.family import Voxtral
from voxray.models.whisper.family import Whisper

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = Voxtral()


def tiny():
    return FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))


def with_lora(roles=("projector", "llm"), r=4):
    torch.manual_seed(0)
    return add_lora(tiny(), FAMILY, roles, model_id=TINY, r=r, alpha=8, dropout=0.0)


def full_size():
    """Voxtral-Mini-3B's shape without its weights."""
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(VoxtralConfig(audio_token_id=24)).requires_grad_(False)


def test_full_size_voxtral_gets_no_adapter_in_the_encoder():
    model = add_lora(full_size(), FAMILY, ("projector", "llm"), model_id="x", r=16, alpha=32, dropout=0.0)
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert not [name for name in adapted if "audio_tower" in name]
    assert len([name for name in adapted if "language_model" in name]) == 30 * 7
    assert len([name for name in adapted if "multi_modal_projector" in name]) == 2
    counts = count_parameters(model, FAMILY)
    assert counts["encoder"]["trainable"] == 0
    assert round(counts["encoder"]["total"] / 1e6, 1) == 637.0
    # r (in + out) summed over q, k, v, o, gate, up, down of 30 layers, and the projector's two layers
    layer = 16 * ((3072 + 4096) * 2 + (3072 + 1024) * 2 + (3072 + 8192) * 3)
    assert counts["llm"]["trainable"] == 30 * layer
    assert counts["projector"]["trainable"] == 16 * ((5120 + 3072) + (3072 + 3072))


def test_lora_by_layer_names_alone_is_refused():
    """Layer names alone put LoRA into the Whisper encoder."""
    leaked = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert any("audio_tower" in name and "lora" in name for name, _ in leaked.named_parameters())
    with pytest.raises(RunError, match=r"audio_tower.* would train, but only projector, llm should"):
        check_trainable(leaked, FAMILY, ("projector", "llm"))


@pytest.mark.parametrize("roles", [("encoder",), ("projector",), ("llm",), ("encoder", "projector", "llm")])
def test_only_the_roles_train(roles):
    counts = count_parameters(with_lora(roles), FAMILY)
    assert {role for role, entry in counts.items() if entry["trainable"]} == set(roles)


def test_a_role_without_matching_layers_is_an_error(monkeypatch):
    monkeypatch.setattr(Voxtral, "lora_targets", {**FAMILY.lora_targets, "projector": ("linear_9",)})
    with pytest.raises(RunError, match="no layer of the projector is called linear_9"):
        with_lora()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "o_proj"), "o_proj: no layer is called so; layers: fc1, fc2, k_proj, out_proj, q_proj, v_proj"),
        (("proj_out",), "proj_out: no layer is called so"),
        (("model.decoder.layers.0.fc1",), "model.decoder.layers.0.fc1: no layer is called so"),
        (("encoder_attn.q_proj",), "encoder_attn.q_proj: no layer of the encoder is called so; its layers: fc1,"),
    ],
)
def test_every_lora_target_has_to_be_a_layer(targets: tuple[str, ...], message: str):
    whisper = Whisper()
    base = whisper.build_on_meta(WHISPER, dtype=torch.float32)
    with pytest.raises(SettingsError, match=f"^--lora_targets {re.escape(message)}"):
        resolve_targets(base, whisper, ("encoder", "decoder"), targets)


def test_all_linear_means_every_linear_layer_of_the_roles():
    """As in PEFT, all but the output layer."""
    whisper = Whisper()
    base = whisper.build_on_meta(WHISPER, dtype=torch.float32)
    assert resolve_targets(base, whisper, ("decoder",), ("encoder_attn.q_proj",)) == ("encoder_attn.q_proj",)
    options = {"model_id": WHISPER, "r": 2, "alpha": 4, "dropout": 0.0}
    model = add_lora(base, whisper, ("decoder",), **options, targets=("all-linear",))
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    linear = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    in_peft = get_peft_model(
        whisper.build_on_meta(WHISPER, dtype=torch.float32), LoraConfig(r=2, target_modules="all-linear")
    )
    expected = {name for name, module in in_peft.named_modules() if hasattr(module, "lora_A") and ".decoder." in name}
    assert adapted == linear == expected


def test_roles_work_in_older_module_layouts():
    """transformers moved the parts from the top of the model into ``model``. Names determine roles, not depth."""
    pattern = target_pattern(FAMILY, ("projector", "llm"))
    for prefix in ("", "model.", "base_model.model.model."):
        assert re.fullmatch(pattern, f"{prefix}language_model.layers.0.self_attn.q_proj")
        assert re.fullmatch(pattern, f"{prefix}language_model.model.layers.0.mlp.up_proj")
        assert not re.fullmatch(pattern, f"{prefix}audio_tower.layers.0.self_attn.q_proj")
        assert find_role(f"{prefix}audio_tower.layers.0.self_attn.q_proj", FAMILY) == "encoder"
    assert find_role("something.else", FAMILY) == "other"


def fill(model):
    """Give the adapter an effect; LoRA starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model):
    ids = torch.tensor([[1, 3, 500, 600, 700, 4]])
    with torch.inference_mode():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_adapter_round_trip(tmp_path):
    """A loaded adapter computes what the saved one did, and reports its number of tensors."""
    model = fill(with_lora())
    save_adapter(model, tmp_path)
    loaded, num_tensors = load_adapter(tiny(), tmp_path)
    assert num_tensors == 2 * (2 * 7 + 2)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(tiny()))
    assert base_of_adapter(tmp_path) == TINY


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_names_its_base_by_the_hub_id(tmp_path, kind):
    """For others it has the hub id; here the folder that was used counts as long as it exists."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0a1b"
    shutil.copytree(TINY, snapshot)
    base = FAMILY.load_model(str(snapshot), dtype=torch.float32, device=torch.device("cpu"))
    roles = ("projector", "llm")
    options = {"model_id": str(snapshot), "r": 2, "alpha": 2, "dropout": 0.0}
    model = train_fully(base, FAMILY, roles) if kind == "full" else add_lora(base, FAMILY, roles, **options)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    assert base_of_adapter(tmp_path / "a") == str(snapshot) and read_trim_record(tmp_path / "a") is False
    assert load_adapter(tiny(), tmp_path / "a")[1]
    set_trim_audio(model, True)
    save_adapter(model, tmp_path / "a")
    assert base_of_adapter(tmp_path / "a") == str(snapshot) and read_trim_record(tmp_path / "a") is True
    shutil.rmtree(snapshot)
    assert base_of_adapter(tmp_path / "a") == "org/tiny"


def test_peft_reads_our_adapter(tmp_path):
    from peft import PeftModel

    model = fill(with_lora())
    save_adapter(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), str(tmp_path))), logits(model))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    save_adapter(with_lora(r=4), tmp_path / "a")
    save_adapter(with_lora(("llm",)), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(RunError, match=r"the adapter does not fit the model: it lacks 4 tensors"):
        load_adapter(tiny(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot read the adapter"):
        load_adapter(tiny(), tmp_path / "a")


def generate_and_score(model):
    """A model's answers to four prompts, and its logits."""
    ids = torch.tensor([[1, 3, 500 + row, 600, 700, 4] for row in range(4)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        return FAMILY.generate(model.eval(), batch, max_new_tokens=12, do_sample=False), model(**batch).logits


def quantized(kind):
    return FAMILY.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"), quantize=kind)


def trained(kind, quantize="none"):
    """A tiny model tuned in one of the four ways until it answers differently from the base."""
    base, roles = quantized(quantize), ("projector", "llm")
    torch.manual_seed(0)
    if kind == "full":
        model = train_fully(base, FAMILY, roles)
    else:
        model = add_lora(base, FAMILY, roles, model_id=TINY, r=4, alpha=8, dropout=0.0, tuning=kind)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, 3, 500, 600, 700, 4, 900, 901, 902, 903, 904, 2]])
    for _ in range(3):
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("lora", "none"), ("dora", "none"), ("rslora", "none"), ("full", "none"), ("lora", "4bit"), ("dora", "8bit")],
)
def test_a_loaded_model_answers_like_the_trained_one(tmp_path, kind, quantize):
    model, fresh = trained(kind, quantize), quantized(quantize)
    save_adapter(model, tmp_path)
    _, before = generate_and_score(fresh)
    loaded, num_tensors = load_adapter(fresh, tmp_path)
    texts, scores = generate_and_score(loaded)
    expected_texts, expected_scores = generate_and_score(model)
    assert torch.equal(texts, expected_texts) and torch.equal(scores, expected_scores)
    assert not torch.allclose(scores, before, atol=1e-2)
    # two matrices for each of 2 x 7 + 2 layers, and with DoRA the norm of every column
    all_weights = sum(find_role(name, FAMILY) != "encoder" for name, _ in tiny().named_parameters())
    assert num_tensors == {"lora": 32, "dora": 48, "rslora": 32, "full": all_weights}[kind]
    assert base_of_adapter(tmp_path) == TINY and find_adapter(str(tmp_path)) == tmp_path
    assert roles_of_adapter(tmp_path, FAMILY) == {"projector", "llm"}


def test_full_tuning_trains_the_roles_except_always_frozen_modules():
    model = train_fully(tiny(), FAMILY, ("encoder", "llm"))
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {find_role(name, FAMILY) for name in idle} == {"encoder", "projector"}
    assert [name for name in idle if "audio_tower" in name] == ["model.audio_tower.embed_positions.weight"]
    headless = tiny()
    FAMILY.skip_encoder(headless)
    with pytest.raises(RunError, match="--tuning full: the encoder has no weights to train"):
        train_fully(headless, FAMILY, ("encoder", "llm"))


def test_fully_tuned_weights_that_do_not_fit_are_refused(tmp_path):
    save_adapter(trained("full"), tmp_path)
    for kind in ("8bit", "4bit"):
        with pytest.raises(RunError, match="fully tuned weights, which no quantised base takes; leave out --quantize"):
            load_adapter(quantized(kind), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("lm_head.weight")
    for changed, message in (
        ({}, r"it lacks 1 tensors, as lm_head\.weight"),
        ({"lm_head.weight": head[:-1].contiguous()}, r"it has in another shape 1 tensors, as lm_head\.weight"),
        ({"lm_head.weight": head, "other": head.clone()}, "it has, unknown to the model, 1 tensors, as other"),
    ):
        save_file({**tensors, **changed}, path)
        with pytest.raises(RunError, match=f"the adapter does not fit the model: {message}"):
            load_adapter(tiny(), tmp_path)


def test_adapters_are_found_in_run_folders(tmp_path):
    def adapter(path: Path) -> Path:
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
        return path

    with pytest.raises(RunError, match="no adapter here"):
        find_adapter(str(tmp_path))
    early = adapter(tmp_path / "run" / "checkpoints" / "step-000009")
    assert find_adapter(str(tmp_path / "run")) == early
    late = adapter(tmp_path / "run" / "checkpoints" / "step-000100")
    assert find_adapter(str(tmp_path / "run")) == late
    final = adapter(tmp_path / "run" / "adapter")
    assert find_adapter(str(tmp_path / "run")) == find_adapter(str(final)) == final
    assert find_adapter(str(tmp_path / "run" / "lora_stage2_adapter")) == final
    old = adapter(tmp_path / "old" / "checkpoint-12")
    adapter(tmp_path / "old" / "checkpoint-7")
    assert find_adapter(str(tmp_path / "old")) == old
