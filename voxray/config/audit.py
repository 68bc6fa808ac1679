"""Settings of jobs/audit.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, OutputFlags, TrimFlags, check_pairs
from voxray.config.parse import CommaStrings, Flag


class AuditSettings(OutputFlags, ClipLimitFlags, TrimFlags):
    input: Annotated[CommaStrings, Flag(("jsonl", "train_jsonl"), path="input"), Field(min_length=1)]
    """Manifests (JSONL) to audit, comma separated; leaks are looked for between them."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/audit"
    """Folder of report.html, the histograms, audit.json, faults.jsonl and warnings.jsonl."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model whose tokens are counted: a folder on disk or a hub id; without one, lengths are in characters and
    bytes."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 1280
    """Longest row in tokens (prompt, audio and answer), as in training; rows over it are faults. Needs --model_id."""
    fix: Annotated[str, Flag(path="output")] = ""
    """Manifest to write the rows without a fault to, of all inputs in order; the exit status is then 0 if any is
    left. Of rows that leak, the one in the earlier file (or in training) is left out."""
    compare: Literal["auto", "files", "none"] = "auto"
    """Between what leaks are looked for: auto takes files whose names say train, val, dev or test as these sides (the
    rest trains), or every file by itself where no name says so; files is always the latter."""
    min_sec: Annotated[float, Field(ge=0)] = 0.3
    """Shortest clip that is fine, in seconds; others are warned of."""
    max_sec: Annotated[float, Field(gt=0)] = 30.0
    """Longest clip that is fine, in seconds; others are warned of."""
    outlier_spread: Annotated[float, Field(gt=0)] = 3.0
    """Durations, lengths and speaking rates further than this many quartile ranges outside a task's quartiles are
    warned of."""
    max_examples: Annotated[int, Field(ge=1)] = 20
    """Faults and warnings of each kind that report.html shows; the .jsonl files hold all."""
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that read rows; 0 takes one per CPU, as far as there is work for them."""
    rows_per_chunk: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows handed to a process at a time."""

    @model_validator(mode="after")
    def _limits(self) -> "AuditSettings":
        check_pairs(self, "min_sec", "min_chars_per_sec")
        return self
