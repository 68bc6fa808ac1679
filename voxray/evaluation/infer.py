"""Answers for one clip or a manifest, in this process and without Ray."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from voxray.config.evaluate import InferSettings
from voxray.data.extract import Extractor, Storing
from voxray.data.features import FeatureRow
from voxray.data.featurize import to_jsonl
from voxray.errors import RunError, SettingsError
from voxray.evaluation.generate import answers
from voxray.evaluation.job import as_trained, base_and_adapter
from voxray.evaluation.metrics.counts import as_row, count, metrics_of
from voxray.launch import warn_about_idle_flags
from voxray.manifest import BadRow, Sample, chunks, first_fault, language_code, read_chunk
from voxray.models.family import family_of
from voxray.models.lora import load_adapter
from voxray.models.quantize import base_dtype
from voxray.run_folder import anchor
from voxray.storage import write_atomically
from voxray.tasks import TASKS
from voxray.terminal import console, metrics_table

DEMO_ROWS = 4
LINES_PER_CHUNK = 256


def run_inference(settings: InferSettings, demo_jsonl: str) -> list[dict[str, Any]]:
    """Print the answer of every row; write them to ``--output_path``; score those that have references.

    Args:
        demo_jsonl: Manifest used when neither a clip nor a manifest is given.
    Returns:
        One entry per row: id, task, prediction, and the reference if there is one.
    Raises:
        RunError, SettingsError: The clip, manifest, model or adapter cannot be used.
    """
    manifest, limit = settings.jsonl, settings.preview_rows
    if not (settings.audio_path or manifest):
        manifest, limit = demo_jsonl, limit or DEMO_ROWS
        console.print(f"no --audio_path and no --jsonl: the first {limit} rows of {manifest}", markup=False)
    if manifest:
        first_fault((manifest,))
    output_path = anchor(settings.output_path, "", flag="--output_path") if settings.output_path else None
    model_id, adapter = base_and_adapter(settings, settings.lora_dir or settings.output_dir)
    settings = as_trained(settings, model_id, adapter)
    warn_about_idle_flags(settings)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    family, extractor = family_of(model_id), Extractor(model_id, Storing(trim_audio=settings.trim_audio_tokens))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    model = family.load_model(model_id, dtype=dtype, device=device, quantize=settings.quantize)
    if adapter:
        model, num_tensors = load_adapter(model, adapter)
        print(f"adapter {adapter}: {num_tensors} tensors", file=sys.stderr, flush=True)
    samples = _one_clip(settings) if settings.audio_path else _manifest_rows(manifest, limit)
    found: list[dict[str, Any]] = []
    scored: dict[str, list[dict[str, int]]] = {}
    for rows in _batches(samples, extractor, settings):
        texts = answers(
            model,
            family,
            extractor.front_end,
            rows,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed + len(found),
        )
        for row, text in zip(rows, texts, strict=True):
            print(text if settings.audio_path else f"{row.id}\t{text}", flush=True)
            entry = {"id": row.id, "task": row.task, "prediction": text}
            if not settings.audio_path:
                counts = as_row(count(row.answer, text))
                scored.setdefault(row.task, []).append(counts)
                entry |= {"reference": row.answer, **counts}
            found.append(entry)
    if not found:
        raise RunError(f"{settings.audio_path or manifest}: nothing could be answered")
    if output_path:
        write_atomically(output_path, to_jsonl(found))
    if scored:
        metrics = {task: metrics_of(task, scored[task]) for task in TASKS if task in scored}
        console.print(metrics_table(f"{len(found)} rows", metrics))
    return found


def _one_clip(settings: InferSettings) -> Iterator[Sample]:
    if not Path(settings.audio_path).is_file():
        raise RunError(f"--audio_path {settings.audio_path}: no such file")
    try:
        language = language_code(settings.language)
    except BadRow as error:
        raise SettingsError(f"--language: {error}") from None
    task = TASKS["sqa"] if settings.question else TASKS["asr"]
    yield Sample(
        Path(settings.audio_path).name,
        task,
        settings.question,
        "",
        settings.audio_path,
        language,
        "--audio_path",
    )


def _manifest_rows(manifest: str, limit: int) -> Iterator[Sample]:
    """Usable rows of a manifest; the others are named on standard error."""
    done = 0
    for chunk in chunks(manifest, LINES_PER_CHUNK):
        rows = read_chunk(chunk)
        for line, error in rows.bad:
            print(f"{manifest}:{line}: left out: {error}", file=sys.stderr)
        for sample in rows.samples:
            if limit and done == limit:
                return
            done += 1
            yield sample


def _batches(samples: Iterator[Sample], extractor: Extractor, settings: InferSettings) -> Iterator[list[FeatureRow]]:
    """Features of the samples, ``batch_size`` at a time."""
    batch: list[FeatureRow] = []
    for sample in samples:
        try:
            row = FeatureRow.of(extractor.sample_rows(sample)[0][0])
            if len(row.prompt_ids) > settings.max_len:
                raise BadRow("too_long", f"{len(row.prompt_ids)} tokens, over --max_len {settings.max_len}")
        except BadRow as error:
            if settings.audio_path:
                raise RunError(f"--audio_path: {error}") from None
            print(f"{sample.source}: left out: {error}", file=sys.stderr)
            continue
        batch.append(row)
        if len(batch) == settings.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
