"""Combinations of adapter, quantization and stored features that would give wrong results or none."""

from pathlib import Path

from voxray.core.errors import RunError, SettingsError
from voxray.models.interface import ModelFamily


def check_encoder_unchanged(family: ModelFamily, store: str, quantize: str, adapter: Path | None) -> None:
    """Refuse stored encoder outputs if the model would compute others.

    Args:
        store: What feature shards hold (--store).
        quantize: Storage of the base's weights (--quantize).
        adapter: Folder of the adapter in use, if any.
    Raises:
        SettingsError: The adapter or quantization changes the encoder.
    """
    from voxray.models.adapters.lora import roles_of_adapter

    if store != "encoder":
        return
    if adapter and family.encoder_role in roles_of_adapter(adapter, family):
        raise SettingsError(f"--store encoder: the adapter in {adapter} changes the encoder, so its outputs differ")
    if quantize != "none" and family.encoder_role in family.quantized:
        raise SettingsError(
            f"--store encoder: --quantize {quantize} holds the encoder of {family.name} in fewer bits, so its outputs "
            "differ; leave one of the two out"
        )


def check_adapter_family(family: ModelFamily, adapter: Path | None, model_id: str, flag: str = "--lora_dir") -> None:
    """Refuse an adapter that was trained on another family, before anything is computed.

    Raises:
        RunError: It is of another kind than LoRA, no part of the family has the layers of one of its tensors, or it
            cannot be read.
    """
    from voxray.models.adapters.lora import find_role, is_lora_tensor
    from voxray.models.adapters.read_files import read_adapter_config, tensor_names

    if adapter is None:
        return
    read_adapter_config(adapter)
    for name in tensor_names(adapter):
        if is_lora_tensor(name) and find_role(name, family) not in family.roles:
            raise RunError(f"{flag} {adapter}: was trained on another model: {model_id} has nothing for {name}")
