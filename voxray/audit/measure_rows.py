"""Measures the rows of manifests for an audit: decodes clips and counts tokens, chunk by chunk, on any machine.

Each row is measured on its own. Findings that need other rows (duplicates, leaks, outliers) are in ``audit.findings``.
A chunk's measurements go to a file, so neither the workers nor the driver hold a corpus in memory.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxray.audio.decode import Part, decode_native, resampled_length
from voxray.audio.logmel import HOP_SAMPLES
from voxray.audio.quality import QualityLimits, faults, measure
from voxray.cluster.actor_pool import PoolWorker, plan_pool, run_workers
from voxray.core.errors import BadRow
from voxray.core.manifest import UNLABELLED, Chunk, Sample, chunks, read_chunk
from voxray.core.source import Source
from voxray.core.storage import write_atomically
from voxray.corpora.prepare.fingerprints import audio_hash, duplicate_key, leak_text, row_text, short_hash, speaker_key
from voxray.models.front_end import FrontEnd, row_target_ids

MAX_DECODED_SEC = 6 * 3600.0  # no clip is longer, but a damaged header may say so and exhaust the memory
EXCERPT_CHARS = 60


@dataclass(frozen=True)
class AuditLimits:
    """Limits of rows; see the settings of the same names."""

    quality: QualityLimits
    min_chars_per_sec: float
    max_chars_per_sec: float
    max_duration_error_sec: float
    max_len: int


@dataclass
class RowMeasurement:
    """Measurements of one row.

    Attributes:
        file: Number of its manifest among the inputs.
        line: Line in it, from 1.
        id: The row's own id, "" if it has none.
        task: Name of its task, "" if unknown.
        faults, warnings: Pairs of a reason and a message.
        usable: Whether the row can be read; if not, the rest is empty.
        duration_sec: Length of its clip, 0 for text.
        num_chars, num_bytes: Length of prompt and answer in characters, and in bytes of UTF-8.
        num_tokens: Length in tokens (prompt, audio, answer), 0 without a model.
        chars_per_sec: Characters of the transcript without spaces per second, 0 for other tasks than transcription.
        audio: Hash of the decoded samples, "" for text.
        text: See ``fingerprints.leak_text``.
        key: Equal for duplicates (see ``fingerprints.duplicate_key``).
        speaker: See ``fingerprints.speaker_key``.
        excerpt: Beginning of the answer, to show in the report.
    """

    file: int
    line: int
    id: str = ""
    task: str = ""
    faults: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    usable: bool = False
    duration_sec: float = 0.0
    num_chars: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    chars_per_sec: float = 0.0
    audio: str = ""
    text: str = ""
    key: str = ""
    speaker: str = ""
    excerpt: str = ""


class RowMeasurer(PoolWorker):
    """Measures the rows of a chunk, as a Ray Data actor or in this process."""

    def __init__(self, limits: AuditLimits, front_end: FrontEnd | None) -> None:
        self.limits, self.front_end = limits, front_end

    def work(self, item: dict[str, Any]) -> dict[str, Any]:
        """Measure a chunk and write the results to its file; returns the number of its lines."""
        chunk = Chunk(**item["chunk"])
        results = [vars(row) for row in self.measure_chunk(chunk, item["file"])]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results)
        write_atomically(Path(item["path"]), lines.encode("utf-8", "surrogatepass"))
        return {"lines": chunk.num_lines}

    def measure_chunk(self, chunk: Chunk, file: int) -> list[RowMeasurement]:
        """All rows of a chunk, in order, the bad ones included."""
        raw = chunk.read_bytes()
        parsed, lines = read_chunk(chunk, raw), raw.split(b"\n")
        rows = [RowMeasurement(file, line, faults=[(bad.reason, bad.message)]) for line, bad in parsed.bad]
        for sample in parsed.samples:
            line = Source.parse(sample.source).line
            values = json.loads(lines[line - chunk.first_line].removeprefix(b"\xef\xbb\xbf"))
            rows.append(self.measure_row(sample, values, RowMeasurement(file, line)))
        return sorted(rows, key=lambda row: row.line)

    def measure_row(self, sample: Sample, values: dict[str, Any], row: RowMeasurement) -> RowMeasurement:
        """Fill in the measurements of one row. An error of its audio is added to ``faults``."""
        row.id = "" if values.get("id") in (None, "") else sample.id
        row.task, row.speaker = sample.task.name, speaker_key(values)
        row.excerpt = sample.answer[:EXCERPT_CHARS]
        texts = (sample.prompt, sample.answer)
        row.num_chars, row.num_bytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        row.warnings += _text_warnings("".join(texts))
        if not sample.answer and sample.task.allows_empty_answer and values.get(UNLABELLED) is not True:
            row.warnings.append(("empty_transcript", "the transcript is empty"))
        try:
            num_samples = self._measure_audio(sample, values, row) if sample.audio_path else 0
            if self.front_end:
                self._count_tokens(sample, self.front_end, num_samples, row)
        except BadRow as error:
            row.faults.append((error.reason, error.message))
            return row
        is_context = sample.task.template == "transcription"  # what is said does not depend on it
        text = row_text("" if is_context else sample.prompt, sample.answer)
        text_hash = short_hash(sample.task.name + text)
        row.key = duplicate_key(sample.task, row.audio, text_hash)
        row.text = leak_text(sample.task, text)
        row.usable = True
        return row

    def _measure_audio(self, sample: Sample, values: dict[str, Any], row: RowMeasurement) -> int:
        """Decode and measure the clip; returns its samples at the model's rate, 0 without a model."""
        part, limits = Part(sample.start_sec, sample.duration_sec, sample.channel), self.limits
        max_sec = self.front_end.max_audio_sec if self.front_end else MAX_DECODED_SEC
        try:
            samples, rate_hz = decode_native(sample.audio_path, part=part, max_sec=max_sec)
        except OSError as error:
            raise BadRow("audio_missing", f"cannot read {sample.audio_path}: {error.strerror}") from None
        quality = measure(samples, rate_hz)
        row.duration_sec, row.audio = quality.duration_sec, audio_hash(samples, rate_hz)
        row.warnings += faults(quality, limits.quality)
        stated_sec = values.get("duration")
        if stated_sec and abs(stated_sec - row.duration_sec) > limits.max_duration_error_sec:
            row.warnings.append(("duration_mismatch", f"{row.duration_sec:.2f} s, but the row says {stated_sec:g} s"))
        if sample.task.template == "transcription":
            row.chars_per_sec = len("".join(sample.answer.split())) / row.duration_sec
            low, high = limits.min_chars_per_sec, limits.max_chars_per_sec
            if sample.answer and not low <= row.chars_per_sec <= high:
                message = f"{row.chars_per_sec:.1f} characters per second, outside {low:g} to {high:g}"
                row.warnings.append(("speaking_rate", message))
        return resampled_length(len(samples), rate_hz, self.front_end.sample_rate_hz) if self.front_end else 0

    def _count_tokens(self, sample: Sample, front_end: FrontEnd, num_samples: int, row: RowMeasurement) -> None:
        num_windows = front_end.num_windows(num_samples) if num_samples else 0
        num_prompt = len(front_end.prompt_ids(sample, num_samples))
        num_target = len(row_target_ids(front_end, sample))
        row.num_tokens = num_prompt + num_target
        window_sec = front_end.window_frames * HOP_SAMPLES / front_end.sample_rate_hz
        if front_end.max_windows and num_windows > front_end.max_windows and not sample.segments:
            longest = f"{front_end.max_windows * window_sec:g} s"
            message = f"the model is trained on {longest} at most, and the row has no segments to divide it at"
            row.faults.append(("audio_too_long", message))
        if row.num_tokens <= self.limits.max_len:
            return
        num_audio = num_prompt - len(front_end.prompt_ids(sample, 0))
        message = over_limit(num_prompt, num_target, num_audio, num_windows, window_sec, self.limits.max_len)
        row.faults.append(("over_max_len", message))


def over_limit(
    num_prompt: int, num_target: int, num_audio: int, num_windows: int, window_sec: float, max_len: int
) -> str:
    """Message that says what happens to a row that is too long, and how to keep it.

    Args:
        num_prompt, num_target, num_audio: Tokens of the prompt (audio included), of the answer and of the audio alone.
        num_windows, window_sec: Model windows that the clip fills, and their length in seconds.
    """
    total = num_prompt + num_target
    sizes = f"{total} tokens ({num_audio} audio, {total - num_audio} text), over --max_len {max_len}"
    fate = "training leaves it out and lists it in quarantine.jsonl, and so does evaluation"
    if num_prompt <= max_len:
        fate = "training leaves it out and lists it in quarantine.jsonl; evaluation takes it, "
        fate += f"for its prompt has just {num_prompt}"
    advice = f"raise --max_len to {total}"
    fitting = (max_len - (total - num_audio)) * num_windows // num_audio if num_audio else 0
    if fitting >= 1:
        parts = -(-num_windows // fitting)
        advice += f", or cut the clip at pauses into {parts} parts of {fitting * window_sec:g} s at most"
    if total - num_audio > total - max_len:
        advice += f", or shorten its texts by {total - max_len} tokens"
    return f"{sizes}: {fate}. To keep it, {advice}"


def _text_warnings(text: str) -> Iterator[tuple[str, str]]:
    """Yield (reason, message) of the warnings about a row's texts."""
    if "\ufffd" in text:
        yield "damaged_text", "the text holds U+FFFD: characters were lost when it was decoded"
    if not unicodedata.is_normalized("NFC", text):
        yield "not_nfc", "the text is not composed (NFC): decomposed Hangul takes several times the tokens"


@dataclass(frozen=True)
class Measurements:
    """The measured rows of all inputs, on disk.

    Attributes:
        manifests: Absolute paths of the inputs.
        paths: Result file of every chunk, in order.
    """

    manifests: tuple[str, ...]
    paths: tuple[Path, ...]

    def __iter__(self) -> Iterator[RowMeasurement]:
        for path in self.paths:
            with open(path, encoding="utf-8", errors="surrogatepass") as file:
                for line in file:
                    yield RowMeasurement(**json.loads(line))


def plan_chunks(manifests: Sequence[str], folder: Path, rows_per_chunk: int) -> list[dict[str, Any]]:
    """Split the manifests into items for ``RowMeasurer.work``.

    Raises:
        RunError: A manifest is missing, cannot be read, or is empty.
    """
    return [
        {"chunk": vars(chunk), "file": number, "path": str(folder / f"{number:04d}-{chunk.number:07d}.jsonl")}
        for number, manifest in enumerate(manifests)
        for chunk in chunks(manifest, rows_per_chunk)
    ]


def measure_manifests(
    manifests: Sequence[str],
    items: list[dict[str, Any]],
    limits: AuditLimits,
    front_end: FrontEnd | None,
    *,
    num_actors: int = 0,
    use_ray: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurements:
    """Measure every row of the planned chunks.

    Args:
        items: Result of ``plan_chunks``.
        front_end: Counts tokens; None measures characters and bytes only.
        num_actors: Ray Data actors; 0 starts one per CPU of the cluster, up to what the work needs.
        use_ray: False measures in this process.
        on_progress: Called with (lines done, lines in total).
    """
    done, total = 0, sum(item["chunk"]["num_lines"] for item in items)
    on_progress(done, total)
    pool = plan_pool(num_actors, len(items)) if use_ray else None
    for result in run_workers(RowMeasurer, (limits, front_end), items, pool):
        done += result["lines"]
        on_progress(done, total)
    return Measurements(tuple(manifests), tuple(Path(item["path"]) for item in items))
