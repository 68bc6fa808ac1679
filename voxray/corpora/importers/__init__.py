"""Corpora of other projects, read line by line into rows of voxray's schema; every line gives a row or a fault.

Importers only read: they write nothing, run nothing and decode no audio.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from voxray.corpora.importers import commonvoice, huggingface, jsonl, kaldi, ksponspeech, lhotse, nemo, salmonn
from voxray.corpora.importers.detect import detect
from voxray.corpora.importers.row import ImportedRow, ImportFault


class Importer(NamedTuple):
    """One format: how to read it, and what it looks like, for messages and ``--help``."""

    rows: Callable[[Path], Iterator[ImportedRow | ImportFault]]
    looks: str


IMPORTERS = {
    "kaldi": Importer(kaldi.rows, "a folder with wav.scp and text (segments, utt2spk ...)"),
    "nemo": Importer(nemo.rows, "JSON Lines with audio_filepath"),
    "ksponspeech": Importer(ksponspeech.rows, ".trn lists, or a folder of .pcm and .txt"),
    "commonvoice": Importer(commonvoice.rows, "TSV tables and a folder clips"),
    "huggingface": Importer(huggingface.rows, "metadata.csv, .jsonl or .parquet, or Parquet with an audio column"),
    "lhotse": Importer(lhotse.rows, "cuts.jsonl or cuts.jsonl.gz"),
    "salmonn": Importer(salmonn.rows, 'a JSON file {"annotation": [...]}'),
    "jsonl": Importer(jsonl.rows, "JSON Lines in voxray's schemas, or chats with messages"),
}

__all__ = ["IMPORTERS", "ImportFault", "ImportedRow", "Importer", "detect"]
