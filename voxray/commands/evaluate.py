"""The evaluate job: answers and scores the rows of manifests and writes predictions, metrics.json and a report."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.commands.lora_frontier import evaluate_scales
from voxray.commands.next_steps import after_evaluation
from voxray.comparison.report import write_report
from voxray.config.evaluate import EvaluateSettings
from voxray.config.flag_groups import as_range
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console, metrics_table, progress_bar
from voxray.core.errors import RunError, Stopped
from voxray.core.manifest import require_usable_row
from voxray.core.storage import AnyPath, to_jsonl, write_atomically, write_json
from voxray.core.tasks import TASKS, template_codes
from voxray.evaluation.distribute import ModelCount, answer_rows, check_invariance, delete_crash_logs, read_failed
from voxray.evaluation.predictions import labelled_rows, read_predictions, score_predictions
from voxray.evaluation.result import EvaluationResult
from voxray.evaluation.submission import write_submission
from voxray.features.context import with_context
from voxray.features.featurize import write_ledger
from voxray.features.from_settings import make_features, open_features_dir
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.generation.engines.load import check_engine
from voxray.generation.long_audio import CHUNK_MANIFEST, restore_recordings, write_chunk_manifest
from voxray.generation.model import InferenceConfig, base_and_adapter, inference_config, resolve_settings
from voxray.generation.salmonn_base import assemble_base
from voxray.models.adapters.compatibility import check_encoder_unchanged
from voxray.models.parts.compiled_audio import read_report
from voxray.models.registry import get_family
from voxray.models.salmonn.compat.annotations import MANIFESTS, as_manifests, ledger_path
from voxray.runs.lease import folder_lease
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import provenance, record_tasks, refuse_training_folder


def run_evaluation(settings: EvaluateSettings) -> EvaluationResult:
    """Compute features of the manifests, answer their rows and score the answers.

    Raises:
        RunError, SettingsError: The user has to fix an input or a setting.
    """
    if len(settings.lora_scale) > 1:
        return evaluate_scales(settings, run_evaluation)
    remote = RemoteSync.from_settings(settings)
    output_dir = remote.folder
    remote.fetch()
    refuse_training_folder(output_dir)
    paths, for_submission = settings.val_jsonl, settings.mode.startswith("submission")
    options: dict[str, Any] = {"prefix": settings.audio_prefix, "needs_text": not for_submission}
    settings = settings.model_copy(update={"val_jsonl": as_manifests(paths, output_dir / MANIFESTS, **options)})
    require_usable_row(settings.val_jsonl)
    settings = assemble_base(settings, output_dir)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = resolve_settings(settings, model_id, adapter, on_ray=True)
    if settings.compiled:
        read_report(Path(settings.compiled))
    with folder_lease(output_dir, remote.remote_dir):
        warn_about_unused_flags(settings)
        write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
        write_json(output_dir / "provenance.json", provenance())
        record_tasks(output_dir)
        remote.push_all()
        features_path = settings.features_dir or remote.features_url or str(output_dir / "features")
        features_dir = open_features_dir(settings, features_path, settings.storage_path, flag="--features_dir")
        check_encoder_unchanged(get_family(model_id), settings.store, settings.quantize, adapter)
        config = inference_config(settings, model_id, adapter, settings.gen_max_new_tokens, settings.per_device_bsz)
        config = replace(config, perplexity=settings.perplexity)
        check_engine(config)
        _, max_models = as_range(settings.num_models)
        num_cpus = max(MIN_ACTORS, settings.num_actors, max_models)
        with _report_interrupt(output_dir), ray_session(output_dir / "ray.log", num_cpus):
            metrics, notes = _answer_and_score(settings, config, features_dir, remote)
        write_json(output_dir / "metrics.json", metrics)
        written = ["predictions", "metrics.json"]
        if settings.mode:
            notes += write_submission(output_dir, settings.mode, paths)
            written.append(f"{settings.mode.partition('_')[0]}.csv")
        if has_metrics := bool(TASKS.keys() & metrics.keys()):
            write_report(output_dir)
            written.append("report.html")
        remote.push_all()
        if has_metrics:
            console.print(
                metrics_table(f"{Path(model_id).name}{f' + {adapter}' if adapter else ', no adapter'}", metrics)
            )
        for note in notes:
            console.print(note, markup=False)
        console.print(f"{', '.join(written[:-1])} and {written[-1]} in {output_dir}", markup=False)
        for line in after_evaluation(output_dir, has_page=has_metrics):
            console.print(line, markup=False, soft_wrap=True)
        return EvaluationResult({task: metrics[task] for task in TASKS if task in metrics}, output_dir)


@contextmanager
def _report_interrupt(output_dir: Path) -> Iterator[None]:
    """Turn Ctrl-C or SIGTERM into a ``Stopped`` that says how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        delete_crash_logs(output_dir)
        raise Stopped(f"stopped; run the same command again to resume; finished answers are in {output_dir}") from None


def _answer_and_score(
    settings: EvaluateSettings, config: InferenceConfig, features_dir: AnyPath, remote: RemoteSync
) -> tuple[dict[str, Any], list[str]]:
    """Answer the rows and score the answers.

    Returns:
        The content of metrics.json, and notes for the user about rows that were not answered or scored normally.
    Raises:
        RunError: There is no row to answer, or no row could be answered.
    """
    output_dir = remote.folder
    folders = evaluation_features(settings, config, features_dir, output_dir)
    features, models = Features(folders), ModelCount(settings.num_models, settings.gpus_per_model)
    rows, too_long = rows_to_answer(features, settings, config)
    write_evaluation_ledger(output_dir, settings.val_jsonl, folders, too_long)
    with progress_bar("answers") as bar:
        options = {"models": models, "retry_failed": settings.retry_failed, "remote": remote}
        answer_rows(config, folders, rows, output_dir, on_progress=bar.update, **options)
    remote.fetch()
    failed = [(features, *entry) for entry in read_failed(output_dir)]
    num_left_out = write_evaluation_ledger(output_dir, settings.val_jsonl, folders, [*too_long, *failed])
    predictions = read_predictions(output_dir)
    if not predictions:
        raise RunError(f"no recording is answered as a whole; {features.source(failed[0][1])}: {failed[0][3]}")
    to_score = labelled_rows(predictions)
    metrics, notes = score_predictions(to_score, settings) if to_score else {}, []
    if num_unlabelled := len(predictions) - len(to_score):
        metrics["unlabelled"] = {"n": num_unlabelled}
        notes.append(f"{num_unlabelled} row(s) are answered, and not scored: they have no text to compare with")
    if num_left_out:
        hint = "; --retry_failed retries those on which the model failed" if failed else ""
        notes.append(f"{num_left_out} row(s) left out in all, listed in quarantine.jsonl{hint}")
    if num_cut := sum(row["hit_max"] for row in predictions):
        notes.append(f"{num_cut} answer(s) cut off at --gen_max_new_tokens {settings.gen_max_new_tokens}")
    if chunks := [row["num_chunks"] for row in predictions if row["chunk_of"]]:
        metrics["long_audio"] = {"n": len(chunks), "chunks": sum(chunks)}
        notes.append(f"{len(chunks)} recording(s) too long for the model answered in {sum(chunks)} chunks")
    if num_rows := settings.check_batch_invariance:
        result = check_invariance(config, folders, rows, output_dir, num_rows, models=models)
        metrics["batch_invariance"] = result
        ids = f": {', '.join(result['ids'][:20])}" if result["ids"] else ""
        notes.append(f"{result['differing']} of {result['n']} rows differ when answered one by one{ids}")
    return metrics, notes


def evaluation_features(
    settings: EvaluateSettings, config: InferenceConfig, features_dir: AnyPath, output_dir: Path
) -> tuple[AnyPath, ...]:
    """Folders of the features of the manifests, and of the chunks of recordings that are too long for the model."""
    model_id = config.model_id
    make = partial(make_features, settings, model_id, (), features_dir, bf16=settings.bf16)
    folders = make(plain_manifests=settings.val_jsonl).folders
    chunk_manifest = output_dir / CHUNK_MANIFEST
    chunk_manifest.unlink(missing_ok=True)
    if settings.mode.partition("_")[2] not in ("", "asr"):
        return folders
    front_end = get_family(model_id).front_end(model_id, trim_audio=settings.trim_audio_tokens)
    options = {"language": settings.language, "context": config.context}
    if not write_chunk_manifest(folders, front_end, settings.max_len, chunk_manifest, **options):
        return folders
    return (*folders, *make(plain_manifests=(str(chunk_manifest),)).folders)


def write_evaluation_ledger(
    output_dir: Path,
    manifests: Sequence[str],
    folders: tuple[AnyPath, ...],
    dropped: Sequence[tuple[Features, int, str, str]],
) -> int:
    """Write quarantine.jsonl: every row without an answer, and why. Returns their number."""
    path, chunk_manifest = output_dir / "quarantine.jsonl", output_dir / CHUNK_MANIFEST
    write_ledger(path, folders, dropped)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if chunk_manifest.is_file():
        lines = restore_recordings(lines, chunk_manifest)
    for ledger in [ledger_path(path) for path in manifests if output_dir / MANIFESTS in Path(path).parents]:
        lines += [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    write_atomically(path, to_jsonl(lines))
    return len(lines)


def prompt_lengths(features: Features, config: InferenceConfig) -> np.ndarray:
    """Tokens of every row's prompt, with the context of the job instead of the stored one."""
    lengths = features.num_prompt_tokens
    transcriptions = np.flatnonzero(np.isin(features.task, template_codes("transcription")))
    if config.context is None or not len(transcriptions):
        return lengths
    front_end, lengths = get_family(config.model_id).front_end(config.model_id, trim_audio=config.trim_audio), +lengths
    added: int | None = None  # to the prompt of a row without a context, the same for all of them
    for row in transcriptions.tolist():
        if added is None or features.prompt(row):
            stored = features.row(row)
            lengths[row] = num_tokens = len(with_context(stored, config.context, front_end).prompt_ids)
            added = added if stored.prompt else num_tokens - len(stored.prompt_ids)
        else:
            lengths[row] += added
    return lengths


def rows_to_answer(
    features: Features, settings: EvaluateSettings, config: InferenceConfig
) -> tuple[list[int], list[tuple[Features, int, str, str]]]:
    """Select the rows of the task of ``--mode`` (all tasks without one).

    Returns:
        The rows within ``--max_len``, and ledger entries for those over it.
    Raises:
        RunError: No row is within ``--max_len``.
    """
    lengths, task = prompt_lengths(features, config), settings.mode.partition("_")[2]
    of_task = features.task == TASK_CODES.get(task, -1) if task else np.full(len(features), True)
    limit = f"over --max_len {settings.max_len}"
    too_long = [
        (features, int(row), "too_long", f"a prompt of {lengths[row]} tokens, {limit}")
        for row in np.flatnonzero(of_task & (lengths > settings.max_len))
    ]
    rows = np.flatnonzero(of_task & (lengths <= settings.max_len)).tolist()
    if not rows:
        what = f"no {task} row" if task else "no row"
        raise RunError(f"--val_jsonl: {what} to evaluate within --max_len {settings.max_len}")
    if too_long:
        console.print(f"{len(too_long)} row(s) over --max_len left out, listed in quarantine.jsonl")
    return rows, too_long
