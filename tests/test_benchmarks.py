"""The benchmark of GPUs runs on a CPU with a small model, so that it works when there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--folder", str(tmp_path), "--tiny"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert process.returncode == 0, process.stderr
    sections = read_sections(process.stdout)
    assert list(sections) == ["machine", "train", "steps", "generate", "trainer", "train_4bit"]
    assert not [figures for figures in sections.values() if "error" in figures or "left_out" in figures]
    assert process.stdout.rstrip().splitlines()[-1].startswith("| train multitask, stored encoder outputs, 4bit |")


def read_sections(output: str) -> dict[str, dict[str, object]]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"section"')]
    return {line["section"]: line for line in lines}
