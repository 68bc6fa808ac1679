"""Manifests -> feature shards, by Ray Data or in this process.

Work is handed out in chunks of manifest lines; a chunk becomes one shard. Only chunk descriptions and counts travel
through Ray: whoever gets a chunk reads its lines and clips, computes, and writes the shard itself. So the driver's
memory does not grow with the data, the order of the rows does not depend on the workers, and a run that was cut off
repeats only the chunks it had not finished.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from voxray.cluster.actor_pool import actor_pool
from voxray.core.errors import RunError, one_line
from voxray.core.manifest import chunks, sha256_hex
from voxray.core.storage import AnyPath, children, to_jsonl, write_atomically, write_json
from voxray.features.chunk import ChunkFeaturizer, WorkItem
from voxray.features.disk_estimate import allowances
from voxray.features.extract import Extractor
from voxray.features.reader import Features
from voxray.features.shards import set_folder, write_index


@dataclass(frozen=True)
class FeaturizeReport:
    """What featurize did, in rows.

    Attributes:
        folders: Feature set of each manifest, in order; those of ``plain_manifests`` after the others.
        num_rows: Usable rows.
        num_bad: Rows in the quarantine ledger.
        num_made: Rows computed in this run, the bad ones included; the others were there already.
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
    """Bring the feature sets of some manifests up to date.

    Args:
        manifests: Absolute paths.
        extractor: What to make of their rows.
        features_dir: Absolute folder of the feature sets, or a remote one.
        plain_manifests: Absolute paths of manifests that get no variants (those to validate on).
        num_actors: Ray Data actors; 0 takes one per CPU of the cluster, as far as there is work for them.
        use_ray: False computes in this process.
        verify: Read shards that are there already and make damaged ones again.
        max_bytes: Largest size of the shards of encoder outputs; more is refused before anything is written.
        on_estimate: Called with the bytes that encoder outputs need at most, before any is written.
        on_progress: Called with (lines done, lines in all).
    Raises:
        RunError: A manifest is missing or holds no usable row; with ``strict``, any row is bad; or the shards would
            take more than ``max_bytes`` or more than the disk has.
    """
    places, sets = _places(manifests, plain_manifests, extractor, features_dir)
    # The work list is the one thing that grows with the data: about 200 bytes for every `rows_per_shard` rows.
    work = [
        WorkItem(chunk, each.folder, each.augmented, verify)
        for each in sets.values()
        for chunk in chunks(each.manifest, rows_per_shard)
    ]
    if extractor.spec.store == "encoder":
        work = allowances(work, extractor, features_dir, max_bytes, on_estimate)
    total = sum(item.chunk.num_lines for item in work)
    lines_of = {(str(item.folder), item.chunk.number): item.chunk.num_lines for item in work}
    done, num_made, pids = 0, 0, set()
    for result in (_run_on_ray if use_ray else _run_here)(extractor, work, num_actors):
        sets[result["folder"]].add(result)
        if strict and result["bad"]:
            line = result["bad"][0]
            raise RunError(f"{line['manifest']}:{line['line']}: {line['message']} (--strict)")
        num_made += result["made"]
        pids.add(result["pid"])
        done += lines_of[result["folder"], result["chunk"]]
        on_progress(done, total)
    for each in sets.values():
        _finish_set(each, extractor.spec.store)
    num_rows = sum(each.num_rows for each in sets.values())
    num_bad = sum(each.num_bad for each in sets.values())
    return FeaturizeReport(places, num_rows, num_bad, num_made, len(pids))


@dataclass
class _Set:
    """A feature set in the making: what of, and what the driver keeps while its chunks come back in any order.

    Attributes:
        augmented: Whether its rows get variants.
        content: Digest of every chunk, by its number.
        bad: Lines for the ledger, by the number of their chunk.
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


def _places(
    manifests: Sequence[str], plain_manifests: Sequence[str], extractor: Extractor, features_dir: AnyPath
) -> tuple[tuple[AnyPath, ...], dict[str, _Set]]:
    """Folder of every manifest's set, and the sets by the folder's name; without variants the two kinds of manifests
    share theirs.
    """
    places, sets = [], {}
    for names, augmented in ((manifests, True), (plain_manifests, False)):
        fingerprint = extractor.fingerprint if augmented else extractor.plain_fingerprint
        for manifest in names:
            places.append(set_folder(features_dir, manifest, fingerprint))
            sets.setdefault(str(places[-1]), _Set(places[-1], manifest, augmented, fingerprint))
    return tuple(places), sets


def _finish_set(made: _Set, store: str) -> None:
    """Write a set's ledger, index and description; refuse a manifest without any usable row."""
    folder = made.folder
    ledger = [line for number in sorted(made.bad) for line in made.bad[number]]
    write_atomically(folder / "quarantine.jsonl", to_jsonl(ledger))
    if not made.num_rows:
        first = ledger[0] if ledger else {"line": 1, "message": "every line is blank"}
        raise RunError(
            f"{made.manifest}:{first['line']}: no usable row in this manifest; the first fault: {first['message']}"
        )
    num_shards = len(made.content)
    for path in children(folder / "shards"):
        if not path.stem.isdigit() or int(path.stem) >= num_shards:
            path.unlink()  # left by a longer manifest, or by a process that was killed while writing
    content = sha256_hex("".join(made.content[number] for number in range(num_shards)).encode())
    if _is_finished(folder, content):
        return
    index = write_index(folder, num_shards)
    description = {"manifest": made.manifest, "fingerprint": made.fingerprint, "store": store}
    counts = {"samples": made.num_rows, "bad": len(ledger), "shards": num_shards}
    write_json(folder / "set.json", {**description, "content": content, **counts, **index})


def _is_finished(folder: AnyPath, content: str) -> bool:
    """Whether index and description stand there already for this very content."""
    try:
        return (
            json.loads((folder / "set.json").read_text())["content"] == content and (folder / "index.arrow").is_file()
        )
    except (OSError, ValueError, KeyError):
        return False


def _run_here(extractor: Extractor, work: list[WorkItem], num_actors: int) -> Iterator[dict[str, Any]]:
    featurizer = ChunkFeaturizer(extractor)
    for item in work:
        try:
            yield featurizer.make(item)
        except OSError as error:
            raise RunError(one_line(error)) from error


def _run_on_ray(extractor: Extractor, work: list[WorkItem], num_actors: int) -> Iterator[dict[str, Any]]:
    """Stream the chunks through a pool of actors; results come back as they are done."""
    import ray

    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if extractor.spec.store == "encoder" else 0
    dataset = ray.data.from_items([{"item": item} for item in work], override_num_blocks=min(len(work), 1000))
    results = dataset.map_batches(
        ChunkFeaturizer,
        fn_constructor_args=(extractor,),
        batch_size=1,
        compute=actor_pool(min(num_actors or num_gpus, num_gpus) or num_actors, len(work)),
        num_gpus=1 if num_gpus else None,
        num_cpus=1,
    )
    for row in results.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise RunError(result["error"])
        yield result


def write_ledger(
    path: AnyPath, folders: Iterable[AnyPath], lost: Iterable[tuple[Features, int, str, str]] = ()
) -> None:
    """Gather the ledgers of feature sets, and rows that a job itself leaves out, into one quarantine.jsonl.

    Args:
        folders: Feature sets; a line that stands in several of them counts once.
        lost: (features, row number, reason, message) of rows that a job itself leaves out.
    """
    lines = []
    for features, row, reason, message in lost:
        manifest, _, line = features.source(row).rpartition(":")
        place = {"manifest": manifest, "line": int(line), "id": features.ids([row])[0]}
        lines.append({**place, "reason": reason, "message": message})
    ledgers = [(folder / "quarantine.jsonl").read_bytes() for folder in dict.fromkeys(folders)]
    known = dict.fromkeys(line for ledger in ledgers for line in ledger.splitlines(keepends=True))
    write_atomically(path, b"".join(known) + to_jsonl(lines))
