"""Evaluations written by hand, for the tests that compare and explain them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DEFAULTS = {"task": "asr", "language": "ko", "prompt": "", "num_samples": 16_000, "speaker": None, "chunk_of": None}


def write_evaluation(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Prediction shards, metrics.json and settings.json as an evaluation leaves them; returns the folder as text.

    Args:
        rows: Values of each prediction row; ``source`` is made of the row's place where it is not given.
        settings: What settings.json holds.
    """
    (folder / "predictions").mkdir(parents=True)
    found = [
        {**DEFAULTS, "id": f"r{at}", "source": f"/data/asr.val.jsonl:{at + 1}", **row} for at, row in enumerate(rows)
    ]
    half = (len(found) + 1) // 2
    for number, part in enumerate((found[:half], found[half:])):
        if part:
            pq.write_table(pa.Table.from_pylist(part), folder / "predictions" / f"part-{number:05d}.parquet")
    (folder / "metrics.json").write_text(json.dumps({"normalizer": {"ko-v1": len(found)}}))
    (folder / "settings.json").write_text(json.dumps(settings))
    return str(folder)
