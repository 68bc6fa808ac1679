"""Load the model that answers, and collect from a job's settings what determines its answers."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import SecretStr

from voxray.config.demo import DemoSettings
from voxray.config.engine_flags import STORES, EngineFlags
from voxray.config.evaluate import AdapterFlags, EvaluateSettings, InferSettings, LoraDirFlags
from voxray.core.context import join_terms
from voxray.core.errors import SettingsError
from voxray.generation.generate import SamplingParams
from voxray.metrics.terms import read_terms
from voxray.models.adapters.audio_trim_record import read_trim_record, trims_audio
from voxray.models.adapters.compatibility import check_adapter_family
from voxray.models.adapters.lora import base_of_adapter, find_adapter, load_adapter
from voxray.models.adapters.lora_scale import scale_lora
from voxray.models.adapters.merge import merge_into_base
from voxray.models.adapters.read_files import is_fully_tuned
from voxray.models.hf_files import unwrap_peft
from voxray.models.parts.arithmetic import set_tf32, with_default_dtype
from voxray.models.parts.compiled_audio import use_compiled
from voxray.models.parts.cpu_16bit import use_float32_products
from voxray.models.parts.layer_compile import check_compiler
from voxray.models.parts.quantize import base_dtype
from voxray.models.registry import get_family
from voxray.models.served import SERVED
from voxray.models.shared_conversion import load_shared, shared_bytes
from voxray.models.weight_sizes import loaded_bytes
from voxray.runs.remote_sync import fetch_folder

AdapterFlagsT = TypeVar("AdapterFlagsT", bound=AdapterFlags)


@dataclass(frozen=True)
class ServerAddress:
    """A server with OpenAI's API.

    Attributes:
        url: Address up to the version, such as ``http://localhost:8000/v1``.
        model: Name of the model on it.
        key_variable: Environment variable that holds the key.
        timeout_sec: Longest time to wait for one response.
        num_retries: How often a request is sent again after an error that may pass.
        key: The key; it is pickled for other processes, and neither printed nor stored. "" for none.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_sec: float = 120.0
    num_retries: int = 4
    key: SecretStr = field(default_factory=lambda: SecretStr(""))


@dataclass(frozen=True)
class InferenceConfig:
    """Everything besides the rows that determines the answers.

    Attributes:
        model_id: Base model.
        adapter: Adapter folder, or "".
        sampling: How tokens are chosen.
        batch_size: Rows generated together.
        bf16: Compute in bfloat16.
        tf32: Let float32 matrix products use TF32.
        fp16: Compute in float16.
        quantize: none, 8bit or 4bit.
        trim_audio: Whether the audio tokens of padding are left out of prompts.
        compiled: Folder of the compiled audio path, or "".
        merge_adapter: Whether LoRA is added to the weights of the base.
        lora_scale: Share of what LoRA adds.
        static_cache: Whether tokens are decoded in a cache of fixed size (see ``models.parts.static_kv_cache``).
        perplexity: Rows whose reference answers are scored by likelihood: ``none``, ``answers`` (all but transcripts)
            or ``all``.
        context: Context of all transcriptions, "" for none; None for that of each row.
        engine: What answers: transformers, vllm, ct2 or server.
        engine_python: Python that runs vLLM, "" for the Python of this process.
        server: Server that answers; None for other engines.
        max_len: Longest prompt in tokens, for engines that reserve memory for it.
    """

    model_id: str
    adapter: str
    sampling: SamplingParams
    batch_size: int
    bf16: bool = False
    tf32: bool = False
    fp16: bool = False
    quantize: str = "none"
    trim_audio: bool = False
    compiled: str = ""
    perplexity: str = "none"
    merge_adapter: bool = False
    lora_scale: float = 1.0
    static_cache: bool = False
    context: str | None = None
    engine: str = "transformers"
    engine_python: str = ""
    server: ServerAddress | None = None
    max_len: int = 0


def inference_config(
    settings: EvaluateSettings | InferSettings | DemoSettings,
    model_id: str,
    adapter: Path | None,
    max_new_tokens: int,
    batch_size: int,
) -> InferenceConfig:
    """The configuration that a job's settings ask for."""
    sampling = SamplingParams(max_new_tokens, settings.num_beams, settings.temperature, settings.top_p, settings.seed)
    flags = {name: getattr(settings, name) for name in ("bf16", "tf32", "fp16", "quantize")}
    flags |= {name: getattr(settings, name, False) for name in ("merge_adapter", "static_cache")}
    scale = getattr(settings, "lora_scale", 1.0)
    flags["lora_scale"] = scale[0] if isinstance(scale, tuple) else scale
    flags |= {"trim_audio": settings.trim_audio_tokens, "compiled": getattr(settings, "compiled", "")}
    flags |= {"max_len": settings.max_len}
    if isinstance(settings, EngineFlags):
        flags |= {"engine": settings.engine_name, "engine_python": settings.engine_python, "server": _server(settings)}
    return InferenceConfig(
        model_id, str(adapter or ""), sampling, batch_size, context=_context(settings, model_id), **flags
    )


def _server(settings: EngineFlags) -> ServerAddress | None:
    if not settings.server:
        return None
    limits = settings.server_timeout_sec, settings.server_retries
    key = SecretStr(os.environ.get(settings.server_key, "").strip())
    url = settings.server.rstrip("/")
    return ServerAddress(url, settings.served_model, settings.server_key, *limits, key=key)


def _context(settings: EvaluateSettings | InferSettings | DemoSettings, model_id: str) -> str | None:
    if isinstance(settings, DemoSettings):
        return None
    initial_prompt = " ".join(settings.initial_prompt.split()) if isinstance(settings, InferSettings) else ""
    if not (settings.context or initial_prompt):
        return "" if settings.no_context else None
    if not getattr(get_family(model_id).front_end(model_id), "takes_context", True):
        flag = "--context" if settings.context else "--initial_prompt"
        raise SettingsError(f"{flag}: prompts of {model_id} have no place for a context")
    return initial_prompt or join_terms(read_terms(settings.context))


def base_and_adapter(settings: LoraDirFlags, lora_dir: str, flag: str = "--lora_dir") -> tuple[str, Path | None]:
    """Base model and adapter folder to use. The base that the adapter names is used unless --model_id is set.

    Raises:
        RunError, SettingsError: The adapter cannot be used, or --server_key names no variable that is set.
    """
    if isinstance(settings, EngineFlags) and settings.server:
        if "server_key" in settings.model_fields_set and not os.environ.get(settings.server_key):
            # the value is not shown, because it may be the key itself
            raise SettingsError("--server_key: the environment has no variable of this name")
        return f"{SERVED}{settings.served_model}", None
    if not lora_dir:
        return settings.model_id, None
    if "://" in lora_dir:
        lora_dir = str(fetch_folder(lora_dir, flag))
    adapter = find_adapter(lora_dir, flag)
    base = base_of_adapter(adapter)
    is_set = "model_id" in settings.model_fields_set
    model_id = settings.model_id if is_set else base or settings.model_id
    check_adapter_family(get_family(model_id), adapter, model_id, flag)
    if is_set and base and Path(base).name != Path(model_id).name:
        print(f"warning: {adapter} was trained on {base}, not {model_id}", file=sys.stderr, flush=True)
    return model_id, adapter


def resolve_settings(
    settings: AdapterFlagsT, model_id: str, adapter: Path | None, *, on_ray: bool = False
) -> AdapterFlagsT:
    """The settings with what the base and the adapter decide, unless flags do.

    These are the type that the model computes in (see ``with_default_dtype``), ``trim_audio_tokens`` as in the training
    of the adapter, or of the base without an adapter, and ``store`` as the engine needs it. For a server only the
    latter is decided, and the name of its model.

    Args:
        on_ray: Whether the job runs on the cluster at RAY_ADDRESS, if that is set.
    Raises:
        SettingsError: The flag is set to the other value.
    """
    if isinstance(settings, EngineFlags) and settings.server:
        return settings.model_copy(update={"model_id": model_id, **_store(settings)})
    trained = read_trim_record(adapter) if adapter else None
    trimmed = trims_audio(model_id, settings.trim_audio_tokens) if trained is None else trained
    if "trim_audio_tokens" in settings.model_fields_set and settings.trim_audio_tokens != trimmed:
        kind = "with" if trimmed else "without"
        raise SettingsError(f"--trim_audio_tokens: {adapter or model_id} was trained {kind} it; leave the flag out")
    settings = with_default_dtype(settings, model_id, is_fully_tuned=is_fully_tuned(adapter), on_ray=on_ray)
    return settings.model_copy(update={"trim_audio_tokens": trimmed, **_store(settings)})


def _store(settings: AdapterFlags) -> dict[str, str]:
    """``--store`` as the engine needs it, for a job that has this flag."""
    if not (isinstance(settings, EngineFlags) and settings.engine_name in STORES and hasattr(settings, "store")):
        return {}
    stores, store = STORES[settings.engine_name], getattr(settings, "store", "")
    return {"store": store if store in stores else stores[0]}


def model_bytes(config: InferenceConfig, num_processes: int) -> tuple[int, int]:
    """Memory that the weights take in each process of a job, and memory that they take once on each node.

    Files of the model itself are not counted. The system can drop them from memory and read them again.
    """
    if config.server:
        return 0, 0
    family, dtype = get_family(config.model_id), base_dtype(bf16=config.bf16, fp16=config.fp16)
    options: dict[str, Any] = {"adapter": config.adapter, "merges_adapter": config.merge_adapter}
    options |= {"quantize": config.quantize, "num_processes": num_processes}
    shared = shared_bytes(config.model_id, dtype, num_processes) if config.quantize == "none" else 0
    return loaded_bytes(family, config.model_id, dtype=dtype, **options), shared


def load_model(config: InferenceConfig, *, skip_encoder: bool = False, num_processes: int = 1) -> tuple[Any, int]:
    """Load base, adapter and compiled audio path; returns the model and the number of adapter tensors loaded.

    Args:
        skip_encoder: Rows hold the outputs of the encoder, so the model runs without it.
        num_processes: Processes of the job with this model. On CPUs they share its weights.
    Raises:
        RunError: Base, adapter or compiled audio path cannot be read, or do not fit each other.
    """
    set_tf32(config.tf32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.static_cache and device.type == "cpu":
        check_compiler(device, "--static_cache")
    family, dtype = get_family(config.model_id), base_dtype(bf16=config.bf16, fp16=config.fp16)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": config.quantize}
    model = load_shared(family, config.model_id, **options, num_processes=num_processes)
    use_float32_products(model)
    if skip_encoder:
        family.skip_encoder(model)
    model, num_tensors = load_adapter(model, Path(config.adapter)) if config.adapter else (model, 0)
    if config.lora_scale != 1:
        scale_lora(model, Path(config.adapter), f"--lora_scale {config.lora_scale:g}", config.lora_scale)
    if config.merge_adapter and unwrap_peft(model) is not model:
        model = merge_into_base(model)
    if config.compiled:
        use_compiled(model, family, Path(config.compiled), dtype=dtype, device=device)
    return model, num_tensors
