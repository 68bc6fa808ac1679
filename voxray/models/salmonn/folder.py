"""A SALMONN as one folder, which ``--model_id`` names.

Either all of it lies there (``save_pretrained`` and the two front ends' files), or ``config.json`` says where the
official parts are, so that 26 GB of a Vicuna need no second copy.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from voxray.core.errors import RunError, one_line
from voxray.models.hf_files import model_file, read_config, weights_below
from voxray.models.parts.audio_encoder import load_alone, tensors_fingerprint, weights_fingerprint
from voxray.models.salmonn.audio_path import StoredEncoders
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.checkpoint import load_beats_weights, read_beats, read_trained
from voxray.models.salmonn.config import BeatsConfig, SalmonnConfig
from voxray.models.salmonn.loading import build_config, end_token, load, load_tokenizer, load_whisper_encoder
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
    """Write a ``config.json`` that names official parts, after a look at their shapes.

    Args:
        prompts: File of prompts by task (see ``prompts.read_prompts``).
        alone: See ``SalmonnConfig``.
        settings: Others of its attributes, such as ``end_sym``.
    Raises:
        RunError: A part cannot be read.
        SettingsError: ``end_sym`` is several tokens.
    """
    from transformers import AutoConfig

    trained = None if checkpoint is None else read_trained(checkpoint)
    found: dict[str, Any] = {}
    for name, path in (("whisper", whisper), ("llm", llm)):
        try:
            found[name] = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: no usable config.json: {one_line(error, 200)}") from None
    tokenizer = load_tokenizer(llm)
    found["llm"].vocab_size = max(found["llm"].vocab_size, len(tokenizer))
    config = build_config(trained, found["whisper"], read_beats(beats)[0], found["llm"], qformer_heads)
    given = dict(zip(PARTS, (whisper, beats, llm, checkpoint, prompts), strict=True))
    config.parts = {name: str(path) for name, path in given.items() if path is not None}
    config.alone = alone
    for name, value in settings.items():
        setattr(config, name, value)
    end_token(tokenizer, config.end_sym)
    config.save_pretrained(folder)
    return config


def read_folder(model_id: str) -> SalmonnConfig:
    """A folder's configuration, with parts that lie in it as absolute paths.

    Raises:
        RunError: There is none, or it is no SALMONN's.
    """
    found = read_config(model_id)
    if found.get("model_type") != SalmonnConfig.model_type:
        raise RunError(f"--model_id {model_id}: model type {found.get('model_type')!r} is not salmonn")
    try:
        config = SalmonnConfig.from_dict(found)
    except (TypeError, ValueError, KeyError) as error:
        raise RunError(f"--model_id {model_id}: no usable config.json: {one_line(error, 200)}") from None
    for name, path in (config.parts or {}).items():
        inside = Path(model_id) / path
        if config.parts is not None and inside.exists():
            config.parts[name] = str(inside)
    return config


def copy_files(model_id: str, folder: Path) -> None:
    """Make a folder to which the whole model was saved complete: tokenizer, Whisper's front end, prompts."""
    config = read_folder(model_id)
    load_tokenizer(part(model_id, config, "llm")).save_pretrained(folder)
    preprocessor = model_file(part(model_id, config, "whisper"), "preprocessor_config.json")
    shutil.copyfile(preprocessor, folder / "preprocessor_config.json")
    saved = read_folder(str(folder))
    saved.parts = None
    if prompts := (config.parts or {}).get("prompts"):
        saved.parts = {"prompts": Path(prompts).name}
        shutil.copyfile(prompts, folder / Path(prompts).name)
    saved.save_pretrained(folder)


def part(model_id: str, config: SalmonnConfig, name: str) -> str:
    """Where one of the parts is; the folder itself where all of it lies there."""
    return (config.parts or {}).get(name, model_id)


def load_folder(model_id: str, *, dtype: torch.dtype = torch.float32, lora: bool = True, **llm_options: Any) -> Any:
    """Load what a folder holds or names, in eval mode (see ``loading.load``).

    Raises:
        RunError: A part is missing, or does not fit.
    """
    config = read_folder(model_id)
    if not _is_named(config):
        try:
            return SalmonnForConditionalGeneration.from_pretrained(model_id, dtype=dtype, **llm_options).eval()
        except (OSError, ValueError) as error:
            raise RunError(f"--model_id {model_id}: cannot load the weights: {one_line(error)}") from None
    qformer: Any = config.qformer_config
    parts = {name: path for name, path in (config.parts or {}).items() if name != "prompts"}
    heads = qformer.num_attention_heads
    model = load(**parts, dtype=dtype, lora=lora, qformer_heads=heads, **llm_options)  # type: ignore[arg-type]
    for name in ("parts", "alone", "prompt_template", "end_sym"):
        setattr(model.config, name, getattr(config, name))
    model.config.name_or_path = model.name_or_path = model_id
    return model


def load_towers(model_id: str, *, dtype: torch.dtype, device: torch.device) -> StoredEncoders:
    """Both encoders alone, frozen.

    Raises:
        RunError: Their weights are missing or do not fit the configuration.
    """
    config = read_folder(model_id)
    speech: Any = config.speech_config
    if _is_named(config):
        encoder = load_whisper_encoder(part(model_id, config, "whisper"), dtype)
    else:
        encoder = load_alone(WhisperEncoder, speech, model_id, "speech_encoder", dtype=dtype, device=device)
    beats_config, weights = _beats_of(model_id, config)
    beats = Beats(beats_config)
    load_beats_weights(beats, weights, model_id)
    return StoredEncoders(encoder, beats.to(dtype)).to(device).requires_grad_(False).eval()


def towers_fingerprint(model_id: str) -> str:
    """Hash of both encoders: their weights as they are stored, and how BEATs computes with its own."""
    config = read_folder(model_id)
    place = (part(model_id, config, "whisper"), "encoder") if _is_named(config) else (model_id, "speech_encoder")
    beats_config, weights = _beats_of(model_id, config)
    numbers = [getattr(beats_config, name) for name in BeatsConfig.__annotations__]
    return f"{weights_fingerprint(*place)} {tensors_fingerprint(weights)} {numbers}"


def _beats_of(model_id: str, config: SalmonnConfig) -> tuple[BeatsConfig, dict[str, torch.Tensor]]:
    if _is_named(config):
        return read_beats(part(model_id, config, "beats"))
    beats: Any = config.beats_config
    return beats, weights_below(model_id, "beats")


def _is_named(config: SalmonnConfig) -> bool:
    """Whether the weights lie elsewhere."""
    return "whisper" in (config.parts or {})
