"""Adapters of other kinds, broken ones and those of tied embeddings are used as PEFT does, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, WHISPER
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from voxray.commands.export import run_export
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError
from voxray.models.adapters import lora
from voxray.models.adapters.compatibility import check_adapter_family
from voxray.models.adapters.lora import load_adapter, load_adapter_weights, save_adapter, train_fully
from voxray.models.adapters.read_files import WEIGHTS
from voxray.models.adapters.tied_weights import untie
from voxray.models.registry import get_family

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def base() -> Any:
    return WhisperForConditionalGeneration.from_pretrained(WHISPER, dtype=torch.float32).eval()


def write(folder: Path, config: Any) -> Path:
    """An adapter with random weights, as plain PEFT writes it."""
    torch.manual_seed(0)
    config.base_model_name_or_path = WHISPER
    model = get_peft_model(base(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    config = model.config
    mel_BFT = torch.randn(1, config.num_mel_bins, config.max_source_positions * 2, generator=torch.Generator())
    return model(input_features=mel_BFT, decoder_input_ids=torch.tensor([[1, 2, 3, 4]])).logits


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LoHaConfig(target_modules=["q_proj"]), "of the kind LOHA"),
        (LoKrConfig(target_modules=["q_proj"]), "of the kind LOKR"),
        (IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"]), "of the kind IA3"),
        (VeraConfig(target_modules=["q_proj"]), "of the kind VERA"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1]}), "trainable_token_ind"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]), "with alora_invocation_tokens"),
    ],
    ids=["loha", "lokr", "ia3", "vera", "token_rows", "alora"],
)
def test_other_kinds_are_one_line(tmp_path: Path, config: Any, kind: str) -> None:
    write(tmp_path, config)
    with pytest.raises(RunError, match=rf"^{tmp_path}: .*{kind}"):
        load_adapter(base(), tmp_path)
    with pytest.raises(RunError, match=rf"^{tmp_path}: .*{kind}"):
        check_adapter_family(get_family(WHISPER), tmp_path, WHISPER)


def test_a_tensor_that_is_not_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(lora, "set_peft_model_state_dict", lambda model, tensors: None)
    with pytest.raises(RunError, match=rf"^{tmp_path}: .*: base_model.model.model.* would not be used"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["proj_out"]},
        {"modules_to_save": ["embed_tokens", "proj_out"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["proj_out", "q_proj"]},
    ],
    ids=["input", "output", "both", "tied", "lora_input", "lora_output"],
)
def test_tied_embeddings_are_as_in_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    """A model with tied embeddings, of which the adapter holds one. The exported model answers the same."""
    adapter = write(tmp_path / "adapter", LoraConfig(**{"target_modules": ["q_proj"], **options}))
    expected = logits(PeftModel.from_pretrained(base(), str(adapter)).eval())
    model, _ = load_adapter(base(), adapter)
    assert torch.equal(logits(model), expected)
    values = {"lora_dir": str(adapter), "output_dir": str(tmp_path / "export"), "dtype": "float32"}
    run_export(ExportSettings.model_validate(values))
    exported = WhisperForConditionalGeneration.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert torch.allclose(logits(exported), expected, atol=1e-3)


def test_untie_changes_only_shared_weights() -> None:
    model = base()
    untie(model, {"model.decoder.layer_norm.weight"})
    assert model.config.tie_word_embeddings and model.proj_out.weight is model.model.decoder.embed_tokens.weight
    untie(model, {"proj_out.weight"}, unless_all=True)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    untie(model, {"proj_out.weight"})
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.proj_out.weight, model.model.decoder.embed_tokens.weight)
    assert model.proj_out.weight is not model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_weights_that_are_not_finite_are_one_line(tmp_path: Path, value: float, tuning: str) -> None:
    """Also where training resumes, which loads the weights with the same function."""
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=CPU)
    if tuning == "full":
        model = train_fully(model, family, ("projector",))
    else:
        model = lora.add_lora(model, family, ("projector",), model_id=TINY, r=4, alpha=8, dropout=0.0)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = max(tensors)
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    message = rf"^{tmp_path / WEIGHTS}: {name} has values that are infinite or not a number"
    with pytest.raises(RunError, match=message):
        load_adapter_weights(model, tmp_path)
    with pytest.raises(RunError, match=message):
        load_adapter(family.load_model(TINY, dtype=torch.float32, device=CPU), tmp_path)
