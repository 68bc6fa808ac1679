"""The infer job: answers a clip, a folder of clips, a question or a manifest, in this process and without Ray."""

import json
import linecache
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from voxray.audio.augment import list_audio
from voxray.config.evaluate import InferSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.chat import CHAT_KEYS, to_messages
from voxray.core.console import console, metrics_table
from voxray.core.context import CONTEXT
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import UNLABELLED, Sample, chunks, read_chunk, require_usable_row
from voxray.core.source import Source
from voxray.evaluation.predictions import labelled_rows, with_counts
from voxray.evaluation.row_metadata import ManifestKeys
from voxray.evaluation.score import score
from voxray.features.context import sample_with_context
from voxray.features.extract import Extractor, FeatureSpec
from voxray.generation.engines.engine import InferenceEngine
from voxray.generation.engines.load import check_engine, engine_store, load_engine
from voxray.generation.generate import Completion, failure_reason
from voxray.generation.model import (
    InferenceConfig,
    base_and_adapter,
    inference_config,
    resolve_settings,
)
from voxray.generation.requests import AnswerRequest, answer_requests, make_request, make_sample
from voxray.runs.run_folder import check_output_files, make_folder, resolve_output_dir

DEMO_ROWS = 4
QUESTION_ID = "--question"
LINES_PER_CHUNK = 256
BATCHES_PER_GROUP = 4  # answers are printed after this many batches


def run_inference(settings: InferSettings, demo_jsonl: str) -> list[dict[str, Any]]:
    """Print the answer of every row, write the answers to ``--output_path`` and score those of a manifest.

    Args:
        demo_jsonl: Manifest to use if the settings name no clip, manifest or question.
    Returns:
        One entry per row: id, task, prediction; for the rows of a manifest also reference and counts.
    Raises:
        RunError, SettingsError: The clip, manifest, model or adapter cannot be used, or a row could not be answered;
            the latter is raised after all other rows are answered, written and scored.
    """
    log = Console(stderr=True) if settings.json_lines else console  # stdout then holds JSON lines only
    manifest, limit = settings.jsonl, settings.preview_rows
    if not (settings.audio_path or manifest or settings.question):
        manifest, limit = demo_jsonl, limit or DEMO_ROWS
        log.print(f"no --audio_path and no --jsonl: the first {limit} rows of {manifest}", markup=False)
    if manifest:
        require_usable_row((manifest,))
    samples = _manifest_rows(manifest, limit) if manifest else _clips_or_question(settings)
    inputs = [manifest, settings.audio_path]
    output_path, labels_path = (
        _prepare_output_path(getattr(settings, flag), inputs, f"--{flag}") for flag in ("output_path", "pseudo_labels")
    )
    flag = "lora_dir" if settings.lora_dir else "output_dir"
    model_id, adapter = base_and_adapter(settings, getattr(settings, flag), f"--{flag}")
    settings = resolve_settings(settings, model_id, adapter)
    _warn_about_unused_flags(settings, manifest, log)
    config = inference_config(settings, model_id, adapter, settings.max_new_tokens, settings.batch_size)
    check_engine(config)
    store = engine_store(config.engine)
    extractor = Extractor(model_id, FeatureSpec(store, trim_audio=config.trim_audio, language=settings.language))
    engine, num_tensors = load_engine(config, extractor.front_end)
    if num_tensors:
        print(f"adapter {adapter}: {num_tensors} tensors", file=sys.stderr, flush=True)
    entries: list[dict[str, Any]] = []
    num_failed, num_cut, num_labels, keys = 0, 0, 0, ManifestKeys() if manifest else None
    # line buffered, so that finished answers are on disk if the job is killed
    options: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "buffering": 1}
    with open(output_path, **options) as output, open(labels_path, **options) as labels:
        for request, answers in _answer(samples, engine, config, extractor, settings):
            error = next((answer for answer in answers if isinstance(answer, Exception)), None)
            if error:
                num_failed += 1
                print(f"{request.rows[0].source}: not answered: {failure_reason(error)}", file=sys.stderr, flush=True)
                continue
            completions = [answer for answer in answers if not isinstance(answer, Exception)]
            is_cut = any(completion.hit_max for completion in completions)
            num_cut += is_cut
            entries.append(_entry(request, request.text(completions), completions[0].language, keys))
            _print_answer(entries[-1], settings)
            output.write(json.dumps(entries[-1], ensure_ascii=False) + "\n")
            if entries[-1]["prediction"] and not is_cut:
                num_labels += 1
                labels.write(json.dumps(_labelled_row(request.sample, entries[-1]), ensure_ascii=False) + "\n")
    if num_cut:
        print(f"{num_cut} answer(s) cut off at --max_new_tokens {settings.max_new_tokens}", file=sys.stderr, flush=True)
    if settings.pseudo_labels:
        log.print(f"{num_labels} of {len(entries)} answers are labels in {labels_path}", markup=False)
    source = manifest or settings.audio_path or QUESTION_ID
    if not entries:
        raise RunError(f"{source}: nothing could be answered")
    if manifest and (to_score := labelled_rows(entries)):
        log.print(metrics_table(f"{len(to_score)} rows", score(to_score, num_resamples=0)))
    if num_failed:
        num_rows = num_failed + len(entries)
        raise RunError(f"{source}: {num_failed} of {num_rows} rows could not be answered, named above")
    return entries


def _warn_about_unused_flags(settings: InferSettings, manifest: str, log: Console) -> None:
    warn_about_unused_flags(settings, log)
    unused = {} if manifest else {"preview_rows": "it is for manifests"}
    if not (manifest or settings.audio_path):
        unused |= {"language": "it is that of audio"}
    if settings.question and not manifest:
        unused |= dict.fromkeys(("context", "no_context", "initial_prompt"), "contexts are for transcriptions")
    for name, reason in unused.items():
        if name in settings.model_fields_set and getattr(settings, name):
            log.print(f"warning: --{name} has no effect: {reason}", markup=False)


def _prepare_output_path(path: str, inputs: Sequence[str], flag: str) -> Path:
    """Resolve an output file and make its folder, before anything is answered.

    Raises:
        SettingsError: The path is a folder or one of the inputs.
    """
    if not path:
        return Path(os.devnull)
    file = resolve_output_dir(path, "", flag=flag)
    clips = [clip for folder in inputs if os.path.isdir(folder) for clip in list_audio(folder)]
    check_output_files({flag: file}, [*filter(None, inputs), *clips])
    make_folder(file.parent, flag)
    return file


def _answer(
    samples: Iterator[Sample],
    engine: InferenceEngine,
    config: InferenceConfig,
    extractor: Extractor,
    settings: InferSettings,
) -> Iterator[tuple[AnswerRequest, list[Completion | Exception]]]:
    """Answer the samples; yields each request with the completions or errors of its rows."""
    if config.context is not None:
        samples = (sample_with_context(sample, config.context) for sample in samples)
    for requests in _request_groups(samples, extractor, settings):
        yield from answer_requests(requests, engine, config.batch_size)


def _entry(request: AnswerRequest, text: str, language: str, keys: ManifestKeys | None) -> dict[str, Any]:
    """The output entry of an answer; ``keys`` adds the row's metadata, reference and counts.

    Args:
        language: The language that the model detected, for a row that names none.
    """
    row = request.rows[0]
    entry = {"id": row.id, "task": row.task, "prediction": text}
    if keys is None:
        return entry
    metadata = {name: value for name, value in keys.of(row.source).items() if value is not None}
    own = {
        "language": row.language or language,
        "source": row.source,
        "reference": row.answer,
        "num_samples": request.num_samples,
        **({CONTEXT: row.prompt} if row.prompt and request.sample.task.template == "transcription" else {}),
    }
    if metadata.pop(UNLABELLED, False):
        own["reference"] = None
    return with_counts({**entry, **own, **metadata})


def _labelled_row(sample: Sample, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest row with the answer as its label: the row of the manifest, or a row for a clip or a question."""
    source, values = Source.parse(sample.source), dict[str, Any](id=sample.id)
    if source.line:
        values = json.loads(linecache.getline(*source).removeprefix("\ufeff"))
        for name in ("segments", "references", "transcript_phonetic", UNLABELLED):  # they belong to the other label
            values.pop(name, None)
        if sample.turns:
            values = {name: value for name, value in values.items() if name not in CHAT_KEYS}
    elif sample.task.prompt_keys:
        values[sample.task.prompt_keys[0]] = sample.prompt
    if sample.target_language and not source.line:
        values["target_language"] = sample.target_language
    if sample.task.has_audio:
        values["audio_path"] = os.path.abspath(sample.audio_path)
    if language := sample.language or entry.get("language", ""):
        values["language"] = language
    answer = entry["prediction"]
    return {**values, sample.task.answer_key: to_messages(sample.turns, answer) if sample.turns else answer}


def _print_answer(entry: dict[str, Any], settings: InferSettings) -> None:
    if settings.json_lines:
        print(json.dumps(entry, ensure_ascii=False), flush=True)
    elif entry["id"] == QUESTION_ID or os.path.isfile(settings.audio_path):
        print(entry["prediction"], flush=True)
    else:
        print(f"{entry['id']}\t{entry['prediction']}", flush=True)


def _clips_or_question(settings: InferSettings) -> Iterator[Sample]:
    """The file at --audio_path, or all audio files below that folder; without --audio_path, the text question.

    Raises:
        RunError: There is no such file, or no audio in the folder.
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
    sources = {name: clip if path.is_dir() else "--audio_path" for name, clip in clips.items()}
    target = settings.target_language if settings.task == "translate" else ""
    return (
        make_sample(name, settings.question, clip, settings.language, sources[name], target)
        for name, clip in clips.items()
    )


def _manifest_rows(manifest: str, limit: int) -> Iterator[Sample]:
    """Usable rows of a manifest, at most ``limit`` unless 0; bad rows are printed on standard error."""
    num_rows = 0
    for chunk in chunks(manifest, LINES_PER_CHUNK):
        rows = read_chunk(chunk)
        for line, error in rows.bad:
            print(f"{manifest}:{line}: left out: {error}", file=sys.stderr)
        for sample in rows.samples:
            if limit and num_rows == limit:
                return
            num_rows += 1
            yield sample


def _request_groups(
    samples: Iterator[Sample], extractor: Extractor, settings: InferSettings
) -> Iterator[list[AnswerRequest]]:
    """Extract features, in groups of a few batches; samples without features are printed on standard error."""
    group: list[AnswerRequest] = []
    for sample in samples:
        try:
            request = make_request(sample, extractor, settings.max_len)
        except BadRow as error:
            if os.path.isfile(settings.audio_path):
                raise RunError(f"--audio_path: {error}") from None
            print(f"{sample.source}: left out: {error}", file=sys.stderr)
            continue
        if len(request.rows) > 1:
            print(f"{sample.source}: too long for the model, answered in {len(request.rows)} chunks", file=sys.stderr)
        group.append(request)
        if len(group) == BATCHES_PER_GROUP * settings.batch_size:
            yield group
            group = []
    if group:
        yield group
