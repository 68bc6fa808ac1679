"""Combinations of adapter, quantization and stored features that would give wrong results."""

from pathlib import Path

from voxray.core.errors import SettingsError
from voxray.models.interface import ModelFamily


def refuse_changed_outputs(family: ModelFamily, store: str, quantize: str, adapter: Path | None) -> None:
    """Refuse stored outputs of an encoder that, as it would be used, has others.

    Args:
        store: What feature shards hold.
        quantize: How many bits the base is held in.
        adapter: That is used, if any.
    Raises:
        SettingsError: With the reason.
    """
    from voxray.models.adapters.lora import roles_of_adapter

    if store != "encoder":
        return
    if adapter and "encoder" in roles_of_adapter(adapter, family):
        raise SettingsError(f"--store encoder: the adapter in {adapter} changes the encoder, so its outputs differ")
    if quantize != "none" and "encoder" in family.quantized:
        raise SettingsError(
            f"--store encoder: --quantize {quantize} holds the encoder of {family.name} in fewer bits, so its outputs "
            "differ; leave one of the two out"
        )
