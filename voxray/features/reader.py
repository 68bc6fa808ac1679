"""Reads feature sets: lengths of all rows from the index, single rows from memory-mapped shards."""

import hashlib
import json
import resource
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from voxray.core.content_hash import combined_hash
from voxray.core.errors import RunError, one_line
from voxray.core.storage import AnyPath, RemotePath, checksum
from voxray.features.shard_cache import fetch
from voxray.features.shards import (
    AUDIO_COLUMN,
    INDEX_SCHEMA,
    ROWS_PER_BATCH,
    SCALARS,
    TASK_CODES,
    are_parts,
    row_checksum,
    shard_path,
)

Stored = TypeVar("Stored")
OPEN_SHARDS = 256  # memory maps kept open at a time
OPEN_REMOTE_SHARDS = 16  # a copy that was evicted from the cache takes disk space until it is closed


@dataclass(frozen=True)
class FeatureRow:
    """One stored row. Its arrays are read-only views of the mapped file.

    Attributes:
        prompt_ids: Token ids up to the answer. ``FrontEnd.prompt_ids`` marks those with a label; here they are plain.
        prompt_labels: Whether each token of the prompt has a label, bool; None if none has.
        store: Kind of ``audio``, one of ``shards.STORES``.
        audio: mel: float16, (num_frames, num_mel_bins); pcm16: int16, (num_samples,); encoder: float32, float16,
            or uint16 that holds the bits of bfloat16, (num_windows, positions, hidden). Empty for text tasks.
        fill: Value of the padded frames of ``mel``.
    """

    id: str
    task: str
    language: str
    source: str
    prompt: str
    answer: str
    prompt_ids: np.ndarray
    target_ids: np.ndarray
    store: str
    audio: np.ndarray
    fill: float
    num_windows: int
    num_samples: int
    prompt_labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.prompt_ids)
        has_label = ids < 0
        if has_label.any():
            object.__setattr__(self, "prompt_ids", np.where(has_label, -1 - ids, ids))
            object.__setattr__(self, "prompt_labels", has_label)

    @classmethod
    def from_values(cls, row: dict[str, Any], store: str = "mel") -> "FeatureRow":
        """Make a row from the values of ``extract.Extractor`` without storing it.

        Args:
            store: ``mel`` or ``pcm16``.
        """
        values = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        ids = {name: np.asarray(row[name], np.int32) for name in ("prompt_ids", "target_ids")}
        audio = row["audio"].astype(np.int16 if store == "pcm16" else np.float16)
        return cls(**{**values, **ids, "store": store, "audio": audio})


class DamagedShard(Exception):
    """A row or another part of a shard does not have its checksum."""


class _Shard:
    """An open shard with the metadata of its audio.

    Args:
        path: The local file.
        parts: (end, CRC-32) of its parts, as ``shards.shard_bytes`` returns them. Rows are checked by their own
            checksums when they are first read. Shards of earlier versions have parts for their record batches instead,
            or none, and then they are not checked.
    Raises:
        DamagedShard: The end of the file, which says where the record batches are, has changed.
    """

    def __init__(self, path: Path, parts: Sequence[Sequence[int]]) -> None:
        self._data, self._parts = pa.memory_map(str(path)).read_buffer(), parts
        self._unchecked = set(range(len(parts)))
        self._check(len(parts) - 1)
        self.reader = pa.ipc.open_file(self._data)
        metadata = self.reader.schema.metadata
        self.store: str = metadata[b"store"].decode()
        self.frame_shape: list[int] = json.loads(metadata[b"frame_shape"])
        self._has_row_checksums = "crc32" in self.reader.schema.names
        self._checked_rows: set[int] = set()

    def _check(self, part: int) -> None:
        if part not in self._unchecked:
            return
        (end, crc), start = self._parts[part], self._parts[part - 1][0] if part else 0
        if not start <= end <= self._data.size or zlib.crc32(self._data.slice(start, end - start)) != crc:
            raise DamagedShard
        self._unchecked.discard(part)

    def prompt(self, index: int) -> str:
        """Text of a row's prompt. It is not checked for damage; training on the row itself does that."""
        return self.reader.get_batch(index // ROWS_PER_BATCH).column("prompt")[index % ROWS_PER_BATCH].as_py()

    def row(self, index: int) -> FeatureRow:
        if not self._has_row_checksums:
            self._check(index // ROWS_PER_BATCH)
        batch, number = self.reader.get_batch(index // ROWS_PER_BATCH), index % ROWS_PER_BATCH
        is_checked = not self._has_row_checksums or index in self._checked_rows
        if not is_checked:
            batch.validate(full=True)  # values at damaged offsets could lie outside of the file
        values = {name: batch.column(name)[number].as_py() for name in SCALARS}
        values |= {name: batch.column(name)[number].values.to_numpy() for name in ("prompt_ids", "target_ids")}
        audio = batch.column(AUDIO_COLUMN)[number].values.to_numpy()
        if not is_checked:
            if row_checksum(values, audio) != batch.column("crc32")[number].as_py():
                raise DamagedShard
            self._checked_rows.add(index)
        return FeatureRow(**values, store=self.store, audio=audio.reshape(-1, *self.frame_shape))


class RowLengths:
    """Lengths of rows, as planning needs them. Rows are numbered from 0 in manifest order.

    100,000 hours are 36 million rows, so arrays of one number per row are as narrow as they can be.

    Attributes:
        task: Task code of every row, int8 (see ``shards.TASK_CODES``).
        sample: Number of the manifest row that each row is a variant of, ascending.
        num_prompt_tokens: Tokens before the answer, audio positions included.
        num_target_tokens: Tokens of the answer, the end-of-text token included.
        num_prompt_labels: Tokens before the answer that have a label: those of the earlier answers of a chat.
        max_extra_prompt_tokens: {task: tokens to reserve per row, since a sampled prompt may be longer}.
        num_windows: Model windows of the clip, 0 for text.
        num_samples: Samples of the clip at the model's rate.
        has_language: Whether the row's language is known, bool.
        first_replay: Number of the first row of ``--replay_jsonl``; these rows are the last ones.
    """

    task: np.ndarray
    sample: np.ndarray
    num_prompt_tokens: np.ndarray
    num_target_tokens: np.ndarray
    num_prompt_labels: np.ndarray
    max_extra_prompt_tokens: Mapping[str, int]
    num_windows: np.ndarray
    num_samples: np.ndarray
    has_language: np.ndarray
    first_replay: int = sys.maxsize

    @property
    def num_tokens(self) -> np.ndarray:
        return self.num_prompt_tokens + self.num_target_tokens

    @cached_property
    def longest_tokens(self) -> np.ndarray:
        """``num_tokens`` plus ``max_extra_prompt_tokens``."""
        longest = self.num_tokens
        for name, extra in self.max_extra_prompt_tokens.items():
            longest[self.task == TASK_CODES[name]] += extra
        return longest

    def num_labels(self, rows: np.ndarray) -> np.ndarray:
        """Tokens with a label, on which the loss is computed, of some rows."""
        return self.num_target_tokens[rows] + self.num_prompt_labels[rows]

    def within(self, max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows within a token limit, and the first row of every sample that has no variant within it."""
        fits = self.longest_tokens <= max_len
        rows, too_long = (np.flatnonzero(chosen).astype(np.int32) for chosen in (fits, ~fits))
        lost = too_long[~np.isin(self.sample[too_long], self.sample[rows])]
        return rows, lost[np.unique(self.sample[lost], return_index=True)[1]]

    def source(self, number: int) -> str:
        """``<manifest>:<line>`` of a row."""
        raise NotImplementedError


class Features(RowLengths):
    """Rows of one or several feature sets.

    Args:
        num_replay_sets: Number of the last sets whose rows are replayed.
    Attributes:
        folders: The feature sets.
        store: Kind of stored audio, one of ``shards.STORES``; "" if there is no set.
    Raises:
        RunError: A folder holds no finished set, or the sets store different kinds of audio.
    """

    def __init__(
        self,
        folders: Iterable[AnyPath],
        max_extra_prompt_tokens: Mapping[str, int] | None = None,
        *,
        num_replay_sets: int = 0,
    ) -> None:
        self.folders = tuple(folders)
        self._descriptions = [_read_description(folder) for folder in self.folders]
        stores = {description["store"] for description in self._descriptions}
        if len(stores) > 1:
            raise RunError(f"{self.folders[0].name}: these feature sets store different things: {', '.join(stores)}")
        self.store: str = next(iter(stores), "")
        tables = [_read_index(*pair) for pair in zip(self.folders, self._descriptions, strict=True)]
        self._first_rows = np.cumsum([0, *(table.num_rows for table in tables)])  # of every set
        self.first_replay = int(self._first_rows[len(tables) - num_replay_sets])
        self._index = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
        self._shard, self._row = self._numbers("shard"), self._numbers("row")
        self.task = self._numbers("task")
        self.sample = np.cumsum(self._numbers("variant") == 0, dtype=np.int32) - 1
        self.num_prompt_tokens = self._numbers("num_prompt_tokens")
        self.num_target_tokens = self._numbers("num_target_tokens")
        labels = self._numbers("num_prompt_labels")
        self.num_prompt_labels = labels if labels.any() else np.broadcast_to(np.int32(0), labels.shape)  # no memory
        self.max_extra_prompt_tokens = max_extra_prompt_tokens or {}
        self.num_windows = self._numbers("num_windows")
        self.num_samples = self._numbers("num_samples")
        languages = self._index["language"]
        num_bytes = pc.call_function("binary_length", [languages]).combine_chunks()  # without Python strings
        self.has_language = num_bytes.to_numpy(zero_copy_only=False) > 0
        self._open: OrderedDict[tuple[int, int], _Shard] = OrderedDict()
        self._lock = threading.Lock()  # loader threads share the open shards
        self._max_open = OPEN_REMOTE_SHARDS
        if all(isinstance(folder, Path) for folder in self.folders):
            num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # each memory map holds a file open
            self._max_open = OPEN_SHARDS if num_files < 0 else min(OPEN_SHARDS, num_files // 4)
        self._shard_lists: dict[int, list[dict[str, Any]]] = {}  # content of shards.json

    def __len__(self) -> int:
        return len(self._row)

    def _numbers(self, name: str) -> np.ndarray:
        return self._index[name].combine_chunks().to_numpy(zero_copy_only=False)

    def ids(self, numbers: Iterable[int]) -> list[str]:
        return [self._index["id"][int(number)].as_py() for number in numbers]

    def source(self, number: int) -> str:
        """``<manifest>:<line>`` of a row."""
        return self._index["source"][int(number)].as_py()

    @property
    def manifests(self) -> list[tuple[str, str]]:
        """(path of the manifest, hash of its lines and clips) of every set."""
        return [(str(each.get("manifest", "")), each["content"]) for each in self._descriptions]

    def origins(self, numbers: np.ndarray) -> pa.Table:
        """``language`` and ``source`` of some rows."""
        return self._index.select(["language", "source"]).take(pa.array(numbers))

    def row(self, number: int) -> FeatureRow:
        """Read one row from its mapped shard; no copy of the features is made.

        Raises:
            RunError: The shard is damaged. The next run makes it again.
        """
        return self._read(number, lambda shard, row: shard.row(row))

    def _read(self, number: int, read: Callable[[_Shard, int], Stored]) -> Stored:
        set_number = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        shard = int(self._shard[number])
        try:
            return read(self._get_shard(set_number, shard), int(self._row[number]))
        except (DamagedShard, pa.ArrowInvalid, OSError) as error:
            path = shard_path(self.folders[set_number], shard)
            if isinstance(path, Path):
                path.with_suffix(".json").unlink(missing_ok=True)  # so the next run makes the shard again
            reason = f" ({one_line(error, 200)})" if str(error) else ""
            raise RunError(f"{path}: damaged{reason}; run the same command again, which makes it anew") from None

    def prompt(self, number: int) -> str:
        """``row(number).prompt``, read without the rest of the row."""
        return self._read(number, lambda shard, row: shard.prompt(row))

    def _get_shard(self, set_number: int, shard: int) -> _Shard:
        key = (set_number, shard)
        with self._lock:
            if key not in self._open:
                self._open[key] = self._open_shard(set_number, shard)
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def _open_shard(self, set_number: int, shard: int) -> _Shard:
        path = shard_path(self.folders[set_number], shard)
        if set_number not in self._shard_lists:
            self._shard_lists[set_number] = _read_shard_list(self.folders[set_number])
        entry = self._shard_lists[set_number][shard]
        parts = entry.get("parts", ())
        if isinstance(path, Path):
            return _Shard(path, parts)
        while True:
            try:
                return _Shard(fetch(path, entry["sha256"], entry["bytes"]), parts)
            except FileNotFoundError:
                continue  # another process evicted the copy before it was opened

    def fingerprint(self) -> str:
        """Hash of everything that decides the rows: lines and clips of all sets, and how they became features."""
        return combined_hash([each["content"], each["fingerprint"]] for each in self._descriptions)

    def content_fingerprint(self) -> str:
        """Hash of the lines and clips alone, which checkpoints of version 1 hold."""
        return hashlib.sha256("\n".join(each["content"] for each in self._descriptions).encode()).hexdigest()


def _read_description(folder: AnyPath) -> dict[str, Any]:
    advice = "run featurize on its manifest"
    try:
        description = json.loads((folder / "set.json").read_text())
        if all(isinstance(description[name], str) for name in ("content", "fingerprint", "store")):
            return description
    except OSError:
        raise RunError(f"{folder}: not a finished feature set; {advice}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise RunError(f"{folder / 'set.json'}: damaged; {advice}")


def _read_shard_list(folder: AnyPath) -> list[dict[str, Any]]:
    try:
        shards = json.loads((folder / "shards.json").read_text())
        is_complete = (isinstance(shard["sha256"], str) and isinstance(shard["bytes"], int) for shard in shards)
        if all(is_complete) and all(are_parts(shard.get("parts", [])) for shard in shards):
            return list(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise RunError(f"{folder / 'shards.json'}: damaged; run featurize on its manifest")


def _read_index(folder: AnyPath, description: dict[str, Any]) -> pa.Table:
    path = folder / "index.arrow"
    try:
        if isinstance(path, RemotePath):
            path = fetch(path, description["index_sha256"], description["index_bytes"])
        elif checksum(path) != description["index_sha256"]:
            raise ValueError("it is not what set.json says")
        return _with_all_columns(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error, 200)
        raise RunError(f"{folder / 'index.arrow'}: damaged ({reason}); run featurize on its manifest") from None


def _with_all_columns(table: pa.Table) -> pa.Table:
    """An index with the column that those of earlier versions lack: they had no labels in prompts."""
    if "num_prompt_labels" in table.column_names:
        return table
    zeros = pa.array(np.zeros(table.num_rows, np.int32))
    return table.append_column("num_prompt_labels", zeros).select(INDEX_SCHEMA.names)
