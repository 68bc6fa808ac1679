"""Writes the clean part of audited manifests: their lines without those that have a fault."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxray.core.chat import short_form
from voxray.core.manifest import parse_row
from voxray.core.storage import atomic_writer

BOM = b"\xef\xbb\xbf"


@dataclass
class FixSummary:
    """Counts of written rows.

    Attributes:
        num_rows: Rows written.
        num_moved: Rows whose ``audio_path`` was made absolute, because from the new folder it named no file or another
            one.
        num_renamed: Rows whose id was taken by a row of another input, so that the name of their own input was put
            before it.
    """

    num_rows: int = 0
    num_moved: int = 0
    num_renamed: int = 0


def write_clean(manifests: Sequence[str], bad_lines: Mapping[int, set[int]], path: Path) -> FixSummary:
    """Write the lines without a fault of all manifests in order. Lines that need no change stay the same byte for byte.

    Args:
        bad_lines: Lines with a fault, by the number of the manifest.
    """
    summary, ids = FixSummary(), set()
    with atomic_writer(path) as out:
        for number, manifest in enumerate(manifests):
            bad, own_ids = bad_lines.get(number, set()), set()
            with open(manifest, "rb") as file:
                for line, raw in enumerate(file, 1):
                    raw = raw.removeprefix(BOM) if line == 1 else raw
                    if line in bad or not raw.strip():
                        continue
                    out.write(_rewrite(raw.rstrip(b"\n"), manifest, line, path, ids, own_ids, summary) + b"\n")
            ids |= own_ids
    return summary


def _rewrite(
    raw: bytes, manifest: str, line: int, path: Path, ids: set[str], own_ids: set[str], summary: FixSummary
) -> bytes:
    """A line for the new manifest, with the changes that it needs there.

    Args:
        ids: Ids of the manifests before this one.
        own_ids: Ids of this manifest; the line's id is added.
        summary: The line is counted.
    """
    sample, values = parse_row(raw, manifest, line), json.loads(raw)
    changes = {}
    if sample.audio_path and _resolved_audio(raw, path) != os.path.realpath(sample.audio_path):
        values = short_form(values) if sample.turns else values
        changes["audio_path"] = os.path.abspath(sample.audio_path)
        summary.num_moved += 1
    if values.get("id") not in (None, ""):
        name = sample.id
        if name in ids:
            name = changes["id"] = f"{Path(manifest).stem}:{line}:{name}"
            summary.num_renamed += 1
        own_ids.add(name)
    summary.num_rows += 1
    return json.dumps({**values, **changes}, ensure_ascii=False).encode() if changes else raw


def _resolved_audio(raw: bytes, path: Path) -> str:
    """Real path of the clip that a line would name in the new manifest, "" if there is none."""
    try:
        return os.path.realpath(parse_row(raw, str(path), 1).audio_path)
    except ValueError:
        return ""
