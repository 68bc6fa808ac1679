"""The export job: merges an adapter into its base and writes a model that needs neither PEFT nor voxray.

Every step is verified: each tensor of the adapter must match a layer, the merged model must give the logits of the
unmerged one, and so must the model read back from disk.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from voxray.batches.collate import collate_training
from voxray.config.export import ExportSettings
from voxray.core.console import console
from voxray.core.content_hash import write_checksums
from voxray.core.errors import RunError, SettingsError, library_errors
from voxray.core.manifest import Sample
from voxray.core.project_files import typed_command
from voxray.core.storage import checksum, write_json
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.models.adapters.audio_trim_record import read_trim_record, set_trim_audio, trims_audio, write_trim_record
from voxray.models.adapters.lora import (
    base_of_adapter,
    find_adapter,
    find_role,
    is_lora_tensor,
    load_adapter,
    target_pattern,
)
from voxray.models.adapters.lora_scale import scale_lora
from voxray.models.adapters.merge import MergeLayers, in_float32, merged_tensors
from voxray.models.adapters.read_files import CONFIG, WEIGHTS, tensor_names, weights_file
from voxray.models.adapters.tied_weights import untie
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import model_file, read_config, stored_dtype, unwrap_peft
from voxray.models.interface import ModelFamily
from voxray.models.parts.losses import pass_inputs
from voxray.models.registry import get_family
from voxray.models.safetensors_files import write_weights
from voxray.models.voxtral.mistral_format import peft_names, read_mistral, rename_for_vllm, write_mistral
from voxray.runs.lease import output_lease
from voxray.runs.run_folder import provenance, replaced_on_success, require_replaceable, resolve_output_dir

REPORT = "export.json"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest allowed difference as a share of the largest logit, by data type: the size of its rounding error."""
FORMATS = {"mistral": "voxtral"}
"""{format: the family that has it}; the others are for all families, or refused by the family."""
CPU = torch.device("cpu")
PROBE_SEC, PROBE_TEXT = 1.5, "환자는 어제부터 열이 납니다"


def run_export(settings: ExportSettings) -> dict[str, Any]:
    """Merge an adapter, or fully tuned weights, and write the model.

    Returns:
        The content of export.json.
    Raises:
        RunError: The adapter does not fit, the output folder is in use, or a check failed. No output is written then.
        SettingsError: The settings do not fit the model, or the output folder cannot be used.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    adapter = find_adapter(settings.lora_dir)
    model_id = settings.model_id or base_of_adapter(adapter)
    if not model_id:
        raise RunError(f"{adapter / CONFIG}: names no base model; give one with --model_id")
    require_replaceable(
        output_dir, REPORT, overwrite=settings.overwrite, earlier="an earlier export", other="it is no export"
    )
    family = get_family(model_id)
    if settings.format in FORMATS and family.name != FORMATS[settings.format]:
        raise SettingsError(f"--format {settings.format}: {FORMATS[settings.format]} models only, not {family.name}")
    trimmed = trims_audio(model_id, bool(read_trim_record(adapter)))
    if trimmed and settings.format == "mistral":
        raise SettingsError(
            f"--format mistral: {adapter} was trained with --trim_audio_tokens, which vLLM does not know"
        )
    front_end = family.front_end(model_id, trim_audio=trimmed)
    base = family.load_model(model_id, dtype=_loaded_dtype(model_id, adapter), device=CPU)
    model, num_tensors = load_adapter(base, adapter)
    if settings.scale != 1:
        if settings.merge != "all" or settings.format == "official":
            raise SettingsError(f"--scale {settings.scale:g}: only with --merge all, and not with --format official")
        scale_lora(model, adapter, f"--scale {settings.scale:g}", settings.scale)
    console.print(f"adapter {adapter}: all of its {num_tensors} tensors used", markup=False)
    if trimmed:
        set_trim_audio(base, trimmed)  # saved in the model's config.json
        console.print("trained with --trim_audio_tokens: voxray reads that off config.json, others have to know it")
    with in_float32(model):
        expected = probe_logits(model, family, front_end)
    roles = _roles_to_merge(settings.merge, model, family, adapter)
    if settings.format == "official":
        return _export_official(settings, model, family, output_dir, adapter, expected)
    layers = _layers_to_merge(model, family, roles) if isinstance(model, PeftModel) else {}
    num_merged = len(layers) if isinstance(model, PeftModel) else num_tensors
    if not num_merged:
        raise RunError(f"--merge {settings.merge}: {adapter} has no part in the {settings.merge}")
    with in_float32(model, layers):
        difference = _difference(probe_logits(model, family, front_end), expected)
    _check(difference, torch.float32, "the merged model")
    report = {"base": model_id, "adapter": str(adapter), "merge": settings.merge, "tensors": num_tensors}
    report |= {"adapter_sha256": checksum(weights_file(adapter)), "difference_merged": difference}
    report |= {"scale": settings.scale, "trim_audio_tokens": trimmed, "layers_merged": num_merged}
    return _write_merged(settings, model, layers, family, output_dir, expected, report)


def _write_merged(
    settings: ExportSettings,
    model: Any,
    layers: MergeLayers,
    family: ModelFamily,
    output_dir: Path,
    expected: torch.Tensor,
    report: dict[str, Any],
) -> dict[str, Any]:
    """Write the merged model in ``--format``, read it back and compare its logits; returns the completed report."""
    model_id, dtype = report["base"], _dtype(settings.dtype, report["base"])
    with output_lease(output_dir), replaced_on_success(output_dir) as partial:
        with library_errors(f"{output_dir}: cannot write the model"):  # safetensors has its own error for a full disk
            adapter = _split_adapter(model, layers, family, partial, output_dir, settings.format)
            if settings.format == "mistral":
                write_mistral(partial, merged_tensors(unwrap_peft(model), layers, dtype), unwrap_peft(model).config)
                shutil.copyfile(model_file(model_id, "tekken.json"), partial / "tekken.json")
            else:
                _write_folder(model, layers, family, partial, model_id, dtype)
        read = _mistral_logits if settings.format == "mistral" else _logits_from_disk
        difference = _difference(read(partial, family, dtype, model_id), expected)
        _check(difference, dtype, "the model on disk")
        report |= {"format": settings.format, "dtype": str(dtype).removeprefix("torch.")}
        report |= {"difference_on_disk": difference, **provenance()}
        write_json(partial / REPORT, report)
        write_checksums(partial)
    console.print(
        f"{report['layers_merged']} layers merged; logits differ by {report['difference_merged']:.1e} of the largest, "
        f"{difference:.1e} on disk"
    )
    console.print(f"model in {output_dir}", markup=False)
    use = typed_command("infer", "--model_id", str(output_dir), "--audio_path", "clip.wav")
    if settings.format == "mistral":
        use = f"vllm serve {output_dir} --config-format mistral --load-format mistral --tokenizer-mode mistral"
        use += f" --enable-lora --lora-modules tuned={output_dir / 'adapter'}" if adapter else ""
    console.print(f"next:\n  {use}", markup=False, soft_wrap=True)
    return report


def _roles_to_merge(merge: str, model: Any, family: ModelFamily, adapter: Path) -> list[str]:
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
    adapter: Path,
    expected: torch.Tensor,
) -> dict[str, Any]:
    """Write the trained weights under their official names, read them back and compare the logits."""
    if unused := {"merge", "dtype"} & settings.model_fields_set:
        raise SettingsError(f"--format official: the weights are written as they are; leave out --{min(unused)}")
    model_id = settings.model_id or base_of_adapter(adapter)
    with output_lease(output_dir), replaced_on_success(output_dir) as partial:
        with library_errors(f"{output_dir}: cannot write the checkpoint"):  # so does PyTorch
            path, num_tensors = family.write_official(model, partial, model_id)
        base = family.load_model(model_id, dtype=torch.float32, device=CPU)
        logits = probe_logits(family.load_official(base, path), family, family.front_end(model_id))
        difference = _difference(logits, expected)
        _check(difference, torch.float32, "the checkpoint on disk")
        report = {"base": model_id, "adapter": str(adapter), "format": settings.format, "tensors": num_tensors}
        report |= {"adapter_sha256": checksum(weights_file(adapter))}
        report |= {"difference_on_disk": difference, **provenance()}
        write_json(partial / REPORT, report)
        write_checksums(partial)
    console.print(f"{num_tensors} tensors under their official names in {output_dir / path.name}", markup=False)
    return report


def _loaded_dtype(model_id: str, adapter: Path) -> torch.dtype:
    """Type in which the base is loaded: the stored one, because weights that are mapped from files take no memory.

    Weights that the adapter holds as a whole replace those of the base, in float32.
    """
    only_lora = all(map(is_lora_tensor, tensor_names(adapter)))
    return (stored_dtype(model_id) if only_lora else None) or torch.float32


def _layers_to_merge(model: PeftModel, family: ModelFamily, roles: Sequence[str]) -> dict[str, LoraLayer]:
    """{name in the base: layer with LoRA} of some roles. Weights that they share with other layers become their own."""
    base = model.get_base_model()
    with_lora = ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
    layers = {name: layer for name, layer in with_lora if find_role(name, family) in roles}
    untie(base, {f"{name}.base_layer.weight" for name in layers})
    return layers


@torch.no_grad()
def probe_logits(model: Any, family: ModelFamily, front_end: FrontEnd) -> torch.Tensor:
    """Logits of the answers to a fixed noise clip and, if the family has the task tqa, to a fixed text question."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(PROBE_SEC * front_end.sample_rate_hz)).astype(np.float32)
    features, known = front_end.features(samples), front_end.languages
    language = "ko" if known is None or "ko" in known else min(known)
    rows = []
    for name in ("asr", "tqa") if "tqa" in family.tasks else ("asr",):
        has_audio = TASKS[name].has_audio
        prompt, path = ("", "probe") if has_audio else (PROBE_TEXT, "")
        sample = Sample("probe", TASKS[name], prompt, PROBE_TEXT, path, language, "")
        num_windows = features.num_windows if has_audio else 0
        values = {"id": "probe", "task": name, "language": language, "source": "", "prompt": sample.prompt}
        values |= {"answer": PROBE_TEXT, "fill": features.fill, "num_windows": num_windows, "num_samples": len(samples)}
        values |= {
            "prompt_ids": front_end.prompt_ids(sample, len(samples) if has_audio else 0),
            "audio": features.mel_KF,
        }
        rows.append(FeatureRow.from_values({**values, "target_ids": front_end.target_ids(PROBE_TEXT)}))
    batch = collate_training(rows, front_end)
    length = batch["input_ids"].shape[1]
    ends = [len(row.prompt_ids) + len(row.target_ids) for row in rows]
    positions_N = torch.cat([row * length + torch.arange(end) for row, end in enumerate(ends)])
    return family.answer_logits(model, pass_inputs(batch), positions_N).float()


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _check(difference: float, dtype: torch.dtype, what: str) -> None:
    if not difference <= TOLERANCE[dtype]:  # also true for NaN
        raise RunError(f"export: {what} answers differently from base and adapter: logits differ by {difference:.1e}")


def _dtype(name: str, model_id: str) -> torch.dtype:
    if name != "base":
        return getattr(torch, name)
    config = read_config(model_id)
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _write_folder(
    model: Any, layers: MergeLayers, family: ModelFamily, folder: Path, model_id: str, dtype: torch.dtype
) -> None:
    """Write the merged base with its tokenizer and processor files, as transformers loads it."""
    base = unwrap_peft(model)
    write_weights(folder, merged_tensors(base, layers, dtype))
    base.config.dtype, base.config.architectures = dtype, [type(base).__name__]
    base.config.save_pretrained(folder)
    if base.can_generate():
        base.generation_config.save_pretrained(folder)
    family.copy_files(model_id, folder)


def _split_adapter(
    model: Any, layers: MergeLayers, family: ModelFamily, folder: Path, final: Path, format: str
) -> bool:
    """Write layers that are not merged as an adapter for the merged base, and remove their LoRA from the model.

    Args:
        layers: The layers to merge.
        folder: Where to write.
        final: Where the folder is moved at the end; the adapter names this path as its base.
    Returns:
        Whether there are such layers.
    """
    base = unwrap_peft(model)
    unmerged = [name for name, module in base.named_modules() if isinstance(module, LoraLayer) and name not in layers]
    if unmerged:
        roles = sorted({find_role(name, family) for name in unmerged})
        _write_adapter(model, family, folder / "adapter", roles, final)
        if format == "mistral":
            rename_for_vllm(folder / "adapter")
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
    write_trim_record(model, folder)


def _mistral_logits(folder: Path, family: ModelFamily, dtype: torch.dtype, model_id: str) -> torch.Tensor:
    """Logits of a model in Mistral's format, from the written files, computed in float32."""
    model = read_mistral(folder, family.load_model(model_id, dtype=dtype, device=CPU))
    if (folder / "adapter" / CONFIG).is_file():
        with peft_names(folder / "adapter") as adapter:
            model, _ = load_adapter(model, adapter)
    with in_float32(model):
        return probe_logits(model, family, family.front_end(model_id))


def _logits_from_disk(folder: Path, family: ModelFamily, dtype: torch.dtype, model_id: str) -> torch.Tensor:
    """Logits of the written model, loaded from disk as a user would load it and computed in float32."""
    model = family.load_model(str(folder), dtype=dtype, device=CPU)
    if (folder / "adapter" / CONFIG).is_file():
        stored = load_file(folder / "adapter" / WEIGHTS)
        model, num_tensors = load_adapter(model, folder / "adapter")
        assert num_tensors == len(stored) > 0
    with in_float32(model):
        return probe_logits(model, family, family.front_end(str(folder)))
