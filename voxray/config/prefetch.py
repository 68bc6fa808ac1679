"""Settings of jobs/prefetch.py."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from voxray.config.flag_groups import ClipLimitFlags, FeatureFlags, OutputFlags, check_pairs
from voxray.config.parse import Flag

WHISPER = "openai/whisper-small"
SPLITS = ("train", "validation", "test")
LOCAL = "features are made in the output folder, which nothing has to be fetched from"


def _splits(value: Any) -> Any:
    """``train,dev`` and lists; every split under its own name, in the order of ``SPLITS``."""
    given = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
    names = {"dev" if name == "valid" else name for name in map(str, given)}
    names = {"validation" if name in {"dev", "val"} else name for name in names}
    if unknown := sorted(names - set(SPLITS)):
        raise ValueError(f"{unknown[0]} is not one of {', '.join(SPLITS)}")
    if "train" not in names:
        raise ValueError("must hold train: the other splits are held out from it")
    return tuple(name for name in SPLITS if name in names)


class PrefetchSettings(OutputFlags, FeatureFlags, ClipLimitFlags):
    model_id: Annotated[str, Flag(("model_name_or_path", "base_model"), path="model")] = WHISPER
    """Model to fetch: a hub id, or a folder on disk, which is copied."""
    model_revision: str = ""
    """Branch, tag or commit of the model on the hub; by default its main branch."""
    dataset: Annotated[str, Flag(("dataset_name",), path="model"), Field(min_length=1)]
    """Corpus to fetch: the hub id of a data set, a Common Voice archive (.tar.gz) or its folder, or anything that
    prepare reads."""
    dataset_revision: str = ""
    """Branch, tag or commit of the data set on the hub; by default its main branch."""
    language: Annotated[str, Flag(("language_abbr",)), Field(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*$")] = "ko"
    """Language to take, as the data set spells it (Common Voice: ko, zh-CN); rows of another one are left out."""
    splits: Annotated[tuple[str, ...], BeforeValidator(_splits)] = SPLITS
    """Splits to take, comma separated: train, validation (or dev), test. A corpus that has no validation rows gets
    some drawn from its training rows, whole speakers."""
    max_rows: Annotated[int, Field(ge=0)] = 0
    """Most rows to take of each split, for trials; 0 takes all. What is downloaded stays the same."""
    hub: Annotated[str, Flag(path="model")] = ""
    """Where hub ids are looked up instead of huggingface.co: the URL of a server with the hub's API, or a folder with
    repositories in it (ORG/NAME, datasets/ORG/NAME) or a hub cache. A login is sent to huggingface.co alone."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/prefetch"
    """Folder for model, audio, manifests, features and lock file; all that a training without network needs."""
    min_sec: Annotated[float, Field(ge=0)] = 0.5
    """Shortest clip kept, in seconds."""
    max_sec: Annotated[float, Field(gt=0)] = 30.0
    """Longest clip kept, in seconds; Whisper hears 30."""
    max_chars: Annotated[int, Field(ge=1)] = 2000
    """Longest transcript kept, in characters without spaces."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Drop rows whose decoded audio occurred before."""
    leaks: Annotated[Literal["refuse", "drop", "allow"], Flag()] = "drop"
    """What to do when audio, text or a speaker of the validation or test rows is in training: drop those training
    rows, refuse, or allow it; the numbers are printed in any case."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows that validation is given, where the corpus has no validation rows of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the rows that validation is given so."""
    features: bool = True
    """Make features as well; without them the training makes them, as it must in any case in a folder that was moved
    after this job."""
    bf16: bool = False
    """Compute the outputs of --store encoder in bfloat16, as a training run with --bf16 does."""
    keep_raw: bool = True
    """Keep what was downloaded and unpacked of the corpus; without it only the 16 kHz audio stays."""
    verify: bool = False
    """Check the checksums of everything that is there already, and fetch or make damaged files again."""
    dry_run: bool = False
    """Say what would be fetched, what is there, and the disk that it takes; write nothing."""
    overwrite: bool = False
    """Fetch and make again what the folder holds from other settings or other sources, which is refused otherwise."""
    features_cache_dir: Annotated[str, Flag(no_effect=LOCAL)] = ""
    """Where other jobs keep copies of shards that they read from a URL."""
    features_cache_gib: Annotated[float, Flag(no_effect=LOCAL), Field(gt=0)] = 50.0
    """Largest size of those copies, GiB."""

    @model_validator(mode="after")
    def _no_credentials(self) -> "PrefetchSettings":
        """They would end up in the lock file; the message of a field's own validator would show them."""
        if "://" in self.hub and "@" in urlsplit(self.hub).netloc:
            raise ValueError("--hub: take the credentials out of the URL; a login is sent to huggingface.co alone")
        return self

    @model_validator(mode="after")
    def _limits(self) -> "PrefetchSettings":
        check_pairs(self, "min_sec", "min_chars_per_sec")
        return self
