"""Where a corpus is before it is here, and how its files come: read where they lie, downloaded, or unpacked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxray.core.errors import RunError
from voxray.corpora.hub import FolderRepository, RepoFile, Repository, copy_file, is_intact, open_repository
from voxray.corpora.importers import detect
from voxray.corpora.importers.huggingface import METADATA
from voxray.corpora.select import corpus_files, in_clips, in_release, local_folder, no_such_language
from voxray.corpora.unpack import is_archive, unpack

ByteProgress = Callable[[float, float], None]


@dataclass(frozen=True)
class Source:
    """A corpus as it was found.

    Attributes:
        form: ``tables`` and ``archives`` (see ``corpora.CorpusFiles``) are unpacked, ``files`` and ``folder`` are read
            as they lie, once they are on this machine.
        base: Folder that the files are below; None where they have to be downloaded.
        files: What there is to fetch or unpack, or to read.
        repository: Where to fetch it from; None for one file on this machine.
        commit: Revision, "" where there is none.
    """

    form: Literal["tables", "archives", "files", "folder"]
    base: Path | None
    files: tuple[RepoFile, ...]
    repository: Repository | None = None
    commit: str = ""

    @property
    def is_packed(self) -> bool:
        return self.form in {"tables", "archives"}


def find_source(dataset: str, revision: str, hub: str, language: str, splits: tuple[str, ...]) -> Source:
    """Look a corpus up, on this machine or on a hub; nothing is read but names and sizes.

    Raises:
        RunError: It is not there, holds no such language, or is in no form that is known.
    """
    path = Path(dataset).expanduser().absolute()
    if not path.exists() and (is_archive(dataset) or dataset.startswith(("/", ".", "~"))):
        raise RunError(f"--dataset {dataset}: no such file or folder")
    if path.is_file():
        file = RepoFile(path.name, path.stat().st_size)
        return Source("archives" if is_archive(path.name) else "files", path.parent, (file,))
    repository = open_repository(dataset, "dataset", revision, hub)
    if repository.folder:
        folder = local_folder(repository.folder, language)
        if _reads(folder):
            found = FolderRepository(folder, dataset, repository.commit)
            return Source("folder", folder, found.files, found, repository.commit)
    chosen = corpus_files(repository.files, language, splits, dataset)
    return Source(chosen.form, repository.folder, chosen.files, repository, repository.commit)


def _reads(folder: Path) -> bool:
    """Whether an importer reads a folder as it is; one of Parquet or metadata files may hold other languages too."""
    try:
        return detect(folder) != "huggingface"
    except RunError:
        return False


def bring(source: Source, raw: Path, language: str, dataset: str, on_progress: ByteProgress) -> tuple[Path, ...]:
    """Download and unpack what has to be; what is here already stays as it is.

    Args:
        raw: Folder for it.
    Returns:
        What ``prepare`` is to read.
    Raises:
        RunError: It cannot be fetched or unpacked, or an archive does not hold the language.
    """
    total, done = sum(file.num_bytes for file in source.files), [0.0]

    def came(num_bytes: float) -> None:
        done[0] += num_bytes
        on_progress(done[0], total)

    base = source.base or raw / "hub"
    if source.base is None and source.repository:
        for file in source.files:
            target = base / file.path
            if target.is_file() and is_intact(target, file):
                came(file.num_bytes)
            else:
                source.repository.fetch(file, target, came)
    if not source.is_packed:
        return tuple(readable(source, base))
    corpus, seen = raw / "corpus", set[str]()
    for file in source.files:
        path = base / file.path
        if is_archive(path.name):
            place = in_release(language, seen) if source.form == "archives" else in_clips
            unpack(path, corpus, place, on_progress)
        else:
            copy_file(path, corpus / path.name)
    if not any(corpus.glob("*.tsv")):
        raise (
            no_such_language(dataset, language, seen)
            if seen
            else RunError(f"--dataset {dataset}: no table (train.tsv ...) of Common Voice in it")
        )
    return (corpus,)


def readable(source: Source, base: Path) -> list[Path]:
    """What an importer takes of a corpus that is not packed: the folder, or metadata, Parquet or whatever files.

    Args:
        base: Where its files are.
    """
    if source.form == "folder":
        return [base]
    metadata = [file for file in source.files if _name(file) in METADATA]
    parquet = [file for file in source.files if file.path.endswith(".parquet")]
    return [base / file.path for file in metadata or parquet or source.files]


def _name(file: RepoFile) -> str:
    return Path(file.path).name


def num_corpus_bytes(source: Source) -> int:
    """Bytes of the files that hold the audio, packed or not."""
    audio = [file for file in source.files if not file.path.endswith((".tsv", ".csv", ".jsonl", ".json", ".md"))]
    return sum(file.num_bytes for file in audio)
