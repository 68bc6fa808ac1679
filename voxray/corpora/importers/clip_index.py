"""Find clips that a table names without their folder, without their suffix, or as paths of another machine."""

import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import find_file

AUDIO_SUFFIXES = frozenset(
    [
        ".wav",
        ".flac",
        ".mp3",
        ".m4a",
        ".mp4",
        ".aac",
        ".ogg",
        ".oga",
        ".opus",
        ".wma",
        ".amr",
        ".aif",
        ".aiff",
        ".au",
        ".caf",
        ".w64",
        ".webm",
        ".3gp",
        ".pcm",
        ".raw",
    ]
)
MAX_FILES = 2_000_000


class ClipIndex:
    """Finds the clips of a table.

    Args:
        folder: Folder of the table, or of its clips. Clips may be at any depth below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folders: Counter[str] = Counter()
        """Folders in which clips were found, with their number."""
        self._by_name: dict[str, list[str]] | None = None

    def find(self, cell: str) -> str:
        """Absolute path of a clip.

        Args:
            cell: A path relative to the folder or absolute, a file name, or a name without suffix. Of a path of
                another machine (absolute, or with a drive) the file name counts; of ``spk1/001.wav`` the folder too.
        Raises:
            BadRow: No file has this name (``audio_missing``), or several have (``audio_ambiguous``).
        """
        if "://" in cell:
            raise BadRow("remote_audio", f"download it first: {cell[:200]}")
        name = cell.replace("\\", "/").strip()
        path = find_file(self.folder, name) if name and "\0" not in name else ""
        if not path:
            path = self._find_by_name(name)
        self.folders[os.path.dirname(path)] += 1
        return path

    def _find_by_name(self, cell: str) -> str:
        folder, _, name = _key(cell.rstrip("/")).rpartition("/")
        if self._by_name is None:
            self._by_name = self._read_names()
        paths = self._by_name.get(name, []) if name else []
        if folder and not folder.startswith("/") and ":" not in folder:
            end = f"/{folder.removeprefix('./')}"
            paths = [path for path in paths if _key(os.path.dirname(path)).endswith(end)]
        if not paths:
            raise BadRow("audio_missing", f"audio file not found: {cell[:200] or '(empty)'}")
        if len(paths) > 1:
            raise BadRow("audio_ambiguous", f"{cell[:200]} is the name of {paths[0]} and of {paths[1]}")
        return paths[0]

    def _read_names(self) -> dict[str, list[str]]:
        """Paths of all clips below the folder, by file name and by file name without suffix."""
        by_name: dict[str, list[str]] = defaultdict(list)
        num_files = 0
        for folder, _, names in os.walk(self.folder):
            num_files += len(names)
            if num_files > MAX_FILES:
                raise RunError(
                    f"{self.folder}: over {MAX_FILES:,} files; name the folder of the clips with --audio_dir"
                )
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in AUDIO_SUFFIXES:
                    by_name[_key(name)].append(os.path.join(folder, name))
                    by_name[_key(stem)].append(os.path.join(folder, name))
        return dict(by_name)


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
