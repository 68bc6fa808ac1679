"""Settings of jobs/prepare.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, check_pairs
from voxray.config.parse import CommaStrings, Flag


class PrepareSettings(ClipLimitFlags):
    input: Annotated[CommaStrings, Flag(path="input"), Field(min_length=1)]
    """Corpora to read: files or folders, comma separated."""
    format: Literal[
        "auto", "kaldi", "nemo", "ksponspeech", "commonvoice", "huggingface", "lhotse", "salmonn", "jsonl"
    ] = "auto"
    """Format of the corpora; auto looks at the files."""
    train_output: Annotated[str, Flag(("out_train",), path="output"), Field(min_length=1)]
    """Manifest of the training rows to write."""
    val_output: Annotated[str, Flag(("out_val",), path="output")] = ""
    """Manifest of the validation rows to write; without it nothing is split off."""
    test_output: Annotated[str, Flag(("out_test",), path="output")] = ""
    """Manifest of what the corpus itself calls its test set; without it those rows are in the ledger, or, where the
    corpus has no validation set, among the others."""
    audio_output: Annotated[str, Flag(path="output")] = ""
    """Folder for 16 kHz mono FLAC copies of the clips that are kept, which the manifests then name, relative to
    themselves where the folder stands below them; without it they name the clips where they are."""
    quarantine: Annotated[str, Flag(path="output")] = ""
    """Ledger of the rows left out; by default quarantine.jsonl beside the training manifest."""
    storage_path: str = ""
    """Absolute folder that outlives the cluster, a shared mount; relative outputs of submitted jobs need it."""
    reading: Literal["spelling", "phonetic"] = "spelling"
    """Which side of (spelling)/(reading) becomes the text; the other one is kept beside it for scoring."""
    min_sec: Annotated[float, Field(ge=0)] = 3.0
    """Shortest clip kept, in seconds."""
    max_sec: Annotated[float, Field(gt=0)] = 25.0
    """Longest clip kept, in seconds."""
    min_chars: Annotated[int, Field(ge=0)] = 1
    """Shortest transcript or answer kept, in characters without spaces."""
    max_chars: Annotated[int, Field(ge=1)] = 2000
    """Longest transcript or answer kept, in characters without spaces."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Drop rows whose decoded audio and task, or, without audio, whose normalised texts occurred before."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows that goes to validation."""
    leaks: Annotated[Literal["refuse", "drop", "allow"], Flag()] = "refuse"
    """What to do when audio, text or a speaker of the validation rows is in training: refuse, drop those training rows,
    or allow it; the numbers are printed in any case."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split."""
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that check rows; 0 takes one per CPU, as far as there is work for them."""
    rows_per_chunk: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows handed to a process at a time."""

    @model_validator(mode="after")
    def _limits(self) -> "PrepareSettings":
        check_pairs(self, "min_sec", "min_chars", "min_chars_per_sec")
        return self
