"""Jobs with SALMONN's stored encoder outputs and with its compiled audio path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import read_rows, write_rows
from helpers.running import load_job, parse_only
from safetensors.torch import load_file, save_file
from test_stages import losses

from voxray.commands import evaluate as job
from voxray.commands import train as launch
from voxray.commands.compile import run_compile
from voxray.commands.efficiency import run_efficiency
from voxray.core.errors import RunError
from voxray.evaluation.predictions import read_predictions
from voxray.features.extract import Extractor, FeatureSpec
from voxray.models.parts.compiled_audio import CompiledAudio
from voxray.models.salmonn.folder import write_folder
from voxray.recipes.salmonn import assemble_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def rows(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Speech, a recording of three windows, one of 0.2 s, and text."""
    folder = tmp_path_factory.mktemp("rows")
    rows = read_rows(small["asr.train"])[:3]
    speech = np.concatenate([soundfile.read(row["audio_path"], dtype="int16")[0] for row in rows] * 3)
    for name, num_samples in (("long", 150_000), ("short", 3_200)):
        soundfile.write(folder / f"{name}.wav", speech[:num_samples], 16_000, subtype="PCM_16")
        rows.append({"audio_path": str(folder / f"{name}.wav"), "transcript": name, "language": "en"})
    return write_rows(folder / "m.jsonl", rows + read_rows(small["tqa.train"])[:1])


@pytest.fixture(scope="module")
def run(salmonn: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train two steps on all rows together; returns the run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *flags: str) -> Path:
        usual = f"--model_id {salmonn} --train_jsonl {rows} --output_dir {folder / name} --features_dir {folder / 'f'} "
        usual += "--num_workers 0 --max_steps 2 --per_device_bsz 6 --lr 1e-3 --min_lr 0 --warmup_steps 0"
        launch.run_training(assemble_inputs(parse_only("train_salmonn", [*usual.split(), *flags])))
        return folder / name

    return run


def answers(rows: str, output_dir: Path, *flags: str) -> dict[str, tuple[str, float]]:
    """{id: (answer, -ln p of the reference)} of an evaluation."""
    usual = f"--val_jsonl {rows} --output_dir {output_dir} --gen_max_new_tokens 8 --perplexity all"
    job.run_evaluation(parse_only("evaluate", [*usual.split(), *flags]))
    return {row["id"]: (row["prediction"], row["nll"]) for row in read_predictions(output_dir)}


def assert_alike(actual: dict[str, tuple[str, float]], expected: dict[str, tuple[str, float]]) -> None:
    assert actual.keys() == expected.keys() and len(expected) == 6
    for name, (text, nll) in expected.items():
        assert actual[name] == (text, pytest.approx(nll, abs=1e-3)), name


def test_stored_outputs_give_the_same_losses_and_answers(
    run: Run, rows: str, tmp_path: Path, evaluation_here: None
) -> None:
    """Not bit for bit as with one encoder, because rounding in BEATs depends on the length of the batch."""
    plain = run("mel")
    stored = run("float32", "--store", "encoder", "--cache_dtype", "float32")
    assert losses(stored) == pytest.approx(losses(plain), abs=1e-5)
    half = losses(run("float16", "--store", "encoder", "--cache_dtype", "float16"))
    assert half != losses(plain) and half == pytest.approx(losses(plain), abs=1e-4)
    flags = ("--lora_dir", str(plain))
    from_mel = answers(rows, tmp_path / "mel", *flags)
    assert_alike(answers(rows, tmp_path / "f", *flags, "--store", "encoder", "--cache_dtype", "float32"), from_mel)


def test_the_fingerprint_of_stored_outputs_covers_both_encoders(salmonn_parts: dict[str, str], tmp_path: Path) -> None:
    names = ("whisper", "beats", "llama")
    whisper, beats, llm = (Path(salmonn_parts[f"{name}_path"]) for name in names)

    def key(name: str, whisper: Path = whisper, beats: Path = beats, llm: Path = llm, **spec: Any) -> str:
        write_folder(tmp_path / name, whisper=whisper, beats=beats, llm=llm)
        return Extractor(str(tmp_path / name), FeatureSpec("encoder", **spec)).fingerprint

    def changed(folder: Path, name: str) -> Path:
        copy = shutil.copytree(folder, tmp_path / f"{name}-changed")
        tensors = load_file(copy / "model.safetensors")
        tensors[name] = tensors[name] + 0.1
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    content = torch.load(beats, weights_only=True)
    content["model"]["layer_norm.bias"] = content["model"]["layer_norm.bias"] + 0.1
    torch.save(content, tmp_path / "weights.pt")
    content = torch.load(beats, weights_only=True)
    content["cfg"]["encoder_attention_heads"] = 2
    torch.save({**content, "cfg": {**content["cfg"], "max_distance": 400}}, tmp_path / "cfg.pt")
    plain = key("plain")
    assert key("copy", llm=changed(llm, "lm_head.weight")) == plain, "the language model does not matter"
    assert key("decoder", whisper=changed(whisper, "model.decoder.layer_norm.bias")) == plain
    others = [key("encoder", whisper=changed(whisper, "model.encoder.layer_norm.bias"))]
    others += [key(name, beats=tmp_path / f"{name}.pt") for name in ("weights", "cfg")]
    others += [key("bf16", bf16=True), key("half", dtype="float16")]
    assert len({plain, *others}) == 6


def test_embeddings_that_depend_on_the_batch_are_refused(
    salmonn_parts: dict[str, str], rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that follows the reference exactly, a clip's embeddings depend on its batch."""
    names = {"whisper": "whisper", "beats": "beats", "llm": "llama"}
    write_folder(tmp_path / "m", **{name: salmonn_parts[f"{flag}_path"] for name, flag in names.items()}, alone=False)
    for command in (f"train_salmonn --train_jsonl {rows} --num_workers 0 --store encoder", "compile"):
        name, *words = command.split()
        words += ["--model_id", str(tmp_path / "m"), "--output_dir", str(tmp_path / name)]
        with pytest.raises(SystemExit) as end:
            load_job(name).main(words)
        assert end.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: --model_id ") and 'its config.json says "alone": false' in message


@pytest.mark.slow
def test_the_audio_path_is_compiled(
    salmonn: str, run: Run, rows: str, tmp_path: Path, evaluation_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter that holds all of it except the encoders, for evaluate and efficiency."""
    tuned = run("tuned")
    folder = tmp_path / "compiled"
    report = run_compile(parse_only("compile", f"--lora_dir {tuned} --windows 1,2 --output_dir {folder}".split()))
    assert report["family"] == "salmonn" and report["mel_shape"] == [80 + 128, 400]
    assert all(0 < entry["difference"] < 1e-5 for entry in report["windows"].values())
    window_counts: list[int] = []
    real = CompiledAudio.__call__

    def call(self: CompiledAudio, *inputs: torch.Tensor) -> torch.Tensor:
        window_counts.append(len(inputs[0]))
        return real(self, *inputs)

    monkeypatch.setattr(CompiledAudio, "__call__", call)
    eager = answers(rows, tmp_path / "eager", "--lora_dir", str(tuned))
    assert not window_counts
    assert_alike(answers(rows, tmp_path / "e", "--lora_dir", str(tuned), "--compiled", str(folder)), eager)
    assert sum(window_counts) == 2 * 7, "each window once for the answer and once for the reference"
    with pytest.raises(RunError, match=rf"made of other weights, those of .* with {tuned}"):
        answers(rows, tmp_path / "base", "--model_id", salmonn, "--compiled", str(folder))
    flags = f"--lora_dir {tuned} --compiled {folder} --compare eager,compiled,8bit,4bit --batch_sizes 1,2 --clip_sec 3"
    flags += f" --new_tokens 16 --warmup 1 --repeats 2 --output_dir {tmp_path / 'efficiency'}"
    measured = run_efficiency(parse_only("efficiency", flags.split()))["variants"]
    assert {name: (variant["quantize"], bool(variant["compiled"])) for name, variant in measured.items()} == {
        "eager": ("none", False),
        "compiled": ("none", True),
        "8bit": ("8bit", False),
        "4bit": ("4bit", False),
    }
    for variant in measured.values():
        assert [result["batch_size"] for result in variant["results"]] == [1, 2]
        assert all(result["ttft_sec"]["median"] > 0 for result in variant["results"])
    assert json.loads((tmp_path / "efficiency" / "efficiency.json").read_text())["variants"].keys() == measured.keys()
