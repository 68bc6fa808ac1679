"""Official files: reading, writing and refusing them; full-size ones by names and shapes."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ASSETS
from transformers import LlamaConfig, WhisperConfig

from voxray.core.errors import RunError
from voxray.models import salmonn
from voxray.models.adapters.lora import add_lora
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.compat.checkpoint import (
    IGNORED_TENSORS,
    POSITION_TABLE,
    SalmonnCheckpoint,
    beats_tensors,
    load_beats_weights,
    load_checkpoint,
    official_name,
    official_tensors,
    read_checkpoint,
    write_checkpoint,
)
from voxray.models.salmonn.config import BeatsConfig
from voxray.models.salmonn.loading import build_config, freeze, wrap_llm
from voxray.models.salmonn.model import SalmonnForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = ASSETS / "salmonn-reference"
LARGE_V2 = WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120)
VICUNA = {
    "7b": LlamaConfig(vocab_size=32_001),
    "13b": LlamaConfig(
        vocab_size=32_001, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
    ),
}
LORA_FAMILY = SimpleNamespace(
    roles={"llm": ("llama_model",)}, lora_targets={"llm": ("q_proj", "v_proj")}, full_modules=()
)


def shapes(name: str) -> dict[str, torch.Tensor]:
    """A full-size file's tensors without their values."""
    stored = json.loads((REFERENCE / f"keys_{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in stored.items()}


@pytest.mark.parametrize(("size", "num_trained"), [("7b", 30_186_240), ("13b", 33_332_992)])
def test_all_tensors_of_a_full_size_checkpoint_are_known(size, num_trained):
    checkpoint = SalmonnCheckpoint("salmonn_v1.pth", shapes(f"salmonn_{size}"))
    with torch.device("meta"):
        model = SalmonnForConditionalGeneration(build_config(checkpoint, LARGE_V2, BeatsConfig(), VICUNA[size]))
        freeze(model)
        wrap_llm(model, checkpoint)
    loaded = load_checkpoint(model, checkpoint)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in weights) == num_trained
    assert loaded.num_loaded == len(weights)
    assert loaded.num_loaded + len(loaded.not_needed) == len(checkpoint.tensors)
    layers = VICUNA[size].num_hidden_layers
    assert len([name for name in loaded.not_needed if name.endswith("rotary_emb.inv_freq")]) == layers
    assert len([name for name in loaded.not_needed if POSITION_TABLE.fullmatch(name)]) == 11
    assert len(loaded.not_needed) == layers + 11 + 1  # and position_ids
    assert sum(weight.numel() for weight in model.beats.parameters()) == 90_311_792
    assert sum(weight.numel() for weight in model.speech_Qformer.parameters()) == 22_837_248
    assert model.config.positions_per_clip == 88


def test_all_tensors_of_a_full_size_beats_file_are_known():
    tensors = shapes("beats_full")
    for classes, num_parameters in ((True, 90_717_055), (False, 90_311_792)):
        settings = {"predictor_class": 527, "finetuned_model": True}
        config = BeatsConfig.of_file(settings, "BEATs.pt", classes=classes)
        with torch.device("meta"):
            beats = Beats(config)
        loaded = beats_tensors(tensors, "BEATs.pt", classes=classes)
        load_beats_weights(beats, loaded, "BEATs.pt")
        assert sum(weight.numel() for weight in beats.parameters()) == num_parameters
        dropped = set(tensors) - set(loaded) - {"predictor.weight", "predictor.bias"}
        assert dropped == {name for name in tensors if re.search(r"layers\.(?!0\.).*relative_attention_bias", name)}


def test_exactly_salmonns_trained_weights_require_gradients(files, rows_of, model):
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    stored = read_checkpoint(files["checkpoint"]).tensors
    assert {official_name(name) for name in trained} == {
        name for name in stored if not (IGNORED_TENSORS.fullmatch(name) or POSITION_TABLE.fullmatch(name))
    }
    assert len(trained) == 73  # 34 with weight decay, 39 without
    model(**rows_of(["w3"], ["asr"], [0])).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained if "embeddings" not in name)
    model.zero_grad()


def test_frozen_encoders_stay_in_eval_mode(model):
    model.train()
    modes = {name: module.training for name, module in model.named_children()}
    assert not modes.pop("speech_encoder") and not modes.pop("beats") and all(modes.values())
    assert not any(module.training for module in model.beats.modules())
    model.speech_encoder.requires_grad_(True)
    assert model.train().speech_encoder.training
    model.speech_encoder.requires_grad_(False)
    model.eval()


@pytest.mark.parametrize("wrapped", ["llm", "whole"])
def test_a_checkpoint_survives_loading_and_writing(files, tmp_path, wrapped):
    """Names are official whether PEFT wraps the language model or the whole."""
    stored = read_checkpoint(files["checkpoint"])
    model = salmonn.load(**files, lora=wrapped == "llm")
    if wrapped == "whole":
        model = add_lora(model, LORA_FAMILY, ["llm"], model_id="x", r=8, alpha=32, dropout=0.1)  # type: ignore[arg-type]
        freeze(model.get_base_model())
        assert load_checkpoint(model, stored).num_loaded == 73
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    write_checkpoint(official_tensors(weights), tmp_path / "new" / "checkpoint_0.pth", {"lora_alpha": 32})
    again = read_checkpoint(tmp_path / "new" / "checkpoint_0.pth")
    assert again.settings == {"lora_alpha": 32}
    assert len(again.tensors) == 73
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, stored.tensors[name]), name


def test_lora_around_the_whole_model_gives_the_same_logits(files, model, rows_of):
    whole = salmonn.load(**files, lora=False)
    whole = add_lora(whole, LORA_FAMILY, ["llm"], model_id="x", r=8, alpha=32, dropout=0.1)  # type: ignore[arg-type]
    load_checkpoint(whole, read_checkpoint(files["checkpoint"]))
    batch = rows_of(["w3"], ["asr"], [0])
    with torch.no_grad():
        assert torch.equal(whole.eval()(**batch).logits, model(**batch).logits)


def changed(files, tmp_path, change) -> dict:
    """The files with a changed checkpoint."""
    content = torch.load(files["checkpoint"], weights_only=True)
    change(content["model"])
    torch.save(content, tmp_path / "changed.pth")
    return {**files, "checkpoint": tmp_path / "changed.pth"}


LM_HEAD = "llama_model.base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(surprise=torch.zeros(1)), "has surprise, unknown to the model"),
        (lambda t: t.pop("ln_audio.bias"), "lacks ln_audio.bias"),
        (
            lambda t: t.update({"ln_audio.bias": torch.zeros(3)}),
            r"ln_audio.bias has shape \(3,\), the model's has \(48",
        ),
        (lambda t: t.pop("speech_query_tokens"), "no SALMONN checkpoint: it lacks speech_query_tokens"),
        (
            lambda t: t["beats.encoder.layers.1.self_attn.relative_attention_bias.weight"].add_(1),
            "trained with another BEATs file",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(files, tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        salmonn.load(**changed(files, tmp_path, change))


def test_extra_tensors_of_other_trainers_are_ignored(files, tmp_path, model):
    """A tied output layer, an embedding, and names of compiled modules."""

    def change(tensors):
        tensors[LM_HEAD] = torch.randn(3, 3)
        tensors["llama_model.base_model.model.model.embed_tokens.weight"] = torch.randn(3, 3)
        for name in [name for name in tensors if name.startswith(("speech_Qformer", "beats"))]:
            parts = name.split(".")
            tensors[".".join([parts[0], "_orig_mod", *parts[1:]])] = tensors.pop(name)

    again = salmonn.load(**changed(files, tmp_path, change))
    for (name, loaded), weight in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, weight), name


def test_unsupported_beats_files_are_refused(files, tmp_path):
    content = torch.load(files["beats"], weights_only=True)
    for part, name, value, message in (
        ("cfg", "deep_norm", False, "BEATs with deep_norm False is not supported"),
        ("cfg", "encoder_layers", 4, "not the weights of its own 'cfg'"),
        ("model", "encoder.layers.2.self_attn.relative_attention_bias.weight", torch.ones(320, 4), "differs from"),
    ):
        other = {**content, part: {**content[part], name: value}}
        torch.save(other, tmp_path / "beats.pt")
        with pytest.raises(RunError, match=message):
            salmonn.load_beats(tmp_path / "beats.pt")


def test_other_files_are_refused_in_one_line(files, tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": SimpleNamespace()}}, tmp_path / "code.pth")
    for name in ("none", "empty", "text", "list", "code"):
        with pytest.raises(RunError, match=f"{name}.pth") as caught:
            read_checkpoint(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    shutil.copytree(files["whisper"], tmp_path / "whisper")
    (tmp_path / "whisper" / "model.safetensors").unlink()
    for part in ("whisper", "llm"):
        with pytest.raises(RunError, match="cannot load"):
            salmonn.load(**{**files, part: tmp_path / "whisper"})


def test_a_tokenizer_that_needs_sentencepiece_is_refused_without_it(files, tmp_path, monkeypatch):
    """Vicuna 1.1 has no tokenizer.json."""
    shutil.copytree(files["llm"], tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").rename(tmp_path / "llm" / "tokenizer.model")
    monkeypatch.setattr("voxray.models.salmonn.loading._has_sentencepiece", lambda: False)
    with pytest.raises(RunError, match=r"tokenizer\.model, which needs: pip install sentencepiece"):
        salmonn.load(**{**files, "llm": tmp_path / "llm"})


def test_without_a_checkpoint_trained_weights_are_initialized(files):
    torch.manual_seed(0)
    model = salmonn.load(**{**files, "checkpoint": None})
    assert model.speech_Qformer.config.hidden_size == 768
    assert model.speech_query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    lora = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(lora) == 6 and not any(weight.any() for weight in lora)


def test_the_pad_row_is_the_same_every_time(files):
    """In the reference it is random."""
    first, second = (salmonn.load(**{**files, "pad_rows": None}, lora=False).llama_model for _ in range(2))
    for layer, other in zip(
        (first.get_input_embeddings(), first.get_output_embeddings()),
        (second.get_input_embeddings(), second.get_output_embeddings()),
        strict=True,
    ):
        assert len(layer.weight) == 421
        assert torch.equal(layer.weight[-1], other.weight[-1])


def test_pad_rows_can_be_a_file_or_its_content(files, tmp_path, model):
    content, expected = torch.load(files["pad_rows"], weights_only=True), model.get_output_embeddings().weight
    assert torch.equal(salmonn.load(**{**files, "pad_rows": content}).get_output_embeddings().weight, expected)
    in_order = (files[name] for name in ("whisper", "beats", "llm", "checkpoint"))
    later = salmonn.load(*in_order)
    assert not torch.equal(later.get_output_embeddings().weight, expected)
    salmonn.set_pad_rows(later, content["pad_rows"])
    assert torch.equal(later.get_output_embeddings().weight, expected)
    torch.save({"pad_rows": {"llama_model.lm_head.weight": torch.zeros(3)}}, tmp_path / "rows.pt")
    with pytest.raises(RunError, match="is no row of the language model"):
        salmonn.load(**{**files, "pad_rows": tmp_path / "rows.pt"})


def test_a_saved_model_gives_the_same_logits(files, tmp_path, model, rows_of):
    """In one folder written by transformers. Trained weights stay float32 in a half-precision model."""
    plain = salmonn.load(**files, lora=False)
    plain.save_pretrained(tmp_path)
    again = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = rows_of(["w3"], ["asr"], [0])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, plain(**batch).logits)
    half = SalmonnForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kinds = {name: {weight.dtype for weight in module.parameters()} for name, module in half.named_children()}
    assert kinds["beats"] == kinds["llama_model"] == kinds["speech_encoder"] == {torch.bfloat16}
    assert kinds["speech_Qformer"] == kinds["ln_audio"] == kinds["speech_llama_proj"] == {torch.float32}
    assert half.speech_query_tokens.dtype == torch.float32
    with torch.no_grad():
        assert half(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), abs=0.1)


def test_names_are_the_same_for_both_positions_of_the_peft_wrapper():
    inner = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert official_name(inner) == inner
    assert official_name("base_model.model.llama_model.model.layers.0.self_attn.q_proj.lora_A.default.weight") == inner
