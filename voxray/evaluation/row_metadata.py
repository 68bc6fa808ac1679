"""What manifest rows say beside what feature shards hold: speaker, domain, data set, several references, noise level.

Read from the manifest, so that shards made before anybody asked for these keys stay good.
"""

import json
from pathlib import Path
from typing import Any

from voxray.core.manifest import UNLABELLED, find_file
from voxray.core.source import split_source
from voxray.evaluation.predictions import KNOWN_COLUMNS, known_number, known_text

CHUNK_KEYS = ("chunk_of", "chunk", "num_chunks", "whole_samples", "whole_reference", "overlap_share")
"""Of the manifest that ``long_audio`` writes."""


class ManifestKeys:
    """Reads each manifest once, when the first of its rows is asked for."""

    def __init__(self) -> None:
        self._files: dict[str, dict[int, dict[str, Any]]] = {}

    def of(self, source: str) -> dict[str, Any]:
        """What the row at ``<manifest>:<line>`` says of itself.

        Returns:
            ``speaker``, ``domain``, ``dataset`` (the manifest's name unless the row names one), ``audio_path``,
            ``references``, ``reference_phonetic``, ``snr_db``; None where the row does not say. ``unlabelled`` for a
            row that has no text to hold an answer against. For a chunk what its recording says, and ``CHUNK_KEYS``.
        """
        manifest, line = split_source(source)
        if manifest not in self._files:
            self._files[manifest] = _read(manifest)
        found = self._files[manifest].get(line, {})
        if "chunk_of" in found:
            return self.of(found["chunk_of"]) | found
        missing = dict.fromkeys((*KNOWN_COLUMNS, "references", "snr_db"))
        return {**missing, "dataset": Path(manifest).stem, **found}


def _read(manifest: str) -> dict[int, dict[str, Any]]:
    """{line: its keys}; empty where the manifest is not there any more."""
    found: dict[int, dict[str, Any]] = {}
    try:
        with open(manifest, "rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    continue  # no row; featurize has it in its ledger
                if isinstance(row, dict):
                    found[line] = _keys(row, manifest)
    except OSError:
        return {}
    return found


def _keys(row: dict[str, Any], manifest: str) -> dict[str, Any]:
    if "chunk_of" in row:
        return {name: row[name] for name in CHUNK_KEYS}
    found: dict[str, Any] = {name: known_text(row.get(name)) for name in ("speaker", "domain", "dataset")}
    found["reference_phonetic"] = known_text(row.get("transcript_phonetic"))
    found["snr_db"] = known_number(row.get("snr_db"))
    found[UNLABELLED] = True if row.get(UNLABELLED) is True else None
    references, path = row.get("references"), row.get("audio_path")
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        found["references"] = references
    if isinstance(path, str) and path:
        found["audio_path"] = find_file(Path(manifest).parent, path) or find_file(Path.cwd(), path) or None
    return {name: value for name, value in found.items() if value is not None}
