"""Defaults of ``ModelFamily`` that a family can inherit."""

import shutil
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import SettingsError
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import base_hash
from voxray.models.interface import InitAdapter
from voxray.models.layer_names import LayerNames


class FamilyDefaults:
    """A family in which nothing trains beside LoRA, weight decay applies to all weights, all parts have the base's
    dtype, and there is no original training code to exchange checkpoints with."""

    name: str
    full_modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    float32_roles: tuple[str, ...] = ()
    encoder_role = "encoder"
    projector_role = "projector"
    layer_names = LayerNames()
    reads_samples = False

    def projector_positions(self, config: Any, front_end: FrontEnd) -> int:
        return front_end.encoder_positions

    def encoder_layer_positions(self, config: Any, front_end: FrontEnd) -> int:
        return front_end.encoder_positions

    def cross_attention_frames(self, config: Any, front_end: FrontEnd) -> int:
        return front_end.cross_attention_positions

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return False

    def content_hash(self, model_id: str) -> str:
        return base_hash(model_id)

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Copy ``files`` and README.md, as far as the base has them and the folder does not."""
        from transformers.utils.hub import cached_file

        for name in (*self.files, "README.md"):
            path = cached_file(model_id, name, _raise_exceptions_for_missing_entries=False)
            if path and not (folder / name).exists():
                shutil.copyfile(path, folder / name)

    def read_official(self, path: str, *, r: int, alpha: float) -> InitAdapter | None:
        return None

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        raise SettingsError(f"--format official: SALMONN models only, and this is a {self.name} model")

    def load_official(self, base: Any, path: Path) -> Any:
        raise AssertionError("write_official wrote nothing")
