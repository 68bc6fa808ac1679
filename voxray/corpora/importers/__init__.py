"""Importers of other projects' corpora: they turn every line of a file into a row of voxray's schema or a fault.

Importers only read. They write nothing, run nothing and decode no audio.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from voxray.corpora.importers import (
    commonvoice,
    huggingface,
    jsonl,
    kaldi,
    ksponspeech,
    lhotse,
    librispeech,
    nemo,
    salmonn,
    table,
)
from voxray.corpora.importers.detect import detect
from voxray.corpora.importers.row import ImportedRow, ImportFault

IMPORTERS: dict[str, Callable[[Path], Iterator[ImportedRow | ImportFault]]] = {
    "kaldi": kaldi.rows,  # a folder with wav.scp and text (segments, utt2spk ...)
    "nemo": nemo.rows,  # JSON Lines with audio_filepath, also of tarred sets
    "ksponspeech": ksponspeech.rows,  # .trn lists, or a folder of clips with a .txt beside each
    "librispeech": librispeech.rows,  # *.trans.txt lists beside the clips, also of Zeroth-Korean
    "commonvoice": commonvoice.rows,  # TSV tables and a folder clips
    "huggingface": huggingface.rows,  # metadata.csv, .jsonl or .parquet, Parquet with an audio column, save_to_disk
    "lhotse": lhotse.rows,  # cuts.jsonl.gz, cuts.json or a Shar folder
    "table": table.rows,  # CSV, TSV and Excel files with any columns
    "salmonn": salmonn.rows,  # a JSON file {"annotation": [...]}
    "jsonl": jsonl.rows,  # JSON Lines in voxray's schemas, or chats with messages
}

__all__ = ["IMPORTERS", "ImportFault", "ImportedRow", "detect"]
