"""Voxtral in Mistral's format: names, parameters, order of rotated rows, and adapters that vLLM applies."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.adapters import random_adapter
from safetensors.torch import load_file, save_file

from voxray.commands import export_formats
from voxray.commands.export import run_export
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError, SettingsError
from voxray.models.safetensors_files import write_weights
from voxray.models.voxtral import mistral_format

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER_KEYS = {
    *(f"attention.w{each}.weight" for each in "qkvo"),
    *(f"feed_forward.w{each}.weight" for each in "123"),
    *("attention_norm.weight", "ffn_norm.weight"),
}


def run(adapter: Path, output_dir: Path, **changes: object) -> dict:
    values = {"lora_dir": str(adapter), "output_dir": str(output_dir), "format": "mistral", **changes}
    return run_export(ExportSettings.model_validate(values))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter"), std=0.1)


def test_files_and_names(adapter: Path, tmp_path: Path) -> None:
    report = run(adapter, tmp_path / "e")
    assert report["difference_on_disk"] < 1e-4 and report["format"] == "mistral"
    assert {path.name for path in (tmp_path / "e").iterdir()} >= {"params.json", "tekken.json"}
    assert (tmp_path / "e" / "tekken.json").read_bytes() == (Path(TINY) / "tekken.json").read_bytes()
    stored = tensors(tmp_path / "e")
    for number in (0, 1):
        prefix = f"layers.{number}."
        assert {name.removeprefix(prefix) for name in stored if name.startswith(prefix)} == LAYER_KEYS
    whisper = "mm_whisper_embeddings.whisper_encoder."
    assert {"norm.weight", "output.weight", "mm_whisper_embeddings.tok_embeddings.weight"} < set(stored)
    assert f"{whisper}transformer.layers.1.attention.wo.bias" in stored and f"{whisper}conv_layers.1.bias" in stored
    assert not any("embed_positions" in name for name in stored)
    params = json.loads((tmp_path / "e" / "params.json").read_text())
    encoder = params["multimodal"]["whisper_model_args"]["encoder_args"]
    assert (params["dim"], params["n_kv_heads"], params["rope_theta"]) == (128, 2, 10_000)
    assert (encoder["dim"], encoder["max_source_positions"], encoder["audio_encoding_args"]["num_mel_bins"]) == (
        128,
        200,
        128,
    )
    assert params["multimodal"]["whisper_model_args"]["downsample_args"] == {"downsample_factor": 4}


def test_rows_are_in_the_order_of_mistrals_rotation(adapter: Path, tmp_path: Path) -> None:
    """Attention scores by Mistral's rotation of neighbouring rows are those by transformers' rotation of halves."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    run(adapter, tmp_path / "mistral")
    run(adapter, tmp_path / "hf", format="transformers")
    stored = tensors(tmp_path / "mistral")
    theirs = {
        name: load_file(tmp_path / "hf" / "model.safetensors")[name]
        for name in (
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.k_proj.weight",
        )
    }
    hidden, dim = torch.randn(6, 128), 32
    angles = torch.outer(torch.arange(6.0), 10_000.0 ** (-torch.arange(0, dim, 2) / dim))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    ours = []
    for name in ("wq", "wk"):
        heads = (hidden @ stored[f"layers.0.attention.{name}.weight"].T).view(6, -1, dim // 2, 2)
        ours.append(torch.view_as_real(torch.view_as_complex(heads) * turns).flatten(2))
    expected = [(hidden @ weight.T).view(1, 6, -1, dim).transpose(1, 2) for weight in theirs.values()]
    both = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(*expected, both.cos(), both.sin())
    scores = torch.einsum("lhd,mhd->hlm", ours[0][:, :2], ours[1])
    torch.testing.assert_close(scores, q[0, :2] @ k[0].transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_the_projector_is_merged_and_lora_has_vllms_names(adapter: Path, tmp_path: Path) -> None:
    report = run(adapter, tmp_path / "e", merge="projector")
    assert report["layers_merged"] == 2 and report["difference_on_disk"] < 1e-4
    names = set(load_file(tmp_path / "e" / "adapter" / "adapter_model.safetensors"))
    assert names and all(name.startswith("base_model.model.language_model.model.layers.") for name in names)
    config = json.loads((tmp_path / "e" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_several_files(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mistral_format, "write_weights", lambda *args, **options: write_weights(*args, 1_000_000, **options)
    )
    assert run(adapter, tmp_path / "e")["difference_on_disk"] < 1e-4
    index = json.loads((tmp_path / "e" / "consolidated.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(tensors(tmp_path / "e"))


@pytest.mark.parametrize("damage", ["missing", "other values", "unknown"])
def test_a_wrong_file_is_not_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    read = export_formats.read_mistral

    def damaged(folder: Path, base: object) -> object:
        [path] = folder.glob("*.safetensors")
        stored = load_file(path)
        if damage == "missing":
            del stored["norm.weight"]
        elif damage == "unknown":
            stored["layers.0.attention.wx.weight"] = torch.zeros(1)
        else:
            stored["layers.0.attention.wq.weight"] = stored["layers.0.attention.wq.weight"].flip(0).contiguous()
        save_file(stored, path)
        return read(folder, base)

    monkeypatch.setattr(export_formats, "read_mistral", damaged)
    message = (
        "the model on disk answers differently" if damage == "other values" else "1 tensors are missing or unknown"
    )
    with pytest.raises(RunError, match=message):
        run(adapter, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_refusals(tmp_path: Path) -> None:
    dora = random_adapter(tmp_path / "dora", tuning="dora")
    with pytest.raises(SettingsError, match="--merge projector: vLLM applies no DoRA; merge all of it"):
        run(dora, tmp_path / "e", merge="projector")
    assert not (tmp_path / "e").exists()
    with pytest.raises(SettingsError, match="--format mistral: voxtral models only, not whisper"):
        run(dora, tmp_path / "e", model_id=WHISPER)
