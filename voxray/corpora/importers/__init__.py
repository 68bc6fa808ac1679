"""Importers of other projects' corpora: they turn every line of a file into a row of voxray's schema or a fault.

Importers only read. They write nothing, run nothing and decode no audio.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from voxray.corpora.importers import commonvoice, huggingface, jsonl, kaldi, ksponspeech, lhotse, nemo, salmonn
from voxray.corpora.importers.detect import detect
from voxray.corpora.importers.row import ImportedRow, ImportFault

IMPORTERS: dict[str, Callable[[Path], Iterator[ImportedRow | ImportFault]]] = {
    "kaldi": kaldi.rows,  # a folder with wav.scp and text (segments, utt2spk ...)
    "nemo": nemo.rows,  # JSON Lines with audio_filepath
    "ksponspeech": ksponspeech.rows,  # .trn lists, or a folder of .pcm and .txt
    "commonvoice": commonvoice.rows,  # TSV tables and a folder clips
    "huggingface": huggingface.rows,  # metadata.csv, .jsonl or .parquet, or Parquet with an audio column
    "lhotse": lhotse.rows,  # cuts.jsonl or cuts.jsonl.gz
    "salmonn": salmonn.rows,  # a JSON file {"annotation": [...]}
    "jsonl": jsonl.rows,  # JSON Lines in voxray's schemas, or chats with messages
}

__all__ = ["IMPORTERS", "ImportFault", "ImportedRow", "detect"]
