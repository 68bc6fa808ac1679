"""Effects of the tune job's flags, without Ray: trials end as soon as they start."""

import csv
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from helpers.running import parse_only
from helpers.sweeps import Runner, write
from test_other_flags import other_values

from voxray.commands import tune
from voxray.config.train import MultitaskSettings
from voxray.config.tune import TuneMultitaskSettings
from voxray.core.errors import RunError, SettingsError, Stopped
from voxray.sweep import ray_tune, work
from voxray.sweep.queue import Queue
from voxray.sweep.results import SweepOutcome
from voxray.sweep.trials import Trial
from voxray.sweep.work import trial_settings

FIGURES = {4: (0.4, 0.1), 8: (0.2, 0.3), 16: (0.3, 0.2)}
"""asr/cer_nospace and tqa/rouge_l by LoRA rank."""


def validation(trial: Trial) -> list[dict[str, float]]:
    cer, rouge = FIGURES[trial.choice["lora_r"]]
    return [{"asr/cer_nospace": cer + trial.choice.get("seed", 0) / 1000, "tqa/rouge_l": rouge}]


class Swept:
    """Result of a sweep.

    Attributes:
        ran: Numbers of the trials that ran, over all starts of the sweep.
        ray_call: Arguments that Ray would have received.
    """

    def __init__(self, folder: Path, outcome: SweepOutcome, runner: Runner, ray_call: dict[str, Any]) -> None:
        self.folder, self.outcome, self.ran, self.ray_call = folder, outcome, runner.ran, ray_call

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [trial.choice for trial in sorted(self.outcome.trials, key=lambda trial: trial.number)]

    @property
    def best(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "best.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def sweep(small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Swept]:
    """Run the tune job on a cluster of 9 CPUs, its output in the folder ``sweep``."""
    ray_call: dict[str, Any] = {}
    runner = Runner(validation)

    def run_on_tune(queue: Queue, train: Any, scheduler: Any, concurrent: int, storage: Path) -> None:
        ray_call.setdefault("schedulers", []).append(scheduler)
        ray_call["concurrent"] = concurrent
        runner(queue, None)

    monkeypatch.setattr(tune, "run_on_tune", run_on_tune)
    monkeypatch.setattr(
        tune, "ray_session", lambda log, processes: ray_call.update(processes=processes) or nullcontext()
    )
    monkeypatch.setattr(ray_tune, "max_gpus", lambda: ray_call.get("gpus", 0))
    monkeypatch.setattr(ray_tune, "max_resource", lambda kind: 9)
    monkeypatch.setattr(work, "training_data", lambda settings, *args, **options: ray_call.update(data=settings))
    monkeypatch.setattr(work, "refuse_missing_metric", lambda *args: None)

    def run(line: str = "", flags: Sequence[str] = (), **more: Any) -> Swept:
        ray_call.clear()
        ray_call.update(more)
        runner.ran.clear()
        runner.outcome = more.get("outcome", validation)
        usual = f"--model_id {TINY} --train_jsonl {small['tqa.train']} --val_jsonl {small['asr.val']}"
        folders = f"--storage_path {tmp_path} --output_dir sweep --features_dir f"
        ray_call["settings"] = parse_only("tune", [*usual.split(), *folders.split(), *line.split(), *flags])
        return Swept(tmp_path / "sweep", tune.run_sweep(ray_call["settings"]), runner, ray_call)

    return run


def test_search(sweep: Callable[..., Swept]) -> None:
    grid = sweep("--task_weights 1,1,1;2,1,1 --lora_r 4,8")
    pairs = [(choice["task_weights"]["asr"], choice["lora_r"]) for choice in grid.choices]
    assert pairs == [(1, 4), (1, 8), (2, 4), (2, 8)] and grid.ran == [1, 2, 3, 4]
    space = ["--space", "{lora_r: [4, 8, 16], lr: {log: [1e-5, 1e-2]}}"]
    drawn = sweep("--num_trials 5 --overwrite", space).choices
    assert len(drawn) == 5 and all(1e-5 <= choice["lr"] <= 1e-2 for choice in drawn)
    assert sweep("--num_trials 5 --overwrite --search random", space).choices == drawn
    assert sweep("--num_trials 5 --overwrite --seed 9", space).choices != drawn
    few = sweep("--num_trials 50 --overwrite --lora_r 4,8")
    assert sorted(choice["lora_r"] for choice in few.choices) == [4, 8], "no choice comes twice"


def test_search_by_optuna(sweep: Callable[..., Swept]) -> None:
    pytest.importorskip("optuna")
    space = ["--space", "{lora_r: [4, 8, 16], lr: {log: [1e-5, 1e-2]}}"]
    proposed = sweep("--num_trials 6 --search optuna", space).choices
    assert len(proposed) == 6 and proposed != sweep("--num_trials 6 --overwrite", space).choices
    assert sweep("--num_trials 8 --search optuna --overwrite", space).choices[:3] == proposed[:3], "by the same seed"


def test_winner(sweep: Callable[..., Swept], tmp_path: Path) -> None:
    swept = sweep("--lora_r 4,8,16 --task_weights asr=1,tqa=2")
    assert swept.outcome.winner and swept.outcome.winner.choice["lora_r"] == swept.best["lora_r"] == 8
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open(encoding="utf-8")))
    assert [row["lora_r"] for row in rows] == ["8", "16", "4"], "best first"
    best = parse_only("train_multitask", ["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert best.task_weights == {"asr": 1.0, "tqa": 2.0} and best.output_dir == str(tmp_path / "sweep" / "best")
    for line, rank in (
        ("--metric_mode max", 4),
        ("--metric tqa/rouge_l", 8),
        ("--metric tqa/rouge_l --metric_mode min", 4),
    ):
        assert sweep(f"--lora_r 4,8,16 --overwrite {line}").best["lora_r"] == rank, line


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_hands_its_flags_to_every_trial(sweep: Callable[..., Swept], tmp_path: Path, half: str) -> None:
    values = other_values(MultitaskSettings, half)
    swept = {"task_weights": ({"asr": 2.0},), "lora_r": (4,)}
    settings = TuneMultitaskSettings.model_validate({**values, **swept})
    trial = trial_settings(settings, {"task_weights": {"asr": 1.0}, "lora_r": 17}, tmp_path)
    own = {"output_dir": str(tmp_path), "storage_path": "", "overwrite": True}
    paths = {name: str(Path(name[0]).absolute()) for name in ("noise_dir", "room_dir", "init_adapter", "tasks_file")}
    trial_values = {name: value for name, value in dict(trial).items() if name not in paths}
    manifests = {"train_jsonl": "t", "replay_jsonl": "r", "val_jsonl": "v"}
    absolute = {name: (str(Path(path).absolute()),) for name, path in manifests.items()}
    expected = {**values, **absolute, "task_weights": {"asr": 1.0}, "lora_r": 17, **own}
    assert trial_values == {name: value for name, value in expected.items() if name not in paths}
    run = sweep("--num_actors 3 --rows_per_shard 5 --strict --tf32").ray_call["data"].settings
    assert (run.features_dir, run.num_actors, run.rows_per_shard, run.strict) == ("f", 3, 5, True)
    assert run.storage_path == str(tmp_path)


def test_trials_at_a_time(sweep: Callable[..., Swept], capsys: pytest.CaptureFixture[str]) -> None:
    ray_call = sweep("--num_workers 2").ray_call
    assert ray_call["processes"] == 2 and ray_call["concurrent"] == 4, "(9 CPUs - 1) / 2 processes"
    ray_call = sweep("--max_concurrent_trials 3 --overwrite").ray_call
    assert ray_call["processes"] == ray_call["concurrent"] == 3
    assert sweep("--num_workers 2 --overwrite", gpus=5).ray_call["concurrent"] == 2, "GPUs are the bottleneck"
    capsys.readouterr()
    assert sweep("--max_concurrent_trials 30 --overwrite").ray_call["concurrent"] == 8
    assert "warning: --max_concurrent_trials 30: the cluster has room for 8" in capsys.readouterr().out
    with pytest.raises(SettingsError, match=r"--num_workers 9: a trial needs as many GPUs or.* has 9 CPUs and 0 G"):
        sweep("--num_workers 9 --overwrite")


def test_schedulers(sweep: Callable[..., Swept], capsys: pytest.CaptureFixture[str]) -> None:
    def rungs(scheduler: Any) -> list[int]:
        return [milestone for milestone, _ in scheduler._brackets[0]._rungs]

    (scheduler,) = sweep().ray_call["schedulers"]
    assert min(rungs(scheduler)) == 20
    (scheduler,) = sweep("--grace_steps 7 --overwrite").ray_call["schedulers"]
    assert min(rungs(scheduler)) == 7
    (scheduler,) = sweep("--scheduler median --grace_steps 7 --overwrite").ray_call["schedulers"]
    assert type(scheduler).__name__ == "Median" and scheduler._grace_period == 7
    capsys.readouterr()
    assert sweep("--scheduler none --max_steps 40 --overwrite").ray_call["schedulers"] == [None]
    assert "warning" not in capsys.readouterr().out
    for line, warns in (("30", False), ("40", True), ("30 --grace_steps 31", True)):
        sweep(f"--max_steps 40 --overwrite --eval_steps {line}")
        assert ("warning: --scheduler asha stops no trial" in capsys.readouterr().out) == warns, line


def test_seeds_and_top_k(sweep: Callable[..., Swept]) -> None:
    swept = sweep("--lora_r 4,8,16 --top_k 2 --seeds 3 --seed 5")
    repeats = [(trial.repeats, trial.choice["seed"]) for trial in swept.outcome.repeats]
    assert sorted(repeats) == [(2, 6), (2, 7), (2, 8), (3, 6), (3, 7), (3, 8)], "the two best, three other seeds each"
    assert swept.ray_call["schedulers"][1] is None, "every one of them trains to its end"
    first = swept.outcome.repeated[0]
    assert first.first.number == 2 and first.mean == pytest.approx(0.207) and set(first.values) == {6, 7, 8}
    assert first.low and first.low < 0.207 < (first.high or 0) and "seed" in swept.best and swept.best["seed"] == 5
    assert "mean of 3 seeds" in (swept.folder / "best.yaml").read_text()
    assert "overlaps with none" in swept.outcome.verdict()
    more = sweep("--lora_r 4,8,16 --top_k 2 --seeds 4 --seed 5 --resume")
    assert more.ran == [10, 11], "only the fourth seed is new"

    def luck_reversed(trial: Trial) -> list[dict[str, float]]:
        return [{"asr/cer_nospace": 0.1 if trial.choice.get("seed") and trial.repeats == 3 else 0.3}]

    upset = sweep("--lora_r 4,8,16 --top_k 3 --seeds 2 --overwrite", outcome=luck_reversed)
    assert upset.outcome.winner and upset.outcome.winner.number == 3, "the mean over seeds decides"


def test_resume_and_overwrite(sweep: Callable[..., Swept], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--lora_r 4,8,16"
    assert sweep(line).ran == [1, 2, 3]
    with pytest.raises(SettingsError, match="holds a sweep; --resume finishes it, --overwrite starts it afresh"):
        sweep(line)
    assert sweep(f"{line} --resume").ran == [], "all of it is done"
    with pytest.raises(SettingsError, match=r"other settings: --lr \(was 0.0002, now 0.1\)"):
        sweep(f"{line} --resume --lr 0.1")
    with pytest.raises(SystemExit):
        sweep("--resume --overwrite")
    assert "error: --resume and --overwrite: give one of them" in capsys.readouterr().err
    old = tmp_path / "sweep" / "trials" / "0003" / "old"
    old.touch()
    assert sweep(f"{line} --overwrite").ran == [1, 2, 3] and not old.exists()
    (tmp_path / "sweep" / "settings.json").write_text("{")
    with pytest.raises(SettingsError, match=r"settings.json: damaged, so this sweep cannot be told from others"):
        sweep(f"{line} --resume")
    (tmp_path / "sweep" / "settings.json").write_text('{"lr": 1}')
    for flag in ("--resume", "--overwrite"):
        with pytest.raises(SettingsError, match="holds another run; give the sweep a folder of its own"):
            sweep(f"{line} {flag}")
    assert (tmp_path / "sweep" / "trials" / "0003").is_dir()


def test_ctrl_c_says_how_to_go_on(sweep: Callable[..., Swept]) -> None:
    def interrupt(trial: Trial) -> Any:
        if trial.number == 2:
            raise KeyboardInterrupt
        return validation(trial)

    with pytest.raises(Stopped, match="stopped; run the same command with --resume to continue"):
        sweep("--lora_r 4,8,16", outcome=interrupt)
    assert sweep("--lora_r 4,8,16 --resume").ran == [2, 3]


def test_salmonn_is_put_together_once(
    sweep: Callable[..., Swept], salmonn_parts: dict[str, str], small: dict[str, str], tmp_path: Path
) -> None:
    sweep()  # replaces Ray
    parts = [word for name, value in salmonn_parts.items() for word in (f"--{name}", value)]
    data = ["--train_jsonl", small["asr.train"], "--val_jsonl", small["asr.val"]]
    line = ["--recipe", "salmonn", "--output_dir", str(tmp_path / "s"), "--space", "{lr: [1e-6, 1e-4], lora_r: [8]}"]
    outcome = tune.run_sweep(parse_only("tune", [*parts, *data, *line, "--metric", "asr/cer_nospace"]))
    assert [trial.state for trial in outcome.trials] == ["done", "failed"]
    assert outcome.trials[1].reason == "--min_lr 1e-05 is over --lr 1e-06"
    best = parse_only("train_salmonn", ["--config", str(tmp_path / "s" / "best.yaml")])
    assert (best.model_id, best.lr) == ("", 1e-4) and best.whisper_path == salmonn_parts["whisper_path"]


def test_a_sweep_without_any_result_says_why(sweep: Callable[..., Swept]) -> None:
    with pytest.raises(RunError, match="no trial finished: no row is within --max_len 3"):
        sweep("--lora_r 4,8", outcome=lambda trial: "no row is within --max_len 3")
    with pytest.raises(RunError, match="no trial finished: no validation gave asr/cer_nospace"):
        sweep("--lora_r 4,8 --overwrite", outcome=lambda trial: [{"tqa/loss": 1.0}])
    settings = sweep("--overwrite").ray_call["settings"].model_copy(update={"val_jsonl": ()})
    with pytest.raises(SettingsError, match="--val_jsonl: a sweep needs validation data"):
        tune.run_sweep(settings)


def test_optuna_that_is_not_there(sweep: Callable[..., Swept], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    with pytest.raises(
        SettingsError, match=r"--search optuna: Optuna is not installed: pip install 'voxray\[optuna\]'"
    ):
        sweep("--search optuna --num_trials 3")


def test_schedulers_go_on_where_they_were(tmp_path: Path) -> None:
    """Trials of an earlier start count when a weak trial is stopped; a missing metric is the weakest."""
    from helpers.sweeps import sweep_settings

    from voxray.sweep.trials import read_trials, scheduler_record

    for number in range(1, 6):
        values = [0.1 * number, 0.05 * number]
        write(tmp_path, number, {"lora_r": number}, *({"asr/cer_nospace": value} for value in values))
    earlier = read_trials(tmp_path)
    for name in ("asha", "median"):
        settings = sweep_settings(tmp_path, "--scheduler", name, "--grace_steps", "10")
        for value, decision in ((0.01, "CONTINUE"), (0.9, "STOP"), (None, "STOP")):
            scheduler = ray_tune.build_scheduler(settings, earlier)
            trial = ray_tune.EarlierTrial("new")
            scheduler.on_trial_add(None, trial)
            record = scheduler_record({"step": 10, "asr/cer_nospace": value}, "asr/cer_nospace", "min")
            assert scheduler.on_trial_result(None, trial, record) == decision, (name, value)
            scheduler.on_trial_complete(None, trial, {})
