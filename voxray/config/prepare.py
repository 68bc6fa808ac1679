"""Settings of jobs/prepare.py."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, check_pairs
from voxray.config.flags import Flag
from voxray.config.parse import InputFiles, Settings
from voxray.core.languages import language_code


class TableFlags(Settings):
    """How to read tables (CSV, TSV and Excel files). What is not given is guessed and printed.

    Some of the flags are also for data sets of Hugging Face: save_to_disk, Parquet and metadata files.
    """

    audio_column: str = ""
    """Heading of the column that names the clips, or its number in a table without headings; by default the column
    whose cells are audio files. In a data set of Hugging Face, the column of clips or of their files."""
    text_column: str = ""
    """Heading or number of the column of transcripts, in tables and in data sets of Hugging Face."""
    speaker_column: str = ""
    """Heading or number of the column of speakers, in tables and in data sets of Hugging Face; rows of
    one speaker stay on one side of the split."""
    language_column: str = ""
    """Heading or number of the column of language codes, in tables and in data sets of Hugging Face."""
    start_column: str = ""
    """Heading or number of the column with the start of a row's part of its clip, in seconds or h:mm:ss; for tables
    only."""
    end_column: str = ""
    """Heading or number of the column with the end of that part; for tables only."""
    duration_column: str = ""
    """Heading or number of the column with the length of that part, or of the clip; for tables only."""
    channel_column: str = ""
    """Heading or number of the column with the channel to read, from 0; for tables only."""
    split_column: str = ""
    """Heading or number of the column with the corpus's own split, in tables and in data sets of Hugging Face."""
    audio_dir: Annotated[str, Flag(path="input")] = ""
    """Folder of the clips that a table names; they may be at any depth below it. By default the table's folder."""
    encoding: str = ""
    """Encoding of a table, such as cp949; by default from its byte-order mark, else UTF-8, else cp949."""
    sheet: str = ""
    """Sheet of an Excel file; by default the first one with rows."""


class PrepareSettings(TableFlags, ClipLimitFlags):
    input: Annotated[InputFiles, Flag(path="input"), Field(min_length=1)]
    """Corpora to read: files or folders, comma separated."""
    format: Literal[
        "auto",
        "kaldi",
        "nemo",
        "ksponspeech",
        "librispeech",
        "commonvoice",
        "huggingface",
        "lhotse",
        "salmonn",
        "jsonl",
        "table",
    ] = "auto"
    """Format of the corpora; auto detects it from the files."""
    train_output: Annotated[str, Flag(("out_train",), path="output"), Field(min_length=1)]
    """Manifest to write with the training rows."""
    val_output: Annotated[str, Flag(("out_val",), path="output")] = ""
    """Manifest to write with the validation rows: those of the corpus's own validation split, or, if it has none,
    --val_share of its training rows. Without it, rows of a validation split are left out."""
    test_output: Annotated[str, Flag(("out_test",), path="output")] = ""
    """Manifest to write with the rows of the corpus's own test split; without it these rows are left out. They are
    never trained on."""
    audio_output: Annotated[str, Flag(path="output")] = ""
    """Folder for 16 kHz mono FLAC copies of the clips in the manifests. The manifests then refer to the copies, by
    relative paths if the folder is below the manifest's; without it they refer to the original files."""
    quarantine: Annotated[str, Flag(path="output")] = ""
    """Ledger of the dropped rows; by default quarantine.jsonl next to the training manifest."""
    storage_path: str = ""
    """Absolute path of a folder that outlives the cluster, such as a shared mount; submitted jobs with relative output
    paths need it."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language to write to rows that name none, as a code such as ko or as an English name."""
    reading: Literal["spelling", "phonetic"] = "spelling"
    """Which side of a dual transcription (spelling)/(reading) becomes the text; the other is stored for scoring."""
    min_sec: Annotated[float, Field(ge=0)] = 3.0
    """Minimum length of a clip, in seconds; shorter ones are dropped."""
    max_sec: Annotated[float, Field(gt=0)] = 25.0
    """Maximum length of a clip, in seconds; longer ones are dropped."""
    min_chars: Annotated[int, Field(ge=0)] = 1
    """Minimum length of a transcript or answer, in characters without spaces."""
    max_chars: Annotated[int, Field(ge=1)] = 2000
    """Maximum length of a transcript or answer, in characters without spaces."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Whether to drop rows that repeat the decoded audio and task of an earlier row (text rows: its normalised
    texts)."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows that goes to validation, if the corpus has no validation split."""
    leaks: Annotated[Literal["refuse", "scripted", "drop", "allow"], Flag()] = "refuse"
    """What to do if audio, text or a speaker of the validation rows also occurs in training: refuse to write, drop
    those training rows, or allow it. scripted refuses too, but equal texts do not count: several speakers read the same
    sentences. The counts are always printed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split."""
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that check rows; 0 uses one per CPU, but no more than there is work for."""
    rows_per_chunk: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows that a process handles at a time."""

    @model_validator(mode="after")
    def _limits(self) -> "PrepareSettings":
        check_pairs(self, "min_sec", "min_chars", "min_chars_per_sec")
        return self
