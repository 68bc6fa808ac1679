"""A base whose weight files cannot hold what its config.json describes."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import TINY, WHISPER

from voxray.core.errors import RunError
from voxray.models.hf_files import check_size


def test_a_configuration_without_its_sizes_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """The library would build its default model, which has 4 billion weights."""
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RunError, match=r"config.json describes 4,0\d\d,\d\d\d,\d\d\d weights, and its weight files have"
    ):
        check_size(transformers.VoxtralForConditionalGeneration, str(folder))


def test_whole_bases_and_those_of_the_hub_pass() -> None:
    """The files of a hub base may not be here yet."""
    check_size(transformers.VoxtralForConditionalGeneration, TINY)
    check_size(transformers.WhisperForConditionalGeneration, WHISPER)
    check_size(transformers.WhisperForConditionalGeneration, "openai/whisper-small")
