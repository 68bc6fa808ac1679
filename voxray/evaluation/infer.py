"""Answers for a clip, a folder of clips or a manifest, in this process and without Ray."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from voxray.audio.augment import list_audio
from voxray.config.evaluate import InferSettings
from voxray.data.extract import Extractor, Storing
from voxray.data.features import FeatureRow
from voxray.errors import RunError, SettingsError
from voxray.evaluation.generate import generated
from voxray.evaluation.job import as_trained, base_and_adapter, search_of
from voxray.evaluation.joining import join_texts
from voxray.evaluation.long_audio import chunks_of, is_too_long, overlap_share
from voxray.evaluation.manifest_keys import ManifestKeys
from voxray.evaluation.predictions import with_counts
from voxray.evaluation.score import score
from voxray.launch import warn_about_idle_flags
from voxray.manifest import BadRow, Sample, chunks, first_fault, language_code, read_chunk
from voxray.models.family import family_of
from voxray.models.lora import load_adapter
from voxray.models.quantize import base_dtype
from voxray.run_folder import anchor
from voxray.storage import to_jsonl, write_atomically
from voxray.tasks import TASKS
from voxray.terminal import console, metrics_table

DEMO_ROWS = 4
LINES_PER_CHUNK = 256
BATCHES_PER_GROUP = 4  # answered before the first of them is shown


def run_inference(settings: InferSettings, demo_jsonl: str) -> list[dict[str, Any]]:
    """Print the answer of every row; write them to ``--output_path``; score those that have references.

    Args:
        demo_jsonl: Manifest used when neither a clip nor a manifest is given.
    Returns:
        One entry per row: id, task, prediction, and for the rows of a manifest reference and counts.
    Raises:
        RunError, SettingsError: The clip, manifest, model or adapter cannot be used.
    """
    talk = Console(stderr=True) if settings.json_lines else console  # so that what is printed can be parsed
    manifest, limit = settings.jsonl, settings.preview_rows
    if not (settings.audio_path or manifest):
        manifest, limit = demo_jsonl, limit or DEMO_ROWS
        talk.print(f"no --audio_path and no --jsonl: the first {limit} rows of {manifest}", markup=False)
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
    samples = _clips(settings) if settings.audio_path else _manifest_rows(manifest, limit)
    found: list[dict[str, Any]] = []
    search, keys = search_of(settings, settings.max_new_tokens), ManifestKeys()
    for asked in _groups(samples, extractor, settings):
        rows = [row for item in asked for row in item.rows]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].prompt_ids))
        told = generated(
            model,
            family,
            extractor.front_end,
            [rows[place] for place in order],
            batch_size=settings.batch_size,
            search=replace(search, seed=search.seed + len(found)),
        )
        text_of = {order[at]: answer.text for at, answer in told}
        texts = iter([text_of[place] for place in range(len(rows))])
        for item in asked:
            text = join_texts([next(texts) for _ in item.rows], item.overlap_share)
            entry = _entry(item.rows[0], text, None if settings.audio_path else keys)
            found.append(entry)
            _show(entry, settings)
    if not found:
        raise RunError(f"{settings.audio_path or manifest}: nothing could be answered")
    if output_path:
        write_atomically(output_path, to_jsonl(found))
    if not settings.audio_path:
        metrics = score(found, num_resamples=0)
        table = metrics_table(f"{len(found)} rows", metrics)
        talk.print(table)
    return found


@dataclass(frozen=True)
class _Item:
    """What is answered as one: a row, or the chunks of a recording that is too long for the model."""

    rows: list[FeatureRow]
    overlap_share: float = 0.0


def _entry(row: FeatureRow, text: str, keys: ManifestKeys | None) -> dict[str, Any]:
    """An answer with what is known of its row; with ``keys`` that is its reference and counts too."""
    entry = {"id": row.id, "task": row.task, "prediction": text}
    if keys is None:
        return entry
    known = {name: value for name, value in keys.of(row.source).items() if value is not None}
    own = {"language": row.language, "source": row.source, "reference": row.answer, "num_samples": row.num_samples}
    return with_counts({**entry, **own, **known})


def _show(entry: dict[str, Any], settings: InferSettings) -> None:
    if settings.json_lines:
        print(json.dumps(entry, ensure_ascii=False), flush=True)
    elif os.path.isfile(settings.audio_path):
        print(entry["prediction"], flush=True)
    else:
        print(f"{entry['id']}\t{entry['prediction']}", flush=True)


def _clips(settings: InferSettings) -> Iterator[Sample]:
    """The file at --audio_path, or all audio below that folder."""
    path = Path(settings.audio_path)
    if path.is_dir():
        try:
            clips = {str(Path(clip).relative_to(path.absolute())): clip for clip in list_audio(str(path))}
        except RunError as error:
            raise RunError(f"--audio_path {error}") from None
    elif path.is_file():
        clips = {path.name: str(path)}
    else:
        raise RunError(f"--audio_path {path}: no such file")
    try:
        language = language_code(settings.language)
    except BadRow as error:
        raise SettingsError(f"--language: {error}") from None
    task = TASKS["sqa"] if settings.question else TASKS["asr"]
    for name, clip in clips.items():
        yield Sample(name, task, settings.question, "", clip, language, clip if path.is_dir() else "--audio_path")


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


def _groups(samples: Iterator[Sample], extractor: Extractor, settings: InferSettings) -> Iterator[list[_Item]]:
    """Features of the samples, a few batches at a time; samples without any are named on standard error."""
    group: list[_Item] = []
    for sample in samples:
        try:
            item = _item(sample, extractor, settings.max_len)
        except BadRow as error:
            if os.path.isfile(settings.audio_path):
                raise RunError(f"--audio_path: {error}") from None
            print(f"{sample.source}: left out: {error}", file=sys.stderr)
            continue
        group.append(item)
        if len(group) == BATCHES_PER_GROUP * settings.batch_size:
            yield group
            group = []
    if group:
        yield group


def _item(sample: Sample, extractor: Extractor, max_len: int) -> _Item:
    """Features of a sample, or of its chunks if it is speech that is too long for the model.

    Raises:
        BadRow: It has none.
    """
    parts, share = [sample], 0.0
    try:
        rows = [FeatureRow.of(extractor.sample_rows(sample)[0][0])]
    except BadRow as error:
        if not is_too_long(error.reason, sample):
            raise
        parts = chunks_of(sample, extractor.front_end, max_len)
        share = overlap_share(parts)
        print(f"{sample.source}: too long for the model, answered in {len(parts)} chunks", file=sys.stderr)
        rows = [FeatureRow.of(extractor.sample_rows(part)[0][0]) for part in parts]
    for row in rows:
        if len(row.prompt_ids) > max_len:
            raise BadRow("too_long", f"{len(row.prompt_ids)} tokens, over --max_len {max_len}")
    return _Item(rows, share)
