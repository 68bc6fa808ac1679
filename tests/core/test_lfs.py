"""Git LFS pointers are named as such wherever a file fails to load."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY

from voxray.audio.decode import decode
from voxray.config.parse import parse
from voxray.config.train import MultitaskSettings
from voxray.core.errors import BadRow, RunError
from voxray.core.lfs import find_pointer
from voxray.core.manifest import chunks
from voxray.corpora.importers.lines import open_text
from voxray.models.adapters.lora import tensor_names
from voxray.models.hf_files import read_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
ADVICE = "a Git LFS pointer, not the file itself: run git lfs pull"


@pytest.fixture
def pointer(tmp_path: Path) -> str:
    path = tmp_path / "file.wav"
    path.write_text(POINTER)
    return str(path)


def test_only_pointers_are_recognised(pointer: str, tmp_path: Path):
    assert find_pointer(pointer) == find_pointer(tmp_path) == pointer
    (tmp_path / "other").write_text("version 1")
    assert not find_pointer(tmp_path / "other") and not find_pointer(tmp_path / "no") and not find_pointer("hub/model")


def test_audio_manifests_corpora_and_adapters(pointer: str, tmp_path: Path):
    with pytest.raises(BadRow, match=f"file.wav is {ADVICE}"):
        decode(pointer, 16_000)
    for read in (lambda: list(chunks(pointer, 8)), lambda: open_text(Path(pointer))):
        with pytest.raises(RunError, match=f"file.wav: {ADVICE}"):
            read()
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(RunError, match=f"adapter_model.safetensors: {ADVICE}"):
        tensor_names(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tekken.json", "config.json"])
def test_models(name: str, tmp_path: Path):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / name).write_text(POINTER)
    with pytest.raises(RunError, match=f"--model_id {folder / name}: {ADVICE}"):
        read_config(str(folder))


def test_flags(pointer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--train_jsonl", pointer, "--init_adapter", str(tmp_path), "--output_dir", "o"]
    with pytest.raises(SystemExit) as end:
        parse(MultitaskSettings, argv, job="j", about="", demo="demo.yaml")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[:2] == [
        f"error: --train_jsonl: {pointer}: {ADVICE}",
        f"error: --init_adapter: {pointer}: {ADVICE}",
    ]


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (("model.bin", "config.json", "vocabulary.json"), "a CTranslate2 model"),
        (("params.json", "consolidated.safetensors", "tekken.json"), "a model in Mistral's own layout"),
    ],
)
def test_other_layouts_are_named(files: tuple[str, ...], layout: str, tmp_path: Path):
    for name in files:
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(RunError, match=f"--model_id {tmp_path}: {layout}.*voxray reads models in the layout of transf"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "voxtral"}))
    (tmp_path / "model.safetensors").touch()
    assert read_config(str(tmp_path))["model_type"] == "voxtral", "Voxtral's repository has both"
