"""Hashes of files and folders by their content.

A file is read once. Its hash is stored in the user's cache folder, together with the file's size, times and inode, and
counts until one of them changes. So a base of many gigabytes is identified at once when a job starts again.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from voxray.core.storage import checksum, write_json

HASHES = Path("~/.cache/voxray/hashes")
STORE_FROM_BYTES = 1 << 20
"""Hashes of smaller files are computed each time."""
SETTLED_SEC = 2.0
"""A file that changed less than this ago may change again without a new time, so its hash is not stored."""
CHECKSUMS = "checksums.json"
"""File in a folder of weights that holds the SHA-256 of the others."""
NUM_THREADS = 4


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        OSError: The file cannot be read.
    """
    status = os.stat(path)
    if status.st_size < STORE_FROM_BYTES:
        return checksum(path)
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    stored = HASHES.expanduser() / f"{hashlib.sha256(state[0].encode('utf-8', 'surrogatepass')).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        entry = json.loads(stored.read_text(encoding="utf-8"))
        if entry["state"] == state:
            return str(entry["sha256"])
    settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SEC
    digest = checksum(path)
    if settled:
        with suppress(OSError):
            write_json(stored, {"state": state, "sha256": digest})
    return digest


def folder_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files, in hex. Hidden files and Markdown pages do not count.

    Raises:
        OSError: A file cannot be read.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
    names = sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))
    return combined_hash([name, content] for name, content in zip(names, _hash_all(folder, names), strict=True))


def path_hash(path: Path) -> str:
    """Hash of a file or a folder; "" if there is neither.

    Raises:
        OSError: A file cannot be read.
    """
    if path.is_dir():
        return folder_hash(path)
    return file_hash(path) if path.is_file() else ""


def combined_hash(values: Iterable[object]) -> str:
    """SHA-256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def _hash_all(folder: Path, names: Iterable[str]) -> list[str]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda name: file_hash(folder / name), names))


def write_checksums(folder: Path) -> None:
    """Write ``CHECKSUMS`` for all files of a folder but Markdown pages, such as model cards, which may be rewritten."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"]
    names = sorted(path.name for path in paths if path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {name: checksum(folder / name) for name in names})


def damaged_files(folder: Path, names: Collection[str] = ()) -> list[str]:
    """Names of the files whose content is not what ``CHECKSUMS`` says, missing ones included.

    Args:
        names: The files to check; empty checks all.
    Returns:
        Sorted names; empty if the folder has no checksums, as those of earlier versions. An unreadable ``CHECKSUMS``
        counts as damaged itself.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        wanted = {name: digest for name, digest in sorted(expected.items()) if not names or name in names}
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError):
        return [CHECKSUMS]
    return [name for name, digest in wanted.items() if not _matches(folder / name, digest)]


def _matches(path: Path, digest: object) -> bool:
    try:
        return file_hash(path) == digest
    except OSError:
        return False
