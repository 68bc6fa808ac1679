"""SALMONN's official files: BEATs, and checkpoints of what was trained, read and written under their own names.

A checkpoint is ``{"model": {name: tensor}, ...}``. Which names those of a model are does not depend on where PEFT's
wrapper stands: around the language model alone, as in the official code, or around the whole, as ``models.lora`` does.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.models.salmonn.audio_path import TRAINED
from voxray.models.salmonn.config import BeatsConfig

QFORMER_NAMES = (
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
    ("speech_Qformer.encoder.", "speech_Qformer.bert.encoder."),
    ("speech_Qformer.layernorm.", "speech_Qformer.bert.embeddings.LayerNorm."),
)
"""Parts of our names, and what stands there in the official ones."""
LLM, WRAPPER = "llama_model.", "base_model.model."
NOT_NEEDED = re.compile(
    r"llama_model\..*\.rotary_emb\.inv_freq"  # computed, and no longer kept
    r"|llama_model\.(?:base_model\.model\.)?lm_head\.weight"  # the base's own, saved along where it is tied
    r"|llama_model\..*embed_tokens\.weight"  # likewise
    r"|speech_Qformer\.bert\.embeddings\.position_ids"  # of words that the Q-Former does not read
)
TABLE = re.compile(r"(?:beats\.)?encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")
TABLE_TOLERANCE = 1e-3  # between two copies of BEATs' table, one of which may have been in half precision


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds.

    Attributes:
        path: Of the file, for messages.
        tensors: By official name.
        settings: The ``model`` part of the configuration that it was trained with; empty if it holds none.
    """

    path: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's LoRA, 0 without one."""
        return next((len(tensor) for name, tensor in self.tensors.items() if ".lora_A." in name), 0)

    @property
    def lora_layers(self) -> list[str]:
        """Names of the layers that LoRA adapts, such as q_proj and v_proj."""
        return sorted({name.split(".")[-4] for name in self.tensors if ".lora_A." in name})

    def without_lora(self) -> "Trained":
        """All but the language model's LoRA."""
        kept = {name: tensor for name, tensor in self.tensors.items() if ".lora_" not in name}
        return Trained(self.path, kept, self.settings)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor.

        Raises:
            RunError: The checkpoint lacks it.
        """
        if name not in self.tensors:
            raise RunError(f"{self.path}: no SALMONN checkpoint: it lacks {name}")
        return tuple(self.tensors[name].shape)


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors.

    Attributes:
        num_loaded: Tensors that are in the model now.
        not_needed: Names of those that have no place in it, for a known reason.
    """

    num_loaded: int
    not_needed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.num_loaded} tensors loaded, {len(self.not_needed)} not needed"


def official_name(name: str) -> str:
    """Name of one of a model's weights in an official checkpoint; whatever wraps the model is left out."""
    name = name.replace("_orig_mod.", "").removeprefix(WRAPPER)
    if name.startswith(LLM):
        inside = name.removeprefix(LLM).removeprefix(WRAPPER).replace(".base_layer.", ".")
        return LLM + WRAPPER + inside
    if name.startswith("speech_Qformer."):
        for ours, theirs in QFORMER_NAMES:
            name = name.replace(ours, theirs)
    return name


def read_trained(path: str | Path) -> Trained:
    """Read a checkpoint: a released one, or one that a trainer wrote.

    Raises:
        RunError: There is none, it holds more than numbers and texts, or no model.
    """
    content = _read(path)
    tensors, config = _tensors(content, "model", path), content.get("config")
    settings = config.get("model", {}) if isinstance(config, dict) else {}
    clean = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    return Trained(str(path), clean, settings if isinstance(settings, dict) else {})


def read_tensors(path: str | Path, part: str) -> dict[str, torch.Tensor]:
    """Read one part of a file of tensors.

    Raises:
        RunError: There is no such file, or it holds no tensors there.
    """
    return _tensors(_read(path), part, path)


def load_trained(model: torch.nn.Module, trained: Trained) -> LoadReport:
    """Copy a checkpoint's tensors into a model that has its LoRA, if the checkpoint has one.

    Raises:
        RunError: Tensors are left over, missing, or of another shape, or the checkpoint was trained with another BEATs.
            Nothing has changed then.
    """
    wanted = {official_name(name): weight for name, weight in model.named_parameters()}
    unused = {name for name in trained.tensors if name not in wanted}
    tables = {name for name in unused if TABLE.fullmatch(name)}
    left_over = sorted(name for name in unused - tables if not NOT_NEEDED.fullmatch(name))
    base = {name for name in trained.tensors if NOT_NEEDED.fullmatch(name)} | tables
    loaded = sorted(set(trained.tensors) - unused - base)
    missing = sorted(name for name in wanted if _is_trained(name) and name not in trained.tensors)
    wrong = [name for name in loaded if wanted[name].shape != trained.tensors[name].shape]
    for names, what in ((left_over, "has {}, unknown to the model"), (missing, "lacks {}")):
        if names:
            raise RunError(f"{trained.path}: {_these(what, names)}")
    for name in wrong:
        shapes = tuple(trained.tensors[name].shape), tuple(wanted[name].shape)
        raise RunError(f"{trained.path}: {name} has shape {shapes[0]}, the model's has {shapes[1]}")
    own = wanted.get("beats.encoder.layers.0.self_attn.relative_attention_bias.weight")
    for name in tables:
        if own is not None and not _equal_tables(own, trained.tensors[name]):
            raise RunError(f"{trained.path}: was trained with another BEATs file: {name} differs")
    with torch.no_grad():
        for name in loaded:
            wanted[name].copy_(trained.tensors[name])
    return LoadReport(len(loaded), tuple(sorted(base)))


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name.split(".")[0] in TRAINED


def _these(what: str, names: list[str]) -> str:
    return what.format(f"{len(names)} tensors, as {names[0]}" if len(names) > 1 else names[0])


def _equal_tables(own: torch.Tensor, other: torch.Tensor) -> bool:
    if own.shape != other.shape or own.is_meta or other.is_meta:
        return own.shape == other.shape
    return torch.allclose(own.float().cpu(), other.float().cpu(), atol=TABLE_TOLERANCE)


def official_tensors(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weights by official name, detached and on the CPU, as ``write_trained`` takes them."""
    return {official_name(name): weight.detach().cpu().contiguous() for name, weight in weights}


def write_trained(tensors: Mapping[str, torch.Tensor], path: Path, settings: Mapping[str, Any]) -> None:
    """Write a checkpoint that the official code loads as its ``ckpt``.

    Args:
        tensors: By official name.
        settings: For its ``config``'s ``model`` part: plain values such as ``lora_rank``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": dict(tensors), "config": {"model": dict(settings)}}, path)


def read_beats(path: str | Path, *, classes: bool = False) -> tuple[BeatsConfig, dict[str, torch.Tensor]]:
    """Read a BEATs file, pre-trained or fine-tuned.

    Args:
        classes: Keep the classifier of a fine-tuned one.
    Returns:
        Its configuration, and the weights as ``Beats`` names them.
    Raises:
        RunError: There is none, or it is no BEATs file of the published kind.
    """
    content = _read(path)
    settings, tensors = content.get("cfg"), content.get("model")
    if not isinstance(settings, dict) or not isinstance(tensors, dict):
        raise RunError(f"{path}: no BEATs file: it lacks 'cfg' or 'model'")
    config = BeatsConfig.of_file(settings, str(path), classes=classes)
    return config, beats_tensors(tensors, str(path), classes=bool(config.predictor_class))


def beats_tensors(tensors: Mapping[str, torch.Tensor], path: str, *, classes: bool = False) -> dict[str, torch.Tensor]:
    """Leave out what one file holds twice, and the classifier unless it is wanted.

    Raises:
        RunError: The layers' tables of relative positions differ: then they are not one table.
    """
    tables = {name: int(match[1]) for name in tensors if (match := TABLE.fullmatch(name))}
    shared = next((tensors[name] for name, layer in tables.items() if layer == 0), None)
    for name in tables:
        if shared is not None and not _equal_tables(shared, tensors[name]):
            raise RunError(f"{path}: {name} differs from the first layer's")
    unused = {name for name, layer in tables.items() if layer}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in unused and (classes or not name.startswith("predictor."))
    }


def load_beats_weights(beats: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Put a file's weights into ``Beats``.

    Raises:
        RunError: They are not exactly its own.
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
    except Exception as error:  # pickle and zip raise many types for a file that is none of theirs
        raise RunError(f"{path}: no file of tensors, or one that holds code: {_first_sentence(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return content


def _tensors(content: dict[str, Any], part: str, path: str | Path) -> dict[str, torch.Tensor]:
    found = content.get(part)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise RunError(f"{path}: holds no tensors by name under {part!r}")
    return found


def _first_sentence(error: Exception) -> str:
    return one_line(error).partition(". ")[0][:200]
