"""Write evaluations for the tests that compare them and report on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DEFAULTS = {"task": "asr", "language": "ko", "prompt": "", "num_samples": 16_000, "speaker": None, "chunk_of": None}


def write_evaluation(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Write prediction shards, metrics.json and settings.json like an evaluation; returns the folder as text.

    Args:
        rows: Values of each prediction row; ``id`` and ``source`` default to the row's number.
        settings: Content of settings.json.
    """
    (folder / "predictions").mkdir(parents=True)
    complete = [
        {**DEFAULTS, "id": f"r{number}", "source": f"/data/asr.val.jsonl:{number + 1}", **row}
        for number, row in enumerate(rows)
    ]
    half = (len(complete) + 1) // 2
    for number, part in enumerate((complete[:half], complete[half:])):
        if part:
            pq.write_table(pa.Table.from_pylist(part), folder / "predictions" / f"part-{number:05d}.parquet")
    (folder / "metrics.json").write_text(json.dumps({"normalizer": {"ko-v1": len(complete)}}))
    (folder / "settings.json").write_text(json.dumps(settings))
    return str(folder)
