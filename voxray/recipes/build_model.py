"""The model of a training run: its base, what trains of it, and the checkpoint or earlier adapter it starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from voxray.batches.rank import Worker
from voxray.config.flag_groups import TrimFlags
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.audio_trim_record import note_trimming, trims_audio
from voxray.models.adapters.init_adapter import load_init_adapter, read_init_adapter
from voxray.models.adapters.lora import add_lora, check_lora, load_adapter_weights, train_fully, trainable_parameters
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import InitAdapter, ModelFamily
from voxray.models.parts.quantize import base_dtype
from voxray.runs.layout import list_checkpoints
from voxray.training.checkpoint import Progress, read_optimizer_state, read_progress
from voxray.training.engine import OptimizerState


def find_init_adapter(settings: TrainSettings, family: ModelFamily) -> InitAdapter | None:
    """The adapter that ``--init_adapter`` names, checked against the settings."""
    lora = {"r": settings.lora_r, "alpha": settings.lora_alpha}
    if official := family.read_official(settings.init_adapter, **lora):
        return official
    trimming = audio_trimming(settings)
    return read_init_adapter(settings.init_adapter, family, store=settings.store, trims_audio=trimming, **lora)


def audio_trimming(settings: TrainSettings) -> bool | None:
    """Whether prompts leave out the audio tokens of padding; None for jobs that train without audio."""
    return trims_audio(settings.model_id, settings.trim_audio_tokens) if isinstance(settings, TrimFlags) else None


def build_model(
    roles: Sequence[str],
    settings: TrainSettings,
    family: ModelFamily,
    worker: Worker,
    *,
    with_encoder: bool = True,
    lora_targets: Sequence[str] = (),
) -> tuple[Any, str]:
    """Load the base and choose what trains; the same on every worker.

    Args:
        roles: Parts of the model that train.
        with_encoder: False if the features are the encoder's outputs already.
        lora_targets: Names of the layers that LoRA adapts within the roles; empty takes the family's own.
    Returns:
        The model, and a line on the adapter that its LoRA starts from, if there is one.
    """
    earlier = find_init_adapter(settings, family)
    if earlier and settings.tuning == "full":
        raise SettingsError("--init_adapter: holds LoRA, which --tuning full has none of")
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    torch.manual_seed(settings.seed)  # of weights that no file has
    base = family.load_model(settings.model_id, dtype=dtype, device=worker.device, quantize=settings.quantize)
    if not with_encoder:
        family.skip_encoder(base)
    torch.manual_seed(settings.seed)
    lora = {"r": settings.lora_r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    adapted = [role for role in family.roles if role in roles or (earlier and role in earlier.roles)]
    if settings.tuning == "full":
        model = train_fully(base, family, roles)
    else:
        model = add_lora(
            base, family, adapted, model_id=settings.model_id, tuning=settings.tuning, targets=lora_targets, **lora
        )
    trimmed = audio_trimming(settings)
    note_trimming(model, earlier.trims_audio if earlier and trimmed is None else trimmed)
    started = ""
    if earlier:
        copied = load_init_adapter(model, family, earlier, roles)
        check_lora(model, family, roles)
        kept = [role for role in earlier.roles if role not in roles]
        started = f"LoRA starts from {earlier.folder}: {copied} tensors of {', '.join(earlier.roles)}"
        started += f"; kept as they are: {', '.join(kept)}" if kept else ""
    if settings.grad_ckpt:
        checkpoint_gradients(base)
    set_modes(model, family, roles)
    if settings.compile:
        family.compile_layers(model)
    return model, started


def checkpoint_gradients(model: Any) -> None:
    """Let layers compute their activations again in the backward pass; ``set_modes`` has to follow."""
    base = unwrap_peft(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The library makes input embeddings give gradients then, which only re-entrant checkpoints need. Of an audio
    # encoder it takes the first convolution for one, and a frozen encoder would keep all its activations.
    base.disable_input_require_grads()


def set_modes(model: torch.nn.Module, family: ModelFamily, roles: Sequence[str]) -> None:
    """Training mode in the roles that train, and eval in the others.

    Layers of a frozen part that gradients pass through (the language model behind a trained projector) still recompute
    their activations if asked to, which transformers does in training mode only; what they are made of stays in eval.
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


def resume(run_dir: Path, model: Any, start: Progress) -> tuple[Progress, OptimizerState]:
    """Load the weights of the run's newest checkpoint, if it has one, and say where the run stands.

    Returns:
        The progress, and the optimizer's moments.
    Raises:
        RunError: The training data, or the prompts, are not what the run started with, or the checkpoint is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return start, {}
    _, newest = checkpoints[-1]
    progress = read_progress(newest)
    advice = "use --overwrite or another --output_dir"
    if progress.data != start.data:
        raise RunError(f"{newest}: the training data is not what this run began with; {advice}")
    if progress.prompts != start.prompts:
        raise RunError(f"{newest}: --prompts holds other prompts than this run began with; {advice}")
    moments = read_optimizer_state(newest)
    if moments and set(moments) != {name for name, _ in trainable_parameters(model)}:
        raise RunError(f"{newest}: moments of other parameters than the model's")
    load_adapter_weights(model, newest)
    return progress, moments
