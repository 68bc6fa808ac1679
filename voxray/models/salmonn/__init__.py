"""SALMONN, built from parts of transformers and our own BEATs. ``load`` reads the official files."""

from voxray.models.salmonn.loading import load as load
from voxray.models.salmonn.loading import load_beats as load_beats
from voxray.models.salmonn.loading import set_pad_rows as set_pad_rows
