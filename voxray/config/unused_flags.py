"""Warnings about flags that have no effect on this machine or with the other flags."""

import os

from rich.console import Console

from voxray.config.flag_groups import ModelFlags
from voxray.core.console import console


def warn_about_unused_flags(settings: ModelFlags, log: Console = console) -> None:
    """Warn about every flag the user set that has no effect here."""
    import torch  # not at the top: settings are read before torch is imported, which takes seconds

    unused = (
        {"lora_r", "lora_alpha", "lora_dropout", "lora_targets"} if getattr(settings, "tuning", "") == "full" else set()
    )
    for name in sorted(unused & settings.model_fields_set):
        log.print(f"warning: --{name} has no effect: --tuning full has no LoRA", markup=False)
    if not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS"):
        for name in sorted({"tf32", "pin_memory", "gpus_per_model"} & settings.model_fields_set):
            if getattr(settings, name):
                log.print(f"warning: --{name} has no effect: there is no GPU on this machine")
