"""The model that answers: what decides its answers, read from the settings of a job, and how it is loaded."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from voxray.config.demo import DemoSettings
from voxray.config.evaluate import AdapterFlags, EvaluateSettings, InferSettings, LoraDirFlags
from voxray.core.errors import SettingsError
from voxray.generation.generate import SamplingParams
from voxray.models.adapters.audio_trim_record import read_record, trims_audio
from voxray.models.adapters.lora import base_of_adapter, find_adapter, load_adapter
from voxray.models.parts.compiled_audio import use_compiled
from voxray.models.parts.quantize import base_dtype
from voxray.models.registry import get_family
from voxray.runs.remote_sync import fetched

AdapterFlagsT = TypeVar("AdapterFlagsT", bound=AdapterFlags)


@dataclass(frozen=True)
class InferenceConfig:
    """Everything that decides the answers, beside the rows.

    Attributes:
        model_id: Base model.
        adapter: Adapter folder, or "".
        search: How answers are looked for.
        batch_size: Rows generated together.
        bf16: Compute in bfloat16.
        tf32: Let float32 matrix products use TF32.
        fp16: Compute in float16.
        quantize: none, 8bit or 4bit.
        trim_audio: Whether prompts leave out the audio tokens of padding.
        compiled: Folder of the compiled audio path, or "".
        perplexity: Whose reference answers are weighed: ``none``, ``answers`` (all but transcripts) or ``all``.
    """

    model_id: str
    adapter: str
    search: SamplingParams
    batch_size: int
    bf16: bool = False
    tf32: bool = False
    fp16: bool = False
    quantize: str = "none"
    trim_audio: bool = False
    compiled: str = ""
    perplexity: str = "none"


def inference_config(
    settings: EvaluateSettings | InferSettings | DemoSettings,
    model_id: str,
    adapter: Path | None,
    max_new_tokens: int,
    batch_size: int,
) -> InferenceConfig:
    """What decides the answers, as the settings want them looked for."""
    search = SamplingParams(max_new_tokens, settings.num_beams, settings.temperature, settings.top_p, settings.seed)
    flags = {name: getattr(settings, name) for name in ("bf16", "tf32", "fp16", "quantize")}
    flags |= {"trim_audio": settings.trim_audio_tokens, "compiled": getattr(settings, "compiled", "")}
    return InferenceConfig(model_id, str(adapter or ""), search, batch_size, **flags)


def base_and_adapter(settings: LoraDirFlags, lora_dir: str, flag: str = "--lora_dir") -> tuple[str, Path | None]:
    """Base model and adapter folder to use; an adapter names its own base, which holds unless --model_id is given."""
    if not lora_dir:
        return settings.model_id, None
    if "://" in lora_dir:
        lora_dir = str(fetched(lora_dir, flag))
    adapter = find_adapter(lora_dir, flag)
    base = base_of_adapter(adapter)
    if "model_id" in settings.model_fields_set:
        if base and Path(base).name != Path(settings.model_id).name:
            print(f"warning: {adapter} was trained on {base}, not {settings.model_id}", file=sys.stderr, flush=True)
        return settings.model_id, adapter
    return base or settings.model_id, adapter


def match_training_prompts(settings: AdapterFlagsT, model_id: str, adapter: Path | None) -> AdapterFlagsT:
    """The settings with prompts as the adapter, or the base, was trained on.

    Raises:
        SettingsError: A flag asks for others.
    """
    trained = read_record(adapter) if adapter else None
    trimmed = trims_audio(model_id, settings.trim_audio_tokens) if trained is None else trained
    if "trim_audio_tokens" in settings.model_fields_set and settings.trim_audio_tokens != trimmed:
        kind = "with" if trimmed else "without"
        raise SettingsError(f"--trim_audio_tokens: {adapter or model_id} was trained {kind} it; leave the flag out")
    return settings.model_copy(update={"trim_audio_tokens": trimmed})


def load_model(generation: InferenceConfig, *, skip_encoder: bool = False) -> tuple[Any, int]:
    """The model that answers, and how many tensors of the adapter it took.

    Args:
        skip_encoder: Rows hold the encoder's outputs.
    Raises:
        RunError: Base, adapter or compiled audio path cannot be read, or do not fit.
    """
    torch.backends.cuda.matmul.allow_tf32 = generation.tf32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, dtype = get_family(generation.model_id), base_dtype(bf16=generation.bf16, fp16=generation.fp16)
    model = family.load_model(generation.model_id, dtype=dtype, device=device, quantize=generation.quantize)
    if skip_encoder:
        family.skip_encoder(model)
    found = load_adapter(model, Path(generation.adapter)) if generation.adapter else (model, 0)
    if generation.compiled:
        use_compiled(found[0], family, Path(generation.compiled), dtype=dtype, device=device)
    return found
