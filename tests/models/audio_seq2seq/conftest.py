"""A tiny base of every model type."""

from pathlib import Path
from typing import Any

import pytest
from helpers.audio_seq2seq_tiny import BASES, write_tiny_seq2seq


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{model type: folder of its tiny base}."""
    folder = tmp_path_factory.mktemp("audio-seq2seq")
    return {model_type: write_tiny_seq2seq(Path(folder) / model_type, model_type) for model_type in BASES}


@pytest.fixture(scope="session", params=tuple(BASES))
def base(request: Any, written: dict[str, str]) -> str:
    """Folder of the tiny base of each model type in turn."""
    return written[request.param]
