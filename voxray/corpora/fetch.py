"""Locate a corpus on this machine or on a hub, and download and unpack it where necessary."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxray.core.errors import RunError
from voxray.corpora.hub import FolderRepository, RepoFile, Repository, copy_file, is_intact, open_repository
from voxray.corpora.importers import detect
from voxray.corpora.importers.huggingface import METADATA, SAVED
from voxray.corpora.select import clip_member_path, corpus_files, local_folder, no_such_language, release_member_path
from voxray.corpora.unpack import is_archive, unpack

ByteProgress = Callable[[float, float], None]


@dataclass(frozen=True)
class CorpusSource:
    """A corpus and its location.

    Attributes:
        form: ``tables`` and ``archives`` (see ``select.CorpusFiles``) are unpacked. ``files`` and ``folder`` are read
            as they are, once they are on this machine.
        base: Folder that contains the files; None if they have to be downloaded.
        files: Files to download, unpack or read.
        repository: Repository to download from; None for a single file on this machine.
        commit: Revision, "" if there is none.
    """

    form: Literal["tables", "archives", "files", "folder"]
    base: Path | None
    files: tuple[RepoFile, ...]
    repository: Repository | None = None
    commit: str = ""

    @property
    def is_packed(self) -> bool:
        return self.form in {"tables", "archives"}


def find_source(dataset: str, revision: str, hub: str, language: str, splits: tuple[str, ...]) -> CorpusSource:
    """Find a corpus on this machine or on a hub. Only file names and sizes are read.

    Raises:
        RunError: The corpus does not exist, does not have the language, or has an unknown layout.
    """
    path = Path(dataset).expanduser().absolute()
    if not path.exists() and (is_archive(dataset) or dataset.startswith(("/", ".", "~"))):
        raise RunError(f"--dataset {dataset}: no such file or folder")
    if path.is_file():
        file = RepoFile(path.name, path.stat().st_size)
        return CorpusSource("archives" if is_archive(path.name) else "files", path.parent, (file,))
    repository = open_repository(dataset, "dataset", revision, hub)
    if repository.folder:
        folder = local_folder(repository.folder, language)
        if _is_importable(folder):
            local = FolderRepository(folder, dataset, repository.commit)
            return CorpusSource("folder", folder, local.files, local, repository.commit)
    chosen = corpus_files(repository.files, language, splits, dataset)
    return CorpusSource(chosen.form, repository.folder, chosen.files, repository, repository.commit)


def _is_importable(folder: Path) -> bool:
    """Whether an importer reads the folder as it is.

    One of Parquet or metadata files may have other languages too, in files of their own. What ``save_to_disk`` writes
    has the rows of all languages in the same files.
    """
    try:
        return detect(folder) != "huggingface" or any(folder.rglob(SAVED))
    except RunError:
        return False


def download_and_unpack(
    source: CorpusSource, raw: Path, language: str, dataset: str, on_progress: ByteProgress
) -> tuple[Path, ...]:
    """Download and unpack a corpus where necessary. Files that exist already are not changed.

    Args:
        raw: Folder for the files.
    Returns:
        Input paths for ``prepare``.
    Raises:
        RunError: It cannot be downloaded or unpacked, or an archive does not have the language.
    """
    total, done = sum(file.num_bytes for file in source.files), 0.0

    def on_bytes(num_bytes: float) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    base = source.base or raw / "hub"
    if source.base is None and source.repository:
        for file in source.files:
            target = base / file.path
            if target.is_file() and is_intact(target, file):
                on_bytes(file.num_bytes)
            else:
                source.repository.fetch(file, target, on_bytes)
    if not source.is_packed:
        return tuple(importer_inputs(source, base))
    corpus, languages, members_by_target = raw / "corpus", set[str](), dict[str, str]()
    for file in source.files:
        path = base / file.path
        if is_archive(path.name):
            target_path = release_member_path(language, languages) if source.form == "archives" else clip_member_path
            unpack(path, corpus, target_path, on_progress, members_by_target)
        else:
            copy_file(path, corpus / path.name)
    if not any(corpus.glob("*.tsv")):
        if languages:
            raise no_such_language(dataset, language, languages)
        raise RunError(f"--dataset {dataset}: no table (train.tsv ...) of Common Voice in it")
    return (corpus,)


def importer_inputs(source: CorpusSource, base: Path) -> list[Path]:
    """Paths that an importer reads of an unpacked corpus: the folder, or its metadata, Parquet or other files.

    Args:
        base: Folder of the files.
    """
    if source.form == "folder":
        return [base]
    metadata = [file for file in source.files if Path(file.path).name in METADATA]
    parquet = [file for file in source.files if file.path.endswith(".parquet")]
    return [base / file.path for file in metadata or parquet or source.files]


def num_corpus_bytes(source: CorpusSource) -> int:
    """Size of the files with audio, packed or not."""
    audio = [file for file in source.files if not file.path.endswith((".tsv", ".csv", ".jsonl", ".json", ".md"))]
    return sum(file.num_bytes for file in audio)
