"""The model of a run without weights, from which preflight counts memory and LoRA layers."""

from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer

from voxray.config.train import TrainSettings
from voxray.models.adapters.lora import count_parameters, find_role
from voxray.models.interface import ModelFamily
from voxray.preflight.findings import Findings
from voxray.recipes.build_model import build_model
from voxray.recipes.run_context import RunContext


class _MetaFamily:
    """A family that builds its models on the meta device."""

    def __init__(self, family: ModelFamily) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        return self._family.build_on_meta(model_id, dtype=dtype)


def of_one_process(settings: TrainSettings) -> TrainSettings:
    """Settings of the same training in one process, which shards nothing and compiles nothing."""
    alone = {"compile": False, "strategy": "ddp", "zero_stage": 2, "offload_optimizer": False}
    return settings.model_copy(update=alone)


def build_meta_model(run: RunContext, settings: TrainSettings | None = None) -> Any:
    """The model that training would build, with LoRA and in the same modes, on the meta device.

    Args:
        settings: Settings to use instead of the run's.
    Raises:
        RunError: A role has no layer for LoRA.
    """
    settings = settings or run.settings
    plain = of_one_process(settings).model_copy(update={"init_adapter": ""})
    meta_run = replace(run, settings=plain, family=cast(ModelFamily, _MetaFamily(run.family)))
    with torch.device("meta"):
        model, _ = build_model(meta_run, with_encoder=settings.store != "encoder")
    return model


def report_parameters(model: Any, family: ModelFamily, findings: Findings) -> dict[str, dict[str, int]]:
    """Report how many parameters train in each role.

    Returns:
        {role: {"total", "trainable", "lora_layers"}}.
    """
    layers = Counter(find_role(name, family) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    counts: dict[str, dict[str, int]] = {}
    for role, entry in count_parameters(model, family).items():
        counts[role] = {**entry, "lora_layers": layers[role]}
        message = f"{role}: {entry['total']:,} parameters, {entry['trainable']:,} of them train"
        message += f", LoRA on {layers[role]} layers" if layers[role] else ""
        findings.add("ok", "parameters", message if entry["trainable"] else f"{message} (frozen)")
    return counts
