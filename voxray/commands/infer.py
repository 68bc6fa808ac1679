"""Answers for a clip, a folder of clips or a manifest, in this process and without Ray."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from voxray.audio.augment import list_audio
from voxray.config.evaluate import InferSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console, metrics_table
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample, chunks, language_code, read_chunk, require_usable_row
from voxray.evaluation.predictions import with_counts
from voxray.evaluation.row_metadata import ManifestKeys
from voxray.evaluation.score import score
from voxray.features.extract import Extractor, FeatureSpec
from voxray.generation.generate import Completion, failure_reason
from voxray.generation.model import (
    InferenceConfig,
    base_and_adapter,
    inference_config,
    load_model,
    match_training_prompts,
)
from voxray.generation.requests import AnswerRequest, answer_requests, make_request, make_sample
from voxray.runs.run_folder import make_folder, resolve_output_dir

DEMO_ROWS = 4
QUESTION_ID = "--question"
LINES_PER_CHUNK = 256
BATCHES_PER_GROUP = 4  # answered before the first of them is shown


def run_inference(settings: InferSettings, demo_jsonl: str) -> list[dict[str, Any]]:
    """Print the answer of every row; write them to ``--output_path``; score those that have references.

    Args:
        demo_jsonl: Manifest used when neither a clip, a manifest nor a question is given.
    Returns:
        One entry per row: id, task, prediction, and for the rows of a manifest reference and counts.
    Raises:
        RunError, SettingsError: The clip, manifest, model or adapter cannot be used, or a row has no answer; that is
            said when the others are answered, written and scored.
    """
    talk = Console(stderr=True) if settings.json_lines else console  # so that what is printed can be parsed
    manifest, limit = settings.jsonl, settings.preview_rows
    if not (settings.audio_path or manifest or settings.question):
        manifest, limit = demo_jsonl, limit or DEMO_ROWS
        talk.print(f"no --audio_path and no --jsonl: the first {limit} rows of {manifest}", markup=False)
    if manifest:
        require_usable_row((manifest,))
    samples = _manifest_rows(manifest, limit) if manifest else _asked(settings)
    output_path = _output_path(settings.output_path)
    where = (settings.lora_dir, "--lora_dir") if settings.lora_dir else (settings.output_dir, "--output_dir")
    model_id, adapter = base_and_adapter(settings, *where)
    settings = match_training_prompts(settings, model_id, adapter)
    _warn_about_idle_flags(settings, manifest, talk)
    how = inference_config(settings, model_id, adapter, settings.max_new_tokens, settings.batch_size)
    model, num_tensors = load_model(how)
    if adapter:
        print(f"adapter {adapter}: {num_tensors} tensors", file=sys.stderr, flush=True)
    found: list[dict[str, Any]] = []
    num_failed, num_cut, keys = 0, 0, ManifestKeys() if manifest else None
    # Line by line, so that what is answered is kept whatever happens to the rest.
    with open(output_path, "w", encoding="utf-8", buffering=1) as output:
        for item, answers in _answered(samples, model, how, settings):
            fault = next((answer for answer in answers if isinstance(answer, Exception)), None)
            if fault:
                num_failed += 1
                print(f"{item.rows[0].source}: not answered: {failure_reason(fault)}", file=sys.stderr, flush=True)
                continue
            given = [answer for answer in answers if not isinstance(answer, Exception)]
            num_cut += any(answer.hit_max for answer in given)
            found.append(_entry(item, item.text(given), keys))
            _show(found[-1], settings)
            output.write(json.dumps(found[-1], ensure_ascii=False) + "\n")
    if num_cut:
        print(f"{num_cut} answer(s) cut off at --max_new_tokens {settings.max_new_tokens}", file=sys.stderr, flush=True)
    asked = manifest or settings.audio_path or QUESTION_ID
    if not found:
        raise RunError(f"{asked}: nothing could be answered")
    if manifest:
        talk.print(metrics_table(f"{len(found)} rows", score(found, num_resamples=0)))
    if num_failed:
        raise RunError(f"{asked}: {num_failed} of {num_failed + len(found)} rows could not be answered, named above")
    return found


def _warn_about_idle_flags(settings: InferSettings, manifest: str, talk: Console) -> None:
    warn_about_unused_flags(settings, talk)
    idle = {"language": "rows of a manifest name their own"} if manifest else {"preview_rows": "it is for manifests"}
    if not (manifest or settings.audio_path):
        idle["language"] = "it is that of audio"
    for name, reason in idle.items():
        if name in settings.model_fields_set and getattr(settings, name):
            talk.print(f"warning: --{name} has no effect: {reason}", markup=False)


def _output_path(path: str) -> Path:
    """Where --output_path is; looked at before anything is answered."""
    if not path:
        return Path(os.devnull)
    place = resolve_output_dir(path, "", flag="--output_path")
    if place.is_dir():
        raise RunError(f"--output_path {place}: a folder; name a file")
    make_folder(place.parent, "--output_path")
    return place


def _answered(
    samples: Iterator[Sample], model: Any, how: InferenceConfig, settings: InferSettings
) -> Iterator[tuple[AnswerRequest, list[Completion | Exception]]]:
    """What is answered, with the answer to each of its rows."""
    extractor = Extractor(how.model_id, FeatureSpec(trim_audio=how.trim_audio))
    for items in _groups(samples, extractor, settings):
        yield from answer_requests(items, model, extractor.front_end, how)


def _entry(item: AnswerRequest, text: str, keys: ManifestKeys | None) -> dict[str, Any]:
    """An answer with what is known of its row; with ``keys`` that is its reference and counts too."""
    row = item.rows[0]
    entry = {"id": row.id, "task": row.task, "prediction": text}
    if keys is None:
        return entry
    known = {name: value for name, value in keys.of(row.source).items() if value is not None}
    own = {"language": row.language, "source": row.source, "reference": row.answer, "num_samples": item.num_samples}
    return with_counts({**entry, **own, **known})


def _show(entry: dict[str, Any], settings: InferSettings) -> None:
    if settings.json_lines:
        print(json.dumps(entry, ensure_ascii=False), flush=True)
    elif entry["id"] == QUESTION_ID or os.path.isfile(settings.audio_path):
        print(entry["prediction"], flush=True)
    else:
        print(f"{entry['id']}\t{entry['prediction']}", flush=True)


def _asked(settings: InferSettings) -> Iterator[Sample]:
    """The file at --audio_path, or all audio below that folder; without any, the question alone.

    Raises:
        RunError, SettingsError: There is no such file, no audio in the folder, or no such language.
    """
    if not settings.audio_path:
        return iter([make_sample(QUESTION_ID, settings.question)])
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
    sources = {name: clip if path.is_dir() else "--audio_path" for name, clip in clips.items()}
    return (make_sample(name, settings.question, clip, language, sources[name]) for name, clip in clips.items())


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


def _groups(samples: Iterator[Sample], extractor: Extractor, settings: InferSettings) -> Iterator[list[AnswerRequest]]:
    """Features of the samples, a few batches at a time; samples without any are named on standard error."""
    group: list[AnswerRequest] = []
    for sample in samples:
        try:
            item = make_request(sample, extractor, settings.max_len)
        except BadRow as error:
            if os.path.isfile(settings.audio_path):
                raise RunError(f"--audio_path: {error}") from None
            print(f"{sample.source}: left out: {error}", file=sys.stderr)
            continue
        if len(item.rows) > 1:
            print(f"{sample.source}: too long for the model, answered in {len(item.rows)} chunks", file=sys.stderr)
        group.append(item)
        if len(group) == BATCHES_PER_GROUP * settings.batch_size:
            yield group
            group = []
    if group:
        yield group
