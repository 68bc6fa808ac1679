"""An adapter and its base -> one model that needs neither PEFT nor voxray.

Nothing is taken on trust: every tensor of the adapter must find its layer, the merged model must give the logits of the
unmerged one, and what was written is read back and asked again.
"""

import hashlib
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
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.storage import write_json
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.models.adapters.audio_trim_record import note_trimming, read_record, trims_audio, write_record
from voxray.models.adapters.lora import (
    CONFIG,
    WEIGHTS,
    base_of_adapter,
    find_adapter,
    find_role,
    load_adapter,
    target_pattern,
)
from voxray.models.hf_files import read_config, unwrap_peft
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.models.registry import get_family
from voxray.runs.run_folder import make_folder, provenance, resolve_output_dir

REPORT = "export.json"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference of logits allowed, as a share of the largest logit; that of the type is what rounding gives."""
CPU = torch.device("cpu")
PROBE_SEC, PROBE_TEXT = 1.5, "환자는 어제부터 열이 납니다"


def run_export(settings: ExportSettings) -> dict[str, Any]:
    """Merge an adapter, or fully tuned weights, and write the model.

    Returns:
        What stands in export.json.
    Raises:
        RunError: The adapter does not fit, the folder is taken, or a check failed (nothing is left behind then).
        SettingsError: The output cannot be placed.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    adapter = find_adapter(settings.lora_dir)
    model_id = settings.model_id or base_of_adapter(adapter)
    if not model_id:
        raise RunError(f"{adapter / CONFIG}: names no base model; give one with --model_id")
    _refuse_taken_folder(output_dir, overwrite=settings.overwrite)
    family = get_family(model_id)
    trimmed = trims_audio(model_id, bool(read_record(adapter)))
    front_end = family.front_end(model_id, trim_audio=trimmed)
    base = family.load_model(model_id, dtype=torch.float32, device=CPU)
    model, num_tensors = load_adapter(base, adapter)
    console.print(f"adapter {adapter}: all of its {num_tensors} tensors used", markup=False)
    if trimmed:
        note_trimming(base, trimmed)  # its config.json is written with the model
        console.print("trained with --trim_audio_tokens: voxray reads that off config.json, others have to know it")
    with_adapter = probe_logits(model, family, front_end)
    roles = _roles_to_merge(settings.merge, model, family, adapter)
    if settings.format == "official":
        return _export_official(settings, model, family, output_dir, adapter, with_adapter)
    num_merged = merge_roles(model, family, roles) if isinstance(model, PeftModel) else num_tensors
    if not num_merged:
        raise RunError(f"--merge {settings.merge}: {adapter} has no part in the {settings.merge}")
    difference = _difference(probe_logits(model, family, front_end), with_adapter)
    _check(difference, torch.float32, "the merged model")
    partial = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        report = {"base": model_id, "adapter": str(adapter), "merge": settings.merge, "tensors": num_tensors}
        report |= {"adapter_sha256": hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()}
        dtype = _dtype(settings.dtype, model_id)
        _write(model, family, partial, model_id, dtype, output_dir)
        written = _difference(_logits_from_disk(partial, family, dtype), with_adapter)
        _check(written, dtype, "the model on disk")
        report |= {"trim_audio_tokens": trimmed, "layers_merged": num_merged}
        report |= {"dtype": str(dtype).removeprefix("torch.")}
        report |= {"difference_merged": difference, "difference_on_disk": written, **provenance()}
        write_json(partial / REPORT, report)
        shutil.rmtree(output_dir, ignore_errors=True)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(
        f"{num_merged} layers merged; logits differ by {difference:.1e} of the largest, {written:.1e} on disk"
    )
    console.print(f"model in {output_dir}", markup=False)
    return report


def _roles_to_merge(merge: str, model: Any, family: ModelFamily, adapter: Path) -> list[str]:
    """Roles that ``--merge`` names.

    Raises:
        SettingsError: They cannot be merged by themselves.
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
    with_adapter: torch.Tensor,
) -> dict[str, Any]:
    """Write what was trained under its official names, read it back and ask it."""
    if unused := {"merge", "dtype"} & settings.model_fields_set:
        raise SettingsError(f"--format official: the weights are written as they are; leave out --{min(unused)}")
    model_id = settings.model_id or base_of_adapter(adapter)
    partial = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        path, num_tensors = family.write_official(model, partial, model_id)
        base = family.load_model(model_id, dtype=torch.float32, device=CPU)
        found = probe_logits(family.load_official(base, path), family, family.front_end(model_id))
        written = _difference(found, with_adapter)
        _check(written, torch.float32, "the checkpoint on disk")
        report = {"base": model_id, "adapter": str(adapter), "format": settings.format, "tensors": num_tensors}
        report |= {"adapter_sha256": hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()}
        report |= {"difference_on_disk": written, **provenance()}
        write_json(partial / REPORT, report)
        shutil.rmtree(output_dir, ignore_errors=True)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{num_tensors} tensors under their official names in {output_dir / path.name}", markup=False)
    return report


def _refuse_taken_folder(output_dir: Path, *, overwrite: bool) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not (overwrite and (output_dir / REPORT).is_file()):
        hint = "--overwrite replaces an earlier export" if (output_dir / REPORT).is_file() else "it is no export"
        raise RunError(f"--output_dir {output_dir}: is not empty; {hint}")


def merge_roles(model: PeftModel, family: ModelFamily, roles: Sequence[str]) -> int:
    """Add the adapter's part in some roles into the base's weights, and take its layers out of the model.

    Returns:
        Layers merged.
    """
    base = model.get_base_model()
    layers = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    merged = [name for name in layers if find_role(name, family) in roles]
    for name in merged:
        layer: Any = base.get_submodule(name)
        layer.merge(safe_merge=True, adapter_names=["default"])
        base.set_submodule(name, layer.get_base_layer())
    return len(merged)


@torch.inference_mode()
def probe_logits(model: Any, family: ModelFamily, front_end: FrontEnd) -> torch.Tensor:
    """Logits of a clip and of a text, the same for every model of a family: a fixed noise, a fixed sentence."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(PROBE_SEC * front_end.sample_rate_hz)).astype(np.float32)
    features = front_end.features(samples)
    rows = []
    for name in ("asr", "tqa") if "tqa" in family.tasks else ("asr",):
        audio = TASKS[name].has_audio
        prompt, path = ("", "probe") if audio else (PROBE_TEXT, "")
        sample = Sample("probe", TASKS[name], prompt, PROBE_TEXT, path, "ko", "")
        num_windows = features.num_windows if audio else 0
        values = {"id": "probe", "task": name, "language": "ko", "source": "", "prompt": sample.prompt}
        values |= {"answer": PROBE_TEXT, "fill": features.fill, "num_windows": num_windows, "num_samples": len(samples)}
        values |= {"prompt_ids": front_end.prompt_ids(sample, len(samples) if audio else 0), "audio": features.mel_KF}
        rows.append(FeatureRow.of({**values, "target_ids": front_end.target_ids(PROBE_TEXT)}))
    batch = collate_training(rows, front_end)
    keep_BL = batch["attention_mask"].bool()
    batch = {name: tensor for name, tensor in batch.items() if name not in ("labels", "task")}
    return family.answer_logits(model, batch, keep_BL).float()


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _check(difference: float, dtype: torch.dtype, what: str) -> None:
    if not difference <= TOLERANCE[dtype]:
        raise RunError(f"export: {what} answers differently from base and adapter: logits differ by {difference:.1e}")


def _dtype(name: str, model_id: str) -> torch.dtype:
    if name != "base":
        return getattr(torch, name)
    found = read_config(model_id)
    named = getattr(torch, str(found.get("dtype", found.get("torch_dtype"))), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _write(model: Any, family: ModelFamily, folder: Path, model_id: str, dtype: torch.dtype, final: Path) -> None:
    """Write the merged base with its tokenizer and processor files, and what was not merged as an adapter on it."""
    base = unwrap_peft(model)
    rest = sorted({find_role(name, family) for name, m in base.named_modules() if isinstance(m, LoraLayer)})
    if rest:
        _write_rest(model, family, folder / "adapter", rest, final)
        for name in [name for name, m in base.named_modules() if isinstance(m, LoraLayer)]:
            layer: Any = base.get_submodule(name)
            base.set_submodule(name, layer.get_base_layer())
    base.to(dtype).save_pretrained(folder)
    family.copy_files(model_id, folder)


def _write_rest(model: PeftModel, family: ModelFamily, folder: Path, roles: Sequence[str], final: Path) -> None:
    """The adapter's tensors in some roles, as an adapter on the new base."""
    from peft import get_peft_model_state_dict

    folder.mkdir()
    config: Any = model.peft_config["default"]
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {name: tensor.contiguous() for name, tensor in sorted(tensors.items()) if find_role(name, family) in roles}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    config.target_modules = target_pattern(family, roles)
    config.base_model_name_or_path, config.inference_mode = str(final), True
    config.save_pretrained(str(folder))
    write_record(model, folder)


def _logits_from_disk(folder: Path, family: ModelFamily, dtype: torch.dtype) -> torch.Tensor:
    """What the written model answers, read back as anybody would."""
    model = family.load_model(str(folder), dtype=dtype, device=CPU)
    if (folder / "adapter" / CONFIG).is_file():
        stored = load_file(folder / "adapter" / WEIGHTS)
        model, num_tensors = load_adapter(model, folder / "adapter")
        assert num_tensors == len(stored) > 0
    return probe_logits(model, family, family.front_end(str(folder)))
