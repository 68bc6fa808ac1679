"""The evaluate job: from checked settings to metrics.json."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.comparison.report import write_report
from voxray.config.evaluate import EvaluateSettings
from voxray.config.flag_groups import as_range
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console, metrics_table, progress_bar
from voxray.core.errors import RunError, Stopped
from voxray.core.manifest import require_usable_row
from voxray.core.storage import AnyPath, to_jsonl, write_atomically, write_json
from voxray.core.tasks import TASKS
from voxray.evaluation.distribute import ModelCount, answer_rows, check_invariance, forget_attempts, read_failed
from voxray.evaluation.predictions import labelled, read_predictions, scored
from voxray.evaluation.submission import write_submission
from voxray.features.featurize import write_ledger
from voxray.features.from_settings import make_features, open_features_dir
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.generation.long_audio import CHUNK_MANIFEST, with_recordings, write_chunk_manifest
from voxray.generation.model import InferenceConfig, base_and_adapter, inference_config, match_training_prompts
from voxray.generation.salmonn_base import assemble_base
from voxray.models.adapters.compatibility import refuse_changed_outputs
from voxray.models.parts.compiled_audio import read_report
from voxray.models.registry import get_family
from voxray.models.salmonn.compat.annotations import MANIFESTS, as_manifests, ledger_path
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import make_folder, provenance, refuse_training_folder


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gave.

    Attributes:
        metrics: {task: {metric: {"value", "n"}}}; metrics.json says more.
        output_dir: Where predictions and metrics.json are.
    """

    metrics: dict[str, dict[str, dict[str, Any]]]
    output_dir: Path


def run_evaluation(settings: EvaluateSettings) -> EvaluationResult:
    """Featurize the manifests, answer their rows, score them.

    Raises:
        RunError, SettingsError: What the user has to put right.
    """
    mirror = RemoteSync.from_settings(settings)
    output_dir = mirror.folder
    mirror.fetch()
    refuse_training_folder(output_dir)
    paths, for_submission = settings.val_jsonl, settings.mode.startswith("submission")
    how: dict[str, Any] = {"prefix": settings.audio_prefix, "needs_text": not for_submission}
    settings = settings.model_copy(update={"val_jsonl": as_manifests(paths, output_dir / MANIFESTS, **how)})
    require_usable_row(settings.val_jsonl)
    settings = assemble_base(settings, output_dir)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = match_training_prompts(settings, model_id, adapter)
    if settings.compiled:
        read_report(Path(settings.compiled))
    make_folder(output_dir)
    warn_about_unused_flags(settings)
    write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
    write_json(output_dir / "provenance.json", provenance())
    mirror.push_all()
    where = settings.features_dir or mirror.features_url or str(output_dir / "features")
    features_dir = open_features_dir(settings, where, settings.storage_path, flag="--features_dir")
    refuse_changed_outputs(get_family(model_id), settings.store, settings.quantize, adapter)
    generation = inference_config(settings, model_id, adapter, settings.gen_max_new_tokens, settings.per_device_bsz)
    generation = replace(generation, perplexity=settings.perplexity)
    _, most_models = as_range(settings.num_models)
    with _stopping(output_dir), ray_session(output_dir / "ray.log", max(MIN_ACTORS, settings.num_actors, most_models)):
        metrics, notes = _answered(settings, generation, features_dir, mirror)
    write_json(output_dir / "metrics.json", metrics)
    written = ["predictions", "metrics.json"]
    if settings.mode:
        notes += write_submission(output_dir, settings.mode, paths)
        written.append(f"{settings.mode.partition('_')[0]}.csv")
    if has_metrics := bool(TASKS.keys() & metrics.keys()):
        write_report(output_dir)
        written.append("report.html")
    mirror.push_all()
    if has_metrics:
        console.print(metrics_table(f"{Path(model_id).name}{f' + {adapter}' if adapter else ', no adapter'}", metrics))
    for note in notes:
        console.print(note, markup=False)
    console.print(f"{', '.join(written[:-1])} and {written[-1]} in {output_dir}", markup=False)
    return EvaluationResult({task: metrics[task] for task in TASKS if task in metrics}, output_dir)


@contextmanager
def _stopping(output_dir: Path) -> Iterator[None]:
    """Say what becomes of an evaluation that is ended by Ctrl-C or SIGTERM."""
    try:
        yield
    except KeyboardInterrupt:
        forget_attempts(output_dir)
        raise Stopped(f"stopped; the same command goes on from there; what is answered stays in {output_dir}") from None


def _answered(
    settings: EvaluateSettings, generation: InferenceConfig, features_dir: AnyPath, mirror: RemoteSync
) -> tuple[dict[str, Any], list[str]]:
    """Answer the rows; returns metrics.json's content and what did not come out as it should, in lines.

    Raises:
        RunError: There is no row to answer, or none is answered.
    """
    output_dir = mirror.folder
    folders = evaluation_features(settings, generation.model_id, features_dir, output_dir)
    features, models = Features(folders), ModelCount(settings.num_models, settings.gpus_per_model)
    rows, lost = rows_to_answer(features, settings)
    write_evaluation_ledger(output_dir, settings.val_jsonl, folders, lost)
    again = settings.retry_failed
    with progress_bar("answers") as bar:
        known = {"models": models, "retry_failed": again, "mirror": mirror}
        answer_rows(generation, folders, rows, output_dir, on_progress=bar.update, **known)
    mirror.fetch()
    failed = [(features, *entry) for entry in read_failed(output_dir)]
    num_left_out = write_evaluation_ledger(output_dir, settings.val_jsonl, folders, [*lost, *failed])
    predictions = read_predictions(output_dir)
    if not predictions:
        raise RunError(f"no recording is answered as a whole; {features.source(failed[0][1])}: {failed[0][3]}")
    to_score = labelled(predictions)
    metrics, notes = scored(to_score, settings) if to_score else {}, []
    if num_unlabelled := len(predictions) - len(to_score):
        metrics["unlabelled"] = {"n": num_unlabelled}
        notes.append(f"{num_unlabelled} row(s) are answered, and not scored: they have no text to compare with")
    if num_left_out:
        hint = "; --retry_failed tries those again at which the model failed" if failed else ""
        notes.append(f"{num_left_out} row(s) left out in all, listed in quarantine.jsonl{hint}")
    if num_cut := sum(row["hit_max"] for row in predictions):
        notes.append(f"{num_cut} answer(s) cut off at --gen_max_new_tokens {settings.gen_max_new_tokens}")
    if chunks := [row["num_chunks"] for row in predictions if row["chunk_of"]]:
        metrics["long_audio"] = {"n": len(chunks), "chunks": sum(chunks)}
        notes.append(f"{len(chunks)} recording(s) too long for the model answered in {sum(chunks)} chunks")
    if num_rows := settings.check_batch_invariance:
        found = check_invariance(generation, folders, rows, output_dir, num_rows, models=models)
        metrics["batch_invariance"] = found
        which = f": {', '.join(found['ids'][:20])}" if found["ids"] else ""
        notes.append(f"{found['differing']} of {found['n']} rows differ when answered one by one{which}")
    return metrics, notes


def evaluation_features(
    settings: EvaluateSettings, model_id: str, features_dir: AnyPath, output_dir: Path
) -> tuple[AnyPath, ...]:
    """Feature sets of the manifests, and of the chunks of recordings that are too long for the model."""
    make = partial(make_features, settings, model_id, (), features_dir, bf16=settings.bf16)
    folders = make(plain_manifests=settings.val_jsonl).folders
    chunk_manifest = output_dir / CHUNK_MANIFEST
    chunk_manifest.unlink(missing_ok=True)
    if settings.mode.partition("_")[2] not in ("", "asr"):
        return folders
    front_end = get_family(model_id).front_end(model_id, trim_audio=settings.trim_audio_tokens)
    if not write_chunk_manifest(folders, front_end, settings.max_len, chunk_manifest):
        return folders
    return (*folders, *make(plain_manifests=(str(chunk_manifest),)).folders)


def write_evaluation_ledger(
    output_dir: Path,
    manifests: Sequence[str],
    folders: tuple[AnyPath, ...],
    lost: Sequence[tuple[Features, int, str, str]],
) -> int:
    """Write quarantine.jsonl: every row that is not answered, and why; returns their number."""
    path, chunk_manifest = output_dir / "quarantine.jsonl", output_dir / CHUNK_MANIFEST
    write_ledger(path, folders, lost)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if chunk_manifest.is_file():
        lines = with_recordings(lines, chunk_manifest)
    for ledger in [ledger_path(path) for path in manifests if output_dir / MANIFESTS in Path(path).parents]:
        lines += [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    write_atomically(path, to_jsonl(lines))
    return len(lines)


def rows_to_answer(
    features: Features, settings: EvaluateSettings
) -> tuple[list[int], list[tuple[Features, int, str, str]]]:
    """Rows of the asked-for task within the token limit, and those over it, for the ledger.

    Raises:
        RunError: None is left.
    """
    lengths, task = features.num_prompt_tokens, settings.mode.partition("_")[2]
    wanted = features.task == TASK_CODES.get(task, -1) if task else np.full(len(features), True)
    too_long = np.flatnonzero(wanted & (lengths > settings.max_len))
    limit = f"over --max_len {settings.max_len}"
    lost = [(features, int(row), "too_long", f"a prompt of {lengths[row]} tokens, {limit}") for row in too_long]
    rows = np.flatnonzero(wanted & (lengths <= settings.max_len)).tolist()
    if not rows:
        what = f"no {task} row" if task else "no row"
        raise RunError(f"--val_jsonl: {what} to evaluate within --max_len {settings.max_len}")
    if lost:
        console.print(f"{len(lost)} row(s) over --max_len left out, listed in quarantine.jsonl")
    return rows, lost
