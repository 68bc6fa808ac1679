"""The model of a training run: its base, the trainable weights, and the checkpoint or adapter it starts from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from voxray.config.flag_groups import TrimFlags
from voxray.config.train import TrainSettings
from voxray.core.content_hash import damaged_files
from voxray.core.errors import RunError, SettingsError
from voxray.core.memory import return_freed_memory
from voxray.models.adapters.audio_trim_record import set_trim_audio, trims_audio
from voxray.models.adapters.init_adapter import load_init_adapter, read_init_adapter
from voxray.models.adapters.lora import (
    adapted_roles,
    add_lora,
    check_trainable,
    load_adapter_weights,
    resolve_targets,
    train_fully,
    trainable_parameters,
)
from voxray.models.adapters.lora_scale import check_base_is_there
from voxray.models.hf_files import stored_dtype, unwrap_peft
from voxray.models.interface import InitAdapter, ModelFamily
from voxray.models.parts.cpu_16bit import use_float32_products
from voxray.models.parts.quantize import base_dtype
from voxray.models.shared_conversion import load_shared
from voxray.recipes.run_context import RunContext
from voxray.runs.layout import list_checkpoints
from voxray.runs.run_folder import other_run_advice
from voxray.training.checkpoint import Progress, read_optimizer_state, read_progress
from voxray.training.engine import OptimizerState
from voxray.training.sharded_weights import compute_dtypes, shown_in_types, use_4bit_layers


def find_init_adapter(run: RunContext) -> InitAdapter | None:
    """The adapter of ``--init_adapter``, checked against the settings; None without one."""
    settings, family = run.settings, run.family
    if settings.init_adapter and settings.tuning == "full":
        raise SettingsError("--init_adapter: holds LoRA weights, which --tuning full does not have")
    lora = {"r": settings.lora_r, "alpha": settings.lora_alpha}
    if official := family.read_official(settings.init_adapter, **lora):
        return official
    trims_audio = audio_trimming(settings)
    options = {"store": settings.store, "trims_audio": trims_audio, "targets": run.stage.lora_targets}
    return read_init_adapter(settings.init_adapter, family, **options, **lora)


def check_lora_targets(run: RunContext) -> None:
    """Check the names of ``--lora_targets`` before anything is computed. The family's own names need no check.

    Raises:
        SettingsError: See ``resolve_targets``.
    """
    settings, family = run.settings, run.family
    targets = run.stage.lora_targets if settings.tuning != "full" else ()
    if set(targets) - {name for names in family.lora_targets.values() for name in names}:
        dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
        base = family.build_on_meta(settings.model_id, dtype=dtype)
        resolve_targets(base, family, adapted_roles(family, run.stage.roles), targets)


def audio_trimming(settings: TrainSettings) -> bool | None:
    """Whether prompts leave out the audio tokens of padding; None for jobs that train without audio."""
    return trims_audio(settings.model_id, settings.trim_audio_tokens) if isinstance(settings, TrimFlags) else None


def build_model(run: RunContext, *, with_encoder: bool = True) -> tuple[Any, str]:
    """Load the base and add the trainable weights. The result is the same on every worker.

    Args:
        with_encoder: False if the features are outputs of the encoder.
    Returns:
        The model, and a log line on the adapter that its LoRA starts from; "" without one.
    """
    settings, family, roles = run.settings, run.family, run.stage.roles
    init_adapter = find_init_adapter(run)
    torch.manual_seed(settings.seed)  # for weights that no file has
    base = _load_base(run)
    if not with_encoder:
        family.skip_encoder(base)
    torch.manual_seed(settings.seed)
    if settings.tuning == "full":
        model = train_fully(base, family, roles)
    else:
        lora = {"r": settings.lora_r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
        in_adapter = init_adapter.roles if init_adapter else ()
        adapted = [role for role in family.roles if role in roles or role in in_adapter]
        options = {"model_id": settings.model_id, "tuning": settings.tuning, "targets": run.stage.lora_targets}
        with shown_in_types(training_dtypes(base, run)):
            model = add_lora(base, family, adapted, **options, **lora)
    trimmed = audio_trimming(settings)
    set_trim_audio(model, init_adapter.trims_audio if init_adapter and trimmed is None else trimmed)
    init_line = _load_init_adapter(model, run, init_adapter) if init_adapter else ""
    if settings.distill_weight:
        check_base_is_there(model, f"--distill_weight {settings.distill_weight:g}")
    if settings.grad_ckpt:
        checkpoint_gradients(base)
    set_modes(model, family, roles)
    if settings.compile:
        family.compile_layers(model)
    return model, init_line


def _load_base(run: RunContext) -> Any:
    """Load the base; one whose weights the engine will shard on the CPU and as it is stored, which takes no memory."""
    settings, family = run.settings, run.family
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    if not settings.shards_weights:
        options = {"dtype": dtype, "device": run.worker.device, "quantize": settings.quantize}
        base = load_shared(family, settings.model_id, **options, num_processes=run.worker.world_size)
        use_float32_products(base)
        return base
    if run.worker.device.type == "cpu":
        return_freed_memory()
    stored = dtype if settings.tuning == "dora" else stored_dtype(settings.model_id) or dtype
    base = family.load_model(settings.model_id, dtype=stored, device=torch.device("cpu"))
    if settings.quantize == "4bit":
        use_4bit_layers(base, family, dtype)
    return base


def training_dtypes(model: Any, run: RunContext) -> dict[torch.nn.Parameter, torch.dtype]:
    """Types that the parameters have in training, of a base that was loaded as it is stored; else empty."""
    settings = run.settings
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    is_stored = settings.shards_weights and settings.tuning != "dora"
    return compute_dtypes(model, run.family, settings.model_id, dtype) if is_stored else {}


def _load_init_adapter(model: Any, run: RunContext, init_adapter: InitAdapter) -> str:
    num_tensors = load_init_adapter(model, run.family, init_adapter, run.stage.roles)
    check_trainable(model, run.family, run.stage.roles)
    frozen = [role for role in init_adapter.roles if role not in run.stage.roles]
    line = f"LoRA starts from {init_adapter.folder}: {num_tensors} tensors of {', '.join(init_adapter.roles)}"
    return line + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def checkpoint_gradients(model: Any) -> None:
    """Turn on activation checkpointing. ``set_modes`` has to be called afterwards."""
    base = unwrap_peft(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers now makes the input embeddings require gradients, which only re-entrant checkpoints need. It treats
    # the first convolution of an audio encoder as one, so a frozen encoder would keep all its activations.
    base.disable_input_require_grads()


def set_modes(model: torch.nn.Module, family: ModelFamily, roles: Sequence[str]) -> None:
    """Set the roles that train to training mode and all others to eval mode.

    transformers recomputes activations in training mode only. So the layers of a frozen role behind a trained one (the
    language model behind a trained projector) are set to training mode, while their submodules stay in eval mode.
    """
    model.train()
    order = list(family.roles)
    first = min(order.index(role) for role in roles)
    for role in order:
        if role in roles:
            continue
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in family.roles[role]:
                module.eval()
                for layer in module.modules():
                    if order.index(role) > first and getattr(layer, "gradient_checkpointing", False):
                        layer.training = True


def resume(run_dir: Path, model: Any, start: Progress, earlier_data: str = "") -> tuple[Progress, OptimizerState]:
    """Load the weights of the run's newest checkpoint, if it has one.

    Args:
        start: Progress of a new run.
        earlier_data: The fingerprint of the same data in checkpoints of earlier versions.
    Returns:
        The progress of the run, and the optimizer state; empty for a new run.
    Raises:
        RunError: Training data or prompts differ from those of the checkpoint, or the checkpoint is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return start, {}
    _, newest = checkpoints[-1]
    if damaged := damaged_files(newest):
        raise RunError(f"{newest}: damaged checkpoint ({', '.join(damaged)}); delete the folder to resume")
    progress = read_progress(newest)
    advice = other_run_advice(run_dir, has_lora=unwrap_peft(model) is not model)
    if progress.data not in (start.data, earlier_data):
        raise RunError(f"{newest}: the training data has changed since this run started; {advice}")
    if progress.prompts != start.prompts:
        raise RunError(f"{newest}: --prompts holds other prompts than when this run started; {advice}")
    optimizer_state = read_optimizer_state(newest)
    if optimizer_state and set(optimizer_state) != {name for name, _ in trainable_parameters(model)}:
        raise RunError(f"{newest}: the optimizer state has other parameters than the model")
    load_adapter_weights(model, newest, keeps_types=True)  # a base that will be sharded has the type of its files
    return replace(progress, data=start.data), optimizer_state
