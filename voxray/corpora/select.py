"""Select the files and rows of one language and of some splits of a data set.

Common Voice has three forms: the archive of a release (``cv-corpus-*/ko/{train.tsv, clips/*.mp3}``), its unpacked
folder, and its hub repository (``transcript/ko/train.tsv``, ``audio/ko/train/*.tar``). Other data sets are Parquet
files or a folder with a metadata file. Their files may be divided by language, by split, or not at all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from voxray.core.errors import RunError
from voxray.core.languages import find_code
from voxray.corpora.hub import RepoFile
from voxray.corpora.importers import ImportedRow, ImportFault
from voxray.corpora.splits import find_split
from voxray.corpora.unpack import is_archive

TABLES = {"train": "train", "validation": "dev", "test": "test"}
"""Common Voice's names of the splits."""
AUDIO_SUFFIXES = {".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".pcm"}
DATA_FOLDERS = {"data", "default", "all"}


@dataclass(frozen=True)
class CorpusFiles:
    """The selected files of a data set.

    Attributes:
        form: ``tables`` for transcript/ and audio/ of a Common Voice repository, ``archives`` for tar files of a
            corpus, ``files`` for files that an importer reads directly.
        files: The files.
    """

    form: Literal["tables", "archives", "files"]
    files: tuple[RepoFile, ...]


def detect_split(path: str) -> str:
    """``train``, ``validation`` or ``test`` by a path: of its file (``data/train-0.parquet``), else of its folders."""
    return next(filter(None, map(find_split, reversed(PurePosixPath(path).parts))), "")


def corpus_files(files: Sequence[RepoFile], language: str, splits: Sequence[str], name: str) -> CorpusFiles:
    """Select the files of one language and of some splits.

    Args:
        name: The data set, for messages.
    Raises:
        RunError: The data set does not have the language (the message lists those that it has), or has no files of a
            known form.
    """
    tables = [file for file in files if _below(file.path, "transcript") and file.path.endswith(".tsv")]
    if tables:
        return CorpusFiles("tables", _tables(files, tables, language, splits, name))
    usable = [file for file in files if not PurePosixPath(file.path).name.startswith(".")]
    parquet = [file for file in usable if file.path.endswith(".parquet")]
    archives = [file for file in usable if is_archive(file.path)]
    metadata = [file for file in usable if PurePosixPath(file.path).name.startswith("metadata.")]
    candidates = parquet or (usable if metadata else archives)
    if candidates:
        in_language = _of_language(candidates, language, name)
        selected = tuple(file for file in in_language if detect_split(file.path) in ("", *splits))
        if not selected:
            raise RunError(f"--dataset {name}: no file of the splits {', '.join(splits)}")
        return CorpusFiles("files" if parquet or metadata else "archives", selected)
    raise RunError(f"--dataset {name}: neither Common Voice's tables, nor Parquet, metadata or tar files in it")


def _below(path: str, folder: str) -> str:
    """The path component after ``folder``, which is the language: ``en`` of transcript/en/x. "" if there is none."""
    parts = PurePosixPath(path).parts
    return parts[parts.index(folder) + 1] if folder in parts[:-2] else ""


def _tables(
    files: Sequence[RepoFile], tables: list[RepoFile], language: str, splits: Sequence[str], name: str
) -> tuple[RepoFile, ...]:
    names = [TABLES[split] for split in splits]
    in_language = [file for file in tables if _below(file.path, "transcript") == language]
    if not in_language:
        raise no_such_language(name, language, {_below(file.path, "transcript") for file in tables})
    selected = [file for file in in_language if PurePosixPath(file.path).stem in names]
    tars = [
        file
        for file in files
        if _below(file.path, "audio") == language
        and is_archive(file.path)
        and PurePosixPath(file.path).parent.name in names
    ]
    if not selected or not tars:
        raise RunError(f"--dataset {name}: {language!r} has no table, or no audio, of {', '.join(names)}")
    return (*selected, *tars)


def _of_language(files: list[RepoFile], language: str, name: str) -> list[RepoFile]:
    """Files whose name or folder has the language; all files if they are not divided by language."""
    selected = [file for file in files if any(_is_language(part, language) for part in PurePosixPath(file.path).parts)]
    folders = {PurePosixPath(file.path).parts[0] for file in files if "/" in file.path}
    others = {folder for folder in folders if not detect_split(folder) and folder.lower() not in DATA_FOLDERS}
    if not selected and len(others) > 1 and all(re.fullmatch(r"[a-z]{2,3}([-_][A-Za-z]+)?", other) for other in others):
        raise no_such_language(name, language, others)
    return selected or files


def _is_language(part: str, language: str) -> bool:
    """Whether a folder or file name contains the language: ``ko``, ``ko_kr``, ``cv-corpus-17.0-ko.tar.gz``."""
    return bool(re.search(rf"(^|[-_.]){re.escape(language.lower())}([-_.]|$)", part.lower()))


def no_such_language(name: str, language: str, others: Iterable[str]) -> RunError:
    """The error for a data set without the language. The message lists up to 20 of the ``others``."""
    shown = sorted(others)
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return RunError(f"--language {language}: {name} does not hold it, but {', '.join(shown[:20])}{more}")


def local_folder(folder: Path, language: str) -> Path:
    """The subfolder of a local folder that has the corpus of the language, or the folder itself.

    Raises:
        RunError: The folder is a Common Voice release without the language.
    """
    if _is_release_of_one(folder):
        return folder
    releases = {
        path.name: path for pattern in ("*", "*/*") for path in folder.glob(pattern) if _is_release_of_one(path)
    }
    if releases and language not in releases:
        raise no_such_language(str(folder), language, releases)
    return releases.get(language, folder)


def _is_release_of_one(folder: Path) -> bool:
    """Whether a folder is a Common Voice release of one language."""
    return (folder / "clips").is_dir() and any(folder.glob("*.tsv"))


def release_member_path(language: str, languages: set[str]) -> Callable[[str], str]:
    """Target paths of members of a release's archive: tables beside ``clips``, of one language only.

    Args:
        languages: The languages in the archive are added to this set.
    Returns:
        A function from a member's name to its path, or "" if it is not to be unpacked.
    """

    def target_path(member: str) -> str:
        *folders, name = PurePosixPath(member).parts or ("",)
        is_clip = folders[-1:] == ["clips"]
        parents = folders[:-1] if is_clip else folders
        is_corpus_file = _is_audio(name) if is_clip else name.endswith(".tsv")
        if not is_corpus_file or name.startswith("."):
            return ""
        languages.update(parents[-1:])
        if parents and parents[-1] != language:
            return ""
        return f"clips/{name}" if is_clip else name

    return target_path


def clip_member_path(member: str) -> str:
    """Target path of a member of a tar file of clips, or "" if it is not to be unpacked."""
    name = PurePosixPath(member).name
    return f"clips/{name}" if _is_audio(name) and not name.startswith(".") else ""


def _is_audio(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in AUDIO_SUFFIXES


RowStream = Iterator[ImportedRow | ImportFault]


@dataclass
class RowFilter:
    """Selects the rows of a language and of some splits. Adds the language, and the split in the name of a row's file.

    Attributes:
        root: Folder of the corpus. Names of folders above it are not searched for a split.
        language: Code, with a region if the corpus has several; also the language of rows that do not have one.
        splits: Splits to select.
        max_rows: Most rows of each split, 0 for all.
        others: Number of rows that were not selected, by split.
    """

    root: Path
    language: str
    splits: tuple[str, ...]
    max_rows: int
    others: Counter[str] = field(default_factory=Counter)

    def __call__(self, rows: RowStream) -> RowStream:
        """Yield the selected rows. Rows of another language become faults."""
        num_selected: Counter[str] = Counter()
        for row in rows:
            if isinstance(row, ImportFault):
                yield row
                continue
            split = self._split(row)
            if (split and split not in self.splits) or (self.max_rows and num_selected[split] >= self.max_rows):
                self.others[split] += 1
                continue
            language = str(row.values.get("language") or self.language)
            if not same_language(language, self.language):
                message = f"it is in {language!r}, not in {self.language!r}"
                yield ImportFault(row.source_file, row.line, row.id, "other_language", message)
                continue
            num_selected[split] += 1
            yield replace(row, values={**row.values, "language": language, **({"split": split} if split else {})})

    def _split(self, row: ImportedRow) -> str:
        if split := str(row.values.get("split") or ""):
            return find_split(split) or split
        path = Path(row.source_file)
        return detect_split(str(path.relative_to(self.root))) if path.is_relative_to(self.root) else ""


def same_language(one: str, other: str) -> bool:
    """Whether two codes are the same language: ``ko`` and ``ko-KR`` are, ``zh-CN`` and ``zh-TW`` are not."""
    first, second = (re.split("[-_]", code.strip().lower()) for code in (one, other))
    for parts in (first, second):
        parts[0] = find_code(parts[0]) or parts[0]
    return all(a == b for a, b in zip(first, second, strict=False))
