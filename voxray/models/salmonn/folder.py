"""SALMONN folders, which ``--model_id`` names.

A folder either holds everything (``save_pretrained`` and the files of both front ends), or its ``config.json`` names
the paths of the official parts, so that 26 GB of a Vicuna need no second copy.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from voxray.core.content_hash import combined_hash, file_hash
from voxray.core.errors import RunError, library_errors
from voxray.models.hf_files import base_hash, model_file, module_weights, read_config
from voxray.models.parts.audio_encoder import config_hash, hash_tensors, load_module
from voxray.models.salmonn.audio_path import StoredEncoders
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.compat.checkpoint import load_beats_weights, read_beats, read_checkpoint
from voxray.models.salmonn.config import BeatsConfig, SalmonnConfig
from voxray.models.salmonn.loading import build_config, end_token_id, load, load_tokenizer, load_whisper_encoder
from voxray.models.salmonn.model import SalmonnForConditionalGeneration

PARTS = ("whisper", "beats", "llm", "checkpoint", "prompts")


def write_folder(
    folder: Path,
    *,
    whisper: str | Path,
    beats: str | Path,
    llm: str | Path,
    checkpoint: str | Path | None = None,
    prompts: str | Path | None = None,
    alone: bool = True,
    qformer_heads: int | None = None,
    **settings: Any,
) -> SalmonnConfig:
    """Write a ``config.json`` that names official parts, with the shapes read from them.

    Args:
        whisper, beats, llm, checkpoint: Paths of the parts (see ``loading.load``).
        prompts: File of prompts by task (see ``prompts.read_prompts``).
        alone: See ``SalmonnConfig``.
        qformer_heads: See ``loading.load``.
        settings: Other attributes of ``SalmonnConfig``, such as ``end_sym``.
    Returns:
        The configuration that was written.
    Raises:
        RunError: A part cannot be read.
        SettingsError: ``end_sym`` is several tokens.
    """
    from transformers import AutoConfig

    stored = None if checkpoint is None else read_checkpoint(checkpoint)
    configs: dict[str, Any] = {}
    for name, path in (("whisper", whisper), ("llm", llm)):
        with library_errors(f"{path}: no usable config.json"):
            configs[name] = AutoConfig.from_pretrained(path)
    tokenizer = load_tokenizer(llm)
    configs["llm"].vocab_size = max(configs["llm"].vocab_size, len(tokenizer))
    config = build_config(stored, configs["whisper"], read_beats(beats)[0], configs["llm"], qformer_heads)
    paths = dict(zip(PARTS, (whisper, beats, llm, checkpoint, prompts), strict=True))
    config.parts = {name: str(path) for name, path in paths.items() if path is not None}
    config.alone = alone
    for name, value in settings.items():
        setattr(config, name, value)
    end_token_id(tokenizer, config.end_sym)
    config.save_pretrained(folder)
    return config


def read_folder(model_id: str) -> SalmonnConfig:
    """Read a folder's configuration. Relative paths of parts inside the folder get its path as prefix.

    Raises:
        RunError: There is no configuration, or it is not SALMONN's.
    """
    values = read_config(model_id)
    if values.get("model_type") != SalmonnConfig.model_type:
        raise RunError(f"--model_id {model_id}: model type {values.get('model_type')!r} is not salmonn")
    with library_errors(f"--model_id {model_id}: no usable config.json"):
        config = SalmonnConfig.from_dict(values)
    for name, path in (config.parts or {}).items():
        inside = Path(model_id) / path
        if config.parts is not None and inside.exists():
            config.parts[name] = str(inside)
    return config


def copy_files(model_id: str, folder: Path) -> None:
    """Copy tokenizer, Whisper's preprocessor and prompts into a folder to which the whole model was saved."""
    config = read_folder(model_id)
    load_tokenizer(part_path(model_id, config, "llm")).save_pretrained(folder)
    preprocessor = model_file(part_path(model_id, config, "whisper"), "preprocessor_config.json")
    shutil.copyfile(preprocessor, folder / "preprocessor_config.json")
    saved = read_folder(str(folder))
    saved.parts = None
    if prompts := (config.parts or {}).get("prompts"):
        saved.parts = {"prompts": Path(prompts).name}
        shutil.copyfile(prompts, folder / Path(prompts).name)
    saved.save_pretrained(folder)


def content_hash(model_id: str) -> str:
    """Hash of the folder, and of the parts that it names.

    Raises:
        RunError: A file cannot be read.
    """
    hashes = [base_hash(model_id)]
    for path in (read_folder(model_id).parts or {}).values():
        hashes.append(file_hash(Path(path)) if Path(path).is_file() else base_hash(path))
    return combined_hash(hashes)


def part_path(model_id: str, config: SalmonnConfig, name: str) -> str:
    """Path of one of the parts; the folder itself if it holds everything."""
    return (config.parts or {}).get(name, model_id)


def load_folder(model_id: str, *, dtype: torch.dtype = torch.float32, lora: bool = True, **llm_options: Any) -> Any:
    """Load the model that a folder holds or names, in eval mode.

    Args:
        dtype, lora, llm_options: See ``loading.load``. ``llm_options`` apply to the whole model if the folder holds it.
    Raises:
        RunError: A part is missing or does not fit.
    """
    config = read_folder(model_id)
    if not _names_parts(config):
        with library_errors(f"--model_id {model_id}: cannot load the model"):
            return SalmonnForConditionalGeneration.from_pretrained(model_id, dtype=dtype, **llm_options).eval()
    qformer: Any = config.qformer_config
    parts = {name: path for name, path in (config.parts or {}).items() if name != "prompts"}
    heads = qformer.num_attention_heads
    model = load(**parts, dtype=dtype, lora=lora, qformer_heads=heads, **llm_options)  # type: ignore[arg-type]
    for name in ("parts", "alone", "prompt_template", "end_sym"):
        setattr(model.config, name, getattr(config, name))
    model.config.name_or_path = model.name_or_path = model_id
    return model


def load_encoders(model_id: str, *, dtype: torch.dtype, device: torch.device) -> StoredEncoders:
    """Load both encoders alone, frozen and in eval mode.

    Raises:
        RunError: Their weights are missing or do not fit the configuration.
    """
    config = read_folder(model_id)
    speech: Any = config.speech_config
    if _names_parts(config):
        encoder = load_whisper_encoder(part_path(model_id, config, "whisper"), dtype)
    else:
        encoder = load_module(WhisperEncoder, speech, model_id, "speech_encoder", dtype=dtype, device=device)
    beats_config, weights = _read_beats(model_id, config)
    beats = Beats(beats_config)
    load_beats_weights(beats, weights, model_id)
    return StoredEncoders(encoder, beats.to(dtype)).to(device).requires_grad_(False).eval()


def encoders_fingerprint(model_id: str) -> str:
    """Hash of both encoders: their stored weights, and the options of BEATs."""
    config = read_folder(model_id)
    names_parts = _names_parts(config)
    source = (part_path(model_id, config, "whisper"), "encoder") if names_parts else (model_id, "speech_encoder")
    beats_config, beats_weights = _read_beats(model_id, config)
    options = [getattr(beats_config, name) for name in BeatsConfig.__annotations__]
    options.append(config_hash(config.speech_config))
    hashes = [hash_tensors(tensors).hexdigest() for tensors in (module_weights(*source), beats_weights)]
    return f"{hashes[0]} {hashes[1]} {options}"


def _read_beats(model_id: str, config: SalmonnConfig) -> tuple[BeatsConfig, dict[str, torch.Tensor]]:
    if _names_parts(config):
        return read_beats(part_path(model_id, config, "beats"))
    beats: Any = config.beats_config
    return beats, module_weights(model_id, "beats")


def _names_parts(config: SalmonnConfig) -> bool:
    """Whether the folder names the official parts instead of holding the weights."""
    return "whisper" in (config.parts or {})
