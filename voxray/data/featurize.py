"""Manifests -> feature shards, by Ray Data or in this process.

Work is handed out in chunks of manifest lines; a chunk becomes one shard. Only chunk descriptions and counts travel
through
Ray: whoever gets a chunk reads its lines and clips, computes, and writes the shard itself. So the driver's memory
does not grow with the data, the order of the rows does not depend on the workers, and a run that was cut off repeats
only the chunks it had not finished.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.decode import Part, decode
from voxray.data.shards import Features, set_folder, shard_path, write_atomically, write_index, write_json, write_shard
from voxray.errors import RunError
from voxray.manifest import BadRow, Chunk, Sample, chunks, digest, read_chunk
from voxray.models.family import FrontEnd, family_of

MIN_ACTORS = 2
MAX_GROWN_ACTORS = 64
MAX_WHOLE_BYTES = 256 << 20
_NO_MEL = np.empty((0, 0), np.float16)


@dataclass(frozen=True)
class FeaturizeReport:
    """What featurize did, in rows.

    Attributes:
        folders: Feature set of each manifest, in order.
        num_rows: Usable rows.
        num_bad: Rows in the quarantine ledger.
        num_made: Rows computed in this run, the bad ones included; the others were there already.
        num_processes: Worker processes that took part.
    """

    folders: tuple[Path, ...]
    num_rows: int
    num_bad: int
    num_made: int
    num_processes: int


class ChunkFeaturizer:
    """Turns one chunk into one shard; the unit of work of a Ray Data actor."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form of ``make``: a batch of one item with the chunk and its folder."""
        item = batch["item"][0]
        result = self.make(Chunk(**item["chunk"]), Path(item["folder"]))
        return {"result": [json.dumps(result)]}

    def make(self, chunk: Chunk, folder: Path) -> dict[str, Any]:
        """Write the chunk's shard unless a good one is there.

        Returns:
            Counts, and the ledger lines of the chunk's bad rows.
        """
        raw = chunk.read_bytes()
        path = shard_path(folder, chunk.number)
        report = _report_of_good_shard(path, raw, chunk.first_line)
        made = report is None
        if report is None:
            report = self._write(chunk, raw, path)
        summary = {"manifest": chunk.manifest, "chunk": chunk.number, "pid": os.getpid(), "bad": report["bad"]}
        num_bad, num_rows = len(report["bad"]), report["rows"]
        return {**summary, "rows": num_rows, "made": num_rows + num_bad if made else 0, "content": report["content"]}

    def _write(self, chunk: Chunk, raw: bytes, path: Path) -> dict[str, Any]:
        parsed = read_chunk(chunk, raw)
        bad = [_ledger_line(chunk.manifest, line, "", error) for line, error in parsed.bad]
        rows, clips = [], []
        for sample in parsed.samples:
            try:
                row, clip = sample_features(sample, self.front_end)
                rows.append(row)
                clips += [clip] if clip else []
            except BadRow as error:
                bad.append(_ledger_line(chunk.manifest, int(sample.source.rpartition(":")[2]), sample.id, error))
        write_shard(path, rows)
        marks = "".join(clip["sha256"] or f"{clip['size']}:{clip['mtime_ns']}" for clip in clips)
        content = hashlib.sha256(raw + marks.encode()).hexdigest()
        bad.sort(key=lambda line: line["line"])
        report = {"lines": digest(raw), "first_line": chunk.first_line, "rows": len(rows), "bad": bad, "clips": clips}
        write_json(path.with_suffix(".json"), {**report, "content": content})
        return {**report, "content": content}


def sample_features(sample: Sample, front_end: FrontEnd) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Everything that a shard holds of one row.

    Returns:
        The row's columns (see ``shards.SCHEMA``), and what identifies its clip (None for text).
    Raises:
        BadRow: The clip cannot be read, decoded or taken by the model, or the text cannot be encoded.
    """
    row: dict[str, Any] = {"mel": _NO_MEL, "num_frames": 0, "fill": 0.0, "num_windows": 0, "num_samples": 0}
    clip = None
    if sample.audio_path:
        part = Part(sample.start_sec, sample.duration_sec, sample.channel)
        try:
            clip = _stat(sample.audio_path)
            # A whole file is read once, hashed and decoded from memory; of a segment's file only the segment is read,
            # and of a huge one only what the longest clip needs.
            whole = not (part.start_sec or part.duration_sec) and clip["size"] <= MAX_WHOLE_BYTES
            raw = Path(sample.audio_path).read_bytes() if whole else None
        except OSError as error:
            raise BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror}") from None
        clip["sha256"] = "" if raw is None else digest(raw)
        rate_hz, max_sec = front_end.sample_rate_hz, front_end.max_audio_sec
        try:
            samples = decode(sample.audio_path, rate_hz, raw, part=part, max_sec=max_sec)
        except OSError as error:  # gone since
            raise BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror}") from None
        features = front_end.features(samples)
        row = {"mel": features.mel_KB, "num_frames": len(features.mel_KB), "fill": features.fill}
        row |= {"num_windows": features.num_windows, "num_samples": len(samples)}
    row |= {"prompt_ids": front_end.prompt_ids(sample, row["num_windows"])}
    row |= {"target_ids": front_end.target_ids(sample.answer), "task": sample.task.name}
    for name in ("id", "language", "source", "audio_path", "prompt", "answer"):
        row[name] = getattr(sample, name)
    return row, clip


def featurize(
    manifests: Sequence[str],
    model_id: str,
    features_dir: Path,
    *,
    rows_per_shard: int,
    num_actors: int = 0,
    use_ray: bool = True,
    strict: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeaturizeReport:
    """Bring the feature sets of some manifests up to date.

    Args:
        manifests: Absolute paths.
        features_dir: Absolute path of the folder of feature sets.
        num_actors: Ray Data actors; 0 takes one per CPU of the cluster, two at least.
        use_ray: False computes in this process.
        on_progress: Called with (lines done, lines in all).
    Raises:
        RunError: A manifest is missing or holds no usable row; or, with ``strict``, any row is bad.
    """
    front_end = family_of(model_id).front_end(model_id)
    folders = {manifest: set_folder(features_dir, manifest, front_end.fingerprint) for manifest in manifests}
    # The chunk list is the one thing that grows with the data: about 100 bytes for every `rows_per_shard` rows.
    work = [chunk for manifest in folders for chunk in chunks(manifest, rows_per_shard)]
    total = sum(chunk.num_lines for chunk in work)
    lines_of = {(chunk.manifest, chunk.number): chunk.num_lines for chunk in work}
    run = _run_on_ray if use_ray else _run_here
    done, num_made, pids = 0, 0, set()
    states = {manifest: _SetState() for manifest in folders}
    for result in run(front_end, work, folders, num_actors):
        states[result["manifest"]].add(result)
        if strict and result["bad"]:
            line = result["bad"][0]
            raise RunError(f"{line['manifest']}:{line['line']}: {line['message']} (--strict)")
        num_made += result["made"]
        pids.add(result["pid"])
        done += lines_of[result["manifest"], result["chunk"]]
        on_progress(done, total)
    for manifest, folder in folders.items():
        _finish_set(manifest, folder, front_end, states[manifest])
    num_rows = sum(state.num_rows for state in states.values())
    num_bad = sum(state.num_bad for state in states.values())
    return FeaturizeReport(tuple(folders.values()), num_rows, num_bad, num_made, len(pids))


class _SetState:
    """What the driver keeps of a set while its chunks come back in any order."""

    def __init__(self) -> None:
        self.content: dict[int, str] = {}
        self.bad: dict[int, list[dict[str, Any]]] = {}
        self.num_rows = 0

    def add(self, result: dict[str, Any]) -> None:
        self.content[result["chunk"]] = result["content"]
        self.num_rows += result["rows"]
        if result["bad"]:
            self.bad[result["chunk"]] = result["bad"]

    @property
    def num_bad(self) -> int:
        return sum(map(len, self.bad.values()))


def _finish_set(manifest: str, folder: Path, front_end: FrontEnd, state: _SetState) -> None:
    """Write a set's ledger, index and description; refuse a manifest without any usable row."""
    ledger = [line for number in sorted(state.bad) for line in state.bad[number]]
    write_atomically(folder / "quarantine.jsonl", to_jsonl(ledger))
    if not state.num_rows:
        first = ledger[0] if ledger else {"line": 1, "message": "every line is blank"}
        raise RunError(
            f"{manifest}:{first['line']}: no usable row in this manifest; the first fault: {first['message']}"
        )
    num_shards = len(state.content)
    for path in (folder / "shards").glob("*.*"):
        if not path.stem.isdigit() or int(path.stem) >= num_shards:
            path.unlink()  # left by a longer manifest, or by a process that was killed while writing
    content = digest("".join(state.content[number] for number in range(num_shards)).encode())
    description = {"manifest": manifest, "front_end": front_end.fingerprint, "content": content}
    old = folder / "set.json"
    if old.is_file() and (folder / "index.arrow").is_file() and json.loads(old.read_text()).get("content") == content:
        return
    num_rows = write_index(folder, num_shards)
    assert num_rows == state.num_rows, (num_rows, state.num_rows)
    write_json(folder / "set.json", {**description, "rows": num_rows, "bad": len(ledger), "shards": num_shards})


def _run_here(
    front_end: FrontEnd, work: list[Chunk], folders: dict[str, Path], num_actors: int
) -> Iterator[dict[str, Any]]:
    featurizer = ChunkFeaturizer(front_end)
    for chunk in work:
        yield featurizer.make(chunk, folders[chunk.manifest])


def _run_on_ray(
    front_end: FrontEnd, work: list[Chunk], folders: dict[str, Path], num_actors: int
) -> Iterator[dict[str, Any]]:
    """Stream the chunks through a pool of actors; results come back as they are done."""
    import ray

    items = [{"chunk": vars(chunk), "folder": str(folders[chunk.manifest])} for chunk in work]
    dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=min(len(items), 1000))
    results = dataset.map_batches(
        ChunkFeaturizer,
        fn_constructor_args=(front_end,),
        batch_size=1,
        compute=actor_pool(num_actors, len(items)),
        num_cpus=1,
    )
    for row in results.iter_rows():
        yield json.loads(row["result"])


def actor_pool(num_actors: int, num_items: int) -> Any:
    """Ray Data's strategy for a pool of CPU actors: as many as asked for, else one per CPU of the cluster.

    A cluster that starts from zero shows no CPU yet: the pool begins small there and grows with it.
    """
    import ray

    present = int(ray.cluster_resources().get("CPU", 0))
    least = max(1, min(num_actors or max(MIN_ACTORS, present), num_items))
    most = max(least, min(num_actors or (present or MAX_GROWN_ACTORS), num_items))
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2)


def write_ledger(path: Path, folders: Iterable[Path], too_long: Iterable[tuple[Features, int, str]] = ()) -> None:
    """Gather the ledgers of feature sets, and rows over a token limit, into one quarantine.jsonl.

    Args:
        folders: Feature sets; one named twice counts once.
        too_long: (features, row number, message) of rows that a job itself leaves out.
    """
    lines = []
    for features, row, message in too_long:
        manifest, _, line = features.source(row).rpartition(":")
        place = {"manifest": manifest, "line": int(line), "id": features.ids([row])[0]}
        lines.append({**place, "reason": "too_long", "message": message})
    ledgers = b"".join((folder / "quarantine.jsonl").read_bytes() for folder in dict.fromkeys(folders))
    write_atomically(path, ledgers + to_jsonl(lines))


def _report_of_good_shard(path: Path, raw: bytes, first_line: int) -> dict[str, Any] | None:
    """The stored report if the shard was made from these lines and these clips, else None."""
    try:
        report = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    if not path.is_file() or report["lines"] != digest(raw) or report["first_line"] != first_line:
        return None
    if any(line["reason"].startswith("audio_") for line in report["bad"]):
        return None  # the clip may have been put right since
    return report if all(map(_clip_unchanged, report["clips"])) else None


def _clip_unchanged(clip: dict[str, Any]) -> bool:
    """Same size and times; or, where a copy has other times, the same bytes."""
    try:
        if _stat(clip["path"]) == {key: value for key, value in clip.items() if key != "sha256"}:
            return True
        return bool(clip["sha256"]) and digest(Path(clip["path"]).read_bytes()) == clip["sha256"]
    except OSError:
        return False


def _stat(path: str) -> dict[str, Any]:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _ledger_line(manifest: str, line: int, row_id: str, error: BadRow) -> dict[str, Any]:
    return {"manifest": manifest, "line": line, "id": row_id, "reason": error.reason, "message": error.message}


def to_jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
