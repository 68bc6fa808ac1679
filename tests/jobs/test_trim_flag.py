"""--trim_audio_tokens from training to evaluation, export and the next stage: prompts are built as in training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SPEECH, TINY, read_rows, write_rows
from helpers.running import parse_only

from voxray.commands import evaluate as job
from voxray.commands import infer
from voxray.commands import train as launch
from voxray.commands.audit import run_audit_job
from voxray.commands.export import run_export
from voxray.config.audit import AuditSettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.config.featurize import FeaturizeSettings
from voxray.core.errors import RunError, SettingsError
from voxray.features.extract import Extractor
from voxray.features.from_settings import feature_spec
from voxray.features.reader import Features
from voxray.models.adapters.audio_trim_record import RECORD
from voxray.models.registry import get_family
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = str(SPEECH / "sample.wav")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a training job for two steps on rows with audio and without; returns the run folder."""
    folder = tmp_path_factory.mktemp("trim")
    mixed = [row for task in ("asr", "sqa", "tqa") for row in read_rows(small[f"{task}.train"])[:4]]
    train = write_rows(folder / "train.jsonl", mixed)

    def run(job_name: str = "train_multitask", *flags: str) -> Path:
        out = folder / f"run{len(list(folder.glob('run*')))}"
        usual = {"model_id": TINY, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "2"}
        usual |= {"train_jsonl": train, "lr": "1e-2", "per_device_bsz": "4", "grad_accum": "1", "lora_r": "4"}
        usual |= {"lora_alpha": "8", "output_dir": str(out), "lora_dropout": "0"}
        argv = [word for key, value in usual.items() for word in (f"--{key}", value)]
        launch.run_training(parse_only(job_name, [*argv, *flags]))
        return out

    return run


@pytest.fixture(scope="module")
def trimmed(run: Run) -> Path:
    return run("train_multitask", "--trim_audio_tokens")


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    return run("train_multitask")


@pytest.fixture
def shown_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that is built, as text."""
    prompts: list[str] = []
    sample_rows = Extractor.sample_rows

    def record(extractor: Any, sample: Any, **options: Any) -> Any:
        rows, clip = sample_rows(extractor, sample, **options)
        prompts.append(extractor.front_end.show(rows[0]["prompt_ids"]))
        return rows, clip

    monkeypatch.setattr(Extractor, "sample_rows", record)
    return prompts


@pytest.fixture
def evaluate(
    small: dict[str, str], tmp_path: Path, evaluation_here: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Features]:
    """Run the evaluate job on four clips; returns the features that it used."""
    used: list[Features] = []

    def record(generation: Any, folders: Any, *args: Any, **options: Any) -> Any:
        used.append(Features(folders))
        assert generation.trim_audio == (used[-1].num_prompt_tokens.min() < 54)
        return real(generation, folders, *args, **options)

    real = job.answer_rows
    monkeypatch.setattr(job, "answer_rows", record)

    def run(**flags: Any) -> Features:
        usual = {"model_id": TINY, "val_jsonl": (small["asr.val"],), "output_dir": str(tmp_path / f"e{len(used)}")}
        usual |= {"gen_max_new_tokens": 2, "features_dir": str(tmp_path / "features")}
        job.run_evaluation(EvaluateSettings.model_validate({**usual, **flags}))
        return used[-1]

    return run


def recorded(run_dir: Path) -> Any:
    return json.loads((run_dir / "adapter" / RECORD).read_text())["trim_audio_tokens"]


def test_training_uses_shorter_rows_and_records_it(trimmed: Path, whole: Path) -> None:
    assert recorded(trimmed) is True and recorded(whole) is False
    newest = sorted((trimmed / "checkpoints").iterdir())[-1]
    assert json.loads((newest / RECORD).read_text()) == {"trim_audio_tokens": True}
    first = [read_metrics(folder, "train")[0]["loss"] for folder in (trimmed, whole)]
    assert first[0] != first[1] and max(first) < 20
    shown = [
        next(line for line in (folder / "train.log").read_text().splitlines() if line.startswith("  asr:"))
        for folder in (trimmed, whole)
    ]
    assert "[AUDIO]x50" in shown[1] and "[AUDIO]x50" not in shown[0] and "[AUDIO]x" in shown[0]


@pytest.mark.parametrize("flags", ["--batching packed --pack_tokens 300", "--store pcm16", "--store encoder"])
def test_training_packed_and_from_every_store(run: Run, trimmed: Path, flags: str) -> None:
    run_dir = run("train_multitask", "--trim_audio_tokens", *flags.split(), "--cache_dtype", "float32")
    losses = [record["loss"] for record in read_metrics(run_dir, "train")]
    assert recorded(run_dir) is True and len(losses) == 2
    if "packed" not in flags:  # the same rows in the same order
        expected = [record["loss"] for record in read_metrics(trimmed, "train")]
        assert losses == pytest.approx(expected, abs=1e-3 if "pcm16" in flags else 1e-5)


def test_evaluation_builds_prompts_as_in_training(
    evaluate: Callable[..., Features], trimmed: Path, whole: Path, tmp_path: Path
) -> None:
    base = evaluate()
    assert base.num_prompt_tokens.tolist() == evaluate(lora_dir=str(whole)).num_prompt_tokens.tolist()
    features = evaluate(lora_dir=str(trimmed))
    assert (features.num_prompt_tokens < base.num_prompt_tokens).all()
    again = evaluate(lora_dir=str(trimmed), trim_audio_tokens=True)
    assert again.folders == features.folders == evaluate(trim_audio_tokens=True).folders != base.folders
    stored = json.loads((tmp_path / "e2" / "settings.json").read_text())
    assert stored["trim_audio_tokens"] is True, "the settings record what was used"
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .*adapter was trained with it; leave the flag out"):
        evaluate(lora_dir=str(trimmed), trim_audio_tokens=False)
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .*adapter was trained without it"):
        evaluate(lora_dir=str(whole), trim_audio_tokens=True)


def test_infer_builds_prompts_as_in_training(trimmed: Path, whole: Path, shown_prompts: list[str]) -> None:
    def ask(**flags: Any) -> str:
        values = {"model_id": TINY, "audio_path": CLIP, "max_new_tokens": 2, **flags}
        infer.run_inference(InferSettings.model_validate(values), "")
        return shown_prompts[-1]

    base = ask()
    assert "[AUDIO]x50" in base and ask(lora_dir=str(whole)) == base
    assert ask(lora_dir=str(trimmed)) == ask(trim_audio_tokens=True) != base
    (whole / "adapter" / RECORD).rename(whole / "adapter" / "elsewhere")
    assert ask(lora_dir=str(whole)) == base, "an adapter without a record was trained on whole windows"
    (whole / "adapter" / RECORD).write_text("{}")
    with pytest.raises(RunError, match=r"voxray\.json: cannot read how the adapter was trained"):
        ask(lora_dir=str(whole))
    (whole / "adapter" / "elsewhere").replace(whole / "adapter" / RECORD)


def test_an_exported_model_records_it(trimmed: Path, whole: Path, shown_prompts: list[str], tmp_path: Path) -> None:
    def export(adapter: Path, name: str, **more: Any) -> Path:
        values = {"lora_dir": str(adapter), "output_dir": str(tmp_path / name), **more}
        report = run_export(ExportSettings.model_validate(values))
        assert report["trim_audio_tokens"] == (adapter == trimmed) and report["difference_on_disk"] < 1e-4
        return tmp_path / name

    out = export(trimmed, "a")
    assert json.loads((out / "config.json").read_text())["trim_audio_tokens"] is True
    assert "trim_audio_tokens" not in json.loads((export(whole, "b") / "config.json").read_text())
    infer.run_inference(InferSettings(model_id=str(out), audio_path=CLIP, max_new_tokens=2), "")
    assert "[AUDIO]x50" not in shown_prompts[-1] and "[AUDIO]x" in shown_prompts[-1]
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .*a was trained with it"):
        values = {"model_id": str(out), "audio_path": CLIP, "trim_audio_tokens": False}
        infer.run_inference(InferSettings.model_validate(values), "")
    half = export(trimmed, "c", merge="projector")
    assert json.loads((half / "adapter" / RECORD).read_text())["trim_audio_tokens"] is True


def test_stages_must_agree(run: Run, trimmed: Path, whole: Path) -> None:
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .*was trained with it; give it here too"):
        run("train_asr_adapter", "--init_adapter", str(trimmed))
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .*was trained without it"):
        run("train_asr_adapter", "--init_adapter", str(whole), "--trim_audio_tokens")
    text = run("train_text")
    assert recorded(text) is None, "a text stage records nothing"
    assert recorded(run("train_asr_adapter", "--init_adapter", str(text), "--trim_audio_tokens")) is True
    assert recorded(run("train_text", "--init_adapter", str(trimmed))) is True, (
        "the value of the audio stage is passed on"
    )


def test_featurize_and_audit_count_tokens_as_training_does(small: dict[str, str], tmp_path: Path) -> None:
    values = {"model_id": TINY, "manifest": small["asr.val"], "trim_audio_tokens": True}
    extractor = Extractor(TINY, feature_spec(FeaturizeSettings.model_validate(values), bf16=False))
    assert extractor.fingerprint != Extractor(TINY).fingerprint
    assert extractor.front_end.fingerprint == get_family(TINY).front_end(TINY, trim_audio=True).fingerprint
    tokens = []
    for flag in (False, True):
        values = {"model_id": TINY, "input": small["asr.val"], "output_dir": str(tmp_path / str(flag))}
        figures = run_audit_job(AuditSettings.model_validate({**values, "trim_audio_tokens": flag}), use_ray=False)
        tokens.append(figures["tasks"]["asr"]["num_tokens"]["max"])
    assert tokens[1] < tokens[0]
