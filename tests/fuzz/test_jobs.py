"""Damaged files of every kind through the jobs' scripts: exit status 0, 1 or 2, and no traceback.

Each kind takes 20 seeded mutations. The scripts run in this process and without Ray, so that a mutation takes a second.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ASSETS, TINY, WHISPER, manifest, read_rows, write_rows
from helpers.mutate import mutate, stopwatch
from helpers.running import load_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("evaluation_here")]
SEEDS = range(5000, 5020)
SECONDS = 10.0
Command = tuple[str, list[str]]


def train(folder: Path, *flags: str) -> Command:
    files = ["--train_jsonl", str(folder / "rows.jsonl"), "--output_dir", str(folder / "run")]
    small = ["--num_workers", "0", "--model_id", TINY, "--max_steps", "2", "--save_steps", "1", "--epochs", "1"]
    return "train_text", [*files, *small, "--features_dir", str(folder / "features"), "--lora_r", "2", *flags]


def infer(folder: Path, model: str, *flags: str) -> Command:
    rows = write_rows(folder.parent / "asked.jsonl", read_rows(manifest("asr.val"))[:2])
    limits = ["--preview_rows", "2", "--max_new_tokens", "4"]
    return "infer", ["--model_id", model, "--jsonl", rows, *limits, *flags]


def evaluate(folder: Path) -> Command:
    rows = write_rows(folder.parent / "asked.jsonl", read_rows(manifest("tqa.val"))[:4])
    flags = ["--model_id", TINY, "--val_jsonl", rows, "--output_dir", str(folder), "--gen_max_new_tokens", "4"]
    return "evaluate", [*flags, "--features_cache_dir", str(folder.parent / "features")]


def text_rows(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", [{"instruction": f"{n} 더하기 1은?", "output": str(n + 1)} for n in range(8)])


def manifests(folder: Path) -> tuple[Command, list[Path]]:
    text_rows(folder)
    return train(folder, "--overwrite"), [folder / "rows.jsonl"]


def yaml_files(folder: Path) -> tuple[Command, list[Path]]:
    text_rows(folder)
    shutil.copyfile(ASSETS.parents[1] / "jobs" / "configs" / "demo_train_text.yaml", folder / "settings.yaml")
    return train(folder, "--overwrite", "--eval_max_rows", "1", "--config", str(folder / "settings.yaml")), [
        folder / "settings.yaml"
    ]


def feature_sets(folder: Path) -> tuple[Command, list[Path]]:
    command, _ = manifests(folder)
    run(command)
    return command, sorted(path for path in (folder / "features").rglob("*") if path.is_file())


def checkpoints(folder: Path) -> tuple[Command, list[Path]]:
    """The last step and the run's adapter are gone, so that the run resumes."""
    text_rows(folder)
    command = train(folder)
    run(command)
    for name in ("adapter", "checkpoints/step-000002"):
        shutil.rmtree(folder / "run" / name)
    return command, sorted(path for path in (folder / "run").rglob("*") if path.is_file())


def adapters(folder: Path) -> tuple[Command, list[Path]]:
    text_rows(folder)
    run(train(folder))
    adapter = folder / "run" / "adapter"
    return infer(folder, TINY, "--lora_dir", str(adapter)), sorted(path for path in adapter.iterdir() if path.is_file())


def predictions(folder: Path) -> tuple[Command, list[Path]]:
    run(evaluate(folder))
    return evaluate(folder), sorted(path for path in folder.rglob("*") if path.is_file())


def foreign_predictions(folder: Path) -> tuple[Command, list[Path]]:
    rows = [{"id": str(n), "task": "asr", "reference": "열 도", "prediction": "열 두"} for n in range(4)]
    answers = write_rows(folder / "answers.jsonl", rows)
    return ("evaluate", ["--score_only", answers, "--output_dir", str(folder / "scores")]), [Path(answers)]


def model(source: str, *names: str) -> Callable[[Path], tuple[Command, list[Path]]]:
    def make(folder: Path) -> tuple[Command, list[Path]]:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        files = sorted(path for path in folder.iterdir() if (path.name in names) == bool(names))
        return infer(folder, str(folder)), [path for path in files if names or path.suffix != ".safetensors"]

    return make


KINDS: dict[str, Callable[[Path], tuple[Command, list[Path]]]] = {
    "manifests": manifests,
    "yaml": yaml_files,
    "feature sets": feature_sets,
    "checkpoints": checkpoints,
    "adapters": adapters,
    "predictions": predictions,
    "foreign predictions": foreign_predictions,
    "Voxtral": model(TINY),
    "Whisper": model(WHISPER),
    "weights": model(TINY, "model.safetensors", "config.json", "generation_config.json"),
}


def run(command: Command) -> int:
    job, argv = command
    try:
        load_job(job).main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, files: dict[Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in files:
            path.unlink()
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "damaged"
    folder.mkdir()
    command, files = KINDS[name](folder)
    before = snapshot(folder)
    assert run(command) == 0, capsys.readouterr().err
    faults, num_refused = [], 0
    for seed in SEEDS:
        restore(folder, before)
        path = files[seed % len(files)]
        path.write_bytes(mutate(before[path], seed))
        capsys.readouterr()
        seconds = stopwatch()
        try:
            status = run(command)
        except Exception as error:
            faults.append(f"{path.name}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            continue
        errors = capsys.readouterr().err
        num_refused += status != 0
        is_clear = status == 0 or (status in {1, 2} and "error: " in errors)
        if not is_clear or "Traceback" in errors:
            faults.append(f"{path.name}, seed {seed}: status {status}: {errors[-300:]}")
        if (taken := seconds()) > SECONDS:
            faults.append(f"{path.name}, seed {seed}: {taken:.0f} s")
    assert not faults, f"{len(faults)} of {len(SEEDS)}:\n" + "\n".join(faults)
    assert num_refused or name == "predictions", "no mutation had an effect, although only predictions are made again"
