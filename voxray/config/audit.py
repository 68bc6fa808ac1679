"""Settings of jobs/audit.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, OutputFlags, TrimFlags, check_pairs
from voxray.config.flags import Flag
from voxray.config.parse import InputFiles
from voxray.config.task_flags import OwnTaskFlags


class AuditSettings(OutputFlags, ClipLimitFlags, TrimFlags, OwnTaskFlags):
    input: Annotated[InputFiles, Flag(("jsonl", "train_jsonl"), path="input"), Field(min_length=1)]
    """Manifests (JSONL) to audit, comma separated; also checked for leaks between them."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/audit"
    """Folder for report.html, the histograms, audit.json, faults.jsonl and warnings.jsonl."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model whose tokenizer counts tokens: a folder on disk or a hub id; without it, lengths are in characters and
    bytes."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 1280
    """Maximum length of a row in tokens (prompt, audio and answer), as in training; longer rows are faults. Needs
    --model_id."""
    fix: Annotated[str, Flag(path="output")] = ""
    """Manifest to write with the fault-free rows of all inputs, in order; the exit status is then 0 if any row is left.
    Of two rows that leak, the one in the earlier file (or in the training split) is dropped."""
    compare: Literal["auto", "files", "none"] = "auto"
    """What to check for leaks: auto assigns files with train, val, dev or test in their names to these splits (all
    other files to training), or compares every pair of files if no name says so; files always compares files."""
    leaks: Literal["all", "scripted"] = "all"
    """Which leaks are faults: all, or all but equal texts in a corpus whose speakers read the same sentences."""
    min_sec: Annotated[float, Field(ge=0)] = 0.3
    """Shortest acceptable clip, in seconds; shorter ones get a warning."""
    max_sec: Annotated[float, Field(gt=0)] = 30.0
    """Longest acceptable clip, in seconds; longer ones get a warning."""
    outlier_spread: Annotated[float, Field(gt=0)] = 3.0
    """Warn about durations, lengths and speaking rates that lie more than this many interquartile ranges outside the
    quartiles of their task."""
    max_examples: Annotated[int, Field(ge=1)] = 20
    """Faults and warnings of each kind shown in report.html; the .jsonl files hold all of them."""
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that read rows; 0 uses one per CPU, but no more than there is work for."""
    rows_per_chunk: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows that a process handles at a time."""

    @model_validator(mode="after")
    def _limits(self) -> "AuditSettings":
        check_pairs(self, "min_sec", "min_chars_per_sec")
        return self
