"""SALMONN's official files: BEATs files, and checkpoints of the trained weights.

A checkpoint is ``{"model": {official name: tensor}, ...}``. ``official_name`` translates the names of our model's
weights, whether PEFT wraps the language model only, as in the official code, or all of it, as ``adapters.lora`` does.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.models.adapters.read_files import check_finite
from voxray.models.salmonn.audio_path import TRAINED_MODULES
from voxray.models.salmonn.config import BeatsConfig

QFORMER_NAMES = (
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
    ("speech_Qformer.encoder.", "speech_Qformer.bert.encoder."),
    ("speech_Qformer.layernorm.", "speech_Qformer.bert.embeddings.LayerNorm."),
)
"""(part of a name in our model, the same part in official names)."""
LLM, WRAPPER = "llama_model.", "base_model.model."
LORA_ALPHA = 32
"""LoRA alpha of SALMONN's training, for checkpoints that do not state it."""
IGNORED_TENSORS = re.compile(
    r"llama_model\..*\.rotary_emb\.inv_freq"  # computed; newer models do not store it
    r"|llama_model\.(?:base_model\.model\.)?lm_head\.weight"  # the base's own weights, saved if they are tied
    r"|llama_model\..*embed_tokens\.weight"  # likewise
    r"|speech_Qformer\.bert\.embeddings\.position_ids"  # of text inputs, which the Q-Former does not have
)
POSITION_TABLE = re.compile(r"(?:beats\.)?encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")
TABLE_TOLERANCE = 1e-3  # between two copies of BEATs' position table, one of which may be in half precision


@dataclass(frozen=True)
class SalmonnCheckpoint:
    """Content of a checkpoint.

    Attributes:
        path: Path of the file, for messages.
        tensors: {official name: tensor}.
        settings: The ``model`` section of the configuration that it was trained with; empty if the file has none.
    """

    path: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's LoRA; 0 without LoRA."""
        return next((len(tensor) for name, tensor in self.tensors.items() if ".lora_A." in name), 0)

    @property
    def lora_alpha(self) -> float:
        """Alpha of the language model's LoRA."""
        return float(self.settings.get("lora_alpha", LORA_ALPHA))

    @property
    def lora_layers(self) -> list[str]:
        """Names of the layers that LoRA adapts, such as q_proj and v_proj."""
        return sorted({name.split(".")[-4] for name in self.tensors if ".lora_A." in name})

    def without_lora(self) -> "SalmonnCheckpoint":
        """The checkpoint without the language model's LoRA."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if ".lora_" not in name}
        return SalmonnCheckpoint(self.path, tensors, self.settings)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            RunError: The checkpoint does not have it.
        """
        if name not in self.tensors:
            raise RunError(f"{self.path}: no SALMONN checkpoint: it lacks {name}")
        return tuple(self.tensors[name].shape)


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a checkpoint.

    Attributes:
        num_loaded: Number of tensors copied into the model.
        not_needed: Names of tensors that the model does not need, for a known reason.
    """

    num_loaded: int
    not_needed: tuple[str, ...]


def official_name(name: str) -> str:
    """Translate the name of a model's weight to its name in official checkpoints, without wrappers around the model."""
    name = name.replace("_orig_mod.", "").removeprefix(WRAPPER)
    if name.startswith(LLM):
        name_in_llm = name.removeprefix(LLM).removeprefix(WRAPPER).replace(".base_layer.", ".")
        return LLM + WRAPPER + name_in_llm
    if name.startswith("speech_Qformer."):
        for our_part, official_part in QFORMER_NAMES:
            name = name.replace(our_part, official_part)
    return name


def read_checkpoint(path: str | Path) -> SalmonnCheckpoint:
    """Read a checkpoint: a released one, or one written by SALMONN's trainer or ``write_checkpoint``.

    Raises:
        RunError: The file is missing, contains objects other than plain data, has no model, or has weights that are not
            finite.
    """
    content = _read(path)
    tensors, config = _tensors(content, "model", path), content.get("config")
    settings = config.get("model", {}) if isinstance(config, dict) else {}
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    check_finite(tensors, path)
    return SalmonnCheckpoint(str(path), tensors, settings if isinstance(settings, dict) else {})


def read_tensors(path: str | Path, part: str) -> dict[str, torch.Tensor]:
    """Read the tensors under one key of a file.

    Raises:
        RunError: The file cannot be read, or has no tensors under this key.
    """
    return _tensors(_read(path), part, path)


def load_checkpoint(model: torch.nn.Module, checkpoint: SalmonnCheckpoint) -> LoadReport:
    """Copy a checkpoint's tensors into a model, which must have LoRA if the checkpoint has.

    Raises:
        RunError: Tensors are unknown, missing, or of another shape, or the checkpoint was trained with another BEATs.
            The model is unchanged then.
    """
    weights = {official_name(name): weight for name, weight in model.named_parameters()}
    tensors, path = checkpoint.tensors, checkpoint.path
    tables = {name for name in tensors if name not in weights and POSITION_TABLE.fullmatch(name)}
    not_needed = {name for name in tensors if IGNORED_TENSORS.fullmatch(name)} | tables
    unknown = sorted(tensors.keys() - weights.keys() - not_needed)
    missing = sorted(name for name in weights if _is_trained(name) and name not in tensors)
    loaded = sorted((tensors.keys() & weights.keys()) - not_needed)
    for names, problem in ((unknown, "has {}, unknown to the model"), (missing, "lacks {}")):
        if names:
            listed = f"{len(names)} tensors, as {names[0]}" if len(names) > 1 else names[0]
            raise RunError(f"{path}: {problem.format(listed)}")
    for name in loaded:
        shape, model_shape = tuple(tensors[name].shape), tuple(weights[name].shape)
        if shape != model_shape:
            raise RunError(f"{path}: {name} has shape {shape}, the model's has {model_shape}")
    model_table = weights.get("beats.encoder.layers.0.self_attn.relative_attention_bias.weight")
    for name in tables:
        if model_table is not None and not _equal_tables(model_table, tensors[name]):
            raise RunError(f"{path}: was trained with another BEATs file: {name} differs")
    with torch.no_grad():
        for name in loaded:
            weights[name].copy_(tensors[name])
    return LoadReport(len(loaded), tuple(sorted(not_needed)))


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name.split(".")[0] in TRAINED_MODULES


def _equal_tables(table: torch.Tensor, other: torch.Tensor) -> bool:
    if table.shape != other.shape or table.is_meta or other.is_meta:
        return table.shape == other.shape
    return torch.allclose(table.float().cpu(), other.float().cpu(), atol=TABLE_TOLERANCE)


def official_tensors(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{official name: tensor} of weights, detached and on the CPU, as ``write_checkpoint`` takes them."""
    return {official_name(name): weight.detach().cpu().contiguous() for name, weight in weights}


def write_checkpoint(tensors: Mapping[str, torch.Tensor], path: Path, settings: Mapping[str, Any]) -> None:
    """Write a checkpoint that the official code loads as its ``ckpt``.

    Args:
        tensors: {official name: tensor}.
        settings: Plain values such as ``lora_rank``, for the ``model`` section of its ``config``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": dict(tensors), "config": {"model": dict(settings)}}, path)


def read_beats(path: str | Path, *, classes: bool = False) -> tuple[BeatsConfig, dict[str, torch.Tensor]]:
    """Read a BEATs file, pre-trained or fine-tuned.

    Args:
        classes: Keep the classifier of a fine-tuned one.
    Returns:
        Its configuration, and its weights under the names of ``Beats``.
    Raises:
        RunError: The file cannot be read or is not a supported BEATs file.
    """
    content = _read(path)
    settings, tensors = content.get("cfg"), content.get("model")
    if not isinstance(settings, dict) or not isinstance(tensors, dict):
        raise RunError(f"{path}: no BEATs file: it lacks 'cfg' or 'model'")
    config = BeatsConfig.of_file(settings, str(path), classes=classes)
    return config, beats_tensors(tensors, str(path), classes=bool(config.predictor_class))


def beats_tensors(tensors: Mapping[str, torch.Tensor], path: str, *, classes: bool = False) -> dict[str, torch.Tensor]:
    """Drop the copies of the position table in later layers, and the classifier unless ``classes`` is set.

    Raises:
        RunError: The layers' position tables differ, so they cannot share one.
    """
    tables = {name: int(match[1]) for name in tensors if (match := POSITION_TABLE.fullmatch(name))}
    shared = next((tensors[name] for name, layer in tables.items() if layer == 0), None)
    for name in tables:
        if shared is not None and not _equal_tables(shared, tensors[name]):
            raise RunError(f"{path}: {name} differs from the first layer's")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not tables.get(name) and (classes or not name.startswith("predictor."))
    }


def load_beats_weights(beats: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Load a file's weights into ``Beats``.

    Raises:
        RunError: Names or shapes differ from those of the model.
    """
    try:
        beats.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise RunError(f"{path}: not the weights of its own 'cfg': {one_line(error, 300)}") from None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: cannot read it: {error.strerror or error}") from None
    except Exception as error:  # pickle and zip raise many types for other files
        raise RunError(f"{path}: no file of tensors, or one that holds code: {_first_sentence(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return content


def _tensors(content: dict[str, Any], part: str, path: str | Path) -> dict[str, torch.Tensor]:
    tensors = content.get(part)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise RunError(f"{path}: holds no tensors by name under {part!r}")
    return tensors


def _first_sentence(error: Exception) -> str:
    return one_line(error).partition(". ")[0][:200]
