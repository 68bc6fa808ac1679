"""SALMONN, out of transformers' parts and a BEATs of our own; ``load`` reads the official files."""

from voxray.models.salmonn.loading import load as load
from voxray.models.salmonn.loading import load_beats as load_beats
