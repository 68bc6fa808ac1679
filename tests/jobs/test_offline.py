"""Jobs run without a network: in a network namespace that has only a loopback interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WHISPER
from helpers.running import ROOT, environment

LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
request = struct.pack("16sH14s", b"lo", 1 | 64, b"")  # SIOCSIFFLAGS: up and running
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lo:
    fcntl.ioctl(lo, 0x8914, request)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_offline(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python where no other machine can be reached."""
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_UP, *argv]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def can_run_offline() -> bool:
    return shutil.which("unshare") is not None and run_offline("-c", "pass").returncode == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not can_run_offline(), reason="this machine does not allow network namespaces")
def test_train_evaluate_and_infer_without_a_network(small: dict[str, str], tmp_path: Path) -> None:
    reach = "import socket; socket.create_connection(('1.1.1.1', 53), 2)"
    assert "unreachable" in run_offline("-c", reach).stderr, "there really is no network"
    run, usual = str(tmp_path / "run"), ["--model_id", WHISPER]
    train = [
        "--train_jsonl",
        small["asr.train"],
        "--val_jsonl",
        small["asr.val"],
        "--max_steps",
        "2",
        "--max_len",
        "120",
    ]
    evaluate = ["--val_jsonl", small["asr.val"], "--gen_max_new_tokens", "20", "--num_models", "1"]
    for argv in (
        ["jobs/train_whisper.py", *usual, *train, "--output_dir", run, "--eval_max_new_tokens", "4"],
        ["jobs/evaluate.py", "--lora_dir", run, *evaluate, "--output_dir", str(tmp_path / "e")],
        ["jobs/infer.py", "--lora_dir", run, "--jsonl", small["asr.val"], "--output_path", str(tmp_path / "o.jsonl")],
    ):
        process = run_offline(*argv)
        assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["asr"]["cer_nospace"]["n"] == 4
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 4
