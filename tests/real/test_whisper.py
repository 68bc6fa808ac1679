"""Real Whisper weights: the texts of voxray's jobs are those of transformers, however the clips arrive.

Run with ``make real REAL=FOLDER``. The folder holds ``whisper-base``, ``whisper-tiny.en`` and ``clips`` with its
manifest clips.jsonl.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import read_rows, write_rows
from helpers.running import ROOT, parse_only
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

from voxray.audio.decode import decode
from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.commands.train import run_training
from voxray.evaluation.predictions import read_predictions
from voxray.preflight.budget import PROCESS_BYTES
from voxray.training.records import read_metrics

REAL = Path(os.environ.get("VOXRAY_REAL") or "no-folder")
BASE, TINY_EN = REAL / "whisper-base", REAL / "whisper-tiny.en"
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (REAL / "clips" / "clips.jsonl").is_file(), reason="VOXRAY_REAL names no real weights"),
]
LIMIT = 60
RATE_HZ = 16_000
CONTAINERS = ("wav", "flac", "ogg", "mp3", "m4a")
TEXTS: dict[tuple[Any, ...], str] = {}
"""What transformers answered to (model, samples, language and options), since several tests ask the same."""


@cache
def clips() -> list[dict[str, Any]]:
    return [
        {**row, "audio_path": str(REAL / "clips" / row["audio_path"])}
        for row in read_rows(REAL / "clips" / "clips.jsonl")
    ]


@cache
def original(model: Path) -> tuple[Any, Any]:
    return WhisperForConditionalGeneration.from_pretrained(model).eval(), WhisperProcessor.from_pretrained(model)


def text_of_transformers(model: Path, path: str, language: str = "", **options: Any) -> str:
    """Greedy text of transformers; long recordings go through its sequential algorithm.

    Its features are rounded to float16, as voxray stores them: that decides a near tie in one of the 27 clips.
    """
    samples = decode(path, RATE_HZ)
    key = (model, samples.tobytes(), language, *sorted(options.items()))
    if key not in TEXTS:
        TEXTS[key] = generate(model, samples, language, **options)
    return TEXTS[key]


@torch.no_grad()
def generate(model: Path, samples: np.ndarray, language: str, **options: Any) -> str:
    whisper, processor = original(model)
    is_long = len(samples) > 30 * RATE_HZ
    kind = {"truncation": False, "padding": "longest", "return_attention_mask": True} if is_long else {}
    inputs = processor(samples, sampling_rate=RATE_HZ, return_tensors="pt", **kind)
    inputs["input_features"] = inputs["input_features"].half().float()
    if is_long:
        options["return_timestamps"] = True
    if model == BASE:
        options |= {"task": "transcribe", "language": language or None}
    ids = whisper.generate(**inputs, do_sample=False, num_beams=1, **options)
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def write_as(path: Path, container: str, source: str) -> Path:
    """The clip in another container, encoded by libsndfile or FFmpeg."""
    samples, rate_hz = soundfile.read(source, dtype="float32")
    if container != "m4a":
        soundfile.write(path.with_suffix(f".{container}"), samples, rate_hz)
        return path.with_suffix(f".{container}")
    import av

    with av.open(str(path.with_suffix(".m4a")), "w") as output:
        stream: Any = output.add_stream("aac", rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in (*stream.encode(frame), *stream.encode(None)):
            output.mux(packet)
    return path.with_suffix(".m4a")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("with_language", [True, False])
def test_evaluate(tmp_path: Path, evaluation_here: None, container: str, batch_size: int, with_language: bool) -> None:
    rows = []
    for number, row in enumerate(clips()):
        audio = write_as(tmp_path / f"{number}", container, row["audio_path"])
        rows.append({"audio_path": str(audio), "transcript": row["transcript"]})
        if with_language:
            rows[-1]["language"] = row["language"]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["--model_id", str(BASE), "--val_jsonl", manifest, "--output_dir", str(tmp_path / "out")]
    argv += ["--per_device_bsz", str(batch_size), "--gen_max_new_tokens", str(LIMIT)]
    run_evaluation(parse_only("evaluate", argv))
    answers = [row["prediction"] for row in read_predictions(tmp_path / "out")]
    expected = [
        text_of_transformers(BASE, row["audio_path"], row.get("language", ""), max_new_tokens=LIMIT) for row in rows
    ]
    assert answers == expected
    assert len(answers) == 27 and sum(map(bool, answers)) == 27


@cache
def in_ct2(model: Path) -> Path:
    """The base in CTranslate2's format, in float32."""
    folder = Path(tempfile.mkdtemp()) / "e"
    values = ["--model_id", str(model), "--format", "ct2", "--output_dir", str(folder)]
    run_export(parse_only("export", values))
    return folder


def engine_flags(engine: str, model: Path) -> list[str]:
    return ["--model_id", str(in_ct2(model) if engine == "ct2" else model), "--engine", engine]


@pytest.mark.parametrize("engine", ["transformers", "ct2"])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("with_language", [True, False])
def test_infer(tmp_path: Path, batch_size: int, with_language: bool, engine: str) -> None:
    languages = [row["language"] if with_language else "" for row in clips()]
    rows = [
        {"audio_path": row["audio_path"], "transcript": row["transcript"]} | ({"language": code} if code else {})
        for row, code in zip(clips(), languages, strict=True)
    ]
    argv = [*engine_flags(engine, BASE), "--jsonl", write_rows(tmp_path / "rows.jsonl", rows)]
    argv += ["--batch_size", str(batch_size), "--max_new_tokens", str(LIMIT)]
    answers = [entry["prediction"] for entry in run_inference(parse_only("infer", argv), "")]
    assert answers == [
        text_of_transformers(BASE, row["audio_path"], code, max_new_tokens=LIMIT)
        for row, code in zip(clips(), languages, strict=True)
    ]


def test_infer_with_an_english_base(tmp_path: Path) -> None:
    rows = [{"audio_path": row["audio_path"], "transcript": ""} for row in clips() if row["language"] == "en"]
    argv = ["--model_id", str(TINY_EN), "--jsonl", write_rows(tmp_path / "rows.jsonl", rows)]
    argv += ["--max_new_tokens", str(LIMIT)]
    answers = [entry["prediction"] for entry in run_inference(parse_only("infer", argv), "")]
    assert answers == [text_of_transformers(TINY_EN, row["audio_path"], max_new_tokens=LIMIT) for row in rows]


@pytest.mark.parametrize("model", [BASE, TINY_EN], ids=["base", "tiny.en"])
@pytest.mark.parametrize(
    ("seconds", "engine"), [(40, "transformers"), (120, "transformers"), (360, "transformers"), (120, "ct2")]
)
def test_long_recordings(tmp_path: Path, model: Path, seconds: int, engine: str) -> None:
    """English clips one after another, with pauses."""
    pause = np.zeros(RATE_HZ, np.float32)
    english = [decode(row["audio_path"], RATE_HZ) for row in clips() if row["language"] == "en"]
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * RATE_HZ:
        parts += [english[len(parts) // 2 % len(english)], pause]
    path = tmp_path / "long.wav"
    soundfile.write(path, np.concatenate(parts)[: seconds * RATE_HZ], RATE_HZ, subtype="FLOAT")
    language = ["--language", "en"] if model == BASE else []
    argv = [*engine_flags(engine, model), "--audio_path", str(path), "--max_new_tokens", "200", *language]
    [entry] = run_inference(parse_only("infer", argv), "")
    expected = text_of_transformers(model, str(path), "en", max_new_tokens=200)
    assert entry["prediction"] == expected and len(expected) > 2 * seconds


def test_long_recordings_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight recordings of 35 to 90 s in one batch have the texts that transformers gives to each of them alone."""
    english = [decode(row["audio_path"], RATE_HZ) for row in clips() if row["language"] == "en"]
    rows = []
    for number in range(8):
        path = tmp_path / f"{number}.wav"
        speech = np.concatenate(english[number % len(english) :] + english[: number % len(english)])
        soundfile.write(path, np.resize(speech, round(RATE_HZ * (35 + 7.9 * number))), RATE_HZ)
        rows.append({"audio_path": str(path), "transcript": "x", "language": "en"})
    argv = ["--model_id", str(BASE), "--jsonl", write_rows(tmp_path / "rows.jsonl", rows), "--max_new_tokens", "200"]
    answers, seconds = {}, {}
    for batch_size in ("1", "8"):
        start = time.process_time()
        entries = run_inference(parse_only("infer", [*argv, "--batch_size", batch_size]), "")
        seconds[batch_size] = time.process_time() - start
        answers[batch_size] = [entry["prediction"] for entry in entries]
    with capsys.disabled():
        print(f"\n8 recordings together take {seconds['8'] / seconds['1']:.2f} of the CPU seconds of one at a time")
    assert answers["8"] == answers["1"]
    assert answers["8"] == [text_of_transformers(BASE, row["audio_path"], "en", max_new_tokens=200) for row in rows]


def train(output_dir: Path, *flags: str) -> dict[str, Any]:
    english = [row for row in clips() if row["language"] in {"en", "fr", "de", "es"}]
    manifest = write_rows(output_dir.with_name("train.jsonl"), english)
    argv = ["--model_id", str(BASE), "--train_jsonl", manifest, "--output_dir", str(output_dir), "--num_workers", "0"]
    argv += ["--per_device_bsz", "2", "--lr", "1e-3", "--warmup_steps", "0", "--save_steps", "2", "--lora_r", "4"]
    return run_training(parse_only("train_whisper", [*argv, *flags]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, uninterrupted."""
    run = tmp_path_factory.mktemp("real") / "run"
    train(run, "--max_steps", "6")
    return run


def test_training_lowers_the_loss_and_resumes(trained: Path, tmp_path: Path) -> None:
    losses = [record["loss"] for record in read_metrics(trained, "train")]
    assert len(losses) == 6 and np.mean(losses[3:]) < np.mean(losses[:3])
    resumed = tmp_path / "run"
    shutil.copytree(trained, resumed)
    shutil.copyfile(trained.with_name("train.jsonl"), tmp_path / "train.jsonl")
    for name in ("adapter", "checkpoints/step-000006", "checkpoints/step-000004"):
        shutil.rmtree(resumed / name)
    settings = json.loads((resumed / "settings.json").read_text())
    for name in ("train_jsonl", "output_dir"):
        settings[name] = json.loads(json.dumps(settings[name]).replace(str(trained.parent), str(tmp_path)))
    (resumed / "settings.json").write_text(json.dumps(settings))
    train(resumed, "--max_steps", "6")
    again = {record["step"]: record["loss"] for record in read_metrics(resumed, "train")}
    assert [again[step] for step in (3, 4, 5, 6)] == losses[2:]


@pytest.mark.parametrize("rows", [2, 4])
def test_preflight_predicts_the_process(tmp_path: Path, rows: int) -> None:
    """The whole process of the training, its libraries and what malloc keeps included, within 10 %."""
    english = [row for row in clips() if row["language"] == "en"]
    flags = [
        "--model_id",
        str(BASE),
        "--train_jsonl",
        write_rows(tmp_path / "train.jsonl", english),
        "--language",
        "en",
    ]
    flags += ["--output_dir", str(tmp_path / "run"), "--num_workers", "0", "--per_device_bsz", str(rows)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    check = [sys.executable, str(ROOT / "jobs" / "preflight.py"), "--recipe", "whisper", *flags, "--no_tune"]
    subprocess.run(check, check=True, env=env, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text())
    predicted = report["memory"]["predicted_bytes"] + PROCESS_BYTES
    train = [sys.executable, str(ROOT / "jobs" / "train_whisper.py"), *flags, "--max_steps", "2"]
    process = subprocess.Popen(train, env=env, stdout=subprocess.DEVNULL)
    resident = [0]
    while process.poll() is None:
        with suppress(OSError, ProcessLookupError):
            resident.append(resident_bytes(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    assert predicted == pytest.approx(max(resident), rel=0.1)


def resident_bytes(pid: int) -> int:
    """Memory of a process, with the files that it maps."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_the_export_in_transformers_pipeline(
    trained: Path, tmp_path: Path, evaluation_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own default is beam search with five beams for long-form generation; with one beam the texts are equal."""
    run_export(parse_only("export", ["--lora_dir", str(trained), "--output_dir", str(tmp_path / "model")]))
    rows = [row for row in clips() if row["language"] in {"en", "fr", "it"}]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["--model_id", str(tmp_path / "model"), "--val_jsonl", manifest, "--output_dir", str(tmp_path / "out")]
    run_evaluation(parse_only("evaluate", [*argv, "--gen_max_new_tokens", str(LIMIT)]))
    answers = [row["prediction"] for row in read_predictions(tmp_path / "out")]
    recognise: Callable[..., Any] = pipeline(
        "automatic-speech-recognition", model=str(tmp_path / "model"), device="cpu"
    )
    for row, answer in zip(rows, answers, strict=True):
        options = {"language": row["language"], "task": "transcribe", "num_beams": 1, "max_new_tokens": LIMIT}
        audio = {"raw": decode(row["audio_path"], RATE_HZ), "sampling_rate": RATE_HZ}
        assert recognise(audio, generate_kwargs=options)["text"].strip() == answer
