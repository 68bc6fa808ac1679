"""Featurizes one chunk of manifest lines into one shard: the unit of work of featurize, and of what it caches."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from voxray.cluster.actor_pool import PoolWorker
from voxray.core.context import CONTEXT
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import Chunk, Sample, read_chunk, sha256_hex
from voxray.core.source import Source
from voxray.core.storage import AnyPath, num_bytes, write_atomically, write_json
from voxray.features.crash_log import CrashLog, open_crash_log
from voxray.features.extract import Extractor, FeatureValues, file_state
from voxray.features.shards import are_parts, index_batch, index_part, shard_bytes, shard_path

MAX_CRASHES_PER_ROW = 3
"""A row that has ended this many processes is skipped."""
WRITE_LOG = ".write"
MAX_CRASHES_PER_SHARD = 3
"""Processes that may die while they encode or write one shard. Ray would replace them without end."""
EARLIER_REFUSALS = ("is not a two-letter code", "; aac: audio_path, caption)", " is null")
"""Ends of the messages with which earlier versions refused languages such as yue, translations, and table rows."""


@dataclass(frozen=True)
class WorkItem:
    """One chunk to featurize.

    Attributes:
        chunk: Lines to read.
        folder: Feature set to write to.
        augmented: Whether its clips get variants.
        verify: Whether to check the checksum of a shard that exists already.
        max_bytes: Largest shard allowed.
    """

    chunk: Chunk
    folder: AnyPath
    augmented: bool = True
    verify: bool = False
    max_bytes: float = float("inf")


@dataclass(frozen=True)
class DecodedChunk:
    """A chunk whose clips are decoded and whose shard is not written.

    Attributes:
        work_item: The chunk, and where to write.
        raw: Its lines.
        rows: Rows of the usable samples, before ``Extractor.encode``.
        num_samples: Usable samples.
        bad: Ledger lines of the bad rows.
        clips: States of the files, by which later runs detect changes.
        pid: Process that decoded them.
    """

    work_item: WorkItem
    raw: bytes
    rows: list[FeatureValues]
    num_samples: int
    bad: list[dict[str, Any]]
    clips: list[dict[str, Any]]
    pid: int


class ChunkReader(PoolWorker):
    """Decodes the clips of chunks: the first half of ``ChunkFeaturizer``."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor

    def work(self, item: WorkItem) -> DecodedChunk | dict[str, Any]:
        """Decode the chunk's clips and compute their features.

        Returns:
            The chunk for ``ChunkWriter``, or the result (see there) if a valid shard exists.
        """
        raw = item.chunk.read_bytes()
        if report := _read_valid_report(item, raw):
            return _result(item, report, [os.getpid()], num_made=0)
        manifest, parsed = item.chunk.manifest, read_chunk(item.chunk, raw)
        bad = [_ledger_line(manifest, line, "", error) for line, error in parsed.bad]
        rows, clips, num_samples = [], [], 0
        with open_crash_log(crash_log_path(item, raw), MAX_CRASHES_PER_ROW) as crash_log:
            for sample in parsed.samples:
                try:
                    start_sample(sample, crash_log)
                    sample_rows, clip = self.extractor.sample_rows(sample, augmented=item.augmented)
                    rows += sample_rows
                    clips += [clip] if clip else []
                    num_samples += 1
                except BadRow as error:
                    bad.append(_ledger_line(manifest, Source.parse(sample.source).line, sample.id, error))
                    if error.reason == "process_died":
                        clips.append({**file_state(sample.audio_path), "sha256": ""})
        bad.sort(key=lambda line: line["line"])
        return DecodedChunk(item, raw, rows, num_samples, bad, clips, os.getpid())


class ChunkWriter(PoolWorker):
    """Encodes chunks and writes their shards: the second half of ``ChunkFeaturizer``."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor

    def work(self, item: DecodedChunk | dict[str, Any]) -> dict[str, Any]:
        """Write the chunk's shard and its report.

        Args:
            item: What ``ChunkReader`` returned. A result is returned as it is.
        Returns:
            folder, chunk: Of the item.
            pids: Processes that worked on the chunk.
            rows: Usable rows.
            num_made: Rows computed now, the bad ones included.
            bad: Ledger lines of the chunk's bad rows.
            content: Hash of the chunk's lines and clips.
        Raises:
            RunError: The shard is larger than allowed, or ``MAX_CRASHES_PER_SHARD`` processes died while they wrote it.
        """
        if isinstance(item, dict):
            return item
        chunk, path = item.work_item.chunk, shard_path(item.work_item.folder, item.work_item.chunk.number)
        log_path = crash_log_path(item.work_item, item.raw).with_suffix(WRITE_LOG)
        with open_crash_log(log_path, MAX_CRASHES_PER_SHARD) as crash_log:
            if not crash_log.start_rows([chunk.first_line]):
                lines = f"{chunk.num_lines} lines from {chunk.manifest}:{chunk.first_line}"
                died = f"{MAX_CRASHES_PER_SHARD} processes died while they wrote the features of {lines}"
                raise RunError(f"{path}: {died}; if memory is short, lower --rows_per_shard")
            report = self._write(item, path)
        num_made = report["samples"] + len(report["bad"])
        return _result(item.work_item, report, sorted({item.pid, os.getpid()}), num_made)

    def _write(self, decoded: DecodedChunk, path: AnyPath) -> dict[str, Any]:
        """Write the chunk's shard and its report; returns the report."""
        item, rows, spec = decoded.work_item, decoded.rows, self.extractor.spec
        self.extractor.encode(rows)
        data, parts = shard_bytes(rows, spec.store, spec.torch_dtype, self.extractor.frame_shape)
        if data.size > item.max_bytes:
            raise RunError(f"{path}: {data.size:,} bytes, but its clips seemed to need {item.max_bytes:,.0f} at most")
        write_atomically(path, data)
        clip_keys = "".join(clip["sha256"] or f"{clip['size']}:{clip['mtime_ns']}" for clip in decoded.clips)
        report = {
            "lines": sha256_hex(decoded.raw),
            "first_line": item.chunk.first_line,
            "samples": decoded.num_samples,
            "rows": len(rows),
            "bytes": data.size,
            "sha256": hashlib.sha256(data).hexdigest(),
            "parts": parts,
            "content": hashlib.sha256(decoded.raw + clip_keys.encode()).hexdigest(),
            "bad": decoded.bad,
            "clips": decoded.clips,
            "reads_context": True,
            "index": index_part(rows, item.chunk.number),
        }
        write_json(path.with_suffix(".json"), report)
        return report


class ChunkFeaturizer(PoolWorker):
    """Featurizes chunks in one process: a ``ChunkReader`` and a ``ChunkWriter``."""

    def __init__(self, extractor: Extractor) -> None:
        self.reader, self.writer = ChunkReader(extractor), ChunkWriter(extractor)

    def work(self, item: WorkItem) -> dict[str, Any]:
        """Write the chunk's shard, unless a valid one exists.

        Returns:
            The result of ``ChunkWriter``.
        Raises:
            RunError: As ``ChunkWriter``.
        """
        return self.writer.work(self.reader.work(item))


def _result(item: WorkItem, report: dict[str, Any], pids: list[int], num_made: int) -> dict[str, Any]:
    """Result of a chunk (see ``ChunkWriter.work``)."""
    values = {"folder": str(item.folder), "chunk": item.chunk.number, "pids": pids, "num_made": num_made}
    return {**values, "rows": report["samples"], "bad": report["bad"], "content": report["content"]}


REPORT_TYPES = {"samples": int, "rows": int, "sha256": str, "content": str, "bad": list, "clips": list, "index": dict}
"""Types of the values of a shard's report that later steps rely on."""


def crash_log_path(item: WorkItem, raw: bytes) -> Path:
    """Crash log of a chunk: beside its shard, or on the local disk for a remote feature set."""
    return _crash_logs(item.folder) / f".attempts-{item.chunk.number:05d}-{sha256_hex(raw)[:16]}"


def forget_write_crashes(folder: AnyPath) -> None:
    """Delete the crash logs of shards that an earlier job was writing when it ended. A job counts its own crashes."""
    for path in _crash_logs(folder).glob(f".attempts-*{WRITE_LOG}"):
        path.unlink(missing_ok=True)


def _crash_logs(folder: AnyPath) -> Path:
    if isinstance(folder, Path):
        return folder / "shards"
    return Path(tempfile.gettempdir()) / "voxray-attempts" / sha256_hex(str(folder).encode())[:16]


def start_sample(sample: Sample, crash_log: CrashLog) -> None:
    """Note in the crash log that a sample's clip is read next.

    Raises:
        BadRow: The clip has ended ``MAX_CRASHES_PER_ROW`` processes.
    """
    if sample.task.has_audio and not crash_log.start_rows([Source.parse(sample.source).line]):
        message = f"{sample.audio_path}: {MAX_CRASHES_PER_ROW} processes died while they read this clip"
        raise BadRow("process_died", message)


def _read_valid_report(item: WorkItem, raw: bytes) -> dict[str, Any] | None:
    """The stored report if it is undamaged and the shard was made from these very lines and clips, else None."""
    path = shard_path(item.folder, item.chunk.number)
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        if num_bytes(path) != report["bytes"]:
            return None
        if item.verify and sha256_hex(path.read_bytes()) != report["sha256"]:
            return None
        if report["lines"] != sha256_hex(raw) or report["first_line"] != item.chunk.first_line:
            return None
        if not (all(isinstance(report[name], kind) for name, kind in REPORT_TYPES.items()) and _has_index(report)):
            return None
        if not are_parts(report.get("parts", [])):
            return None
        json.dumps(report, ensure_ascii=False).encode()  # raises if a text holds half a surrogate pair
        # The clip may have been fixed since, and earlier versions knew fewer languages and tasks.
        if any(
            line["reason"].startswith("audio_") or line["message"].endswith(EARLIER_REFUSALS) for line in report["bad"]
        ):
            return None
        if "reads_context" not in report and CONTEXT.encode() in raw:  # earlier versions ignored this key
            return None
        if "parts" not in report and any(map(_is_mp3_segment, report["clips"])):
            return None
        paths = {sample.audio_path for sample in read_chunk(item.chunk, raw).samples}
        if {clip["path"] for clip in report["clips"]} - paths:
            return None  # a relative path names another file now, because the folders have changed
        return report if all(map(_clip_unchanged, report["clips"])) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, pa.ArrowException):
        return None


def _has_index(report: dict[str, Any]) -> bool:
    """Whether a report's part of the index has all columns, with a value for each row."""
    batch = index_batch(report["index"])
    return batch.num_rows == report["rows"] and not any(column.null_count for column in batch.columns)


def _is_mp3_segment(clip: dict[str, Any]) -> bool:
    """Whether a clip is a part of an MP3 file, whose beginning earlier versions decoded wrongly."""
    return not clip["sha256"] and clip["path"].lower().endswith(".mp3")


def _clip_unchanged(clip: dict[str, Any]) -> bool:
    """Whether a clip has the same size and times as before, or the same bytes (a copy may have other times)."""
    try:
        if {**file_state(clip["path"]), "sha256": clip["sha256"]} == clip:
            return True
        return bool(clip["sha256"]) and sha256_hex(Path(clip["path"]).read_bytes()) == clip["sha256"]
    except OSError:
        return False


def _ledger_line(manifest: str, line: int, row_id: str, error: BadRow) -> dict[str, Any]:
    return {"manifest": manifest, "line": line, "id": row_id, "reason": error.reason, "message": error.message}
