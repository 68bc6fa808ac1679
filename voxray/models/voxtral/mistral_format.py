"""Voxtral in Mistral's own format, which vLLM reads: params.json, consolidated.safetensors and tekken.json.

The tensors are those of transformers under other names. The rows of the language model's queries and keys have another
order: transformers rotates the first half of a head against the second, Mistral each row against the next one.

Source: vLLM, ``transformers_utils/configs/mistral.py`` and ``model_executor/models/voxtral.py``.
"""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from voxray.audio.logmel import HOP_SAMPLES, N_FFT, SAMPLE_RATE_HZ
from voxray.core.errors import RunError
from voxray.core.storage import write_json
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


def read_mistral(folder: Path, model: Any) -> None:
    """Copy the weights of a folder in Mistral's format into a model of transformers, whose types they get.

    Raises:
        RunError: The folder does not have exactly the model's tensors.
    """
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    stored = {}
    for path in sorted(folder.glob(f"{STEM}*.safetensors")):
        file = safe_open(path, framework="pt")
        stored |= {name: file for name in file.keys()}  # noqa: SIM118, a file is no dictionary
    parameters = revert_weight_conversion(model, dict(model.state_dict(keep_vars=True)))
    expected = {mistral_name(name): name for name in parameters if name != LEFT_OUT}
    if different := sorted(expected.keys() ^ stored.keys()):
        raise RunError(f"{folder}: {len(different)} tensors are missing or unknown: {', '.join(different[:5])}")
    for mistral, name in expected.items():
        tensor, heads = stored[mistral].get_tensor(mistral), _num_heads(name, model.config)
        parameters[name].data.copy_(_in_halves(tensor, heads) if heads else tensor)


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
