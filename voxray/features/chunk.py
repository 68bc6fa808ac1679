"""One chunk of manifest lines -> one shard: the unit of work of featurize, and of what it remembers."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError, one_line
from voxray.core.manifest import Chunk, Sample, read_chunk, sha256_hex
from voxray.core.storage import AnyPath, num_bytes, write_atomically, write_json
from voxray.features.crash_log import open_crash_log
from voxray.features.extract import Extractor, file_state
from voxray.features.shards import index_part, shard_bytes, shard_path

MAX_ATTEMPTS = 3
"""How often a process may end at one and the same row before the row is given up."""


@dataclass(frozen=True)
class WorkItem:
    """What an actor gets.

    Attributes:
        chunk: Lines to read.
        folder: Feature set to write to.
        augmented: Whether its clips get variants.
        verify: Whether the checksum of a shard that is there already is checked.
        max_bytes: Largest shard allowed.
    """

    chunk: Chunk
    folder: AnyPath
    augmented: bool = True
    verify: bool = False
    max_bytes: float = float("inf")


class ChunkFeaturizer:
    """Turns one chunk into one shard; a Ray Data actor."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form of ``make``: a batch of one item; what the user has to put right comes back as ``error``."""
        try:
            result = self.make(batch["item"][0])
        except (RunError, OSError) as error:
            result = {"error": one_line(error)}
        return {"result": [json.dumps(result)]}

    def make(self, item: WorkItem) -> dict[str, Any]:
        """Write the chunk's shard unless a good one is there.

        Returns:
            Counts, and the ledger lines of the chunk's bad rows.
        Raises:
            RunError: The shard is larger than allowed.
        """
        raw = item.chunk.read_bytes()
        report = _report_of_good_shard(item, raw)
        made = report is None
        if report is None:
            report = self._write(item, raw)
        num_bad, num_samples = len(report["bad"]), report["samples"]
        summary = {"folder": str(item.folder), "chunk": item.chunk.number, "pid": os.getpid(), "bad": report["bad"]}
        return {
            **summary,
            "rows": num_samples,
            "made": num_samples + num_bad if made else 0,
            "content": report["content"],
        }

    def _write(self, item: WorkItem, raw: bytes) -> dict[str, Any]:
        manifest, path = item.chunk.manifest, shard_path(item.folder, item.chunk.number)
        parsed = read_chunk(item.chunk, raw)
        bad = [_ledger_line(manifest, line, "", error) for line, error in parsed.bad]
        rows, clips, num_samples = [], [], 0
        with attempts(item, raw) as attempt:
            for sample in parsed.samples:
                try:
                    attempt(sample)
                    made, clip = self.extractor.sample_rows(sample, augmented=item.augmented)
                    rows += made
                    clips += [clip] if clip else []
                    num_samples += 1
                except BadRow as error:
                    bad.append(_ledger_line(manifest, _line(sample), sample.id, error))
                    if error.reason == "process_died":
                        clips.append({**file_state(sample.audio_path), "sha256": ""})
            self.extractor.encode(rows)
        storing = self.extractor.spec
        data = shard_bytes(rows, storing.store, storing.torch_dtype, self.extractor.frame_shape)
        if data.size > item.max_bytes:
            raise RunError(f"{path}: {data.size:,} bytes, but its clips seemed to need {item.max_bytes:,.0f} at most")
        write_atomically(path, data)
        marks = "".join(clip["sha256"] or f"{clip['size']}:{clip['mtime_ns']}" for clip in clips)
        bad.sort(key=lambda line: line["line"])
        report = {
            "lines": sha256_hex(raw),
            "first_line": item.chunk.first_line,
            "samples": num_samples,
            "rows": len(rows),
            "bytes": data.size,
            "sha256": hashlib.sha256(data).hexdigest(),
            "content": hashlib.sha256(raw + marks.encode()).hexdigest(),
            "bad": bad,
            "clips": clips,
            "index": index_part(rows, item.chunk.number),
        }
        write_json(path.with_suffix(".json"), report)
        return report


@contextmanager
def attempts(item: WorkItem, raw: bytes) -> Iterator[Any]:
    """Remember on disk which row is being worked on, so that one that kills its process is given up.

    Yields:
        A function to call with every sample before it is worked on; it raises BadRow for one that has ended
        ``MAX_ATTEMPTS`` processes.
    """
    if isinstance(item.folder, Path):
        place = item.folder / "shards"
    else:
        place = Path(tempfile.gettempdir()) / "voxray-attempts" / sha256_hex(str(item.folder).encode())[:16]
    with open_crash_log(place / f".attempts-{item.chunk.number:05d}-{sha256_hex(raw)[:16]}") as begun:

        def attempt(sample: Sample) -> None:
            if not sample.task.has_audio:
                return
            if begun.deaths[_line(sample)] >= MAX_ATTEMPTS:
                raise BadRow(
                    "process_died", f"{sample.audio_path}: {MAX_ATTEMPTS} processes died while they read this clip"
                )
            begun.begin(_line(sample))

        yield attempt


def _line(sample: Sample) -> int:
    return int(sample.source.rpartition(":")[2])


def _report_of_good_shard(item: WorkItem, raw: bytes) -> dict[str, Any] | None:
    """The stored report if the shard was made from these lines and these clips, else None."""
    path = shard_path(item.folder, item.chunk.number)
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        if num_bytes(path) != report["bytes"]:
            return None
        if item.verify and sha256_hex(path.read_bytes()) != report["sha256"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    if report["lines"] != sha256_hex(raw) or report["first_line"] != item.chunk.first_line:
        return None
    if any(line["reason"].startswith("audio_") for line in report["bad"]):
        return None  # the clip may have been put right since
    return report if all(map(_clip_unchanged, report["clips"])) else None


def _clip_unchanged(clip: dict[str, Any]) -> bool:
    """Same size and times; or, where a copy has other times, the same bytes."""
    try:
        if file_state(clip["path"]) == {key: value for key, value in clip.items() if key != "sha256"}:
            return True
        return bool(clip["sha256"]) and sha256_hex(Path(clip["path"]).read_bytes()) == clip["sha256"]
    except OSError:
        return False


def _ledger_line(manifest: str, line: int, row_id: str, error: BadRow) -> dict[str, Any]:
    return {"manifest": manifest, "line": line, "id": row_id, "reason": error.reason, "message": error.message}
