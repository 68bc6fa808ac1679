"""The model of a run without its weights: what trains in it, layer by layer, for a count of memory and of LoRA."""

from collections import Counter
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer

from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.models.adapters.lora import count_parameters, find_role
from voxray.models.interface import ModelFamily
from voxray.preflight.findings import Findings
from voxray.recipes.build_model import build_model
from voxray.recipes.run_stage import Stage


class _Outlined:
    """A family whose models have no weights."""

    def __init__(self, family: ModelFamily) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        return self._family.build_on_meta(model_id, dtype=dtype)


def build_meta_model(stage: Stage, settings: TrainSettings, family: ModelFamily) -> Any:
    """The model that training would build, with LoRA and in its modes, on the meta device.

    Raises:
        RunError: A role has no layer for LoRA.
    """
    plain = settings.model_copy(update={"init_adapter": "", "compile": False})
    how: dict[str, Any] = {"with_encoder": settings.store != "encoder", "lora_targets": stage.lora_targets}
    with torch.device("meta"):
        model, _ = build_model(stage.roles, plain, cast(ModelFamily, _Outlined(family)), Worker(), **how)
    return model


def tell_coverage(model: Any, stage: Stage, family: ModelFamily, findings: Findings) -> dict[str, dict[str, int]]:
    """Say what trains in each role.

    Returns:
        {role: {"total", "trainable", "lora_layers"}}.
    """
    layers = Counter(find_role(name, family) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    counts: dict[str, dict[str, int]] = {}
    for role, entry in count_parameters(model, family).items():
        counts[role] = {**entry, "lora_layers": layers[role]}
        told = f"{role}: {entry['total']:,} parameters, {entry['trainable']:,} of them train"
        told += f", LoRA on {layers[role]} layers" if layers[role] else ""
        findings.add("ok", "parameters", told if entry["trainable"] else f"{told} (frozen)")
    return counts
