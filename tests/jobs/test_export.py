"""Exported models answer like base and adapter, transformers can load them, and a wrong one is never written."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SPEECH, TINY

from voxray.commands import export_formats
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.config.evaluate import InferSettings
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.lora import (
    CONFIG,
    WEIGHTS,
    add_lora,
    load_adapter,
    save_adapter,
    train_fully,
    trainable_parameters,
)
from voxray.models.registry import get_family

FAMILY = get_family(TINY)
CPU = torch.device("cpu")
CLIP = str(SPEECH / "sample.wav")


def make_adapter(
    folder: Path, roles: tuple[str, ...] = ("projector", "llm"), seed: int = 0, tuning: str = "lora"
) -> Path:
    """An adapter that changes the model's answers."""
    torch.manual_seed(seed)
    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    if tuning == "full":
        model = train_fully(base, FAMILY, roles)
    else:
        model = add_lora(base, FAMILY, roles, model_id=TINY, r=4, alpha=16, dropout=0.1, tuning=tuning)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name or tuning == "full":
                parameter += torch.randn_like(parameter) * 0.05
    save_adapter(model, folder)
    return folder


def run(adapter: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    values = {"lora_dir": str(adapter), "output_dir": str(output_dir), **changes}
    return run_export(ExportSettings.model_validate(values))


def answer_text(**flags: Any) -> str:
    values = {"audio_path": CLIP, "language": "ko", "max_new_tokens": 16, **flags}
    [answer] = run_inference(InferSettings.model_validate(values), "")
    return answer["prediction"]


def test_a_merged_model_answers_as_base_and_adapter(tmp_path):
    adapter = make_adapter(tmp_path / "a")
    report = run(adapter, tmp_path / "e")
    expected = answer_text(lora_dir=str(adapter))
    assert answer_text(model_id=str(tmp_path / "e"), bf16=False) == expected != answer_text(model_id=TINY)
    assert report["tensors"] == 32 and report["layers_merged"] == 16 and report["difference_merged"] < 1e-4
    stored = json.loads((tmp_path / "e" / "export.json").read_text())
    assert stored == report and stored["versions"]["torch"] and stored["base"] == TINY
    assert not list((tmp_path / "e").glob("adapter*")), "nothing is left of the adapter"


@pytest.mark.parametrize("tuning", ["dora", "rslora", "full"])
def test_every_kind_of_tuning_can_be_exported(tuning, tmp_path):
    adapter = make_adapter(tmp_path / "a", tuning=tuning)
    report = run(adapter, tmp_path / "e", dtype="float32")
    assert report["difference_on_disk"] < 1e-4
    assert answer_text(model_id=str(tmp_path / "e")) == answer_text(lora_dir=str(adapter)) != answer_text(model_id=TINY)
    if tuning == "full":
        with pytest.raises(SettingsError, match=r"--merge projector: .* holds whole weights"):
            run(adapter, tmp_path / "f", merge="projector")


def test_transformers_alone_loads_it(tmp_path):
    """No voxray, no PEFT: the library's own classes, processor included, give the same logits."""
    from transformers import VoxtralForConditionalGeneration, VoxtralProcessor

    adapter = make_adapter(tmp_path / "a")
    run(adapter, tmp_path / "e", dtype="float32")
    theirs = VoxtralForConditionalGeneration.from_pretrained(tmp_path / "e", dtype=torch.float32).eval()
    assert VoxtralProcessor.from_pretrained(tmp_path / "e").tokenizer
    ours, _ = load_adapter(FAMILY.load_model(TINY, dtype=torch.float32, device=CPU), adapter)
    ids = torch.tensor([FAMILY.front_end(TINY).target_ids("환자는 어제부터 열이 납니다")])
    with torch.inference_mode():
        assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-4)


def test_only_the_projector_can_be_merged(tmp_path):
    """The language model's LoRA is written next to the new base, and both together answer as before."""
    adapter = make_adapter(tmp_path / "a")
    report = run(adapter, tmp_path / "e", merge="projector")
    assert report["layers_merged"] == 2
    rest = tmp_path / "e" / "adapter"
    assert json.loads((rest / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "e")
    assert answer_text(lora_dir=str(rest)) == answer_text(lora_dir=str(adapter)), "the adapter knows its new base"
    with pytest.raises(RunError, match=r"--merge projector: .* has no part in the projector"):
        run(make_adapter(tmp_path / "llm", ("llm",)), tmp_path / "f", merge="projector")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, tmp_path):
    from safetensors import safe_open

    report = run(make_adapter(tmp_path / "a"), tmp_path / "e", dtype=dtype)
    with safe_open(tmp_path / "e" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    assert report["dtype"] == dtype and (report["difference_on_disk"] < 1e-4) == (dtype == "float32")


def test_runs_checkpoints_and_bases_are_found(tmp_path):
    """--lora_dir accepts a run folder; --model_id overrides the base's path."""
    make_adapter(tmp_path / "run" / "adapter")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(TINY).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    report = run(tmp_path / "run", tmp_path / "e", model_id=str(copy))
    assert report["base"] == str(copy) and report["adapter"] == str(tmp_path / "run" / "adapter")
    with pytest.raises(RunError, match="no adapter here"):
        run(tmp_path / "nothing", tmp_path / "f")


def test_folders_that_hold_something_are_left_alone(tmp_path):
    adapter = make_adapter(tmp_path / "a")
    run(adapter, tmp_path / "e")
    before = (tmp_path / "e" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="is not empty; --overwrite replaces an earlier export"):
        run(adapter, tmp_path / "e")
    run(make_adapter(tmp_path / "b", seed=1), tmp_path / "e", overwrite=True)
    assert (tmp_path / "e" / "model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty; it is no export"):
        run(adapter, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_relative_output_stands_under_the_storage_path(tmp_path):
    run(make_adapter(tmp_path / "a"), Path("e"), storage_path=str(tmp_path / "mnt"))
    assert (tmp_path / "mnt" / "e" / "export.json").is_file()


def test_a_merge_that_goes_wrong_is_not_written(tmp_path, monkeypatch):
    """If the files lack one layer's LoRA, the logits differ and no file is left."""
    merged_tensors = export_formats.merged_tensors

    def forgetful(base: Any, layers: Any, dtype: torch.dtype) -> Any:
        return merged_tensors(base, dict(list(layers.items())[:-1]), dtype)

    monkeypatch.setattr(export_formats, "merged_tensors", forgetful)
    with pytest.raises(RunError, match="the model on disk answers differently"):
        run(make_adapter(tmp_path / "a"), tmp_path / "e")
    assert not (tmp_path / "e").exists() and not list(tmp_path.glob(".e*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, tmp_path):
    """With parts left unmerged, too, which are written by another call."""
    adapter = make_adapter(tmp_path / "a")
    for changes in ({}, {"merge": "projector"}):
        with pytest.raises(RunError, match=rf"^{small_disk / 'e'}: cannot write the model: .*No space left") as caught:
            run(adapter, small_disk / "e", **changes)
        assert "\n" not in str(caught.value) and not [path for path in small_disk.iterdir() if path.is_dir()]


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "a")
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunError, match="the adapter does not fit the model"):
        run(adapter, tmp_path / "e")
