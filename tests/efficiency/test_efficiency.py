"""jobs/efficiency.py: the times in every metric, measured by a fake clock that only the model advances; the report, the
flags and the error messages on the tiny models."""

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
from voxray.models.parts.compiled_audio import FORMAT
from voxray.models.registry import get_family

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FAMILY = get_family(TINY)
VOCABULARY = 8
PREFILL_SEC, FIRST_STEP_SEC, STEP_SEC, SYNC_SEC = 0.3, 0.02, 0.005, 0.001


class FakeClock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedFamily:
    """A family, and its decode state, with a known duration of every call."""

    name = "timed"

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.num_prefills, self.num_steps = clock, 0, 0

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple["TimedFamily", torch.Tensor]:
        self.clock.now += PREFILL_SEC
        self.num_prefills, self.is_first = self.num_prefills + 1, True
        return self, torch.zeros(len(batch["input_ids"]), VOCABULARY)

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self.clock.now += FIRST_STEP_SEC if self.is_first else STEP_SEC
        self.is_first, self.num_steps = False, self.num_steps + 1
        return torch.zeros(len(ids_B), VOCABULARY)


class SlowSync(LoadedModel):
    """A device that finishes its work a moment after it was submitted."""

    def synchronise(self) -> None:
        self.family.clock.now += SYNC_SEC  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000 * 3).astype(np.float32), 16_000)
    return Sample("clip", TASKS["asr"], "", "", str(path), "ko", "")


@pytest.mark.parametrize(("batch_size", "new_tokens"), [(1, 16), (3, 40)])
def test_every_time_is_in_its_metric(
    batch_size: int, new_tokens: int, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    family = TimedFamily(clock)
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=clock))
    loaded = SlowSync(None, family, FAMILY.front_end(TINY), CPU)  # type: ignore[arg-type]
    entry, old = measure(loaded, sample, batch_size=batch_size, new_tokens=new_tokens, warmup=2, repeats=3)
    assert family.num_prefills == 5 and family.num_steps == 5 * (new_tokens - 1), "end-of-text tokens are ignored"
    assert entry["ttft_sec"]["values"] == pytest.approx([PREFILL_SEC + SYNC_SEC] * 3), "prefill and synchronisation"
    steps = [FIRST_STEP_SEC + SYNC_SEC] + [STEP_SEC + SYNC_SEC] * (new_tokens - 2)
    assert entry["tpot_sec"]["median"] == pytest.approx(statistics.fmean(steps)), "the mean over all steps"
    # one synchronisation before the model's clock starts: the features' tensors may still be copied
    total = PREFILL_SEC + sum(steps) + 2 * SYNC_SEC
    assert entry["total_sec"]["median"] == pytest.approx(total)
    assert entry["clip_sec"] == pytest.approx(3) and entry["num_windows"] == batch_size
    assert entry["rtfx"]["median"] == pytest.approx(3 * batch_size / total)
    assert entry["rtfx_model_only"]["median"] == pytest.approx(3 * batch_size / (total - SYNC_SEC))
    assert entry["tokens_per_sec"]["median"] == pytest.approx(batch_size * new_tokens / (total - SYNC_SEC))
    assert (entry["num_new_tokens"], entry["num_steps"]) == (batch_size * new_tokens, new_tokens - 1)
    expected = {"ttft_sec": PREFILL_SEC, "tpot_sec": FIRST_STEP_SEC, "num_runs": 3}
    expected["inference_sec"] = PREFILL_SEC + FIRST_STEP_SEC
    assert old == pytest.approx(expected), "a single step, without synchronisation"


def test_a_slow_encoder_and_slow_steps_show(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    model.model.audio_tower.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    prefill = type(FAMILY).prefill

    def slow(self: Any, *args: Any) -> Any:
        state, logits_BV = prefill(self, *args)
        step = state.decode_step
        state.decode_step = lambda ids_B: (time.sleep(0.005), step(ids_B))[1]  # type: ignore[method-assign]
        return state, logits_BV

    monkeypatch.setattr(type(FAMILY), "prefill", slow)
    loaded = LoadedModel(model, FAMILY, FAMILY.front_end(TINY), CPU)
    entry, _ = measure(loaded, sample, batch_size=2, new_tokens=16, warmup=0, repeats=2)
    assert min(entry["ttft_sec"]["values"]) >= 0.2 and min(entry["tpot_sec"]["values"]) >= 0.005
    assert entry["decode_sec"]["median"] > 0 and entry["features_sec"]["median"] > 0


def test_peak_memory_can_be_reset() -> None:
    memory = PeakMemory(CPU)
    memory.reset()
    if memory.kind != RESIDENT:
        pytest.skip("this system does not allow a process to reset its peak memory")
    before_gib = memory.current_gib()
    block = np.ones(300 << 20, np.uint8)
    del block
    assert 0.25 < memory.peak_gib() - before_gib < 0.4
    memory.reset()
    assert memory.peak_gib() < before_gib + 0.1


Job = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run the job in this process on a tiny model; returns its report."""

    def run(*flags: str, **values: str) -> dict[str, Any]:
        defaults = {"model_id": TINY, "output_dir": str(tmp_path / "out"), "clip_sec": "3", "new_tokens": "16"}
        defaults |= {"warmup": "0", "repeats": "2", "batch_sizes": "1"}
        argv = [word for key, value in (defaults | values).items() if value for word in (f"--{key}", value)]
        return run_efficiency(parse_only("efficiency", [*argv, *flags]))

    return run


@pytest.mark.slow
def test_report_of_every_family(job: Job, salmonn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model_id in (TINY, WHISPER, salmonn):
        report = job(model_id=model_id, batch_sizes="2,1")
        folder = tmp_path / "out"
        assert json.loads((folder / "efficiency.json").read_text()) == json.loads(json.dumps(report))
        assert (folder / "efficiency.png").read_bytes().startswith(b"\x89PNG") and (folder / "clip.wav").is_file()
        assert report["dtype"] == "float32" and report["quantize"] == "none" and report["family"] in model_id
        assert [result["batch_size"] for result in report["results"]] == [1, 2]
        for result in report["results"]:
            for name in ("ttft_sec", "tpot_sec", "decode_sec", "features_sec", "total_sec", "rtfx", "tokens_per_sec"):
                spread = result[name]
                assert 0 < spread["low"] <= spread["median"] <= spread["high"] and len(spread["values"]) == 2
            assert result["peak_memory_gib"] >= result["memory_held_before_gib"] > 0
        old = report["old_evaluator"]
        assert old["memory_gib"] is None, "it measured GPU memory only"
        assert old["inference_sec"] == pytest.approx(old["ttft_sec"] + old["tpot_sec"])
        output = " ".join(capsys.readouterr().out.split())
        assert "as the older evaluator counted (means of 2 runs" in output and "TPOT, of one single step" in output
    assert job(batch_sizes="2")["old_evaluator"] is None
    assert "add 1 to --batch_sizes" in capsys.readouterr().out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments with which the job loads and measures a model; neither is executed."""
    seen: dict[str, Any] = {}
    measured = {"clip_sec": 1.0, "peak_memory_gib": 1.0}
    for name in ("ttft_sec", "tpot_sec", "decode_sec", "features_sec", "total_sec", "rtfx", "tokens_per_sec"):
        measured[name] = efficiency.spread([1.0])

    def load(config: Any) -> tuple[Any, int]:
        seen["config"] = config
        return torch.nn.Linear(1, 1), 0

    def fake_measure(loaded: Any, sample: Sample, **options: Any) -> tuple[dict[str, Any], dict[str, float]]:
        ids = loaded.front_end.prompt_ids(sample, 16_000)
        seen.update(options, sample=sample, clip=soundfile.read(sample.audio_path)[0], ids=ids)
        old = {"ttft_sec": 1.0, "tpot_sec": 1.0, "inference_sec": 2.0, "num_runs": 1}
        return {**measured, "batch_size": options["batch_size"]}, old

    monkeypatch.setattr(efficiency_job, "load_model", load)
    monkeypatch.setattr(efficiency_job, "measure", fake_measure)
    return seen


def test_flags_reach_the_measurement(
    job: Job, recorded: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job("--bf16", "--tf32", batch_sizes="4", new_tokens="20", warmup="7", repeats="9", clip_sec="2", language="en")
    config = recorded["config"]
    assert (config.model_id, config.bf16, config.fp16, config.tf32) == (TINY, True, False, True)
    assert "--tf32 has no effect" in capsys.readouterr().out
    assert [recorded[name] for name in ("batch_size", "new_tokens", "warmup", "repeats")] == [4, 20, 7, 9]
    noise, prompt = recorded["clip"], FAMILY.front_end(TINY).show(recorded["ids"])
    assert len(noise) == 32_000 and "lang:en" in prompt
    job(clip_sec="2")
    assert np.array_equal(recorded["clip"], noise)
    job(clip_sec="2", seed="1")
    assert not np.array_equal(recorded["clip"], noise)
    job("--fp16", clip_sec="", audio_path=str(SPEECH / "sample.wav"), task="sqa", question="What is it?")
    assert recorded["config"].fp16 and recorded["sample"].audio_path == str(SPEECH / "sample.wav")
    assert "What is it?" in FAMILY.front_end(TINY).show(recorded["ids"])
    job(quantize="4bit", output_dir="own", storage_path=str(tmp_path / "shared"))
    assert recorded["config"].quantize == "4bit" and (tmp_path / "shared/own/efficiency.json").is_file()
    job("--trim_audio_tokens")
    assert len(recorded["ids"]) < 60, "a clip of one second has few audio tokens"


def test_an_adapter_names_its_base(job: Job, recorded: dict[str, Any], tmp_path: Path) -> None:
    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    model = add_lora(base, FAMILY, ("projector",), model_id=TINY, r=2, alpha=4, dropout=0.0)
    save_adapter(model, tmp_path / "adapter")
    report = job(model_id="", lora_dir=str(tmp_path / "adapter"))
    assert report["model_id"] == TINY and recorded["config"].adapter == str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"model_id": WHISPER, "clip_sec": "5"}, SettingsError, "whisper hears a clip of over 4 s window by window"),
        ({"model_id": WHISPER, "new_tokens": "128"}, SettingsError, "--new_tokens 128: 132 tokens with the prompt"),
        ({"clip_sec": "", "audio_path": "no.wav"}, RunError, "--audio_path .*no.wav: no such file"),
        ({"clip_sec": "", "audio_path": __file__}, RunError, "--audio_path: "),
        ({"model_id": WHISPER, "language": "ga"}, SettingsError, "--language: language 'ga' is none of the 99"),
        ({"compiled": "nowhere"}, RunError, "--compiled .*nowhere: no compiled.json that can be read"),
    ],
)
def test_errors_are_one_line(flags: dict[str, str], error: type[Exception], message: str, job: Job) -> None:
    with pytest.raises(error, match=message) as raised:
        job(**flags)
    assert "\n" not in str(raised.value)


def test_batch_sizes_must_match_the_compiled_path(job: Job, tmp_path: Path) -> None:
    (tmp_path / "compiled.json").write_text(json.dumps({"format": FORMAT, "windows": {"1": {}, "4": {}}}))
    with pytest.raises(SettingsError, match=r"--batch_sizes 3: has 3 window\(s\), and .* is compiled for 1, 4"):
        job(compiled=str(tmp_path), batch_sizes="1,3")
    with pytest.raises(SettingsError, match=r"--batch_sizes 1: has 2 window\(s\)"):
        job(compiled=str(tmp_path), clip_sec="5")


def test_compare_runs_every_variant_in_its_own_process(
    job: Job, recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    variants = []

    def run(command: list[str], **options: Any) -> Any:
        settings = parse_only("efficiency", command[2:])
        variants.append((settings.quantize, settings.compiled, settings.compare))
        if settings.quantize == "8bit":
            return SimpleNamespace(returncode=1, stderr="a warning\nerror: --quantize 8bit: no\n")
        run_efficiency(settings.model_copy(update={"compiled": ""}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(efficiency_job, "subprocess", SimpleNamespace(run=run))
    report = job(compare="eager,4bit,compiled", compiled=str(tmp_path))
    assert variants == [("none", "", ()), ("4bit", "", ()), ("none", str(tmp_path), ())]
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
def test_invalid_settings(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_job("efficiency").main(line.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and "Traceback" not in error


@pytest.mark.slow
def test_compare_measures_variants_in_subprocesses(job: Job) -> None:
    report = job(compare="eager,8bit,4bit", new_tokens="16")
    names = {name: variant["quantize"] for name, variant in report["variants"].items()}
    assert names == {"eager": "none", "8bit": "8bit", "4bit": "4bit"}
    for flag, dtype in (("--bf16", "bfloat16"), ("--fp16", "float16")):
        report = job(flag)
        assert report["dtype"] == dtype and report["results"][0]["tpot_sec"]["median"] > 0
