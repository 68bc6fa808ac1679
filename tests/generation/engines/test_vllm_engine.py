"""The vLLM engine: its process, which may die, with a stand-in of vLLM; and answers of vLLM itself (mark engines)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, WHISPER, manifest, read_rows, write_rows
from helpers.adapters import random_adapter
from helpers.running import parse_only

from voxray.commands import evaluate as evaluate_job
from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation.distribute import answer_rows, read_failed
from voxray.evaluation.predictions import read_predictions
from voxray.features.reader import Features
from voxray.generation.engines.load import check_engine, load_engine
from voxray.generation.generate import Completion, SamplingParams
from voxray.generation.model import InferenceConfig
from voxray.models.registry import get_family
from voxray.models.voxtral.mistral_format import max_lora_rank

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 24
ROWS = 6
VLLM_PYTHON = os.environ.get("VOXRAY_VLLM_PYTHON", "")
STAND_IN = '''
"""Answers with the last token ids of the prompt; dies or fails at samples that files beside this one name."""
import json, os, pathlib, signal, types
FOLDER = pathlib.Path(__file__).parents[1]
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, **arguments):
        (FOLDER / "arguments.json").write_text(json.dumps(arguments))
        print("loading", flush=True)
        if (FOLDER / "broken").exists(): raise ValueError("no such\\nmodel")
    def generate(self, prompts, sampling, lora_request=None, use_tqdm=True):
        counts = [self.num_samples(prompt) for prompt in prompts]
        for name in ("kills", "kills_once", "fails"):
            path = FOLDER / name
            if path.exists() and (path.read_text() == "all" or int(path.read_text()) in counts):
                if name == "kills_once": path.unlink()
                if name == "fails": raise ValueError("cannot answer")
                os.kill(os.getpid(), signal.SIGKILL)
        with open(FOLDER / "answered.txt", "a") as file:
            file.writelines(f"{count}\\n" for count in counts)
        ids = [prompt.get("decoder_prompt", prompt)["prompt_token_ids"][-3:] for prompt in prompts]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=each)]) for each in ids]
    def num_samples(self, prompt):
        prompt = prompt.get("encoder_prompt", prompt)
        return len(prompt["multi_modal_data"]["audio"][0]) if "multi_modal_data" in prompt else 0
'''


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python whose vLLM is the stand-in."""
    folder = tmp_path / "engine"
    (folder / "vllm" / "lora").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(STAND_IN)
    (folder / "vllm" / "lora" / "__init__.py").touch()
    (folder / "vllm" / "lora" / "request.py").write_text("def LoRARequest(*values): return values\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Voxtral in Mistral's format."""
    folder = tmp_path_factory.mktemp("mistral") / "e"
    export(folder, model_id=TINY)
    return str(folder)


@pytest.fixture(scope="module")
def features(make_features: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Features:
    rows = [read_rows(manifest(f"{task}.val"))[number] for task in ("asr", "sqa", "tqa") for number in (0, 1)]
    return pcm16_features(make_features, tmp_path_factory.mktemp("rows"), rows, TINY)


def pcm16_features(make_features: Callable[..., Any], folder: Path, rows: list[dict[str, Any]], base: str) -> Features:
    return Features(make_features(write_rows(folder / "m.jsonl", rows), model_id=base, store="pcm16"))


def export(folder: Path, **changes: Any) -> None:
    run_export(ExportSettings.model_validate({"format": "mistral", "output_dir": str(folder), **changes}))


def config(model_id: str, python: str, **changes: Any) -> InferenceConfig:
    values = {"engine": "vllm", "engine_python": python, "max_len": 400, **changes}
    return InferenceConfig(model_id, values.pop("adapter", ""), SamplingParams(LIMIT), 3, **values)


def evaluate(settings: InferenceConfig, features: Features, folder: Path) -> list[dict[str, Any]]:
    answer_rows(settings, features.folders, range(len(features)), folder, use_ray=False)
    return read_predictions(folder)


def write(python: str, name: str, value: object) -> None:
    (Path(python).parent / name).write_text(str(value))


def test_prompts_and_samples_arrive(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    """The answers of the stand-in are the ends of the prompts, and every row is asked once."""
    predictions = evaluate(config(mistral, python), features, tmp_path / "out")
    front_end = get_family(TINY).front_end(TINY)
    rows = {row.source: row for row in map(features.row, range(ROWS))}
    for each in predictions:
        assert each["prediction"] == front_end.decode(rows[each["source"]].prompt_ids[-3:].tolist()).strip()
    answered = sorted(int(line) for line in (Path(python).parent / "answered.txt").read_text().split())
    assert answered == sorted(row.num_samples for row in rows.values()) and len(predictions) == ROWS
    arguments = json.loads((Path(python).parent / "arguments.json").read_text())
    assert arguments["load_format"] == "mistral" and arguments["max_model_len"] == 400 + LIMIT


def test_a_killed_process_is_started_again(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    """It dies once in the middle; every row has one answer."""
    write(python, "kills_once", features.row(1).num_samples)
    predictions = evaluate(config(mistral, python), features, tmp_path / "out")
    assert len({row["source"] for row in predictions}) == len(predictions) == ROWS
    assert not (Path(python).parent / "kills_once").exists() and not read_failed(tmp_path / "out")


def test_a_row_that_kills_the_process(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    write(python, "kills", features.row(1).num_samples)
    predictions = evaluate(config(mistral, python), features, tmp_path / "out")
    [(row, reason, message)] = read_failed(tmp_path / "out")
    assert (row, reason) == (1, "not_answered") and "vLLM's process ended with status -9: loading" in message
    assert len({row["source"] for row in predictions}) == len(predictions) == ROWS - 1


def test_a_row_that_vllm_refuses_is_left_out(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    write(python, "fails", features.row(0).num_samples)
    assert len(evaluate(config(mistral, python), features, tmp_path / "out")) == ROWS - 1
    assert read_failed(tmp_path / "out") == [(0, "not_answered", "VllmError: ValueError: cannot answer")]


def test_deaths_without_end_end_the_job(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    write(python, "kills", "all")
    with pytest.raises(RunError, match="its process died 5 times in a row"):
        evaluate(config(mistral, python), features, tmp_path / "out")


def test_a_model_that_does_not_load_is_one_line(mistral: str, python: str, features: Features, tmp_path: Path) -> None:
    write(python, "broken", "")
    with pytest.raises(RunError, match=r"^--engine vllm: vLLM cannot load .*: ValueError: no such model$"):
        evaluate(config(mistral, python), features, tmp_path / "out")


def test_the_process_ends_with_its_parent(mistral: str, python: str, tmp_path: Path) -> None:
    """A job that is killed leaves no process behind."""
    lines = (
        "import sys",
        "from voxray.generation.engines.vllm_engine import VllmEngine",
        "from tests_config import settings, front_end",
        "engine = VllmEngine(settings, front_end)",
        "print(engine._worker.process.pid, flush=True)",
        "sys.stdin.read()",
    )
    (tmp_path / "tests_config.py").write_text(
        "from voxray.generation.generate import SamplingParams\n"
        "from voxray.generation.model import InferenceConfig\n"
        "from voxray.models.registry import get_family\n"
        f"settings = InferenceConfig({mistral!r}, '', SamplingParams(4), 1, engine='vllm', engine_python={python!r})\n"
        f"front_end = get_family({mistral!r}).front_end({mistral!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process is still there")


def test_what_vllm_would_not_apply_is_refused(mistral: str, python: str, tmp_path: Path) -> None:
    """Also an adapter under PEFT's names, which vLLM takes and then ignores."""
    adapter = str(random_adapter(tmp_path / "a"))
    cases = {
        "a Voxtral in Hugging Face's format; write .* with `export --format mistral`": config(TINY, python),
        "vLLM would ignore base_model": config(mistral, python, adapter=adapter),
        "takes no adapter of whisper; merge it": config(WHISPER, python, adapter=adapter),
        "has no vLLM; name one that has it with --engine_python": config(mistral, sys.executable),
        "cannot be run: No such file": config(mistral, str(tmp_path / "none")),
    }
    for message, settings in cases.items():
        with pytest.raises(SettingsError, match=message):
            check_engine(settings)
    export(tmp_path / "projector", lora_dir=adapter, merge="projector")
    check_engine(config(str(tmp_path / "projector"), python, adapter=str(tmp_path / "projector" / "adapter")))


def test_evaluate_and_infer_answer_with_vllm(
    mistral: str,
    python: str,
    features: Features,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flags of the jobs reach the engine; adapters, beams and other stores are refused."""
    monkeypatch.setattr(evaluate_job, "ray_session", lambda *args: nullcontext())
    for name in ("make_features", "answer_rows"):
        monkeypatch.setattr(evaluate_job, name, partial(getattr(evaluate_job, name), use_ray=False))
    rows = [json.loads(Path(features.row(0).source.rsplit(":", 1)[0]).read_text().splitlines()[0])]
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model_id", mistral, "--engine", "vllm", "--engine_python", python]
    entries = run_inference(parse_only("infer", [*flags, "--jsonl", jsonl]), "")
    output_dir = str(tmp_path / "out")
    run_evaluation(parse_only("evaluate", [*flags, "--val_jsonl", jsonl, "--output_dir", output_dir]))
    front_end = get_family(TINY).front_end(TINY)
    expected = front_end.decode(features.row(0).prompt_ids[-3:].tolist()).strip()
    predictions = read_predictions(Path(output_dir))
    assert [each["prediction"] for each in (*entries, *predictions)] == [expected, expected]
    for flag in ("--num_beams 2", "--store mel", "--quantize 8bit", "--perplexity all", "--merge_adapter"):
        with pytest.raises(SystemExit):
            parse_only("evaluate", [*flags, "--val_jsonl", jsonl, *flag.split()])
        assert re.search(f"--engine vllm: (not with|needs) {flag.split()[0]}", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        parse_only("infer", ["--jsonl", jsonl, "--engine_python", python])
    assert "--engine_python: needs --engine vllm" in capsys.readouterr().err


def test_rows_that_vllm_would_answer_differently_are_refused(
    python: str, make_features: Callable[..., Any], tmp_path: Path
) -> None:
    """vLLM puts a start token before the context of a Whisper prompt. The other rows are answered."""
    rows = read_rows(manifest("base.val"))[:2]
    features = pcm16_features(make_features, tmp_path, [rows[0], {**rows[1], "context": "fever"}], WHISPER)
    engine, _ = load_engine(config(WHISPER, python), get_family(WHISPER).front_end(WHISPER))
    answers = dict(engine.generate([features.row(0), features.row(1)], 8))
    assert isinstance(answers[0], Completion) and "no contexts of Whisper; leave them out" in str(answers[1])


@pytest.mark.parametrize(("rank", "expected"), [(1, 8), (8, 8), (12, 16), (300, 320), (600, 0)])
def test_ranks_are_those_of_vllm(tmp_path: Path, rank: int, expected: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    assert max_lora_rank(tmp_path) == expected


def completions(settings: InferenceConfig, features: Features) -> list[Completion]:
    front_end = get_family(settings.model_id).front_end(settings.model_id)
    engine, _ = load_engine(settings, front_end)
    answers = dict(engine.generate([features.row(number) for number in range(len(features))], 8))
    return [replace(answers[number], sec=0.0) for number in range(len(features))]


@pytest.mark.engines
@pytest.mark.skipif(not VLLM_PYTHON, reason="VOXRAY_VLLM_PYTHON names no Python with vLLM")
class TestVllm:
    """Answers of vLLM itself, equal to the last token."""

    @pytest.fixture(scope="class")
    def mixed(self, make_features: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Features:
        rows = [row for task in ("asr", "sqa", "tqa") for row in read_rows(manifest(f"{task}.val"))[:12]]
        return pcm16_features(make_features, tmp_path_factory.mktemp("mixed"), rows, TINY)

    @pytest.mark.parametrize("merge", ["all", "projector"])
    def test_voxtral(self, merge: str, mixed: Features, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        export(tmp_path / "e", lora_dir=str(adapter), merge=merge)
        lora = str(tmp_path / "e" / "adapter") if merge == "projector" else ""
        ours = completions(config(TINY, "", engine="transformers", adapter=str(adapter)), mixed)
        assert completions(config(str(tmp_path / "e"), VLLM_PYTHON, adapter=lora), mixed) == ours
        assert ours != completions(config(TINY, "", engine="transformers"), mixed)

    def test_whisper(self, make_features: Callable[..., Any], tmp_path: Path) -> None:
        """With named and detected languages."""
        rows = [*read_rows(manifest("base.val"))[:18], *read_rows(manifest("asr.val"))[:18]]
        for row in rows[::4]:
            row.pop("language")
        features = pcm16_features(make_features, tmp_path, rows, WHISPER)
        ours = completions(config(WHISPER, "", engine="transformers"), features)
        assert completions(config(WHISPER, VLLM_PYTHON), features) == ours

    def test_killed_in_the_middle(self, mixed: Features, mistral: str, tmp_path: Path) -> None:
        """kill -9 after the first part; every row has one answer."""
        settings, pids = replace(config(mistral, VLLM_PYTHON), batch_size=1), list[int]()

        def kill_once(done: int, total: int) -> None:
            if done and not pids:
                pids.extend(child_pids())
                os.kill(pids[0], signal.SIGKILL)

        answer_rows(settings, mixed.folders, range(len(mixed)), tmp_path, use_ray=False, on_progress=kill_once)
        predictions = read_predictions(tmp_path)
        assert pids and len({row["source"] for row in predictions}) == len(predictions) == len(mixed)


def child_pids() -> list[int]:
    """Processes of vLLM that this process started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "vllm_worker" in line]
