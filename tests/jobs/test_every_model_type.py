"""Jobs that are not tested with each model type elsewhere, with a tiny base of every one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from conftest import write_rows
from helpers import audio_lm_tiny, audio_seq2seq_tiny
from helpers.audio_lm_rows import noise
from helpers.running import load_job, parse_only, start

from voxray.commands.infer import run_inference
from voxray.config.demo import DemoSettings
from voxray.config.evaluate import InferSettings
from voxray.demo.answers import DemoRequest, open_model

SEQ2SEQ = tuple(audio_seq2seq_tiny.BASES)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=[*audio_lm_tiny.BASES, *SEQ2SEQ])
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    write = audio_seq2seq_tiny.write_tiny_seq2seq if model_type in SEQ2SEQ else audio_lm_tiny.write_tiny
    return write(tmp_path_factory.mktemp("bases") / model_type, model_type)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rows = tmp_path_factory.mktemp("rows"), []
    for number, length in enumerate((9_000, 24_321, 16_000, 40_001)):
        soundfile.write(folder / f"{number}.wav", noise(length), 16_000, subtype="PCM_16")
        rows.append({"audio_path": str(folder / f"{number}.wav"), "transcript": f"one {number}", "language": "en"})
    return write_rows(folder / "rows.jsonl", rows)


@pytest.fixture
def run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation_here: None
) -> Callable[[str, str], None]:
    """Run a job with the base in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda job, line: load_job(job).main(["--model_id", base, *line.split()])


def test_audit_and_efficiency(run: Callable[[str, str], None], manifest: str, tmp_path: Path) -> None:
    run("audit", f"--input {manifest} --output_dir audit")
    assert "tokens" in (tmp_path / "audit" / "report.html").read_text()
    run(
        "efficiency", "--repeats 1 --warmup 0 --clip_sec 2 --new_tokens 16 --batch_sizes 1 --language en --output_dir e"
    )
    assert json.loads((tmp_path / "e" / "efficiency.json").read_text())


def test_the_demo_answers_as_infer(base: str, manifest: str) -> None:
    flags = {"model_id": base, "max_new_tokens": 8}
    clip = json.loads(Path(manifest).read_text().splitlines()[1])["audio_path"]
    model = open_model(DemoSettings.model_validate(flags))[0]
    [answer] = list(model.answers(DemoRequest(audio_path=clip, language="en")))
    [row] = run_inference(InferSettings.model_validate({**flags, "audio_path": clip, "language": "en"}), "")
    assert answer.text == row["prediction"]


@pytest.mark.ray
@pytest.mark.parametrize("model_type", ["qwen3_asr", "moonshine"], indirect=True, scope="module")
def test_a_sweep_and_a_comparison(
    run: Callable[[str, str], None], model_type: str, base: str, manifest: str, tmp_path: Path
) -> None:
    recipe = "whisper" if model_type in SEQ2SEQ else "asr_adapter"
    line = f"--model_id {base} --recipe {recipe} --train_jsonl {manifest} --val_jsonl {manifest} --num_workers 1"
    line += " --max_steps 2 --metric asr/loss --eval_max_new_tokens 4 --eval_steps 1 --max_concurrent_trials 1"
    process = start("tune", [*line.split(), "--output_dir", f"{tmp_path}/sweep", "--space", "{lora_r: [2, 4]}"])
    assert process.returncode == 0, process.stdout + process.stderr
    best = parse_only(f"train_{recipe}", ["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert best.lora_r in (2, 4) and best.model_id == base
    adapter = next((tmp_path / "sweep").glob("**/adapter"))
    for name, flags in (("before", ""), ("after", f"--lora_dir {adapter}")):
        run("evaluate", f"--val_jsonl {manifest} --gen_max_new_tokens 4 {flags} --output_dir {name}")
    process = start("compare", [f"{tmp_path}/before", f"{tmp_path}/after", "--output_dir", f"{tmp_path}/compared"])
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "compared" / "comparison.html").is_file()
