"""Raw corpora -> checked, cleaned, split manifests, with a ledger in which every lost row has its reason.

Three passes, none of which holds the corpus in memory:

1. The driver reads the corpus' text files through an importer and spools its rows in chunks on disk.
2. Ray Data actors take chunks: clean the texts, decode and measure the audio, and write the results beside the chunk.
3. The driver reads the results in order: duplicates, split by group, leaks; then writes manifests, ledger and summary
   (``prepare_outputs``).

A row is kept or in the ledger, and the summary adds up. The order of the output is that of the input, whatever the
workers did. Ids are unique in what is written: evaluation names rows by them. A row with an id that an earlier one has,
as where two corpora number from 1, is no worse for it, so it is kept as ``<id>#2``, the next as ``<id>#3``.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.decode import Part, decode_native
from voxray.audio.flac import flac_bytes
from voxray.audio.quality import QualityLimits, check, measure
from voxray.cluster.actor_pool import run_workers
from voxray.core.errors import BadRow
from voxray.core.manifest import check_values
from voxray.core.source import segment, segments
from voxray.core.storage import write_atomically
from voxray.core.tasks import Task
from voxray.corpora.importers import ImportedRow, ImportFault
from voxray.corpora.importers.huggingface import embedded_audio
from voxray.corpora.prepare.fingerprints import audio_hash, leak_text, row_text, short_hash, speaker_key
from voxray.text.korean import Reading, clean_transcript


@dataclass(frozen=True)
class Limits:
    """What a row must satisfy; see the settings of the same names."""

    quality: QualityLimits
    min_chars: int
    max_chars: int
    min_chars_per_sec: float
    max_chars_per_sec: float
    max_duration_error_sec: float
    reading: Reading


@dataclass
class CheckedRow:
    """A row after the second pass.

    Attributes:
        source: ``<file>:<line>``.
        id: The row's id.
        values: The manifest row to write; empty if the row is bad.
        reason, message: Why it is bad, else "".
        duration_sec: Length of its audio, 0 for text.
        audio_hash, text_hash: Hashes of the decoded samples and of the normalised texts.
        leak_text: See ``identity.leak_text``.
        group: What must stay on one side of the split: speaker, session, or the row's own text.
        split: The side that the corpus itself puts the row on, if it says so.
    """

    source: str
    id: str
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    message: str = ""
    duration_sec: float = 0.0
    audio_hash: str = ""
    text_hash: str = ""
    leak_text: str = ""
    group: str = ""
    split: str = ""


@dataclass(frozen=True)
class ClipPlaces:
    """Where clips are written to.

    Attributes:
        embedded: Folder of clips that come out of Parquet files.
        copies: Folder of 16 kHz copies of all clips that are kept; None makes none.
        named_from: Folder that the manifests stand in; they name copies below it relative to it, so that all of it can
            be carried elsewhere.
    """

    embedded: Path
    copies: Path | None = None
    named_from: Path | None = None


class RowChecker:
    """Checks the rows of a spooled chunk; the unit of work of a Ray Data actor."""

    def __init__(self, limits: Limits, places: ClipPlaces) -> None:
        self.limits, self.places = limits, places

    def work(self, item: str) -> dict[str, Any]:
        """``check_chunk`` as ``run_workers`` calls it."""
        return {"rows": self.check_chunk(Path(item))}

    def check_chunk(self, path: Path) -> int:
        """Check the rows of a chunk and write the results beside it; returns how many there are.

        Results that stand there already, since the job before this one was cut off, are kept.
        """
        if checked_path(path).is_file():
            return checked_path(path).read_bytes().count(b"\n")
        results = [vars(self.check_row(json.loads(line))) for line in path.read_bytes().splitlines()]
        write_atomically(checked_path(path), _to_jsonl(results))
        return len(results)

    def check_row(self, spooled: dict[str, Any]) -> CheckedRow:
        """Clean and measure one row; a fault ends up in its ``reason`` and never as an exception."""
        source, row_id = spooled["source"], spooled["id"]
        if spooled.get("reason"):
            return CheckedRow(source, row_id, reason=spooled["reason"], message=spooled["message"])
        values, clip, heard = dict(spooled["values"]), None, ""
        duration_sec = 0.0
        try:
            _refuse_bad_names(source, values)
            task = check_values(values)
            if task.has_audio:
                clip = self._check_audio(values)
                duration_sec, heard = len(clip[0]) / clip[1], audio_hash(clip[0])
            text = self._check_text(values, task, duration_sec)
            if clip and self.places.copies:
                self._copy(values, *clip, name=heard)
        except BadRow as error:
            return CheckedRow(source, row_id, reason=error.reason, message=error.message, duration_sec=duration_sec)
        split = str(values.pop("split", None) or "")
        group = speaker_key(values) or f"text:{short_hash(text)}"
        if task.has_audio:
            values["duration"] = round(duration_sec, 3)
        hashes = (heard, short_hash(task.name + text), leak_text(task, text))
        return CheckedRow(source, row_id, values, "", "", duration_sec, *hashes, group, split)

    def _check_text(self, values: dict[str, Any], task: Task, duration_sec: float) -> str:
        """Clean the answer in place and check its length; returns the normalised texts of the row."""
        answer = values[task.answer_key]
        if task.template == "transcription":
            raw = values.pop("transcript_raw", answer)
            if not isinstance(raw, str):
                raise BadRow("bad_type", f"transcript_raw is {type(raw).__name__}, not text")
            reading = self.limits.reading
            cleaned = clean_transcript(raw, reading)
            if cleaned.text != answer:
                values["transcript_raw"] = answer
            if cleaned.phonetic != cleaned.text:
                values["transcript_phonetic"] = cleaned.phonetic
            if cleaned.notes:
                values["transcript_notes"] = list(cleaned.notes)
            answer = cleaned.text
            if segments(values):
                parts = [{**part, "text": clean_transcript(part["text"], reading).text} for part in values["segments"]]
                values["segments"] = parts
        values[task.answer_key] = answer = " ".join(answer.split()) if task.has_audio else answer.strip()
        num_chars = len("".join(answer.split()))
        limits = self.limits
        if num_chars < limits.min_chars:
            raise BadRow(
                "empty_text" if not num_chars else "text_too_short", f"{task.answer_key}: {num_chars} characters"
            )
        if num_chars > limits.max_chars:
            raise BadRow("text_too_long", f"{task.answer_key}: {num_chars} characters, over {limits.max_chars}")
        if task.template == "transcription":
            rate = num_chars / duration_sec
            if not limits.min_chars_per_sec <= rate <= limits.max_chars_per_sec:
                within = f"{limits.min_chars_per_sec:g} to {limits.max_chars_per_sec:g}"
                raise BadRow("speaking_rate", f"{rate:.1f} characters per second, outside {within}")
        return row_text(task.prompt(values), answer)

    def _check_audio(self, values: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Decode and measure the clip; returns its samples and their rate in Hz."""
        embedded = values.pop("audio_bytes_from", None)
        claimed_hz, stated_sec = values.pop("sample_rate", None), values.get("duration")
        if not isinstance(claimed_hz, int | float | None):
            raise BadRow("bad_type", f"sample_rate is {type(claimed_hz).__name__}, not a number")
        raw = None
        if embedded:
            raw = embedded_audio(embedded["file"], embedded["row"])
            values["audio_path"] = str(self.places.embedded / f"{short_hash(raw)[:20]}{_suffix(raw)}")
            if not self.places.copies and not Path(values["audio_path"]).is_file():
                write_atomically(Path(values["audio_path"]), raw)
        part, max_sec = Part(*segment(values)), self.limits.quality.max_sec
        try:
            samples, rate_hz = decode_native(values["audio_path"], raw, part=part, max_sec=max_sec)
        except OSError as error:
            raise BadRow("audio_missing", f"cannot read {values['audio_path']}: {error.strerror}") from None
        except BadRow as error:
            raise BadRow("too_long", error.message) if error.reason == "audio_too_long" else error from None
        if claimed_hz and claimed_hz != rate_hz:
            raise BadRow("wrong_rate", f"{rate_hz} Hz, but the corpus says {claimed_hz}")
        quality = measure(samples, rate_hz)
        check(quality, self.limits.quality)
        if stated_sec and abs(stated_sec - quality.duration_sec) > self.limits.max_duration_error_sec:
            raise BadRow("duration_mismatch", f"{quality.duration_sec:.2f} s, but the corpus says {stated_sec:g} s")
        return samples, rate_hz

    def _copy(self, values: dict[str, Any], samples: np.ndarray, rate_hz: int, *, name: str) -> None:
        """Write a 16 kHz copy of exactly what was heard and let the row name that instead.

        Its name is the hash of the samples that it is made of, so the copy of a job that was cut off is a good one, and
        256 folders hold them.
        """
        assert self.places.copies is not None
        path = self.places.copies / name[:2] / f"{name}.flac"
        if not path.is_file():
            write_atomically(path, flac_bytes(samples, rate_hz))
        base = self.places.named_from
        values["audio_path"] = str(path.relative_to(base) if base and path.is_relative_to(base) else path)
        for key in ("start", "channel"):  # the copy is that part, and has that channel alone
            values.pop(key, None)


def _refuse_bad_names(source: str, values: dict[str, Any]) -> None:
    """File names come as the disk has them; one in an old code page cannot stand in a manifest."""
    try:
        f"{source}{values.get('audio_path')}".encode()
    except UnicodeEncodeError:
        raise BadRow("bad_encoding", "the file's name is not UTF-8; rename it, with convmv for one") from None


def _suffix(raw: bytes) -> str:
    """File name ending of embedded audio, by its first bytes; decoding does not depend on it."""
    kinds = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
    return next((suffix for start, suffix in kinds.items() if raw.startswith(start)), ".m4a")


def _to_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def spool(rows: Iterator[ImportedRow | ImportFault], folder: Path, rows_per_chunk: int) -> list[Path]:
    """First pass: write the importer's rows to disk in chunks; returns their paths in order."""
    paths: list[Path] = []
    waiting: list[dict[str, Any]] = []

    def write() -> None:
        paths.append(folder / f"{len(paths):06d}.jsonl")
        write_atomically(paths[-1], _to_jsonl(waiting))
        waiting.clear()

    for row in rows:
        fault = isinstance(row, ImportFault)
        what = {"reason": row.reason, "message": row.message} if fault else {"values": row.values}
        waiting.append({"source": f"{row.source_file}:{row.line}", "id": row.id, **what})
        if len(waiting) == rows_per_chunk:
            write()
    if waiting:
        write()
    return paths


def checked_path(chunk: Path) -> Path:
    return chunk.with_suffix(".checked.jsonl")


def run_checks(
    paths: list[Path],
    checker: RowChecker,
    *,
    num_actors: int,
    use_ray: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Second pass: check every chunk, by Ray Data or in this process."""
    arguments, items = (checker.limits, checker.places), list(map(str, paths))
    results = run_workers(RowChecker, arguments, items, num_actors=num_actors, use_ray=use_ray)
    for done, _ in enumerate(results, 1):
        on_progress(done, len(paths))
