"""Featurizes manifests into feature shards, on Ray Data or in this process.

The unit of work is a chunk of manifest lines, which becomes one shard. A worker reads the lines and clips of its chunk,
computes the features and writes the shard itself. For encoder outputs on GPUs there are two workers: one on a CPU
decodes the clips, and one with a GPU encodes them and writes the shard. So a GPU can encode while the next clips are
decoded. Only chunk descriptions and counts travel through the driver, whose memory does not grow with the data. The
order of the rows does not depend on the workers, and a restarted run repeats only unfinished chunks.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxray.cluster.actor_pool import fit_memory, plan_pool, run_stages, run_workers
from voxray.core.errors import RunError
from voxray.core.manifest import chunks, sha256_hex
from voxray.core.source import Source
from voxray.core.storage import AnyPath, checksum, children, num_bytes, to_jsonl, write_atomically, write_json
from voxray.features.chunk import ChunkFeaturizer, ChunkReader, ChunkWriter, WorkItem, forget_write_crashes
from voxray.features.disk_estimate import with_byte_limits
from voxray.features.extract import Extractor
from voxray.features.reader import Features
from voxray.features.shards import set_folder, write_index


@dataclass(frozen=True)
class FeaturizeReport:
    """Result of featurize, in rows.

    Attributes:
        folders: Feature set of each manifest, in order; those of ``plain_manifests`` come last.
        num_rows: Usable rows.
        num_bad: Rows in the quarantine ledger.
        num_made: Rows computed in this run, including bad ones. The others existed already.
        num_processes: Worker processes that took part.
    """

    folders: tuple[AnyPath, ...]
    num_rows: int
    num_bad: int
    num_made: int
    num_processes: int


def featurize(
    manifests: Sequence[str],
    extractor: Extractor,
    features_dir: AnyPath,
    *,
    plain_manifests: Sequence[str] = (),
    rows_per_shard: int,
    num_actors: int = 0,
    use_ray: bool = True,
    strict: bool = False,
    verify: bool = False,
    max_bytes: float = float("inf"),
    on_estimate: Callable[[int], None] = lambda num_bytes: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeaturizeReport:
    """Bring the feature sets of manifests up to date.

    Args:
        manifests: Absolute paths.
        extractor: Extracts the features of a row.
        features_dir: Absolute folder of the feature sets, or a remote one.
        plain_manifests: Absolute paths of manifests whose clips get no variants (validation data).
        num_actors: Ray Data actors, of each stage if there are two; 0 starts one per CPU of the cluster, up to what the
            work needs. There are no more encoders than GPUs.
        use_ray: False computes in this process.
        strict: Stop at the first bad row.
        verify: Read existing shards and make damaged ones again.
        max_bytes: Largest size of all shards of encoder outputs together, checked before anything is written.
        on_estimate: Called with the bytes that encoder outputs need at most, before any is written.
        on_progress: Called with (lines done, lines in total).
    Raises:
        RunError: A manifest is missing or holds no usable row; with ``strict``, any row is bad; or the shards would
            take more than ``max_bytes`` or the free disk space.
    """
    folders, sets = _feature_sets(manifests, plain_manifests, extractor, features_dir)
    # The work list is all that grows with the data: about 200 bytes for every `rows_per_shard` rows.
    work = [
        WorkItem(chunk, each.folder, each.augmented, verify)
        for each in sets.values()
        for chunk in chunks(each.manifest, rows_per_shard)
    ]
    if extractor.spec.store == "encoder":
        work = with_byte_limits(work, extractor, features_dir, max_bytes, on_estimate)
    num_lines = {(str(item.folder), item.chunk.number): item.chunk.num_lines for item in work}
    total = sum(num_lines.values())
    done, num_made, pids = 0, 0, set()
    on_progress(done, total)
    for folder in folders:
        forget_write_crashes(folder)
    for result in _run_workers(work, extractor, num_actors, use_ray):
        sets[result["folder"]].add(result)
        if strict and result["bad"]:
            line = result["bad"][0]
            raise RunError(f"{line['manifest']}:{line['line']}: {line['message']} (--strict)")
        num_made += result["num_made"]
        pids.update(result["pids"])
        done += num_lines[result["folder"], result["chunk"]]
        on_progress(done, total)
    for each in sets.values():
        _finish_set(each, extractor.spec.store)
    num_rows = sum(each.num_rows for each in sets.values())
    num_bad = sum(each.num_bad for each in sets.values())
    return FeaturizeReport(folders, num_rows, num_bad, num_made, len(pids))


def _run_workers(
    work: Sequence[WorkItem], extractor: Extractor, num_actors: int, use_ray: bool
) -> Iterator[dict[str, Any]]:
    """Results of all chunks (see ``ChunkWriter``), in the order in which they finish."""
    encodes = extractor.spec.store == "encoder"
    pool = plan_pool(num_actors, len(work), use_gpus=encodes) if use_ray else None
    if pool and pool.num_gpus:
        readers = plan_pool(num_actors, len(work), num_taken_cpus=pool.min_size)
        # Ray reserves no CPU for writers: on a node whose CPUs are all taken by readers, a GPU would stay idle.
        writers = replace(pool, num_cpus=0)
        return run_stages([(ChunkReader, (extractor,), readers), (ChunkWriter, (extractor,), writers)], work)
    if pool and encodes:
        pool = fit_memory(pool, extractor.encoder_bytes)
    return run_workers(ChunkFeaturizer, (extractor,), work, pool)


@dataclass
class _Set:
    """A feature set being made. It collects the results of its chunks, which arrive in any order.

    Attributes:
        augmented: Whether its rows get variants.
        content: Hash of every chunk, by chunk number.
        bad: Ledger lines, by chunk number.
        num_rows: Usable rows so far.
    """

    folder: AnyPath
    manifest: str
    augmented: bool
    fingerprint: str
    content: dict[int, str] = field(default_factory=dict)
    bad: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, result: dict[str, Any]) -> None:
        self.content[result["chunk"]] = result["content"]
        self.num_rows += result["rows"]
        if result["bad"]:
            self.bad[result["chunk"]] = result["bad"]

    @property
    def num_bad(self) -> int:
        return sum(map(len, self.bad.values()))


def _feature_sets(
    manifests: Sequence[str], plain_manifests: Sequence[str], extractor: Extractor, features_dir: AnyPath
) -> tuple[tuple[AnyPath, ...], dict[str, _Set]]:
    """Folder of every manifest's set, and the sets by folder. Without variants both kinds of manifests share sets."""
    folders, sets = [], {}
    for names, augmented in ((manifests, True), (plain_manifests, False)):
        fingerprint = extractor.fingerprint if augmented else extractor.plain_fingerprint
        for manifest in names:
            folder = set_folder(features_dir, manifest, fingerprint)
            folders.append(folder)
            sets.setdefault(str(folder), _Set(folder, manifest, augmented, fingerprint))
    return tuple(folders), sets


def _finish_set(done: _Set, store: str) -> None:
    """Write a set's ledger, index and description.

    Raises:
        RunError: The manifest has no usable row.
    """
    folder = done.folder
    ledger = [line for number in sorted(done.bad) for line in done.bad[number]]
    write_atomically(folder / "quarantine.jsonl", to_jsonl(ledger))
    if not done.num_rows:
        first = ledger[0] if ledger else {"line": 1, "message": "every line is blank"}
        raise RunError(
            f"{done.manifest}:{first['line']}: no usable row in this manifest; the first fault: {first['message']}"
        )
    num_shards = len(done.content)
    for path in children(folder / "shards"):
        if not path.stem.isdigit() or int(path.stem) >= num_shards:
            path.unlink()  # left over from a longer manifest, or from a process that was killed while writing
    content = sha256_hex("".join(done.content[number] for number in range(num_shards)).encode())
    if _is_finished(folder, content):
        return
    index = write_index(folder, num_shards)
    description = {"manifest": done.manifest, "fingerprint": done.fingerprint, "store": store}
    counts = {"samples": done.num_rows, "bad": len(ledger), "shards": num_shards}
    write_json(folder / "set.json", {**description, "content": content, **counts, **index})


def _is_finished(folder: AnyPath, content: str) -> bool:
    """Whether the set's index and description exist already, undamaged, for this very content."""
    try:
        description = json.loads((folder / "set.json").read_text())
        index, shards = folder / "index.arrow", json.loads((folder / "shards.json").read_text())
        undamaged = (
            checksum(index) == description["index_sha256"]
            if isinstance(index, Path)
            else num_bytes(index) == description["index_bytes"]
        )
        return undamaged and description["content"] == content and len(shards) == description["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_ledger(
    path: AnyPath, folders: Iterable[AnyPath], lost: Iterable[tuple[Features, int, str, str]] = ()
) -> None:
    """Merge the ledgers of feature sets, and rows that a job itself leaves out, into one quarantine.jsonl.

    Args:
        folders: Feature sets; a line that occurs in several of them is written once.
        lost: (features, row number, reason, message) of rows that the job itself leaves out.
    """
    lines = []
    for features, row, reason, message in lost:
        manifest, line = Source.parse(features.source(row))
        entry = {"manifest": manifest, "line": line, "id": features.ids([row])[0]}
        lines.append({**entry, "reason": reason, "message": message})
    ledgers = [(folder / "quarantine.jsonl").read_bytes() for folder in dict.fromkeys(folders)]
    unique = dict.fromkeys(line for ledger in ledgers for line in ledger.splitlines(keepends=True))
    write_atomically(path, b"".join(unique) + to_jsonl(lines))
