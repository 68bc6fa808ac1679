"""A base that is stored in bfloat16, as the released models are."""

import shutil
from pathlib import Path

from conftest import TINY
from safetensors.torch import load_file, save_file


def stored_in_bfloat16(folder: Path) -> str:
    """A copy of the tiny base whose weights are in bfloat16, as config.json says."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = (folder / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    return str(folder)
