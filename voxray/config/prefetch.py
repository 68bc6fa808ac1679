"""Settings of jobs/prefetch.py."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, EncoderPrecisionFlags, FeatureFlags, OutputFlags, check_pairs
from voxray.config.flags import Flag
from voxray.config.parse import convert, split_commas
from voxray.core.languages import language_code

WHISPER = "openai/whisper-small"
SPLITS = ("train", "validation", "test")
LOCAL = "features are written to the output folder, from which nothing has to be copied"


def _splits(value: Any) -> Any:
    """Parse ``train,dev`` or a list. Synonyms become one name, and splits have the order of ``SPLITS``."""
    names = {"validation" if name in {"dev", "val", "valid"} else str(name) for name in split_commas(value)}
    if unknown := sorted(names - set(SPLITS)):
        raise ValueError(f"{unknown[0]} is not one of {', '.join(SPLITS)}")
    if "train" not in names:
        raise ValueError("must hold train: the other splits are held out from it")
    return tuple(name for name in SPLITS if name in names)


def _check_language(value: str) -> str:
    language_code(value)
    return value


class PrefetchSettings(OutputFlags, EncoderPrecisionFlags, FeatureFlags, ClipLimitFlags):
    model_id: Annotated[str, Flag(("model_name_or_path", "base_model"), path="model")] = WHISPER
    """Model to download: a hub id, or a folder on disk to copy."""
    model_revision: str = ""
    """Branch, tag or commit of the model on the hub; by default the main branch."""
    dataset: Annotated[str, Flag(("dataset_name",), path="model"), Field(min_length=1)]
    """Corpus to download: the hub id of a dataset, a Common Voice archive (.tar.gz) or its folder, or any input of the
    job prepare."""
    dataset_revision: str = ""
    """Branch, tag or commit of the dataset on the hub; by default the main branch."""
    language: Annotated[
        str,
        Flag(("language_abbr",)),
        Field(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*$"),
        AfterValidator(_check_language),
    ] = "ko"
    """Language to use, as the dataset writes it (Common Voice: ko, zh-CN). Rows of other languages are left out."""
    splits: Annotated[tuple[str, ...], convert(_splits)] = SPLITS
    """Splits to use, comma separated: train, validation (or dev), test. If the corpus has no validation split, whole
    speakers are moved from its training rows to validation."""
    max_rows: Annotated[int, Field(ge=0)] = 0
    """Maximum rows of each split, for trials; 0 uses all. The download does not become smaller."""
    hub: Annotated[str, Flag(path="model")] = ""
    """Source of hub ids instead of huggingface.co: the URL of a server with the hub's API, a folder with repositories
    (ORG/NAME, datasets/ORG/NAME), or a hub cache. Login tokens are sent to huggingface.co only."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/prefetch"
    """Folder for model, audio, manifests, features and lock file: all that training without a network needs."""
    min_sec: Annotated[float, Field(ge=0)] = 0.5
    """Minimum length of a clip, in seconds; shorter clips are left out."""
    max_sec: Annotated[float, Field(gt=0)] = 30.0
    """Maximum length of a clip, in seconds; longer clips are left out. Whisper's window is 30 s."""
    max_chars: Annotated[int, Field(ge=1)] = 2000
    """Maximum length of a transcript, in characters without spaces."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Drop or keep rows whose decoded audio equals that of an earlier row."""
    leaks: Annotated[Literal["refuse", "scripted", "drop", "allow"], Flag()] = "drop"
    """What to do if audio, text or a speaker of validation or test rows is also in training: drop these training rows,
    refuse to continue, or allow it. The counts are always printed."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows to move to validation, if the corpus has no validation split."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed for the choice of these rows."""
    features: bool = True
    """Also compute features. Otherwise training computes them, as it always has to if the folder is moved after this
    job."""
    keep_raw: bool = True
    """Keep the downloaded and unpacked corpus; --no_keep_raw keeps only the 16 kHz audio."""
    verify: bool = False
    """Verify the checksums of all existing files, and download or compute damaged ones again."""
    dry_run: bool = False
    """Print what would be downloaded, what exists, and the disk space it takes, without writing anything."""
    overwrite: bool = False
    """Replace files of the folder that come from other settings or other sources, which is refused otherwise."""
    features_cache_dir: Annotated[str, Flag(no_effect=LOCAL)] = ""
    """Folder for local copies of shards that other jobs read from a URL."""
    features_cache_gib: Annotated[float, Flag(no_effect=LOCAL), Field(gt=0)] = 50.0
    """Maximum total size of those copies, in GiB."""

    @model_validator(mode="after")
    def _no_credentials(self) -> "PrefetchSettings":
        """Refuse credentials, which the lock file would store. A field validator's message would show them."""
        if "://" in self.hub and "@" in urlsplit(self.hub).netloc:
            raise ValueError("--hub: take the credentials out of the URL; a login is sent to huggingface.co alone")
        return self

    @model_validator(mode="after")
    def _limits(self) -> "PrefetchSettings":
        check_pairs(self, "min_sec", "min_chars_per_sec")
        return self
