"""Raw corpora -> checked, cleaned, split manifests, and a ledger with the reason of every row left out.

There are three passes. None of them holds the corpus in memory:

1. The driver reads the corpus' text files through an importer and spools its rows in chunks on disk.
2. Ray Data actors process chunks: they clean the texts, decode and measure the audio, and write the results beside the
   chunk.
3. The driver reads the results in order, detects duplicates and leaks, splits by group, and writes manifests, ledger
   and summary (``write_manifests.py``).

Every row is either in a manifest or in the ledger, and the summary adds up. The output has the order of the input,
independent of the workers. Ids in the manifests are unique, since evaluation identifies rows by them. A row with the id
of an earlier row (two corpora may both number from 1) stays as ``<id>#2``, the next one as ``<id>#3``.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.decode import Part, decode_native
from voxray.audio.flac import flac_bytes
from voxray.audio.quality import QualityLimits, check, measure
from voxray.cluster.actor_pool import PoolWorker, plan_pool, run_workers
from voxray.core.chat import read_chat
from voxray.core.errors import BadRow
from voxray.core.languages import language_code
from voxray.core.manifest import UNLABELLED, check_values
from voxray.core.source import Source, segment, segments
from voxray.core.storage import write_atomically
from voxray.core.tasks import Task
from voxray.corpora.importers import ImportedRow, ImportFault
from voxray.corpora.importers.embedded import embedded_audio
from voxray.corpora.prepare.fingerprints import audio_hash, leak_text, row_text, short_hash, speaker_key
from voxray.text.korean import Reading, clean_transcript, has_notation


@dataclass(frozen=True)
class Limits:
    """Limits that a row must satisfy; see the settings of the same names."""

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
        leak_text: See ``fingerprints.leak_text``.
        group: Speaker, session, or hash of the row's text. All rows of a group go to the same side of the split.
        split: The corpus' own split of the row, "" if it has none.
        recording, channel: The file and the channel that the row names, before a copy was written.
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
    recording: str = ""
    channel: float | None = None


@dataclass(frozen=True)
class ClipFolders:
    """Folders that clips are written to.

    Attributes:
        embedded: Folder of clips extracted from Parquet files.
        copies: Folder of 16 kHz copies of all usable clips; None writes no copies.
        manifest_folder: Folder of the manifests. Paths of copies below it are relative to it, so that the folder can be
            moved.
    """

    embedded: Path
    copies: Path | None = None
    manifest_folder: Path | None = None


class RowChecker(PoolWorker):
    """Checks the rows of spooled chunks in a Ray Data actor."""

    def __init__(self, limits: Limits, folders: ClipFolders) -> None:
        self.limits, self.folders = limits, folders

    def work(self, item: str) -> dict[str, Any]:
        """``check_chunk`` with the interface of ``run_workers``."""
        return {"rows": self.check_chunk(Path(item))}

    def check_chunk(self, path: Path) -> int:
        """Check the rows of a chunk and write the results beside it. Returns the number of rows.

        Results of an earlier, interrupted job are used as they are.
        """
        if checked_path(path).is_file():
            return checked_path(path).read_bytes().count(b"\n")
        results = [vars(self.check_row(json.loads(line))) for line in path.read_bytes().splitlines()]
        write_atomically(checked_path(path), _to_jsonl(results))
        return len(results)

    def check_row(self, spooled: dict[str, Any]) -> CheckedRow:
        """Clean and measure one row. Faults are returned in ``reason``, not raised."""
        source, row_id = spooled["source"], spooled["id"]
        if spooled.get("reason"):
            return CheckedRow(source, row_id, reason=spooled["reason"], message=spooled["message"])
        values, clip, clip_hash = dict(spooled["values"]), None, ""
        duration_sec, recording, channel = 0.0, str(values.get("audio_path")), values.get("channel")
        try:
            _check_encodable(source, values)
            task = check_values(values)
            if task.has_audio:
                stated_sec = values.get("duration")
                clip = self._decode(values)
                duration_sec, clip_hash = len(clip[0]) / clip[1], audio_hash(*clip)
                self._check_quality(*clip, stated_sec)
            text = self._check_text(values, task, duration_sec)
            if clip and self.folders.copies:
                self._write_copy(values, *clip, name=clip_hash)
        except BadRow as error:
            return CheckedRow(source, row_id, reason=error.reason, message=error.message, duration_sec=duration_sec)
        split = str(values.pop("split", None) or "")
        group = speaker_key(values) or f"text:{short_hash(text)}"
        if task.has_audio:
            values["duration"] = round(duration_sec, 3)
        hashes = (clip_hash, short_hash(task.name + text), leak_text(task, text))
        return CheckedRow(source, row_id, values, "", "", duration_sec, *hashes, group, split, recording, channel)

    def _check_text(self, values: dict[str, Any], task: Task, duration_sec: float) -> str:
        """Clean the answer in place and check its length. Returns the normalised texts of the row."""
        chat = read_chat(values) if task.template == "conversation" else None
        answer = chat.answer if chat else values[task.answer_key]
        if task.template == "transcription":
            raw = values.get("transcript_raw", answer)
            if not isinstance(raw, str):
                raise BadRow("bad_type", f"transcript_raw is {type(raw).__name__}, not text")
            parts = segments(values)
            if has_notation(raw, language_code(values.get("language"))):
                answer = self._clean(values, raw, has_segments=bool(parts))
        if not chat:
            values[task.answer_key] = answer = " ".join(answer.split()) if task.has_audio else answer.strip()
        num_chars = len("".join(answer.split()))
        limits = self.limits
        if num_chars < limits.min_chars and values.get(UNLABELLED) is not True:
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
        return row_text(chat.prompt if chat else task.prompt(values), answer)

    def _clean(self, values: dict[str, Any], raw: str, *, has_segments: bool) -> str:
        """Remove the notation of Korean corpora from transcript and segments. Returns the transcript."""
        cleaned, answer = clean_transcript(raw, self.limits.reading), values["transcript"]
        values.pop("transcript_raw", None)
        if cleaned.text != answer:
            values["transcript_raw"] = answer
        if cleaned.phonetic != cleaned.text:
            values["transcript_phonetic"] = cleaned.phonetic
        if cleaned.notes:
            values["transcript_notes"] = list(cleaned.notes)
        if has_segments:
            values["segments"] = [
                {**part, "text": clean_transcript(part["text"], self.limits.reading).text}
                for part in values["segments"]
            ]
        return cleaned.text

    def _decode(self, values: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Decode the clip. Returns its samples and their rate in Hz."""
        embedded, claimed_hz = values.pop("audio_bytes_from", None), values.pop("sample_rate", None)
        if not isinstance(claimed_hz, int | float | None):
            raise BadRow("bad_type", f"sample_rate is {type(claimed_hz).__name__}, not a number")
        raw = None
        if embedded:
            raw = embedded_audio(embedded)
            values["audio_path"] = str(self.folders.embedded / f"{short_hash(raw)[:20]}{_suffix(raw)}")
            if not self.folders.copies and not Path(values["audio_path"]).is_file():
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
        return samples, rate_hz

    def _check_quality(self, samples: np.ndarray, rate_hz: int, stated_sec: float | None) -> None:
        """Measure a clip. ``stated_sec`` is the duration that its row states."""
        quality = measure(samples, rate_hz)
        check(quality, self.limits.quality)
        if stated_sec and abs(stated_sec - quality.duration_sec) > self.limits.max_duration_error_sec:
            raise BadRow("duration_mismatch", f"{quality.duration_sec:.2f} s, but the corpus says {stated_sec:g} s")

    def _write_copy(self, values: dict[str, Any], samples: np.ndarray, rate_hz: int, *, name: str) -> None:
        """Write a 16 kHz copy of the decoded samples and set the row's ``audio_path`` to it.

        The name is the hash of the samples, so copies of an interrupted job are valid. There are 256 subfolders.
        """
        assert self.folders.copies is not None
        path = self.folders.copies / name[:2] / f"{name}.flac"
        if not path.is_file():
            write_atomically(path, flac_bytes(samples, rate_hz))
        base = self.folders.manifest_folder
        values["audio_path"] = str(path.relative_to(base) if base and path.is_relative_to(base) else path)
        for key in ("start", "channel"):  # the copy has only that part and channel
            values.pop(key, None)


def _check_encodable(source: str, values: dict[str, Any]) -> None:
    """Refuse file names that are not UTF-8: a manifest cannot contain them."""
    try:
        f"{source}{values.get('audio_path')}".encode()
    except UnicodeEncodeError:
        raise BadRow("bad_encoding", "the file's name is not UTF-8; rename it, with convmv for one") from None


def _suffix(raw: bytes) -> str:
    """File suffix of embedded audio, from its first bytes. Decoding does not depend on it."""
    suffixes = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
    return next((suffix for start, suffix in suffixes.items() if raw.startswith(start)), ".m4a")


def _to_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def spool(rows: Iterator[ImportedRow | ImportFault], folder: Path, rows_per_chunk: int) -> list[Path]:
    """First pass: write the importer's rows to disk in chunks. Returns the paths of the chunks in order."""
    paths: list[Path] = []
    while chunk := [_spooled(row) for row in islice(rows, rows_per_chunk)]:
        paths.append(folder / f"{len(paths):06d}.jsonl")
        write_atomically(paths[-1], _to_jsonl(chunk))
    return paths


def _spooled(row: ImportedRow | ImportFault) -> dict[str, Any]:
    is_fault = isinstance(row, ImportFault)
    content = {"reason": row.reason, "message": row.message} if is_fault else {"values": row.values}
    return {"source": str(Source(row.source_file, row.line)), "id": row.id, **content}


def checked_path(chunk: Path) -> Path:
    """File of the second pass' results for a chunk."""
    return chunk.with_suffix(".checked.jsonl")


def run_checks(
    paths: list[Path],
    checker: RowChecker,
    *,
    num_actors: int,
    use_ray: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Second pass: check every chunk, with Ray Data or in this process."""
    arguments, items = (checker.limits, checker.folders), list(map(str, paths))
    pool = plan_pool(num_actors, len(items)) if use_ray else None
    on_progress(0, len(paths))
    results = run_workers(RowChecker, arguments, items, pool)
    for done, _ in enumerate(results, 1):
        on_progress(done, len(paths))
