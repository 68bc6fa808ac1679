"""The evaluate job: from checked settings to metrics.json."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from voxray.config.evaluate import AdapterFlags, EvaluateSettings
from voxray.data.feature_sets import features_place, make_features
from voxray.data.features import Features
from voxray.data.featurize import MIN_ACTORS, write_ledger
from voxray.data.shards import TASK_CODES
from voxray.errors import RunError, SettingsError
from voxray.evaluation.batch import Generation, evaluate, read_predictions
from voxray.launch import ray_session, warn_about_idle_flags
from voxray.manifest import first_fault
from voxray.models.family import family_of
from voxray.models.lora import base_of_adapter, find_adapter, roles_of_adapter
from voxray.models.trimming import read_record, trims_audio
from voxray.run_folder import anchor, make_folder, provenance
from voxray.storage import Place, write_atomically, write_json
from voxray.terminal import console, metrics_table, progress_bar


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gave.

    Attributes:
        metrics: {task: {metric: {"value", "n"}}}.
        output_dir: Where predictions and metrics.json are.
    """

    metrics: dict[str, dict[str, dict[str, Any]]]
    output_dir: Path


def run_evaluation(settings: EvaluateSettings) -> EvaluationResult:
    """Featurize the manifests, answer their rows, score them.

    Raises:
        RunError, SettingsError: What the user has to put right.
    """
    output_dir = anchor(settings.output_dir, settings.storage_path)
    first_fault(settings.val_jsonl)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = as_trained(settings, model_id, adapter)
    make_folder(output_dir)
    warn_about_idle_flags(settings)
    write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
    write_json(output_dir / "provenance.json", provenance())
    where = settings.features_dir or str(output_dir / "features")
    features_dir = features_place(settings, where, settings.storage_path, flag="--features_dir")
    if settings.store == "encoder" and adapter and "encoder" in roles_of_adapter(adapter, family_of(model_id)):
        raise SettingsError(f"--store encoder: the adapter in {adapter} changes the encoder, so its outputs differ")
    with ray_session(output_dir / "ray.log", max(MIN_ACTORS, settings.num_actors, settings.num_models)):
        report = make_features(
            settings, model_id, (), features_dir, bf16=settings.bf16, plain_manifests=settings.val_jsonl
        )
        rows = rows_to_answer(Features(report.folders), settings, report.folders, output_dir)
        generation = Generation(
            model_id,
            str(adapter or ""),
            settings.bf16,
            settings.per_device_bsz,
            settings.gen_max_new_tokens,
            settings.tf32,
            settings.fp16,
            settings.quantize,
            settings.trim_audio_tokens,
        )
        with progress_bar("answers") as bar:
            metrics = evaluate(
                generation, report.folders, rows, output_dir, num_models=settings.num_models, on_progress=bar.update
            )
    if settings.mode.startswith("submission"):
        write_submission(output_dir)
    title = f"{Path(model_id).name}{' + ' + str(adapter) if adapter else ', no adapter'}"
    console.print(metrics_table(title, metrics))
    console.print(f"predictions and metrics.json in {output_dir}", markup=False)
    return EvaluationResult(metrics, output_dir)


def base_and_adapter(settings: AdapterFlags, lora_dir: str) -> tuple[str, Path | None]:
    """Base model and adapter folder to use; an adapter names its own base, which holds unless --model_id is given."""
    if not lora_dir:
        return settings.model_id, None
    adapter = find_adapter(lora_dir)
    if "model_id" in settings.model_fields_set:
        return settings.model_id, adapter
    return base_of_adapter(adapter) or settings.model_id, adapter


Flags = TypeVar("Flags", bound=AdapterFlags)


def as_trained(settings: Flags, model_id: str, adapter: Path | None) -> Flags:
    """The settings with prompts as the adapter, or the base, was trained on.

    Raises:
        SettingsError: A flag asks for others.
    """
    trained = read_record(adapter) if adapter else None
    trimmed = trims_audio(model_id, settings.trim_audio_tokens) if trained is None else trained
    if "trim_audio_tokens" in settings.model_fields_set and settings.trim_audio_tokens != trimmed:
        kind = "with" if trimmed else "without"
        raise SettingsError(f"--trim_audio_tokens: {adapter or model_id} was trained {kind} it; leave the flag out")
    return settings.model_copy(update={"trim_audio_tokens": trimmed})


def rows_to_answer(
    features: Features, settings: EvaluateSettings, folders: tuple[Place, ...], output_dir: Path
) -> list[int]:
    """Rows of the asked-for task within the token limit; the others that were lost stand in quarantine.jsonl.

    Raises:
        RunError: None is left.
    """
    lengths, task = features.num_prompt_tokens, settings.mode.partition("_")[2]
    wanted = features.task == TASK_CODES.get(task, -1) if task else np.full(len(features), True)
    too_long = np.flatnonzero(wanted & (lengths > settings.max_len))
    limit = f"over --max_len {settings.max_len}"
    lost = [(features, int(row), "too_long", f"a prompt of {lengths[row]} tokens, {limit}") for row in too_long]
    write_ledger(output_dir / "quarantine.jsonl", folders, lost)
    rows = np.flatnonzero(wanted & (lengths <= settings.max_len)).tolist()
    if not rows:
        what = f"no {task} row" if task else "no row"
        raise RunError(f"--val_jsonl: {what} to evaluate within --max_len {settings.max_len}")
    if lost:
        console.print(f"{len(lost)} row(s) over --max_len left out, listed in {output_dir / 'quarantine.jsonl'}")
    return rows


def write_submission(output_dir: Path) -> None:
    """Write submission.csv with the columns ``testset_id,text`` that SALMONN's evaluators take."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["testset_id", "text"])
    writer.writerows([row["id"], row["prediction"]] for row in read_predictions(output_dir))
    write_atomically(output_dir / "submission.csv", text.getvalue().encode())
