"""The clean part of audited manifests: their own lines, without those that have a fault."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxray.core.errors import SettingsError
from voxray.core.manifest import parse_row
from voxray.core.storage import replacing

BOM = b"\xef\xbb\xbf"


@dataclass
class Fixed:
    """What was written, in rows.

    Attributes:
        num_rows: Rows written.
        num_moved: Those whose ``audio_path`` was made absolute, because from the new folder it meant nothing, or
            another file.
        num_renamed: Those whose id was taken by a row of another input, and now begins with that input's name.
    """

    num_rows: int = 0
    num_moved: int = 0
    num_renamed: int = 0


def check_fix_path(path: Path, manifests: Sequence[str]) -> None:
    """Refuse to write over an input.

    Raises:
        SettingsError: The path is one of the inputs, by any name.
    """
    for manifest in manifests:
        if os.path.realpath(path) == os.path.realpath(manifest) or (path.exists() and path.samefile(manifest)):
            raise SettingsError(f"--fix {path}: that is an input; give another file")


def write_clean(manifests: Sequence[str], bad_lines: Mapping[int, set[int]], path: Path) -> Fixed:
    """Write the lines without a fault, of all manifests in order; each byte for byte unless it has to change.

    Args:
        bad_lines: Lines with a fault, by the number of the manifest.
    """
    fixed, ids = Fixed(), set()
    with replacing(path) as out:
        for number, manifest in enumerate(manifests):
            bad, own = bad_lines.get(number, set()), set()
            with open(manifest, "rb") as file:
                for line, raw in enumerate(file, 1):
                    raw = raw.removeprefix(BOM) if line == 1 else raw
                    if line in bad or not raw.strip():
                        continue
                    out.write(_moved(raw.rstrip(b"\n"), manifest, line, path, ids, own, fixed) + b"\n")
            ids |= own
    return fixed


def _moved(raw: bytes, manifest: str, line: int, path: Path, ids: set[str], own: set[str], fixed: Fixed) -> bytes:
    """A line as it has to read in the new manifest; notes its id among those of its own manifest."""
    sample, values = parse_row(raw, manifest, line), json.loads(raw)
    changes = {}
    if sample.audio_path and _found_from(raw, path) != os.path.realpath(sample.audio_path):
        changes["audio_path"] = os.path.abspath(sample.audio_path)
        fixed.num_moved += 1
    if values.get("id") not in (None, ""):
        name = sample.id
        if name in ids:
            name = changes["id"] = f"{Path(manifest).stem}:{line}:{name}"
            fixed.num_renamed += 1
        own.add(name)
    fixed.num_rows += 1
    return json.dumps({**values, **changes}, ensure_ascii=False).encode() if changes else raw


def _found_from(raw: bytes, path: Path) -> str:
    """The clip that a line names if it stands in the new manifest, "" if there is none."""
    try:
        return os.path.realpath(parse_row(raw, str(path), 1).audio_path)
    except ValueError:
        return ""
