"""The best validation and early stopping, with a fake validation that returns given values."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from helpers.training import train as train_here
from pydantic import ValidationError

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.errors import SettingsError
from voxray.recipes.training_data import TrainingData
from voxray.training import validation_hook
from voxray.training.best_checkpoint import BestCheckpoint
from voxray.training.validate import Validation

LOSS = "tqa/loss"


def test_better_depends_on_the_metric_and_the_threshold() -> None:
    loss, score = BestCheckpoint(LOSS, patience=2, threshold=0.1), BestCheckpoint("tqa/rouge_l")
    assert loss.update(1, {LOSS: 0.5}) and not loss.update(2, {LOSS: 0.45}) and not loss.should_stop
    assert loss.update(3, {LOSS: 0.3}) and (loss.best_step, loss.num_bad_validations) == (3, 0)
    assert not loss.update(4, {LOSS: 0.9}) and not loss.update(5, {LOSS: math.nan}) and loss.should_stop
    assert score.update(1, {"tqa/rouge_l": 0.5}) and score.update(2, {"tqa/rouge_l": 0.6})
    assert not score.update(3, {"tqa/rouge_l": 0.1}) and not score.should_stop, "patience 0 never stops"


def test_a_validation_without_the_metric_is_not_better() -> None:
    """Rows whose references are all empty have no error rate."""
    best = BestCheckpoint("asr/cer", patience=2)
    assert best.update(1, {"asr/cer": 0.5}) and not best.update(2, {"asr/exact_match": 0.5})
    assert best.num_bad_validations == 1
    assert not best.update(3, {}) and best.num_bad_validations == 1, "no validation rows at all"


def test_the_state_survives_json() -> None:
    fresh, used = BestCheckpoint(LOSS), BestCheckpoint(LOSS, patience=3)
    used.update(2, {LOSS: 0.5})
    used.update(4, {LOSS: 0.7})
    for best in (fresh, used):
        loaded = BestCheckpoint(LOSS, patience=3)
        assert not loaded.load(json.loads(json.dumps(best.state(), allow_nan=False)), 4)
        assert loaded.state() == best.state()
    other = BestCheckpoint("asr/wer")
    other.load(used.state(), 4)
    assert (other.best_step, other.last_step) == (0, 4), "the best value of another metric is dropped"


def test_values_on_other_rows_are_dropped() -> None:
    used = BestCheckpoint(LOSS, rows="a")
    used.update(2, {LOSS: 0.5})
    other = BestCheckpoint(LOSS, rows="b")
    assert other.load(used.state(), 3)
    assert (other.best_step, other.last_step, other.first_step) == (0, 0, 3)
    earlier_version = {name: value for name, value in used.state().items() if name not in ("rows", "first_step")}
    assert not other.load(earlier_version, 3) and other.best_step == 2


def test_metrics_that_validation_lacks_are_refused() -> None:
    required = {"train_jsonl": "t", "output_dir": "o"}
    for flags in ({"load_best_model_at_end": True}, {"early_stopping_patience": 1}, {"metric_for_best_model": "asr/x"}):
        with pytest.raises(ValidationError, match=r"--val_jsonl|must be one of asr/cer_nospace"):
            MultitaskSettings.model_validate({**required, **flags})
        if "metric_for_best_model" not in flags:
            MultitaskSettings.model_validate({**required, **flags, "val_jsonl": "v"})


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> TrainingData:
    return TrainingData(make_features(small["tqa.train"]), make_features(small["tqa.val"]))


@pytest.fixture
def run(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Train on text rows with a validation after each of 6 steps; ``values`` are the losses of the validations."""

    def train(values: list[float], name: str = "run", data: TrainingData = data, **flags: Any) -> dict[str, Any]:
        losses = iter(values)
        monkeypatch.setattr(validation_hook, "validate", lambda *args, **options: Validation({LOSS: next(losses)}, {}))
        defaults = {"model_id": TINY, "train_jsonl": "unused", "val_jsonl": "unused", "num_workers": 0}
        defaults |= {"output_dir": str(tmp_path / name), "metric_for_best_model": LOSS, "preview_rows": 0}
        defaults |= {"max_steps": 6, "eval_steps": 1, "save_steps": 100}
        (tmp_path / name).mkdir(exist_ok=True)
        settings = MultitaskSettings.model_validate({**defaults, **flags})
        return train_here(settings, tmp_path / name, data, Worker())

    yield train


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_best_becomes_the_adapter(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = [0.9, 0.3, 0.2, 0.5, 0.6, 0.7]
    result = run(values, "best", load_best_model_at_end=True)
    assert (result["best"][LOSS], result["adapter_step"]) == ({"step": 3, "value": 0.2}, 3)
    folder = tmp_path / "best"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003", "step-000006"], "those of improvements, and the last"
    assert sha(folder / "adapter") == sha(folder / "checkpoints" / "step-000003")
    log = (folder / "train.log").read_text()
    assert f"best {LOSS}: 0.2000 at step 3" in log and "the adapter is that of step 3" in log
    assert run(values, "last")["adapter_step"] == 6
    assert sha(tmp_path / "last" / "adapter") == sha(folder / "checkpoints" / "step-000006")
    with pytest.raises(SettingsError, match="--metric_for_best_model asr/wer: validation has tqa/rouge_l, tqa/"):
        run(values, "other", metric_for_best_model="asr/wer")


def test_early_stopping_finishes_a_run(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = [0.5, 0.49, 0.2, 0.3, 0.4, 0.1]
    result = run(values, early_stopping_patience=2)
    assert (result["steps"], result["finished"], result["best"][LOSS]["step"]) == (5, True, 3)
    assert (
        f"early stopping at step 5: 2 validations without a better {LOSS}" in (tmp_path / "run/train.log").read_text()
    )
    assert run([], early_stopping_patience=2) == result, "the same command does not train any further"
    result = run(values, "strict", early_stopping_patience=1, early_stopping_threshold=0.1)
    assert (result["steps"], result["best"][LOSS]["step"]) == (2, 1), "0.49 is not better than 0.5 by 0.1"
    assert run([0.7, 0.7, 0.01, 0.02], "strict", early_stopping_patience=0)["best"][LOSS]["step"] == 5, (
        "it continues with other flags"
    )


def test_the_best_value_survives_a_kill(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the validation after step 5, the run resumes from step 3, the best checkpoint so far."""
    with pytest.raises(StopIteration):
        run([0.5, 0.4, 0.2, 0.3], early_stopping_patience=4)
    result = run([0.3, 0.4, 0.5], early_stopping_patience=4)
    whole = run([0.5, 0.4, 0.2, 0.3, 0.4, 0.5], "whole", early_stopping_patience=4)
    assert result == whole and sha(tmp_path / "run" / "adapter") == sha(tmp_path / "whole" / "adapter")


def test_a_resumed_run_first_does_a_missed_validation(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert not run([])["finished"], "it stops after step 1, saved but not validated"
    (tmp_path / "run" / "STOP").unlink()
    result = run([0.1, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert (result["best"][LOSS]["step"], result["finished"]) == (1, True)


@pytest.mark.parametrize("change", ["manifest", "eval_max_rows"])
def test_a_run_that_continues_with_other_validation_rows_chooses_the_best_anew(
    run: Callable[..., dict[str, Any]], data: TrainingData, tmp_path: Path, change: str
) -> None:
    """Else the run would compare values of different rows. The checkpoint that it continues from is validated again."""
    assert run([0.5, 0.1, 0.2], max_steps=3)["best"][LOSS]["step"] == 2
    flags = {"data": TrainingData(data.train, data.train)} if change == "manifest" else {"eval_max_rows": 1}
    result = run([0.9, 0.8, 0.7, 0.75], load_best_model_at_end=True, max_steps=6, **flags)
    assert (result["best"][LOSS], result["adapter_step"]) == ({"step": 5, "value": 0.7}, 5)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "the validation rows are others than before, so the best checkpoint is chosen anew" in log
    assert run([], load_best_model_at_end=True, max_steps=6, **flags) == result
    assert (tmp_path / "run" / "train.log").read_text().count("chosen anew") == 1
