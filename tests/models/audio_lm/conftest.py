"""A tiny base of every model type, and clips that need no file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.audio_lm_tiny import BASES, write_tiny

MODEL_TYPES = tuple(BASES)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Model type -> folder of its tiny base, which is written once."""
    folder, written = tmp_path_factory.mktemp("audio-lm"), dict[str, str]()

    def base(model_type: str) -> str:
        if model_type not in written:
            written[model_type] = write_tiny(Path(folder) / model_type, model_type)
        return written[model_type]

    return base


@pytest.fixture(scope="session", params=MODEL_TYPES)
def base(request: Any, tiny_base: Callable[[str], str]) -> str:
    """Folder of the tiny base of each model type in turn."""
    return tiny_base(request.param)
