"""Voxtral in Mistral's own format, which vLLM reads: params.json, consolidated.safetensors and tekken.json.

The tensors are those of transformers under other names. The rows of the language model's queries and keys have another
order: transformers rotates the first half of a head against the second, Mistral each row against the next one.

Source: vLLM, ``transformers_utils/configs/mistral.py`` and ``model_executor/models/voxtral.py``.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from voxray.audio.logmel import HOP_SAMPLES, N_FFT, SAMPLE_RATE_HZ
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.models.adapters.read_files import CONFIG, WEIGHTS
from voxray.models.safetensors_files import LazyTensor, write_weights

STEM = "consolidated"
LEFT_OUT = "audio_tower.embed_positions.weight"
"""Sinusoids, which readers compute."""
_AUDIO = "mm_whisper_embeddings"
_ENCODER = f"{_AUDIO}.whisper_encoder"
_NAMES = {
    "language_model.model.embed_tokens": f"{_AUDIO}.tok_embeddings",
    "language_model.model.norm": "norm",
    "language_model.lm_head": "output",
    "multi_modal_projector.linear_1": f"{_AUDIO}.audio_language_projection.0",
    "multi_modal_projector.linear_2": f"{_AUDIO}.audio_language_projection.2",
    "audio_tower.layer_norm": f"{_ENCODER}.transformer.norm",
    "audio_tower.conv1": f"{_ENCODER}.conv_layers.0",
    "audio_tower.conv2": f"{_ENCODER}.conv_layers.1",
}
_TEXT_LAYER = {
    **{f"self_attn.{each}_proj": f"attention.w{each}" for each in "qkvo"},
    **{"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"},
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
}
_AUDIO_LAYER = {
    **{f"self_attn.{each}_proj": f"attention.w{each}" for each in "qkv"},
    **{"self_attn.out_proj": "attention.wo", "self_attn_layer_norm": "attention_norm"},
    **{"fc1": "feed_forward.w1", "fc2": "feed_forward.w2", "final_layer_norm": "ffn_norm"},
}
_LAYERS = {
    "language_model.model.layers.": ("layers.", _TEXT_LAYER),
    "audio_tower.layers.": (f"{_ENCODER}.transformer.layers.", _AUDIO_LAYER),
}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for the largest rank of its adapters."""
_PEFT_TEXT, VLLM_TEXT = "base_model.model.model.language_model.", "base_model.model.language_model.model."
"""Names of the language model's layers in an adapter of PEFT, and in one for vLLM."""
_ROTATED = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")


def mistral_name(name: str) -> str:
    """Mistral's name of a tensor that transformers stores as ``name``.

    Raises:
        RunError: The format has no such tensor.
    """
    module, _, kind = name.rpartition(".")
    for prefix, (other, layer_names) in _LAYERS.items():
        if module.startswith(prefix):
            number, _, inside = module.removeprefix(prefix).partition(".")
            if inside in layer_names:
                return f"{other}{number}.{layer_names[inside]}.{kind}"
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    raise RunError(f"--format mistral: the format has no place for the tensor {name}")


def mistral_params(config: Any) -> dict[str, Any]:
    """Content of params.json for a ``VoxtralConfig``."""
    text, audio = config.text_config, config.audio_config
    encoding = {"sampling_rate": SAMPLE_RATE_HZ, "num_mel_bins": audio.num_mel_bins}
    encoding |= {"hop_length": HOP_SAMPLES, "window_size": N_FFT}
    encoder = {"audio_encoding_args": encoding, "dim": audio.hidden_size, "n_layers": audio.num_hidden_layers}
    encoder |= {"head_dim": audio.hidden_size // audio.num_attention_heads, "hidden_dim": audio.intermediate_size}
    encoder |= {"n_heads": audio.num_attention_heads, "vocab_size": audio.vocab_size}
    encoder |= {"max_source_positions": audio.max_source_positions, "causal": False, "pos_embed": "sinusoidal"}
    downsampling = {"downsample_factor": audio.intermediate_size // audio.hidden_size}
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "head_dim": text.head_dim,
        "hidden_dim": text.intermediate_size,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "rope_theta": text.rope_parameters["rope_theta"],
        "norm_eps": text.rms_norm_eps,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "tied_embeddings": bool(text.tie_word_embeddings),
        "multimodal": {"whisper_model_args": {"encoder_args": encoder, "downsample_args": downsampling}},
    }


def write_mistral(folder: Path, tensors: Iterable[LazyTensor], config: Any) -> None:
    """Write params.json and the weights, in several files if they are large.

    Args:
        tensors: All weights under the names that transformers stores.
    """
    write_json(folder / "params.json", mistral_params(config))
    renamed = []
    for tensor in tensors:
        if tensor.name != LEFT_OUT:
            heads = _num_heads(tensor.name, config)
            compute = partial(_interleaved, tensor, heads) if heads else tensor.compute
            renamed.append(LazyTensor(mistral_name(tensor.name), tensor.shape, tensor.dtype, compute))
    write_weights(folder, renamed, stem=STEM)


def read_mistral(folder: Path, base: Any) -> Any:
    """Load a model of transformers with the weights of a folder in Mistral's format.

    Args:
        base: A model of the same configuration; sinusoids come from it.
    Raises:
        RunError: The folder does not have exactly the model's tensors.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored = {}
    for path in sorted(folder.glob(f"{STEM}*.safetensors")):
        file = safe_open(path, framework="pt")
        stored |= dict.fromkeys(file.keys(), file)
    tensors = revert_weight_conversion(base, dict(base.state_dict()))
    names = {mistral_name(name): name for name in tensors if name != LEFT_OUT}
    if different := sorted(names.keys() ^ stored.keys()):
        raise RunError(f"{folder}: {len(different)} tensors are missing or unknown: {', '.join(different[:5])}")
    for other, name in names.items():
        tensor, heads = stored[other].get_tensor(other), _num_heads(name, base.config)
        tensors[name] = _in_halves(tensor, heads) if heads else tensor
    model = type(base).from_pretrained(None, config=base.config, state_dict=tensors, dtype=base.dtype)
    return model.eval().requires_grad_(False)


def max_lora_rank(adapter: Path) -> int:
    """vLLM's ``max_lora_rank`` for an adapter; 0 if its rank is too large."""
    return next_lora_rank(json.loads((adapter / CONFIG).read_text(encoding="utf-8"))["r"])


def next_lora_rank(rank: int) -> int:
    """The smallest of ``LORA_RANKS`` that is not below a rank; 0 if there is none."""
    return next((each for each in LORA_RANKS if each >= rank), 0)


def rename_for_vllm(adapter: Path) -> None:
    """Give the tensors of a LoRA adapter the names under which vLLM finds their layers, in place.

    vLLM ignores tensors under PEFT's names without a message.

    Raises:
        SettingsError: vLLM does not apply this kind of adapter.
    """
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise SettingsError("--merge projector: vLLM applies no DoRA; merge all of it")
    tensors = load_file(adapter / WEIGHTS)
    if foreign := [name for name in tensors if not name.startswith(_PEFT_TEXT)]:
        raise SettingsError(f"--merge projector: vLLM applies LoRA to the language model only, not to {foreign[0]}")
    renamed = {name.replace(_PEFT_TEXT, VLLM_TEXT, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / WEIGHTS, metadata={"format": "pt"})
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    write_json(adapter / CONFIG, config)


@contextmanager
def peft_names(adapter: Path) -> Iterator[Path]:
    """A temporary copy of an adapter with vLLM's names, under PEFT's."""
    tensors = load_file(adapter / WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(adapter, Path(folder) / "adapter"))
        renamed = {name.replace(VLLM_TEXT, _PEFT_TEXT, 1): tensor for name, tensor in tensors.items()}
        save_file(renamed, copy / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((copy / CONFIG).read_text(encoding="utf-8"))
        config["target_modules"] = rf".*language_model\..*\.({'|'.join(config['target_modules'])})"
        write_json(copy / CONFIG, config)
        yield copy


def _num_heads(name: str, config: Any) -> int:
    """Heads of a tensor whose rows the two formats order differently; 0 for other tensors."""
    if not (rotated := _ROTATED.fullmatch(name)):
        return 0
    text = config.text_config
    return text.num_attention_heads if rotated[1] == "q" else text.num_key_value_heads


def _interleaved(tensor: LazyTensor, heads: int) -> torch.Tensor:
    rows, columns = tensor.shape
    return tensor.compute().view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
