"""Jobs that are killed anywhere and started again, few file descriptors, many rows and many files in one folder."""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ASSETS, TINY, manifest, read_rows, write_rows
from helpers.running import ROOT, Driver, environment

from voxray.core.storage import checksum
from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.registry import get_family

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1800)]
KILLS, WAIT_SEC = 4, 600


def command(job: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]


def run(job: str, *flags: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(job, *flags), env=environment(), capture_output=True, text=True, timeout=WAIT_SEC, preexec_fn=before
    )


def kill_and_restart(job: str, flags: list[str], log: Path, longest_sec: float) -> None:
    """Start a job, send SIGKILL to all of it at a random moment, several times, and let the last start end."""
    chooser = random.Random(job)
    for _ in range(KILLS):
        driver = Driver(command(job, *flags), log)
        time.sleep(chooser.uniform(0.3, longest_sec))
        driver.kill()
        driver.end()
    driver = Driver(command(job, *flags), log)
    try:
        assert driver.process.wait(WAIT_SEC) == 0, log.read_text()
    finally:
        driver.end()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = read_rows(manifest("asr.train"))
    folder = Path(manifest("asr.train")).parent
    absolute = [{**row, "audio_path": str(folder / row["audio_path"])} for row in rows]
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", absolute)


def test_prepare(tmp_path: Path, corpus: str) -> None:
    def flags(name: str) -> list[str]:
        folder = tmp_path / name
        output = [
            "--train_output",
            str(folder / "t.jsonl"),
            "--val_output",
            str(folder / "v.jsonl"),
            "--val_share",
            "0.1",
        ]
        return ["--input", corpus, "--min_sec", "0.3", "--duplicates", "keep", "--rows_per_chunk", "8", *output]

    start = time.monotonic()
    assert run("prepare", *flags("whole")).returncode == 0
    kill_and_restart("prepare", flags("killed"), tmp_path / "log", time.monotonic() - start)
    for name in ("t.jsonl", "v.jsonl", "quarantine.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, killed = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert {name for name in killed if not name.endswith(".lock")} == whole, "nothing of the killed jobs is left"


def test_export(tmp_path: Path) -> None:
    family = get_family(TINY)
    base = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(add_lora(base, family, ["llm"], model_id=TINY, r=2, alpha=2, dropout=0.0), tmp_path / "adapter")

    def flags(name: str) -> list[str]:
        return ["--lora_dir", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / name)]

    start = time.monotonic()
    assert run("export", *flags("whole")).returncode == 0
    kill_and_restart("export", [*flags("killed"), "--overwrite"], tmp_path / "log", time.monotonic() - start)
    weights = [checksum(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert left == {"adapter", "whole", "killed", "log"}


def test_few_file_descriptors(tmp_path: Path) -> None:
    """``ulimit -n 256``, with a shard for each of 300 rows."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    rows = [{"instruction": f"{number} 더하기 1은?", "output": str(number + 1)} for number in range(300)]
    train = write_rows(tmp_path / "t.jsonl", rows)
    flags = ["--model_id", TINY, "--train_jsonl", train, "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    flags += ["--rows_per_shard", "1", "--max_steps", "20", "--per_device_bsz", "16"]
    process = run("train_text", *flags, before=limit)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_many_files_in_one_folder(tmp_path: Path) -> None:
    """audit reads 5,000 clips, all with the same content."""
    clip = shutil.copy(next((ASSETS / "speech").rglob("*.ogg")), tmp_path / "clip.ogg")
    (tmp_path / "clips").mkdir()
    rows = []
    for number in range(5000):
        (tmp_path / "clips" / f"{number:05d}.ogg").hardlink_to(clip)
        rows.append({"audio_path": f"clips/{number:05d}.ogg", "transcript": "열"})
    audited = write_rows(tmp_path / "rows.jsonl", rows)
    process = run("audit", "--input", audited, "--output_dir", str(tmp_path / "audit"))
    assert process.returncode == 1 and "duplicate" in process.stdout + process.stderr
    figures = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert sum(entry["rows"] for entry in figures["files"]) == 5000


def test_many_rows(tmp_path: Path) -> None:
    """20,000 rows are featurized and trained on."""
    rows = [{"instruction": f"{number} 더하기 1은?", "output": str(number + 1)} for number in range(20_000)]
    train = write_rows(tmp_path / "t.jsonl", rows)
    flags = ["--model_id", TINY, "--train_jsonl", train, "--output_dir", str(tmp_path / "run"), "--max_steps", "3"]
    process = run("train_text", *flags, "--num_workers", "2", "--rows_per_shard", "512")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "features: 20000 rows" in process.stdout
