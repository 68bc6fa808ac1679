"""Results of a sweep: ranking, intervals over seeds, the Pareto front, importance, the files."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.running import parse_only
from helpers.sweeps import sweep_settings, write

from voxray.config.search_space import Domain
from voxray.core.errors import RunError
from voxray.sweep.importance import group, importance
from voxray.sweep.results import front, ranked, summarise_trials, t_interval, t_quantile, write_best, write_csv
from voxray.sweep.trials import WORST, Trial, read_trials, scheduler_record

METRIC = "asr/cer_nospace"


def test_finished_trials_come_first(tmp_path: Path) -> None:
    write(tmp_path, 1, {"lora_r": 1}, {METRIC: 0.1}, state="stopped")
    write(tmp_path, 2, {"lora_r": 2}, {METRIC: 0.9}, {METRIC: 0.3})
    write(tmp_path, 3, {"lora_r": 3}, {METRIC: 0.2}, {METRIC: None})
    write(tmp_path, 4, {"lora_r": 4}, state="failed", reason="why")
    write(tmp_path, 5, {"lora_r": 5}, {METRIC: 0.1}, {METRIC: 0.25})
    trials = read_trials(tmp_path)
    assert [trial.number for trial in ranked(trials, METRIC, "min")] == [5, 2, 3, 1, 4]
    assert [trial.number for trial in ranked(trials, METRIC, "max")] == [2, 5, 3, 1, 4]
    outcome = summarise_trials(trials, METRIC, "min")
    assert outcome.winner and (outcome.winner.number, outcome.winning_value) == (5, 0.25), "the last validation counts"
    assert outcome.verdict() == "" and summarise_trials([], METRIC, "min").winner is None
    write_csv(tmp_path / "results.csv", outcome, ["lora_r"])
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    assert [row["trial"] for row in rows] == ["5", "2", "3", "1", "4"] and rows[4]["reason"] == "why"
    assert [row["state"] for row in rows] == ["done", "done", "done", "stopped", "failed"] and rows[0]["step"] == "20"
    assert rows[2][METRIC] == ""


def test_the_best_checkpoint_counts(tmp_path: Path) -> None:
    """With --load_best_model_at_end the result is that of an earlier step."""
    trial = write(tmp_path, 1, {}, {METRIC: 0.2}, {METRIC: 0.6})
    (trial.folder / "result.json").write_text('{"finished": true, "steps": 20, "adapter_step": 10}')
    (trial,) = read_trials(tmp_path)
    assert trial.value(METRIC) == 0.2 and trial.counts_step == 10


def test_a_trial_that_finished_before_its_driver_was_killed_is_done(tmp_path: Path) -> None:
    write(tmp_path, 1, {}, {METRIC: 0.2}, state="running")
    done = write(tmp_path, 2, {}, {METRIC: 0.2}, state="running")
    (done.folder / "result.json").write_text('{"finished": true, "steps": 10, "adapter_step": 10}')
    assert [trial.state for trial in read_trials(tmp_path)] == ["running", "done"]
    (done.folder / "result.json").write_text('{"finished": tr')
    assert [trial.state for trial in read_trials(tmp_path)] == ["running", "running"], "an incomplete file is ignored"
    (done.folder / "trial.json").write_text("{")
    with pytest.raises(RunError, match=r"0002/trial.json: damaged .* delete its folder to train it anew"):
        read_trials(tmp_path)


def test_a_missing_value_is_the_worst() -> None:
    assert scheduler_record({"step": 1, METRIC: 0.5, "kind": "validation"}, METRIC, "min") == {"step": 1, METRIC: 0.5}
    assert scheduler_record({"step": 1, METRIC: math.nan}, METRIC, "min")[METRIC] == WORST
    assert scheduler_record({"step": 1}, METRIC, "max")[METRIC] == -WORST


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 30, 31, 60, 99])
def test_students_t(degrees: int) -> None:
    """2.5 % of the distribution lies above the quantile: its density, integrated by numbers."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, t_quantile(degrees), 200_001)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=5e-5)


def test_intervals_over_seeds() -> None:
    mean, low, high = t_interval([0.2, 0.3, 0.4])
    assert mean == pytest.approx(0.3) and low is not None and high is not None
    assert high - 0.3 == pytest.approx(4.303 * 0.1 / math.sqrt(3)) == pytest.approx(0.3 - low)
    assert t_interval([0.2]) == (0.2, None, None)


def seeds(folder: Path, *values: tuple[float, ...]) -> list[Trial]:
    """The best choices, the first the best of the search, each again with other seeds."""
    for number, of_choice in enumerate(values, 1):
        write(folder, number, {"lora_r": number}, {METRIC: 0.1 + number / 1000})
        for seed, value in enumerate(of_choice, 1):
            write(folder, 10 * number + seed, {"lora_r": number, "seed": seed}, {METRIC: value}, repeats=number)
    return read_trials(folder)


def test_the_mean_over_seeds_decides_and_overlaps_are_reported(tmp_path: Path) -> None:
    outcome = summarise_trials(seeds(tmp_path / "a", (0.30, 0.31, 0.32), (0.20, 0.21, 0.22)), METRIC, "min", 2)
    assert outcome.winner and outcome.winner.number == 2 and outcome.winning_value == pytest.approx(0.21)
    assert "overlaps with none of the others" in outcome.verdict()
    outcome = summarise_trials(seeds(tmp_path / "b", (0.20, 0.30), (0.21, 0.31), (5.0, 5.1)), METRIC, "min", 3)
    assert outcome.verdict().endswith("that of another choice, which it is not shown to be better than: lora_r 2")
    assert summarise_trials(read_trials(tmp_path / "b"), METRIC, "max", 3).repeated[0].first.number == 3
    assert [
        entry.first.number for entry in summarise_trials(read_trials(tmp_path / "b"), METRIC, "min", 1).repeated
    ] == [1]
    write(tmp_path / "b", 14, {"lora_r": 1, "seed": 4}, repeats=1, state="failed")
    again = summarise_trials(read_trials(tmp_path / "b"), METRIC, "min", 3)
    assert {entry.first.number: entry.missing for entry in again.repeated} == {1: 1, 2: 0, 3: 0}


def test_the_front() -> None:
    points = [(0.1, 0.5), (0.2, 0.9), (0.3, 0.9), (0.15, 0.6), (0.1, 0.4), (0.2, 0.9)]
    assert front(points, first_up=False, second_up=True) == [0, 3, 1, 5]
    assert front(points, first_up=True, second_up=True) == [2] and front([], first_up=True, second_up=True) == []


def test_importance_is_corrected_for_chance() -> None:
    rng = np.random.default_rng(0)
    ranks, noise = Domain("lora_r", "choice", (4, 8, 16)), Domain("lora_alpha", "choice", (1.0, 2.0, 3.0, 4.0))
    rate = Domain("lr", "log", (1e-5, 1e-1))
    of_rank = [(4, 8, 16)[index % 3] for index in range(60)]
    of_noise = [float(index // 3 % 4 + 1) for index in range(60)]
    rates = [10 ** -float(rng.uniform(1, 5)) for _ in range(60)]
    figures = [rank / 16 + abs(math.log10(lr) + 3) / 2 for rank, lr in zip(of_rank, rates, strict=True)]
    strong, weak = importance(ranks, of_rank, figures), importance(noise, of_noise, figures)
    curved = importance(rate, rates, figures)
    assert strong and strong > 0.4 and weak is not None and weak < 0.1 and curved and curved > 0.1, (
        "also if the effect is not monotonic"
    )
    draws = [importance(noise, of_noise, rng.normal(size=60).tolist()) or 0.0 for _ in range(200)]
    assert np.mean(draws) < 0.03, "a flag that does nothing has next to none, though it has four values"
    exact = importance(ranks, of_rank, [float(rank) for rank in of_rank])
    assert exact == pytest.approx(1)
    assert importance(ranks, [4, 8, 16], [1, 2, 3]) is None, "one trial each"
    assert importance(ranks, of_rank, [1.0] * 60) is None and importance(ranks, [], []) is None
    assert importance(ranks, [4] * 9, list(range(9))) is None
    assert group(rate, [1e-5, 1e-1, 1e-3]) == [0, 2, 1] and set(group(rate, rates)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("recipe", "flags", "choice"),
    [
        (
            "multitask",
            ["--grad_accum", "2", "--per_task_bsz", "asr=2", "--batching", "length"],
            {"task_weights": {"asr": 1}},
        ),
        ("multitask", ["--task_weights", "1,1,1"], {"curriculum": [[["tqa"], 1], [["tqa", "asr"], 2]], "lr": 1e-5}),
        ("multitask", ["--num_workers", "1:4"], {"task_weights": None, "grad_ckpt": True, "lora_r": 4}),
        ("text", ["--lr_schedule", "linear"], {"lora_r": 4, "lora_dropout": 0.1}),
        ("asr_adapter", ["--speeds", "0.9,1.1", "--variants", "2"], {"lora_r": 4, "freq_masks": 2}),
        ("whisper", ["--language", "ko"], {"lora_targets": ["q_proj", "fc1"], "lora_r": 4}),
        ("salmonn", ["--model_id", "m", "--lr", "1e-4"], {"min_lr": 1e-6, "lora_r": 4}),
    ],
)
def test_best_yaml_is_a_config_of_the_training_job(recipe: str, flags: list[str], choice: dict, tmp_path: Path) -> None:
    settings = sweep_settings(tmp_path, "--recipe", recipe, *flags)
    write_best(tmp_path / "best.yaml", settings, choice, "it")
    read = parse_only(f"train_{recipe}", ["--config", str(tmp_path / "best.yaml")])
    expected = {
        flags[index].removeprefix("--"): getattr(settings, flags[index].removeprefix("--"))
        for index in range(0, len(flags), 2)
    }
    for name, value in {**expected, **choice}.items():
        if name == "task_weights" and name not in choice:
            continue  # that of a trial is in its choice
        parsed = getattr(read, name)
        assert parsed == value or parsed == _tuples(value), (name, parsed, value)
    assert read.output_dir == str(tmp_path / "best") and read.features_dir == str(tmp_path / "features")
    assert "recipe" not in yaml.safe_load((tmp_path / "best.yaml").read_text())


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
