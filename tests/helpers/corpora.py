"""Write small corpora and read them with the importers."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from voxray.commands.prepare import run_prepare_job
from voxray.config.prepare import PrepareSettings
from voxray.corpora.importers import IMPORTERS, ImportedRow, ImportFault


def clip(path: Path) -> str:
    """Write 0.1 s of audio. Returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pcm":
        path.write_bytes(np.zeros(1600, "<i2").tobytes())
    elif path.suffix in (".wav", ".flac"):
        soundfile.write(path, np.zeros(1600, np.float32), 16_000)
    else:
        path.write_bytes(b"sound")  # importers never decode
    return str(path)


def lines(path: Path, *rows: str | dict | bytes, bom: bool = False, end: str = "\n", packed: bool = False) -> Path:
    """Write a text file. dicts are written as JSON, bytes unchanged."""
    parts = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode()
        for row in rows
    ]
    raw = b"\xef\xbb\xbf" * bom + b"".join(part + end.encode() for part in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def read(name: str, path: Path) -> tuple[list[ImportedRow], list[ImportFault]]:
    """The rows and faults that an importer gives for a path. Properties that all must have are checked."""
    rows, faults = [], []
    for item in IMPORTERS[name](path):
        (rows if isinstance(item, ImportedRow) else faults).append(item)
        assert Path(item.source_file).is_absolute() and item.line >= 1
        if isinstance(item, ImportFault):
            assert item.reason.replace("_", "").isalpha() and item.reason.islower() and item.message
        elif item.values.get("audio_path"):
            assert Path(item.values["audio_path"]).is_absolute() and Path(item.values["audio_path"]).is_file()
        assert json.dumps(vars(item), ensure_ascii=False).encode()
    return rows, faults


AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def save_to_disk(
    folder: Path, splits: dict[str, list[dict]], audio: str = "audio", audio_between: pa.Array | None = None
) -> Path:
    """Write what ``save_to_disk`` writes of a DatasetDict. All its splits have shards of the same name.

    Args:
        splits: {split: rows}; the row's ``audio`` is the file whose bytes the row holds.
        audio: Name of the column of clips.
        audio_between: Another column of clips, ``audio``, behind it.
    """
    for split, rows in splits.items():
        clips = [{"bytes": Path(row["audio"]).read_bytes(), "path": Path(row["audio"]).name} for row in rows]
        others = {key: [row[key] for row in rows] for key in rows[0] if key != "audio"}
        between = {} if audio_between is None else {"audio": audio_between}
        table = pa.table({audio: pa.array(clips, AUDIO), **between, **others})
        (folder / split).mkdir(parents=True)
        file = folder / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        (folder / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def reasons(faults: list[ImportFault]) -> list[tuple[int, str]]:
    return [(fault.line, fault.reason) for fault in faults]


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(
    folder: Path, manifest: str, use_ray: bool = False, **changes
) -> tuple[list[dict], list[dict], list[dict], dict]:
    """Run the job. Returns training rows, validation rows, ledger and summary."""
    values = {"input": manifest, "train_output": str(folder / "out" / "train.jsonl"), "rows_per_chunk": 3}
    values |= {"val_output": str(folder / "out" / "val.jsonl"), "num_actors": 2, "val_share": 0.25}
    try:
        run_prepare_job(PrepareSettings(**{**values, **changes}), use_ray=use_ray)
    finally:
        out = folder / "out"
        paths = [out / name for name in ("train.jsonl", "val.jsonl")]
        manifests = [read_json_lines(path) if path.is_file() else [] for path in paths]
    summary = json.loads((out / "prepare_summary.json").read_text())
    return *manifests, read_json_lines(out / "quarantine.jsonl"), summary
