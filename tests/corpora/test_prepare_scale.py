"""prepare processes 100,000 rows of audio, and the driver's memory does not grow with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

NUM_CLIPS = 50
LIMITS = "--min_sec 0 --leaks allow --rows_per_chunk 512 --num_actors 2"
PROBE = """
import json, pathlib, sys, time
sys.path.insert(0, sys.argv.pop(1))
from voxray.config.parse import parse
from voxray.config.prepare import PrepareSettings
from voxray.commands.prepare import run_prepare_job
began = time.monotonic()
outcome = run_prepare_job(parse(PrepareSettings, sys.argv[1:], job="prepare", about="", demo=""))
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({**outcome.tally.rows, "mib": int(peak.split()[1]) // 1024, "sec": time.monotonic() - began}))
"""


def corpus(folder: Path, num_rows: int) -> Path:
    """Rows with different texts and file names. The files are hard links to a few clips."""
    (folder / "clips").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(min(NUM_CLIPS, num_rows)):
        noise = generator.normal(0, 0.1, 4_800).clip(-0.9, 0.9)
        soundfile.write(folder / "clips" / f"{number}.wav", noise, 16_000)
    path = folder / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            clip = folder / "clips" / f"{number}.wav"
            if number >= NUM_CLIPS:
                os.link(folder / "clips" / f"{number % NUM_CLIPS}.wav", clip)
            # One clip may have many questions, so no row is a duplicate. Each row is a group of the split.
            row = {
                "audio_path": f"clips/{clip.name}",
                "question": f"{number}번 환자의 증상은?",
                "answer": f"증상 {number}",
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def run(folder: Path, num_rows: int, flags: str) -> dict[str, float]:
    """Run the job in a process of its own. Returns rows by outcome, the driver's peak memory and time."""
    words = ["--input", str(corpus(folder, num_rows)), "--train_output", str(folder / "out" / "train.jsonl")]
    words += ["--val_output", str(folder / "out" / "val.jsonl"), *LIMITS.split(), *flags.split()]
    command = [sys.executable, "-c", PROBE, str(Path(__file__).parents[2]), *words]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ""}, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_drivers_memory_stays_flat_to_100_000_rows(tmp_path):
    """A few hundred bytes per row are allowed, for hashes of earlier rows and the groups of the split."""
    few, many = run(tmp_path / "few", 1_000, ""), run(tmp_path / "many", 100_000, "")
    print(f"driver with 1,000 rows: {few}; with 100,000: {many}; {100_000 / many['sec']:.0f} rows/s")
    assert few["train"] + few["val"] == 1_000 and many["train"] + many["val"] == 100_000
    assert many["mib"] < few["mib"] + 60
