"""Which files of a data set make the corpus of one language, how it is laid out for an importer, and which rows count.

Common Voice is met in three forms: the archive of a release (``cv-corpus-*/ko/{train.tsv, clips/*.mp3}``), the folder
that it unpacks to, and its hub repository (``transcript/ko/train.tsv``, ``audio/ko/train/*.tar``). Other data sets are
Parquet files or a folder with a metadata file, by language, by split, or neither.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from voxray.core.errors import RunError
from voxray.corpora.hub import RepoFile
from voxray.corpora.importers import ImportedRow, ImportFault
from voxray.corpora.prepare.split import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from voxray.corpora.unpack import is_archive

TABLES = {"train": "train", "validation": "dev", "test": "test"}
"""What Common Voice calls the splits."""
AUDIO_SUFFIXES = {".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".pcm"}
DATA_FOLDERS = {"data", "default", "all"}


@dataclass(frozen=True)
class CorpusFiles:
    """The files to have.

    Attributes:
        form: ``tables`` for transcript/ and audio/ of a Common Voice repository, ``archives`` for tar files that hold
            the corpus, ``files`` for one that an importer reads as it lies.
        files: The files.
    """

    form: Literal["tables", "archives", "files"]
    files: tuple[RepoFile, ...]


def detect_split(name: str) -> str:
    """``train``, ``validation`` or ``test``, if a name or path says so (``data/train-0.parquet``), or ""."""
    words = re.split(r"[^a-z]+", name.lower())
    for split, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES), ("test", TEST_NAMES)):
        if names & set(words):
            return split
    return ""


def corpus_files(files: Sequence[RepoFile], language: str, splits: Sequence[str], name: str) -> CorpusFiles:
    """Choose the files of one language and of some splits.

    Args:
        name: The data set, for messages.
    Raises:
        RunError: It holds no such language, with those that it does hold; or nothing that could be a corpus.
    """
    tables = [file for file in files if _below(file.path, "transcript") and file.path.endswith(".tsv")]
    if tables:
        return CorpusFiles("tables", _tables(files, tables, language, splits, name))
    usable = [file for file in files if not PurePosixPath(file.path).name.startswith(".")]
    parquet = [file for file in usable if file.path.endswith(".parquet")]
    archives = [file for file in usable if is_archive(file.path)]
    metadata = [file for file in usable if PurePosixPath(file.path).name.startswith("metadata.")]
    for form, found in (("files", parquet), ("files", usable if metadata else []), ("archives", archives)):
        if found:
            chosen = _of_language(found, language, name)
            wanted = [file for file in chosen if detect_split(file.path) in ("", *splits)]
            if not wanted:
                raise RunError(f"--dataset {name}: no file of the splits {', '.join(splits)}")
            return CorpusFiles("archives" if form == "archives" else "files", tuple(wanted))
    raise RunError(f"--dataset {name}: neither Common Voice's tables, nor Parquet, metadata or tar files in it")


def _below(path: str, folder: str) -> str:
    """The part of a path after a folder of that name and before the file: the language, ``en`` of transcript/en/x."""
    parts = PurePosixPath(path).parts
    return parts[parts.index(folder) + 1] if folder in parts[:-2] else ""


def _tables(
    files: Sequence[RepoFile], tables: list[RepoFile], language: str, splits: Sequence[str], name: str
) -> tuple[RepoFile, ...]:
    names = [TABLES[split] for split in splits]
    found = [file for file in tables if _below(file.path, "transcript") == language]
    if not found:
        raise no_such_language(name, language, {_below(file.path, "transcript") for file in tables})
    kept = [file for file in found if PurePosixPath(file.path).stem in names]
    tars = [
        file
        for file in files
        if _below(file.path, "audio") == language
        and is_archive(file.path)
        and PurePosixPath(file.path).parent.name in names
    ]
    if not kept or not tars:
        raise RunError(f"--dataset {name}: {language!r} has no table, or no audio, of {', '.join(names)}")
    return (*kept, *tars)


def _of_language(files: list[RepoFile], language: str, name: str) -> list[RepoFile]:
    """Files in a folder, or with a name, of the language; all of them where nothing is by language."""
    chosen = [file for file in files if any(_is_language(part, language) for part in PurePosixPath(file.path).parts)]
    tops = {PurePosixPath(file.path).parts[0] for file in files if "/" in file.path}
    others = {top for top in tops if not detect_split(top) and top.lower() not in DATA_FOLDERS}
    if not chosen and len(others) > 1 and all(re.fullmatch(r"[a-z]{2,3}([-_][A-Za-z]+)?", top) for top in others):
        raise no_such_language(name, language, others)
    return chosen or files


def _is_language(part: str, language: str) -> bool:
    """Whether a folder or file name is that of a language: ``ko``, ``ko_kr``, ``cv-corpus-17.0-ko.tar.gz``."""
    return bool(re.search(rf"(^|[-_.]){re.escape(language.lower())}([-_.]|$)", part.lower()))


def no_such_language(name: str, language: str, others: Iterable[str]) -> RunError:
    shown = sorted(others)
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return RunError(f"--language {language}: {name} does not hold it, but {', '.join(shown[:20])}{more}")


def local_folder(folder: Path, language: str) -> Path:
    """Where in a folder on disk the corpus of the language begins.

    Raises:
        RunError: It is a Common Voice release without that language.
    """
    if _is_release_of_one(folder):
        return folder
    releases = {
        place.name: place for pattern in ("*", "*/*") for place in folder.glob(pattern) if _is_release_of_one(place)
    }
    if releases and language not in releases:
        raise no_such_language(str(folder), language, releases)
    return releases.get(language, folder)


def _is_release_of_one(folder: Path) -> bool:
    return (folder / "clips").is_dir() and any(folder.glob("*.tsv"))


def in_release(language: str, seen: set[str]) -> Callable[[str], str]:
    """Where members of a release's archive go: tables beside ``clips``, of one language alone.

    Args:
        seen: Takes the languages that the archive turns out to hold.
    """

    def place(member: str) -> str:
        *folders, name = PurePosixPath(member).parts or ("",)
        are_clips = folders[-1:] == ["clips"]
        home = folders[:-1] if are_clips else folders
        fits = _is_audio(name) if are_clips else name.endswith(".tsv")
        if not fits or name.startswith("."):
            return ""
        seen.update(home[-1:])
        if home and home[-1] != language:
            return ""
        return f"clips/{name}" if are_clips else name

    return place


def in_clips(member: str) -> str:
    """Where members of a tar of clips go: all into ``clips``."""
    name = PurePosixPath(member).name
    return f"clips/{name}" if _is_audio(name) and not name.startswith(".") else ""


def _is_audio(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in AUDIO_SUFFIXES


RowStream = Iterator[ImportedRow | ImportFault]


@dataclass
class RowFilter:
    """Which rows of a corpus are wanted, and what they lack is added: the split that their file's name says, and the
    language.

    Attributes:
        root: Folder of the corpus; what stands above it says nothing.
        max_rows: Most rows of each split, 0 for all.
        others: Rows that were not asked for, by split, filled while rows go by.
    """

    root: Path
    language: str
    splits: tuple[str, ...]
    max_rows: int
    others: Counter[str] = field(default_factory=Counter)

    def __call__(self, rows: RowStream) -> RowStream:
        """The wanted rows, and those of another language as faults."""
        taken: Counter[str] = Counter()
        for row in rows:
            if isinstance(row, ImportFault):
                yield row
                continue
            split = self._split(row)
            if (split and split not in self.splits) or (self.max_rows and taken[split] >= self.max_rows):
                self.others[split] += 1
                continue
            spoken = str(row.values.get("language") or self.language)
            if not same_language(spoken, self.language):
                message = f"it is in {spoken!r}, not in {self.language!r}"
                yield ImportFault(row.source_file, row.line, row.id, "other_language", message)
                continue
            taken[split] += 1
            yield replace(row, values={**row.values, "language": spoken, **({"split": split} if split else {})})

    def _split(self, row: ImportedRow) -> str:
        said = str(row.values.get("split") or "")
        if said:
            return detect_split(said) or said
        path = Path(row.source_file)
        return detect_split(str(path.relative_to(self.root))) if path.is_relative_to(self.root) else ""


def same_language(one: str, other: str) -> bool:
    """Whether two codes name one language: ``ko`` and ``ko-KR`` do, ``zh-CN`` and ``zh-TW`` do not."""
    first, second = (re.split("[-_]", code.strip().lower()) for code in (one, other))
    known = {"korean": "ko", "kor": "ko", "english": "en", "eng": "en"}
    first[0], second[0] = known.get(first[0], first[0]), known.get(second[0], second[0])
    return all(mine == theirs for mine, theirs in zip(first, second, strict=False))
