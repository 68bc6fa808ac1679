"""Metadata of rows that feature shards do not store: speaker, domain, data set, several references, noise level.

It is read from the manifest, so that shards written before these keys existed remain usable.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.core.chat import clip_path
from voxray.core.manifest import UNLABELLED, find_file
from voxray.core.source import Source
from voxray.evaluation.predictions import METADATA_COLUMNS, number_or_none, text_or_none

CHUNK_KEYS = ("chunk_of", "chunk", "num_chunks", "whole_samples", "whole_reference", "overlap_share")
"""Keys of the manifest that ``long_audio`` writes."""


class ManifestKeys:
    """Metadata from manifests. Each manifest is read once, at the first lookup of one of its rows.

    Args:
        chunk_manifests: Manifests that ``long_audio`` wrote. In other manifests ``CHUNK_KEYS`` have no meaning.
    """

    def __init__(self, chunk_manifests: Sequence[Path] = ()) -> None:
        self._files: dict[str, dict[int, dict[str, Any]]] = {}
        self._chunk_manifests = {str(path) for path in chunk_manifests}

    def of(self, source: str) -> dict[str, Any]:
        """Metadata of the row at ``<manifest>:<line>``.

        Returns:
            ``speaker``, ``domain``, ``dataset`` (the manifest's name unless the row names one), ``audio_path``,
            ``references``, ``reference_phonetic``, ``snr_db``; None for missing keys. ``unlabelled`` for a row without
            a reference. For a chunk: the metadata of its recording, and ``CHUNK_KEYS``.
        """
        manifest, line = Source.parse(source)
        if manifest not in self._files:
            self._files[manifest] = _read(manifest, of_chunks=manifest in self._chunk_manifests)
        metadata = self._files[manifest].get(line, {})
        if "chunk_of" in metadata:
            return self.of(metadata["chunk_of"]) | metadata
        missing = dict.fromkeys((*METADATA_COLUMNS, "references", "snr_db"))
        return {**missing, "dataset": Path(manifest).stem, **metadata}


def _read(manifest: str, *, of_chunks: bool) -> dict[int, dict[str, Any]]:
    """{line: metadata}; empty if the manifest no longer exists."""
    by_line: dict[int, dict[str, Any]] = {}
    try:
        with open(manifest, "rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    continue  # not a row; the ledger of featurize lists it
                if isinstance(row, dict):
                    keys = {name: row[name] for name in CHUNK_KEYS} if of_chunks else _metadata(row, manifest)
                    by_line[line] = keys
    except OSError:
        return {}
    return by_line


def _metadata(row: dict[str, Any], manifest: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {name: text_or_none(row.get(name)) for name in ("speaker", "domain", "dataset")}
    metadata["reference_phonetic"] = text_or_none(row.get("transcript_phonetic"))
    metadata["snr_db"] = number_or_none(row.get("snr_db"))
    metadata[UNLABELLED] = True if row.get(UNLABELLED) is True else None
    references, path = row.get("references"), clip_path(row)
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        metadata["references"] = references
    if isinstance(path, str) and path:
        metadata["audio_path"] = find_file(Path(manifest).parent, path) or find_file(Path.cwd(), path) or None
    return {name: value for name, value in metadata.items() if value is not None}
