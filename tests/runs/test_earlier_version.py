"""A run folder, its feature sets and an evaluation that an earlier version wrote go on with this one.

Commit 0a0f714 wrote ``assets/run-0a0f714`` in the folder ``WRITTEN_IN``. Shards and predictions hold absolute paths, so
the test works in a copy at that very path. Training had six steps. The checkpoint of step 3 is there, and
``expected.metrics.jsonl`` has the records of all six.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS, TINY
from helpers.running import parse_only

from voxray.commands.evaluate import run_evaluation
from voxray.commands.train import run_training
from voxray.features.reader import Features
from voxray.training.records import read_metrics

WRITTEN_IN = Path("/var/tmp/voxray-0a0f714")
DATA = "--train_jsonl asr.train.jsonl,sqa.train.jsonl,tqa.train.jsonl --val_jsonl asr.val.jsonl,tqa.val.jsonl"
TRAIN = f"{DATA} --model_id voxtral-tiny --output_dir run --num_workers 0 --per_device_bsz 4 --lora_r 2 --lora_alpha 4"
STEPS = "--lr 2e-3 --max_steps 6 --save_steps 3 --eval_steps 6 --eval_max_new_tokens 8 --preview_rows 0"
EVALUATE = (
    "--model_id voxtral-tiny --lora_dir run/checkpoints/step-000003 --val_jsonl asr.val.jsonl,tqa.val.jsonl"
    " --output_dir eval --features_dir run/features --gen_max_new_tokens 8 --per_device_bsz 4"
)


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what the earlier version wrote, as the current folder; one test process at a time has it."""
    with open(WRITTEN_IN.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(WRITTEN_IN, ignore_errors=True)
        shutil.copytree(ASSETS / "run-0a0f714", WRITTEN_IN)
        shutil.copytree(TINY, WRITTEN_IN / "voxtral-tiny")
        monkeypatch.chdir(WRITTEN_IN)
        yield WRITTEN_IN
        shutil.rmtree(WRITTEN_IN)


def train_records(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == "train"]


def written(folder: Path) -> dict[str, int]:
    """Every file below a folder, less the ledgers, with the time it was last written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_training_goes_on_from_its_checkpoint(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No shard is written again; steps 4 to 6 see the rows, prompts and losses of the uninterrupted run."""
    shards, log = written(earlier / "run" / "features"), (earlier / "run" / "train.log").read_text(encoding="utf-8")
    result = run_training(parse_only("train_multitask", [*TRAIN.split(), *STEPS.split()]))
    assert (result["steps"], result["finished"]) == (6, True)
    output = capsys.readouterr().out
    assert "resuming from step 3 of 6" in output
    for line in log.splitlines():
        if line.startswith(("  asr: ", "  sqa: ", "data: ", "parameters: ")):
            line = line.replace("are no padding", "are not padding")  # the wording since
            assert line in output, "rows, prompts and parameters as they were"
    assert written(earlier / "run" / "features") == shards
    expected = train_records(earlier / "expected.metrics.jsonl")
    records = read_metrics(earlier / "run", "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record, before in zip(records, expected, strict=True):
        for name in ("loss", "loss/asr", "loss/sqa", "loss/tqa", "grad_norm", "lr"):
            if name in before:
                assert record[name] == pytest.approx(before[name], rel=1e-6, abs=1e-6), name


def test_an_evaluation_is_made_again(earlier: Path, evaluation_here: None) -> None:
    """The earlier version did not record the base's content, so its answers are set aside. The metrics are equal."""
    before = json.loads((earlier / "eval" / "metrics.json").read_text(encoding="utf-8"))
    result = run_evaluation(parse_only("evaluate", EVALUATE.split()))
    assert (earlier / "eval" / "predictions-earlier" / "part-00000.parquet").is_file()
    for task in ("asr", "tqa"):
        values = {name: entry["value"] for name, entry in result.metrics[task].items()}
        assert values == pytest.approx({name: entry["value"] for name, entry in before[task].items()}, rel=1e-6)


def test_features_are_read_as_they_were_written(earlier: Path) -> None:
    folders = sorted((earlier / "run" / "features").iterdir())
    features = Features(folders)
    ids = [features.row(number).target_ids.tolist() for number in range(len(features))]
    assert len(ids) == 5 + 3 + 3 + 4 + 2 and all(ids)
