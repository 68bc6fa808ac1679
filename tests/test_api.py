"""The Python API and the command ``voxray``: the same results as the jobs, light imports, clear errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import soundfile
import yaml
from conftest import SPEECH, TINY, WHISPER, manifest, read_rows
from helpers.running import JOBS, ROOT, environment

import voxray
from voxray.audio.decode import decode
from voxray.cli import main
from voxray.commands.infer import run_inference
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.schema import yaml_schema
from voxray.config.train import MultitaskSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLE = str(SPEECH / "sample.wav")


def test_importing_voxray_is_light() -> None:
    """It imports neither torch nor Ray nor pydantic, so it takes a fraction of 0.2 s beyond Python's own start."""
    code = (
        "import sys, voxray; print(*sorted({'torch', 'ray', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert process.stdout == "\n", process.stdout + process.stderr
    assert min(seconds) < 2, "0.2 s on a machine with nothing else to do"


def test_train_then_transcribe(small: dict[str, str], tmp_path: Path) -> None:
    settings = {"train_jsonl": small["asr.train"], "val_jsonl": small["asr.val"], "max_steps": 2, "num_workers": 0}
    result = voxray.train(model_id=WHISPER, output_dir=str(tmp_path / "run"), language="ko", **settings)
    assert (result.steps, result.run_dir) == (2, tmp_path / "run")
    assert "asr/cer_nospace" in result.metrics and (result.adapter_dir / "adapter_model.safetensors").is_file()
    assert json.loads((result.run_dir / "settings.json").read_text())["model_id"] == WHISPER, "the Whisper recipe ran"
    model = voxray.load_model(lora_dir=result.run_dir, max_new_tokens=12)
    job = InferSettings(lora_dir=str(result.run_dir), audio_path=SAMPLE, language="ko", max_new_tokens=12)
    [entry] = run_inference(job, "")
    assert model.transcribe(SAMPLE, language="Korean") == entry["prediction"]


def test_transcribe_takes_files_and_samples(tmp_path: Path) -> None:
    model = voxray.load_model(TINY, max_new_tokens=16, batch_size=3)
    text = model.transcribe(SAMPLE)
    samples, rate_hz = soundfile.read(SAMPLE, dtype="float32")
    assert text and text == model.transcribe(samples, sample_rate_hz=rate_hz) == model.transcribe(Path(SAMPLE))
    stereo = np.stack([samples, samples], axis=1)
    assert model.transcribe([SAMPLE, stereo, decode(SAMPLE, 16_000)], sample_rate_hz=rate_hz)[:2] == [text, text]
    assert model.transcribe([]) == []
    with pytest.raises(voxray.SettingsError, match="language: language 'Klingon' is not known"):
        model.transcribe(SAMPLE, language="Klingon")
    with pytest.raises(voxray.BadRow, match=r"absent\.wav"):
        model.transcribe(tmp_path / "absent.wav")
    (tmp_path / "noise.wav").write_text("not audio")
    with pytest.raises(voxray.BadRow, match=r"noise\.wav"):
        model.transcribe(tmp_path / "noise.wav")


def test_answers_equal_those_of_the_job() -> None:
    model = voxray.load_model(TINY, max_new_tokens=8)
    question = read_rows(manifest("sqa.val"))[0]
    job = InferSettings(
        model_id=TINY, audio_path=question["audio_path"], question=question["question"], max_new_tokens=8
    )
    [entry] = run_inference(job, "")
    assert model.answer(question["question"], question["audio_path"]) == entry["prediction"]
    [entry] = run_inference(InferSettings(model_id=TINY, question="What is 1 + 1?", max_new_tokens=8), "")
    assert model.answer("What is 1 + 1?") == entry["prediction"]


def test_evaluate_and_infer(evaluation_here: None, small: dict[str, str], tmp_path: Path) -> None:
    rows = {"model_id": TINY, "val_jsonl": small["tqa.val"], "gen_max_new_tokens": 4}
    result = voxray.evaluate(**rows, output_dir=str(tmp_path / "eval"))
    assert result.metrics["tqa"]["exact_match"]["n"] == 4 and (result.output_dir / "report.html").is_file()
    again = voxray.evaluate(score_only=str(tmp_path / "eval"), output_dir=str(tmp_path / "again"))
    assert again.metrics["tqa"]["exact_match"]["value"] == result.metrics["tqa"]["exact_match"]["value"]
    [entry] = voxray.infer(model_id=TINY, audio_path=SAMPLE, max_new_tokens=4)
    assert entry["task"] == "asr"


def test_wrong_settings_are_one_error_with_all_of_them() -> None:
    with pytest.raises(voxray.SettingsError) as caught:
        voxray.evaluate(val_jsnl="a.jsonl", per_device_bsz=0, batch_size="x")
    message = str(caught.value)
    assert "val_jsnl: unknown setting; did you mean val_jsonl?" in message and "--per_device_bsz" in message
    with pytest.raises(voxray.SettingsError, match="recipe 'no': not one of multitask, text"):
        voxray.train("no", train_jsonl="a.jsonl")


# the command voxray


def test_the_command_runs_jobs_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for line, status in (("train --check_flags", 0), ("train-text --check_flags", 0), ("evaluate --nothing", 2)):
        with pytest.raises(SystemExit) as end:
            main(line.split())
        assert end.value.code == status, capsys.readouterr()
    capsys.readouterr()
    for line in ("--version", "--help"):
        main([line])
    output = capsys.readouterr().out
    assert output.startswith(f"voxray {voxray.__version__}\n") and all(job in output for job in JOBS)
    for words in (["no_job"], ["schema"], ["schema", "no_job"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_module_runs_in_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "voxray", "train_text", "--help"]
    process = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.startswith("voxray train_text [--config FILE.yaml]"), process.stderr
    assert "    voxray train_text" in process.stdout and "python jobs" not in process.stdout


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_schema(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["schema", job])
    schema = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and schema["additionalProperties"] is False and len(schema["properties"]) > 1


def test_the_recipes_of_the_repository_fit_the_schemas() -> None:
    for model, pattern in ((MultitaskSettings, "train_multitask*.yaml"), (EvaluateSettings, "demo_evaluate.yaml")):
        schema = yaml_schema(model)
        jsonschema.Draft202012Validator.check_schema(schema)
        for path in (ROOT / "jobs" / "configs").glob(pattern):
            jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    schema = yaml_schema(MultitaskSettings)
    jsonschema.validate({"train_jsonl": "a.jsonl,b.jsonl", "learning_rate": 1e-3}, schema)
    for wrong in ({"train_jsnl": "a"}, {"bf16": "perhaps"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
