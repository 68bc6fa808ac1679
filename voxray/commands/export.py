"""The export job: merges an adapter into its base and writes a model that needs neither PEFT nor voxray.

Every step is verified: each tensor of the adapter must match a layer, the merged model must give the logits of the
unmerged one, and so must the model read back from disk. A base without an adapter can be written in another format.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from voxray.cards.card import CardFacts, read_card_facts, write_card
from voxray.commands.export_formats import CPU, FORMATS, HfFormat, MergedModel, probe_logits
from voxray.config.export import ExportSettings
from voxray.core.console import console
from voxray.core.content_hash import write_checksums
from voxray.core.errors import RunError, SettingsError, library_errors
from voxray.core.storage import checksum, write_json
from voxray.models.adapters.audio_trim_record import read_trim_record, set_trim_audio, trims_audio, write_record
from voxray.models.adapters.lora import (
    base_of_adapter,
    find_adapter,
    find_role,
    is_lora_tensor,
    load_adapter,
    target_pattern,
)
from voxray.models.adapters.lora_scale import scale_lora
from voxray.models.adapters.merge import in_float32
from voxray.models.adapters.read_files import CONFIG, WEIGHTS, tensor_names, weights_file
from voxray.models.adapters.tied_weights import untie
from voxray.models.hf_files import read_config, stored_dtype, unwrap_peft
from voxray.models.interface import ModelFamily
from voxray.models.registry import get_family
from voxray.runs.lease import output_lease
from voxray.runs.run_folder import provenance, replaced_on_success, require_replaceable, resolve_output_dir

REPORT = "export.json"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Largest allowed difference as a share of the largest logit, by data type: the size of its rounding error."""
INT8_TOLERANCE = 0.25


def run_export(settings: ExportSettings) -> dict[str, Any]:
    """Merge an adapter, or fully tuned weights, and write the model.

    Returns:
        The content of export.json.
    Raises:
        RunError: The adapter does not fit, the output folder is in use, or a check failed. No output is written then.
        SettingsError: The settings do not fit the model, or the output folder cannot be used.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    adapter = find_adapter(settings.lora_dir) if settings.lora_dir else None
    model_id = settings.model_id or (base_of_adapter(adapter) if adapter else "")
    if not model_id:
        raise RunError(f"{settings.lora_dir}/{CONFIG}: names no base model; give one with --model_id")
    require_replaceable(
        output_dir, REPORT, overwrite=settings.overwrite, earlier="an earlier export", other="it is no export"
    )
    family = get_family(model_id)
    trimmed = trims_audio(model_id, bool(adapter and read_trim_record(adapter)))
    format = _format(settings, family, trimmed)
    card = _card_facts(settings, adapter, model_id)  # before anything takes long
    model, num_tensors = _load(settings, family, model_id, adapter, trimmed)
    front_end = family.front_end(model_id, trim_audio=trimmed)
    with in_float32(model):
        expected = probe_logits(model, family, front_end)
    report = {"base": model_id, "adapter": str(adapter or ""), "format": settings.format, "tensors": num_tensors}
    if adapter:
        report["adapter_sha256"] = checksum(weights_file(adapter))
    roles = _roles_to_merge(settings.merge, model, family, adapter)
    if format is None:
        return _export_official(settings, model, family, output_dir, expected, report, card)
    layers = _layers_to_merge(model, family, roles) if isinstance(model, PeftModel) else {}
    num_merged = len(layers) if isinstance(model, PeftModel) else num_tensors
    if adapter and not num_merged:
        raise RunError(f"--merge {settings.merge}: {adapter} has no part in the {settings.merge}")
    with in_float32(model, layers):
        difference = _difference(probe_logits(model, family, front_end), expected)
    _check(difference, "float32", "the merged model")
    report |= {"merge": settings.merge, "scale": settings.scale, "trim_audio_tokens": trimmed}
    report |= {"layers_merged": num_merged, "difference_merged": difference}
    merged = MergedModel(model, layers, family, model_id, _dtype(settings.dtype, model_id))
    return _write_merged(merged, format, output_dir, expected, report, card)


def _format(settings: ExportSettings, family: ModelFamily, trimmed: bool) -> HfFormat | None:
    """The format of ``--format``; None for ``official``, which the family writes.

    Raises:
        SettingsError: It cannot hold this model, or the flags do not fit it.
    """
    flag = f"--format {settings.format}"
    if settings.format == "official":
        if not settings.lora_dir:
            raise SettingsError(f"{flag}: needs --lora_dir")
        return None
    format = FORMATS[settings.format]
    if format.family not in ("", family.name):
        raise SettingsError(f"{flag}: {format.family} models only, not {family.name}")
    if trimmed and not format.takes_trimmed:
        raise SettingsError(f"{flag}: the model was trained with --trim_audio_tokens, which vLLM does not know")
    if settings.dtype not in ("base", *format.dtypes):
        raise SettingsError(f"{flag}: --dtype {settings.dtype}: must be one of base, {', '.join(format.dtypes)}")
    if not settings.lora_dir and (settings.format == "hf" or settings.merge != "all" or settings.scale != 1):
        raise SettingsError(f"{flag}: without --lora_dir there is nothing to merge")
    format.require_library()
    return format


def _load(
    settings: ExportSettings, family: ModelFamily, model_id: str, adapter: Path | None, trimmed: bool
) -> tuple[Any, int]:
    """Base and adapter, and the number of adapter tensors loaded."""
    base = family.load_model(model_id, dtype=_loaded_dtype(model_id, adapter), device=CPU)
    model, num_tensors = load_adapter(base, adapter) if adapter else (base, 0)
    if adapter and settings.scale != 1:
        if settings.merge != "all" or settings.format == "official":
            raise SettingsError(f"--scale {settings.scale:g}: only with --merge all, and not with --format official")
        scale_lora(model, adapter, f"--scale {settings.scale:g}", settings.scale)
    if adapter:
        console.print(f"adapter {adapter}: all of its {num_tensors} tensors used", markup=False)
    if trimmed:
        set_trim_audio(base, trimmed)  # saved in the model's config.json
        console.print("trained with --trim_audio_tokens: voxray reads that off config.json, others have to know it")
    return model, num_tensors


def _card_facts(settings: ExportSettings, adapter: Path | None, model_id: str) -> CardFacts | None:
    """What the model card says; None for a base without an adapter, which keeps the card of the base."""
    if adapter is None:
        return None
    part = "" if settings.merge == "all" else settings.merge
    options = {"evaluations": settings.evaluations, "kind": settings.format, "scale": settings.scale, "part": part}
    return read_card_facts(adapter, model_id, **options)


def _write_merged(
    merged: MergedModel,
    format: HfFormat,
    output_dir: Path,
    expected: torch.Tensor,
    report: dict[str, Any],
    card: CardFacts | None,
) -> dict[str, Any]:
    """Write the merged model, read it back and compare its logits; returns the completed report."""
    with output_lease(output_dir), replaced_on_success(output_dir) as partial:
        with library_errors(f"{output_dir}: cannot write the model"):  # safetensors has its own error for a full disk
            has_adapter = _split_adapter(merged, partial, output_dir)
            if has_adapter:
                format.finish_adapter(partial / "adapter")
            format.write(merged, partial)
        difference = _difference(format.probe_logits(merged, partial), expected)
        _check(difference, merged.dtype, "the model on disk")
        report |= {"dtype": merged.dtype, "difference_on_disk": difference, **provenance()}
        write_json(partial / REPORT, report)
        if card:
            write_card(partial, card)
        write_checksums(partial)
    console.print(
        f"{report['layers_merged']} layers merged; logits differ by {report['difference_merged']:.1e} of the largest, "
        f"{difference:.1e} on disk"
    )
    console.print(f"model in {output_dir}", markup=False)
    console.print(f"next:\n  {format.usage(output_dir, has_adapter)}", markup=False, soft_wrap=True)
    return report


def _roles_to_merge(merge: str, model: Any, family: ModelFamily, adapter: Path | None) -> list[str]:
    """The model's roles to merge, from ``--merge``.

    Raises:
        SettingsError: The model cannot be merged in part.
    """
    if merge == "all":
        return list(family.roles)
    if merge not in family.roles:
        raise SettingsError(f"--merge {merge}: a {family.name} model has no {merge}")
    if family.full_modules:
        raise SettingsError(f"--merge {merge}: what trains beside LoRA in {family.name} cannot be kept apart")
    if not isinstance(model, PeftModel):
        raise SettingsError(f"--merge {merge}: {adapter} holds whole weights, of which none can be kept apart")
    return [merge]


def _export_official(
    settings: ExportSettings,
    model: Any,
    family: ModelFamily,
    output_dir: Path,
    expected: torch.Tensor,
    report: dict[str, Any],
    card: CardFacts | None,
) -> dict[str, Any]:
    """Write the trained weights under their official names, read them back and compare the logits."""
    if unused := {"merge", "dtype"} & settings.model_fields_set:
        raise SettingsError(f"--format official: the weights are written as they are; leave out --{min(unused)}")
    model_id = report["base"]
    with output_lease(output_dir), replaced_on_success(output_dir) as partial:
        with library_errors(f"{output_dir}: cannot write the checkpoint"):  # so does PyTorch
            path, num_tensors = family.write_official(model, partial, model_id)
        base = family.load_model(model_id, dtype=torch.float32, device=CPU)
        logits = probe_logits(family.load_official(base, path), family, family.front_end(model_id))
        difference = _difference(logits, expected)
        _check(difference, "float32", "the checkpoint on disk")
        report |= {"tensors": num_tensors, "difference_on_disk": difference, **provenance()}
        write_json(partial / REPORT, report)
        if card:
            write_card(partial, card)
        write_checksums(partial)
    console.print(f"{num_tensors} tensors under their official names in {output_dir / path.name}", markup=False)
    return report


def _loaded_dtype(model_id: str, adapter: Path | None) -> torch.dtype:
    """Type in which the base is loaded: the stored one, because weights that are mapped from files take no memory.

    Weights that the adapter holds as a whole replace those of the base, in float32.
    """
    only_lora = not adapter or all(map(is_lora_tensor, tensor_names(adapter)))
    return (stored_dtype(model_id) if only_lora else None) or torch.float32


def _layers_to_merge(model: PeftModel, family: ModelFamily, roles: Sequence[str]) -> dict[str, LoraLayer]:
    """{name in the base: layer with LoRA} of some roles. Weights that they share with other layers become their own."""
    base = model.get_base_model()
    with_lora = ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
    layers = {name: layer for name, layer in with_lora if find_role(name, family) in roles}
    untie(base, {f"{name}.base_layer.weight" for name in layers})
    return layers


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _check(difference: float, dtype: str, what: str) -> None:
    if not difference <= TOLERANCE.get(dtype, INT8_TOLERANCE):  # also true for NaN
        raise RunError(f"export: {what} answers differently from base and adapter: logits differ by {difference:.1e}")


def _dtype(name: str, model_id: str) -> str:
    """The type of ``--dtype``; ``base`` is that of the base's files."""
    if name != "base":
        return name
    config = read_config(model_id)
    stored = str(config.get("dtype", config.get("torch_dtype")))
    return stored if stored in TOLERANCE else "float32"


def _split_adapter(merged: MergedModel, folder: Path, final: Path) -> bool:
    """Write layers that are not merged as an adapter for the merged base, and remove their LoRA from the model.

    Args:
        folder: Where to write.
        final: Where the folder is moved at the end; the adapter names this path as its base.
    Returns:
        Whether there are such layers.
    """
    base, family = unwrap_peft(merged.model), merged.family
    with_lora = (name for name, module in base.named_modules() if isinstance(module, LoraLayer))
    unmerged = [name for name in with_lora if name not in merged.layers]
    if unmerged:
        roles = sorted({find_role(name, family) for name in unmerged})
        _write_adapter(merged.model, family, folder / "adapter", roles, final)
        for name in unmerged:
            layer: Any = base.get_submodule(name)
            base.set_submodule(name, layer.get_base_layer())
    return bool(unmerged)


def _write_adapter(model: PeftModel, family: ModelFamily, folder: Path, roles: Sequence[str], base_path: Path) -> None:
    """Write the adapter's tensors of some roles as an adapter for the base at ``base_path``."""
    from peft import get_peft_model_state_dict

    folder.mkdir()
    config: Any = model.peft_config["default"]
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in sorted(state.items()) if find_role(name, family) in roles}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.target_modules = target_pattern(family, roles)
    config.base_model_name_or_path, config.inference_mode = str(base_path), True
    config.save_pretrained(str(folder))
    write_record(model, folder)
