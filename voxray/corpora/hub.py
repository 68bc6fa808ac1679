"""Repositories of a hub: list and download their files.

A repository is on a server with the hub's API, or in a folder: as ``<folder>/<id>`` (data sets as
``<folder>/datasets/<id>``), or in a hub cache (``models--org--name/snapshots/<commit>``). An interrupted download
resumes within the file, unlike huggingface_hub's own. Every file is checked against the size and checksum on the hub.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import atomic_writer, checksum

RepoKind = Literal["model", "dataset"]
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository.

    Attributes:
        path: Path in the repository, with slashes.
        num_bytes: Size.
        sha256: Checksum, which the hub has for large files, else "".
        git_id: Git's id of the content, which the hub has for small files, else "".
    """

    path: str
    num_bytes: int
    sha256: str = ""
    git_id: str = ""


class Repository(Protocol):
    """One revision of a model or data set.

    Attributes:
        name: Name in messages.
        commit: Commit of the revision, "" if unknown (a folder).
        files: Files, sorted by path.
        folder: Local folder of the files, None if they have to be downloaded.
    """

    name: str
    commit: str
    files: tuple[RepoFile, ...]
    folder: Path | None

    def fetch(self, file: RepoFile, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Copy or download a file to ``target`` atomically.

        Args:
            on_bytes: Called with the number of new bytes as they arrive.
        Raises:
            RunError: It cannot be downloaded, or its size or checksum is wrong.
        """
        ...


def open_repository(repo_id: str, kind: RepoKind, revision: str, hub: str) -> Repository:
    """Find a model or data set and list its files.

    Args:
        repo_id: A folder, or an id on the hub.
        revision: Branch, tag or commit; "" is the main branch.
        hub: URL of a server, or a folder; "" is huggingface.co, or the server in HF_ENDPOINT.
    Raises:
        RunError: The repository does not exist or cannot be reached.
        SettingsError: ``repo_id`` is a path outside the folder ``hub``.
    """
    flag = "--model_id" if kind == "model" else "--dataset"
    if Path(repo_id).is_dir():
        return FolderRepository(Path(repo_id), repo_id, "")
    if hub and "://" not in hub:
        return _in_folder(Path(os.path.expanduser(hub)), repo_id, kind, revision, flag)
    return HubRepository(repo_id, kind, revision, hub, flag)


def _in_folder(hub: Path, repo_id: str, kind: RepoKind, revision: str, flag: str) -> "FolderRepository":
    """Find a repository in a folder with the layout of a hub or of a hub cache."""
    if PurePosixPath(repo_id).is_absolute() or ".." in PurePosixPath(repo_id).parts:
        raise SettingsError(f"{flag} {repo_id}: neither a folder nor a hub id")
    plain = hub / repo_id if kind == "model" else hub / "datasets" / repo_id
    if plain.is_dir():
        return FolderRepository(plain, repo_id, "")
    cached = hub / f"{kind}s--{repo_id.replace('/', '--')}"
    ref = cached / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit and (cached / "snapshots" / commit).is_dir():
        return FolderRepository(cached / "snapshots" / commit, repo_id, commit)
    raise RunError(f"{flag} {repo_id}: neither {plain} nor {cached} has it; the folder comes from --hub {hub}")


class FolderRepository:
    """A repository in a local folder."""

    def __init__(self, folder: Path, name: str, commit: str) -> None:
        self.folder: Path | None = folder
        self.name, self.commit, self._folder = name, commit, folder
        self.files = tuple(
            RepoFile(path.relative_to(folder).as_posix(), path.stat().st_size)
            for path in sorted(walk(folder))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )

    def fetch(self, file: RepoFile, target: Path, on_bytes: Callable[[int], None]) -> None:
        """See ``Repository``. The file is copied."""
        copy_file(self._folder / file.path, target, on_bytes)


def copy_file(source: Path, target: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Copy a file atomically.

    Raises:
        RunError: The source cannot be read or the target cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(source, "rb") as original, atomic_writer(target) as copy:
            while block := original.read(CHUNK_BYTES):
                copy.write(block)
                on_bytes(len(block))
    except OSError as error:
        raise RunError(f"{source}: cannot copy it to {target}: {error.strerror}") from None


def walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder. Links to files are followed, links to folders are not."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(parent, name)).is_file())


class HubRepository:
    """A repository on a server."""

    folder: Path | None = None

    def __init__(self, repo_id: str, kind: RepoKind, revision: str, hub: str, flag: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile as HubFile

        self.name, self._kind, self._hub, self._flag = repo_id, kind, hub or None, flag
        # The user's token is for huggingface.co (or the server in HF_ENDPOINT). Do not send it to other servers.
        self._token = False if hub else None
        api = HfApi(endpoint=self._hub, token=self._token)
        with self._as_run_errors():
            self.commit = str(api.repo_info(repo_id, repo_type=kind, revision=revision or None).sha)
            tree = api.list_repo_tree(repo_id, recursive=True, revision=self.commit, repo_type=kind)
            entries = [entry for entry in tree if isinstance(entry, HubFile)]
        for entry in entries:
            _check_repo_path(entry.path, repo_id)
        self.files = tuple(
            RepoFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "", "" if entry.lfs else entry.blob_id)
            for entry in sorted(entries, key=lambda entry: entry.path)
        )

    def fetch(self, file: RepoFile, target: Path, on_bytes: Callable[[int], None]) -> None:
        """See ``Repository``. An interrupted download is resumed, and the whole file is checked."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{self.commit[:12]}.part")
        url = hf_hub_url(self.name, file.path, repo_type=self._kind, revision=self.commit, endpoint=self._hub)
        disable_progress_bars()
        with self._as_run_errors(), open(partial, "ab") as output:
            num_bytes = output.tell()
            if num_bytes > file.num_bytes:
                output.truncate(num_bytes := 0)
            on_bytes(num_bytes)
            http_get(
                url,
                _CountingWriter(output, on_bytes),  # type: ignore[arg-type]
                resume_size=num_bytes,
                headers={**build_hf_headers(token=self._token), "Accept-Encoding": "identity"},
                expected_size=file.num_bytes,
            )
            output.flush()
            os.fsync(output.fileno())
        if not is_intact(partial, file):
            partial.unlink()
            raise RunError(f"{self._flag} {self.name}: {file.path} arrived damaged; start again to fetch it once more")
        os.replace(partial, target)

    @contextmanager
    def _as_run_errors(self) -> Iterator[None]:
        """Turn errors of the hub and of the network into a one-line ``RunError``."""
        from huggingface_hub import errors
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

        label = f"{self._flag} {self.name}"
        try:
            yield
        except errors.GatedRepoError:
            raise RunError(f"{label}: needs a login that may read it: accept its terms, then `hf auth login`") from None
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
            kind = "revision" if isinstance(error, errors.RevisionNotFoundError) else f"{self._kind} (or no login)"
            raise RunError(f"{label}: {self._hub or 'the hub'} has no such {kind}") from None
        except errors.HFValidationError as error:
            raise RunError(f"{label}: neither a folder nor a hub id: {_first_line(error)}") from None
        except errors.OfflineModeIsEnabled:
            raise RunError(f"{label}: has to be fetched, but HF_HUB_OFFLINE is set") from None
        except (HTTPError, OSError) as error:
            raise RunError(f"{label}: cannot fetch it: {_first_line(error)}; start again to go on") from None


class _CountingWriter:
    """Wrapper of a file that reports the number of bytes of each write."""

    def __init__(self, file: Any, on_bytes: Callable[[int], None]) -> None:
        self._file, self._on_bytes = file, on_bytes

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self._on_bytes(len(block))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def is_intact(path: Path, file: RepoFile) -> bool:
    """Whether a file has the size in the repository, and the checksum or Git id if known."""
    if path.stat().st_size != file.num_bytes:
        return False
    if file.sha256:
        return checksum(path) == file.sha256
    if file.git_id:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == file.git_id
    return True


def _check_repo_path(path: str, name: str) -> None:
    """Refuse a path outside the repository's folder: a server's paths become local paths."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise RunError(f"{name}: refused, it holds a file outside its folder: {path!r}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""File names of transformers' weights, the preferred form first."""
CONFIGURATION = (".json", ".txt", ".model", ".jinja")


def model_files(repository: Repository) -> list[RepoFile]:
    """Files that are needed to load a model: configuration, tokenizer and one form of its weights.

    Other forms and precisions of the weights and subfolders are not included.

    Raises:
        RunError: The repository has no weights that transformers loads.
    """
    top = [file for file in repository.files if "/" not in file.path]
    for stem, suffix in WEIGHTS:
        weights = [file for file in top if _is_part(file.path, stem, suffix)]
        if weights:
            break
    else:
        raise RunError(f"--model_id {repository.name}: holds neither model.safetensors nor pytorch_model.bin")
    index = f"{stem}{suffix}.index.json"
    others = (file for file in top if file.path.endswith(CONFIGURATION))
    configuration = [file for file in others if ".index." not in file.path or file.path == index]
    return sorted([*configuration, *weights], key=lambda file: file.path)


def _is_part(path: str, stem: str, suffix: str) -> bool:
    """Whether it is ``model.safetensors`` or ``model-00001-of-00002.safetensors``, not ``model.fp32-00001-of-...``."""
    return path == f"{stem}{suffix}" or (path.startswith(f"{stem}-") and path.endswith(suffix))
