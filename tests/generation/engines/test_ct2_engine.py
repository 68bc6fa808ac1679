"""CTranslate2's answers against those of transformers with the same base, prompts and features."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import TINY, WHISPER, manifest, read_rows, write_rows

from voxray.audio.decode import decode
from voxray.commands.export import run_export
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation.distribute import answer_key, answer_rows
from voxray.evaluation.predictions import read_predictions
from voxray.features.context import with_context
from voxray.features.reader import FeatureRow, Features
from voxray.generation.engines.ct2_engine import Ct2Engine
from voxray.generation.engines.load import check_engine, load_engine
from voxray.generation.generate import Completion, SamplingParams
from voxray.generation.model import InferenceConfig
from voxray.models.registry import get_family

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 40


def export(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"model_id": WHISPER, "format": "ct2", "output_dir": str(folder), **changes}
    return run_export(ExportSettings.model_validate(values))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ct2") / "e"
    report = export(folder)
    assert report["difference_on_disk"] < 1e-5 and report["dtype"] == "float32"
    return str(folder)


@pytest.fixture(scope="module")
def features(make_features: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Speech, one translation, and recordings of several windows."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [*read_rows(manifest("base.val"))[:6], *read_rows(manifest("asr.val"))[:4]]
    clips = [decode(row["audio_path"], 16_000) for row in read_rows(manifest("base.val")) if row["language"] == "en"]
    for number, seconds in enumerate((6, 21, 13)):
        path = folder / f"{number}.wav"
        soundfile.write(path, np.resize(np.concatenate(clips), seconds * 16_000), 16_000)
        rows.append({"audio_path": str(path), "transcript": "a long recording", "language": "en"})
    translated = {**rows[1], "translation": "text", "target_language": "en"}
    translated.pop("transcript")
    return Features(make_features(write_rows(folder / "m.jsonl", [*rows, translated]), model_id=WHISPER))


@pytest.fixture(scope="module")
def rows(features: Features) -> list[FeatureRow]:
    return [features.row(number) for number in range(len(features))]


def config(model_id: str, engine: str = "ct2", limit: int = LIMIT, **sampling: Any) -> InferenceConfig:
    return InferenceConfig(model_id, "", SamplingParams(limit, **sampling), 3, engine=engine)


def answers(settings: InferenceConfig, rows: list[FeatureRow], batch_size: int = 3) -> list[Completion]:
    front_end = get_family(settings.model_id).front_end(settings.model_id)
    engine, _ = load_engine(settings, front_end)
    completions = dict(engine.generate(rows, batch_size))
    return [replace(completions[index], sec=0.0) for index in range(len(rows))]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_those_of_transformers(exported: str, rows: list[FeatureRow], batch_size: int) -> None:
    """A translation, and recordings window by window, with times. tests/real has detected languages."""
    expected = answers(config(WHISPER, "transformers"), rows)
    assert answers(config(exported), rows, batch_size) == expected
    assert max(row.num_windows for row in rows) > 3 and all(each.text for each in expected)


@pytest.mark.parametrize("limit", [1, 3, 4, 5])
def test_answers_are_cut_off_at_the_same_token(exported: str, rows: list[FeatureRow], limit: int) -> None:
    short = [row for row in rows if row.num_windows == 1]
    expected = answers(config(WHISPER, "transformers", limit), short)
    assert answers(config(exported, limit=limit), short) == expected and any(each.hit_max for each in expected)


def test_a_limit_beyond_the_positions_of_the_model(exported: str, rows: list[FeatureRow]) -> None:
    short = [row for row in rows if row.num_windows == 1]
    texts = [each.text for each in answers(config(exported, limit=10_000), short)]
    assert texts == [each.text for each in answers(config(WHISPER, "transformers", 10_000), short)]


def test_contexts(exported: str, rows: list[FeatureRow]) -> None:
    """A context stands before every prompt of a row, also of one with several windows."""
    front_end = get_family(WHISPER).front_end(WHISPER)
    with_terms = [with_context(rows[index], "the patient has a fever", front_end) for index in (1, 2, 11)]
    assert answers(config(exported), with_terms) == answers(config(WHISPER, "transformers"), with_terms)


def test_beams(exported: str, rows: list[FeatureRow]) -> None:
    """CTranslate2 stops its search by another rule, so scores decide, and most texts are the same."""
    short = [row for row in rows if row.num_windows == 1]
    ours = [each.text for each in answers(config(WHISPER, "transformers", num_beams=3), short)]
    texts = [each.text for each in answers(config(exported, num_beams=3), short)]
    assert sum(a == b for a, b in zip(ours, texts, strict=True)) >= len(short) - 1


def test_an_evaluation_answers_with_it(exported: str, features: Features, tmp_path: Path) -> None:
    numbers = range(len(features))
    for name, settings in (("ct2", config(exported)), ("transformers", config(WHISPER, "transformers"))):
        answer_rows(settings, features.folders, numbers, tmp_path / name, use_ray=False)
    texts = [[row["prediction"] for row in read_predictions(tmp_path / name)] for name in ("ct2", "transformers")]
    assert texts[0] == texts[1]


def test_the_key_names_the_engine(exported: str, features: Features) -> None:
    keys = {answer_key(config(exported, engine), features, []) for engine in ("ct2", "transformers", "vllm")}
    assert len(keys) == 3


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_smaller_types(dtype: str, rows: list[FeatureRow], tmp_path: Path) -> None:
    """Files are smaller; most answers stay the same."""
    export(tmp_path / "f32")
    report = export(tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("f32", dtype)]
    assert report["dtype"] == dtype and sizes[1] < 0.7 * sizes[0]
    short = [row for row in rows if row.num_windows == 1]
    expected = [each.text for each in answers(config(WHISPER, "transformers"), short)]
    same = sum(a == each.text for a, each in zip(expected, answers(config(str(tmp_path / dtype)), short), strict=True))
    assert same >= len(short) / 2


def test_faster_whisper_reads_the_folder(exported: str, rows: list[FeatureRow]) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    model = faster_whisper.WhisperModel(exported, device="cpu", compute_type="float32", cpu_threads=1)
    assert model.hf_tokenizer.token_to_id("<|startoftranscript|>") == get_family(WHISPER).front_end(WHISPER).start_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": TINY}, "--format ct2: whisper models only, not voxtral"),
        ({"format": "hf"}, "without --lora_dir there is nothing to merge"),
        ({"format": "official"}, "--format official: needs --lora_dir"),
        ({"format": "mistral", "model_id": TINY, "dtype": "int8"}, "--dtype int8: must be one of base, float32"),
    ],
)
def test_what_cannot_be_exported_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        export(tmp_path / "e", **changes)
    assert not (tmp_path / "e").exists()


def test_what_the_engine_cannot_do_is_one_line(exported: str) -> None:
    cases = {
        f"{WHISPER} has no model.bin": config(WHISPER),
        "Whisper models only, not voxtral": config(TINY),
        "takes no adapter beside the model": replace(config(exported), adapter="a"),
    }
    for message, settings in cases.items():
        with pytest.raises(SettingsError, match=message):
            check_engine(settings)
    with pytest.raises(RunError, match=r"a CTranslate2 model .* with --engine ct2"):
        answers(config(exported, "transformers"), [])


def test_a_missing_library_is_one_line(exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxray.models.whisper.ct2_format.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'voxray\[ct2\]'"):
        Ct2Engine.check(config(exported))
