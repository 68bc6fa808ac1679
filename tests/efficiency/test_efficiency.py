"""What jobs/efficiency.py measures: which times are in which figure, on a clock that only the model moves; its report,
flags and refusals on the tiny models."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import SPEECH, TINY, WHISPER
from helpers.running import load_job, parse_only

from voxray.commands import efficiency as efficiency_job
from voxray.commands.efficiency import run_efficiency
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.efficiency import measure as efficiency
from voxray.efficiency.measure import LoadedModel, measure
from voxray.efficiency.peak_memory import RESIDENT, PeakMemory
from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.registry import get_family

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FAMILY = get_family(TINY)
VOCABULARY = 8
HEARING, FIRST_STEP, STEP, WAITING = 0.3, 0.02, 0.005, 0.001


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A family, and the state of its rows, that takes a known time for everything."""

    name = "timed"

    def __init__(self, clock: Clock) -> None:
        self.clock, self.begun, self.steps = clock, 0, 0

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple["Timed", torch.Tensor]:
        self.clock.now += HEARING
        self.begun, self.first = self.begun + 1, True
        return self, torch.zeros(len(batch["input_ids"]), VOCABULARY)

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self.clock.now += FIRST_STEP if self.first else STEP
        self.first, self.steps = False, self.steps + 1
        return torch.zeros(len(ids_B), VOCABULARY)


class Waited(LoadedModel):
    """A device that is asked at once and done a moment later."""

    def synchronise(self) -> None:
        self.family.clock.now += WAITING  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000 * 3).astype(np.float32), 16_000)
    return Sample("clip", TASKS["asr"], "", "", str(path), "ko", "")


@pytest.mark.parametrize(("batch_size", "new_tokens"), [(1, 16), (3, 40)])
def test_every_time_is_in_its_figure(
    batch_size: int, new_tokens: int, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    family = Timed(clock)
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=clock))
    loaded = Waited(None, family, FAMILY.front_end(TINY), CPU)  # type: ignore[arg-type]
    found, old = measure(loaded, sample, batch_size=batch_size, new_tokens=new_tokens, warmup=2, repeats=3)
    assert family.begun == 5 and family.steps == 5 * (new_tokens - 1), "all tokens are generated, whatever they are"
    assert found["ttft_sec"]["values"] == pytest.approx([HEARING + WAITING] * 3), "heard, and waited for"
    steps = [FIRST_STEP + WAITING] + [STEP + WAITING] * (new_tokens - 2)
    assert found["tpot_sec"]["median"] == pytest.approx(statistics.fmean(steps)), "the mean over all, not one step"
    # one wait before the clock starts for the model: the features' tensors may be on their way
    total = HEARING + sum(steps) + 2 * WAITING
    assert found["total_sec"]["median"] == pytest.approx(total)
    assert found["clip_sec"] == pytest.approx(3) and found["num_windows"] == batch_size
    assert found["rtfx"]["median"] == pytest.approx(3 * batch_size / total)
    assert found["rtfx_model_only"]["median"] == pytest.approx(3 * batch_size / (total - WAITING))
    assert found["tokens_per_sec"]["median"] == pytest.approx(batch_size * new_tokens / (total - WAITING))
    assert (found["num_new_tokens"], found["num_steps"]) == (batch_size * new_tokens, new_tokens - 1)
    wanted = {"ttft_sec": HEARING, "tpot_sec": FIRST_STEP, "inference_sec": HEARING + FIRST_STEP, "num_runs": 3}
    assert old == pytest.approx(wanted), "one step, and not waited for"


def test_a_slow_encoder_and_slow_steps_show(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    model.model.audio_tower.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    begin = type(FAMILY).prefill

    def slow(self: Any, *args: Any) -> Any:
        state, logits_BV = begin(self, *args)
        step = state.decode_step
        state.decode_step = lambda ids_B: (time.sleep(0.005), step(ids_B))[1]  # type: ignore[method-assign]
        return state, logits_BV

    monkeypatch.setattr(type(FAMILY), "prefill", slow)
    loaded = LoadedModel(model, FAMILY, FAMILY.front_end(TINY), CPU)
    found, _ = measure(loaded, sample, batch_size=2, new_tokens=16, warmup=0, repeats=2)
    assert min(found["ttft_sec"]["values"]) >= 0.2 and min(found["tpot_sec"]["values"]) >= 0.005
    assert found["decode_sec"]["median"] > 0 and found["features_sec"]["median"] > 0


def test_peak_memory_begins_anew() -> None:
    memory = PeakMemory(CPU)
    memory.restart()
    if memory.kind != RESIDENT:
        pytest.skip("this system tells no process to begin anew")
    held = memory.now_gib()
    block = np.ones(300 << 20, np.uint8)
    del block
    assert 0.25 < memory.peak_gib() - held < 0.4
    memory.restart()
    assert memory.peak_gib() < held + 0.1


Job = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run the job in this process on a tiny model; returns its report."""

    def run(*flags: str, **more: str) -> dict[str, Any]:
        usual = {"model_id": TINY, "output_dir": str(tmp_path / "out"), "clip_sec": "3", "new_tokens": "16"}
        usual |= {"warmup": "0", "repeats": "2", "batch_sizes": "1", **more}
        argv = [word for key, value in usual.items() if value for word in (f"--{key}", value)]
        return run_efficiency(parse_only("efficiency", [*argv, *flags]))

    return run


def test_report_of_every_family(job: Job, salmonn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model_id in (TINY, WHISPER, salmonn):
        report = job(model_id=model_id, batch_sizes="2,1")
        folder = tmp_path / "out"
        assert json.loads((folder / "efficiency.json").read_text()) == json.loads(json.dumps(report))
        assert (folder / "efficiency.png").read_bytes().startswith(b"\x89PNG") and (folder / "clip.wav").is_file()
        assert report["dtype"] == "float32" and report["quantize"] == "none" and report["family"] in model_id
        assert [found["batch_size"] for found in report["results"]] == [1, 2]
        for found in report["results"]:
            for name in ("ttft_sec", "tpot_sec", "decode_sec", "features_sec", "total_sec", "rtfx", "tokens_per_sec"):
                figure = found[name]
                assert 0 < figure["low"] <= figure["median"] <= figure["high"] and len(figure["values"]) == 2
            assert found["peak_memory_gib"] >= found["memory_held_before_gib"] > 0
        old = report["old_evaluator"]
        assert old["memory_gib"] is None, "it counted that of a GPU"
        assert old["inference_sec"] == pytest.approx(old["ttft_sec"] + old["tpot_sec"])
        said = " ".join(capsys.readouterr().out.split())
        assert "as the older evaluator counted (means of 2 runs" in said and "TPOT, of one single step" in said
    assert job(batch_sizes="2")["old_evaluator"] is None
    assert "add 1 to --batch_sizes" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the job loads and measures, without doing either."""
    seen: dict[str, Any] = {}
    measured = {"clip_sec": 1.0, "peak_memory_gib": 1.0}
    for name in ("ttft_sec", "tpot_sec", "decode_sec", "features_sec", "total_sec", "rtfx", "tokens_per_sec"):
        measured[name] = efficiency.spread([1.0])

    def load(generation: Any) -> tuple[Any, int]:
        seen["generation"] = generation
        return torch.nn.Linear(1, 1), 0

    def count(loaded: Any, sample: Sample, **options: Any) -> tuple[dict[str, Any], dict[str, float]]:
        ids = loaded.front_end.prompt_ids(sample, 16_000)
        seen.update(options, sample=sample, clip=soundfile.read(sample.audio_path)[0], ids=ids)
        old = {"ttft_sec": 1.0, "tpot_sec": 1.0, "inference_sec": 2.0, "num_runs": 1}
        return {**measured, "batch_size": options["batch_size"]}, old

    monkeypatch.setattr(efficiency_job, "load_model", load)
    monkeypatch.setattr(efficiency_job, "measure", count)
    return seen


def test_flags_reach_the_measurement(
    job: Job, asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job("--bf16", "--tf32", batch_sizes="4", new_tokens="20", warmup="7", repeats="9", clip_sec="2", language="en")
    generation = asked["generation"]
    assert (generation.model_id, generation.bf16, generation.fp16, generation.tf32) == (TINY, True, False, True)
    assert "--tf32 has no effect" in capsys.readouterr().out
    assert [asked[name] for name in ("batch_size", "new_tokens", "warmup", "repeats")] == [4, 20, 7, 9]
    noise, prompt = asked["clip"], FAMILY.front_end(TINY).show(asked["ids"])
    assert len(noise) == 32_000 and "lang:en" in prompt
    job(clip_sec="2")
    assert np.array_equal(asked["clip"], noise)
    job(clip_sec="2", seed="1")
    assert not np.array_equal(asked["clip"], noise)
    job("--fp16", clip_sec="", audio_path=str(SPEECH / "sample.wav"), task="sqa", question="What is it?")
    assert asked["generation"].fp16 and asked["sample"].audio_path == str(SPEECH / "sample.wav")
    assert "What is it?" in FAMILY.front_end(TINY).show(asked["ids"])
    job(quantize="4bit", output_dir="own", storage_path=str(tmp_path / "shared"))
    assert asked["generation"].quantize == "4bit" and (tmp_path / "shared/own/efficiency.json").is_file()
    job("--trim_audio_tokens")
    assert len(asked["ids"]) < 60, "a second of audio has few tokens of its own"


def test_an_adapter_brings_its_base(job: Job, asked: dict[str, Any], tmp_path: Path) -> None:
    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    model = add_lora(base, FAMILY, ("projector",), model_id=TINY, r=2, alpha=4, dropout=0.0)
    save_adapter(model, tmp_path / "adapter")
    report = job(model_id="", lora_dir=str(tmp_path / "adapter"))
    assert report["model_id"] == TINY and asked["generation"].adapter == str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"model_id": WHISPER, "clip_sec": "5"}, SettingsError, "whisper hears a clip of over 4 s window by window"),
        ({"model_id": WHISPER, "new_tokens": "128"}, SettingsError, "--new_tokens 128: 132 tokens with the prompt"),
        ({"clip_sec": "", "audio_path": "no.wav"}, RunError, "--audio_path .*no.wav: no such file"),
        ({"clip_sec": "", "audio_path": __file__}, RunError, "--audio_path: "),
        ({"model_id": WHISPER, "language": "zz"}, RunError, "language 'zz' is none of"),
        ({"compiled": "nowhere"}, RunError, "--compiled .*nowhere: no compiled.json that can be read"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    flags: dict[str, str], error: type[Exception], message: str, job: Job
) -> None:
    with pytest.raises(error, match=message) as told:
        job(**flags)
    assert "\n" not in str(told.value)


def test_a_batch_that_the_compiled_path_was_not_made_for_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "compiled.json").write_text(json.dumps({"format": 1, "windows": {"1": {}, "4": {}}}))
    with pytest.raises(SettingsError, match=r"--batch_sizes 3: has 3 window\(s\), and .* is compiled for 1, 4"):
        job(compiled=str(tmp_path), batch_sizes="1,3")
    with pytest.raises(SettingsError, match=r"--batch_sizes 1: has 2 window\(s\)"):
        job(compiled=str(tmp_path), clip_sec="5")


def test_compare_runs_every_variant_in_a_process_of_its_own(
    job: Job, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = []

    def run(command: list[str], **options: Any) -> Any:
        settings = parse_only("efficiency", command[2:])
        given.append((settings.quantize, settings.compiled, settings.compare))
        if settings.quantize == "8bit":
            return SimpleNamespace(returncode=1, stderr="a warning\nerror: --quantize 8bit: no\n")
        run_efficiency(settings.model_copy(update={"compiled": ""}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(efficiency_job, "subprocess", SimpleNamespace(run=run))
    report = job(compare="eager,4bit,compiled", compiled=str(tmp_path))
    assert given == [("none", "", ()), ("4bit", "", ()), ("none", str(tmp_path), ())]
    assert list(report["variants"]) == ["eager", "4bit", "compiled"]
    written = yaml.safe_load((tmp_path / "out" / "4bit" / "settings.yaml").read_text())
    assert written["output_dir"] == str(tmp_path / "out" / "4bit") and written["repeats"] == 2
    with pytest.raises(RunError, match=r"--compare 8bit: --quantize 8bit: no \(exit status 1\)"):
        job(compare="8bit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--compare eager,fast", "--compare fast: must be of eager, compiled, 8bit, 4bit"),
        ("--compare compiled", "--compare compiled: needs --compiled"),
        ("--compare eager --quantize 8bit", "--quantize 8bit: name it in --compare"),
        ("--audio_path a.wav --clip_sec 3", "--audio_path and --clip_sec: give one of them"),
        ("--question what", "--question: --task asr asks nothing"),
        ("--task sqa", "--task sqa: needs --question"),
        ("--task tqa", "must be one of asr, sqa, aac"),
        ("--new_tokens 8", "--new_tokens: "),
        ("--batch_sizes 0,2", "--batch_sizes: "),
    ],
)
def test_settings_that_make_no_sense(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_job("efficiency").main(line.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and "Traceback" not in said


@pytest.mark.slow
def test_variants_are_really_measured(job: Job) -> None:
    report = job(compare="eager,8bit,4bit", new_tokens="16")
    names = {name: found["quantize"] for name, found in report["variants"].items()}
    assert names == {"eager": "none", "8bit": "8bit", "4bit": "4bit"}
    for flag, dtype in (("--bf16", "bfloat16"), ("--fp16", "float16")):
        report = job(flag)
        assert report["dtype"] == dtype and report["results"][0]["tpot_sec"]["median"] > 0
