"""A base whose weight files cannot hold what its config.json describes."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import TINY, WHISPER

from voxray.core.errors import RunError
from voxray.models.hf_files import LOCK_FILE_NAME, check_size, hub_id


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


def test_the_hub_id_of_a_base(tmp_path: Path) -> None:
    """It is known of a name on the hub, of a snapshot in a hub cache, and of a folder that prefetch filled."""
    assert hub_id("mistralai/Voxtral-Mini-3B-2507") == "mistralai/Voxtral-Mini-3B-2507"
    snapshot = tmp_path / "hub" / "models--openai--whisper-tiny" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert hub_id(str(snapshot)) == "openai/whisper-tiny"
    assert hub_id(TINY) == hub_id("/no/such/folder") == hub_id("./org/name") == hub_id("") == ""
    model = tmp_path / "prefetched" / "model"
    model.mkdir(parents=True)
    lock = model.parent / LOCK_FILE_NAME
    for requested, expected in (("org/name", "org/name"), (str(snapshot), "openai/whisper-tiny"), (TINY, "")):
        lock.write_text(json.dumps({"format": 1, "steps": {"model": {"asked": {"model_id": requested}}}}))
        assert hub_id(str(model)) == expected
    for damaged in ("", "[]", '{"steps": {"model": 1}}'):
        lock.write_text(damaged)
        assert hub_id(str(model)) == ""
