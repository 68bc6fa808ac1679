"""What a run trains on, for its model card: rows and hours by task and data set, languages, and the manifests."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from voxray.core.tasks import TASKS
from voxray.features.reader import Features

ROWS_AT_ONCE = 1 << 20
SOURCE = r"^(?P<file>.*):(?P<line>\d+)$"


def describe_trained_rows(features: Features, rows: np.ndarray, sample_rate_hz: int) -> dict[str, Any]:
    """Count the rows that a run trains on. Variants of a row count once.

    Args:
        rows: Row numbers, ascending.
    Returns:
        ``rows``: a list of {"task", "dataset", "replay", "rows", "hours"}; ``languages``: {code: rows}, the most
        frequent first; ``manifests``: a list of {"name", "content"}, with the hash of lines and clips.
    """
    first = rows[np.unique(features.sample[rows], return_index=True)[1]]
    names, tasks = _DatasetNames(), list(TASKS)
    num_rows: Counter[tuple[str, str, bool]] = Counter()
    num_samples: Counter[tuple[str, str, bool]] = Counter()
    languages: Counter[str] = Counter()
    for start in range(0, len(first), ROWS_AT_ONCE):
        batch = first[start : start + ROWS_AT_ONCE]
        origins = features.origins(batch)
        for entry in origins["language"].value_counts().to_pylist():
            languages[entry["values"]] += entry["counts"]
        datasets = names.number_rows(origins["source"])
        keys = np.stack([features.task[batch], datasets, batch >= features.first_replay], axis=1)
        groups, indices = np.unique(keys, axis=0, return_inverse=True)
        for number, (task, dataset, is_replay) in enumerate(groups.tolist()):
            of_group = indices.ravel() == number
            key = (tasks[task], names.name(dataset), bool(is_replay))
            num_rows[key] += int(of_group.sum())
            num_samples[key] += int(features.num_samples[batch[of_group]].sum(dtype=np.int64))
    counts = [
        {"task": task, "dataset": dataset, "replay": is_replay, "rows": num_rows[key], "hours": num_samples[key]}
        for key in sorted(num_rows, key=lambda key: (key[2], tasks.index(key[0]), -num_rows[key], key[1]))
        for task, dataset, is_replay in [key]
    ]
    for entry in counts:
        entry["hours"] /= 3600 * sample_rate_hz
    manifests = [{"name": Path(path).name, "content": content} for path, content in features.manifests]
    return {"rows": counts, "languages": dict(languages.most_common()), "manifests": manifests}


class _DatasetNames:
    """Numbers of data sets: that of a row is the data set it names, else its manifest without folder and suffix."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._by_manifest: dict[str, tuple[int, np.ndarray]] = {}

    def name(self, number: int) -> str:
        return list(self._numbers)[number]

    def number_rows(self, sources: pa.ChunkedArray) -> np.ndarray:
        """Number of the data set of every row, by the rows' ``<manifest>:<line>``."""
        parts = pc.call_function("extract_regex", [sources], pc.ExtractRegexOptions(SOURCE)).combine_chunks()
        files = parts.field("file").dictionary_encode()
        lines = pc.cast(parts.field("line"), pa.int64()).to_numpy(zero_copy_only=False)
        codes = files.indices.to_numpy(zero_copy_only=False)
        numbers = np.zeros(len(codes), np.int64)
        for code, file in enumerate(files.dictionary.to_pylist()):
            default, by_line = self._read(file)
            of_file = codes == code
            known = lines[of_file] < len(by_line)
            numbers[of_file] = np.where(known, by_line[np.where(known, lines[of_file], 0)], default)
        return numbers

    def _read(self, manifest: str) -> tuple[int, np.ndarray]:
        """Number of a manifest's own name, and the number of the data set of every line, from line 1."""
        if manifest not in self._by_manifest:
            default = self._number(Path(manifest).stem)
            by_line = [default, *(self._number(name) if name else default for name in _named_datasets(manifest))]
            self._by_manifest[manifest] = default, np.array(by_line, np.int32)
        return self._by_manifest[manifest]

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))


def _named_datasets(manifest: str) -> Iterator[str]:
    """The data set that each line names, "" for none. Nothing if the manifest no longer exists."""
    with suppress(OSError), open(manifest, "rb") as file:
        for line in file:
            name = None
            if b'"dataset"' in line:
                with suppress(ValueError, RecursionError, AttributeError):
                    name = json.loads(line.decode("utf-8-sig")).get("dataset")
            yield name if isinstance(name, str) else ""
