"""Compare the featurize job with the sum of its parts, and measure how its time and memory grow with the data.

The parts (read and decode FLAC at 48 kHz, resample, log-mel, tokens, write shards) are timed one after the other in one
process with one thread. Together they give a rate per core. That rate times the number of actors is the upper bound of
the job. The job runs on Ray like ``jobs/featurize.py``, once per ``--hours``. Three ratios to the bound:

    whole    over the whole time, Ray's start included
    steady   from the first shard to the last, without the start
    CPU      CPU seconds of the parts over CPU seconds of the actors; also valid on a busy machine

The parts are timed in CPU time, so other processes on the same cores make the first two ratios smaller. ``cores`` is
the share of their cores that the actors had in the steady time; ``steady`` is ``CPU`` times ``cores``. It is below 1 if
other processes take the cores or if actors wait for work; only an idle machine shows which.
Prints a table and one JSON line with the same figures.

    python benchmarks/featurize.py --hours 1,10
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import soxr
import torch

from voxray.cluster.session import ray_session
from voxray.core.manifest import Sample
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.shards import shard_bytes
from voxray.models.voxtral.front_end import VoxtralFrontEnd

TINY = Path(__file__).resolve().parents[1] / "tests/assets/voxtral-tiny"
RATE_HZ, CLIP_SEC = 48_000, 7.7
NUM_CLIPS = 64  # distinct clips; all other rows are hard links to them
ROWS_PER_SHARD = 64  # the job's default
TEXT = "환자는 어제부터 열이 나고 기침을 하며 혈압은 120/80 이었습니다"
GIB = 1 << 30
MIN_STEADY_SEC = 5.0  # a shorter time cannot be measured


def write_clips(folder: Path) -> list[Path]:
    """Write 16-bit FLAC clips that compress like speech: noise that falls off with frequency, in syllables."""
    paths = []
    for number in range(NUM_CLIPS):
        random, size = np.random.default_rng(number), round(RATE_HZ * CLIP_SEC)
        spectrum = np.fft.rfft(random.normal(size=size)) / np.maximum(np.fft.rfftfreq(size, 1 / RATE_HZ), 100.0)
        noise = np.fft.irfft(spectrum, size) * (0.05 + np.abs(np.sin(np.arange(size) * 12 / RATE_HZ)))
        paths.append(folder / f"clip-{number}.flac")
        soundfile.write(paths[-1], (0.5 * noise / np.abs(noise).max()).astype(np.float32), RATE_HZ, subtype="PCM_16")
    return paths


def write_manifest(folder: Path, clips: list[Path], hours: float) -> tuple[Path, float]:
    """Write a manifest; returns its path and its seconds of audio."""
    folder.mkdir()
    num_rows = round(hours * 3600 / CLIP_SEC)
    with open(folder / "m.jsonl", "w", encoding="utf-8") as manifest:
        for number in range(num_rows):
            os.link(clips[number % len(clips)], folder / f"{number}.flac")
            row = {"audio_path": f"{number}.flac", "transcript": TEXT, "id": str(number)}
            manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder / "m.jsonl", num_rows * CLIP_SEC


def measure_parts(clips: list[Path], folder: Path, passes: int) -> dict[str, float]:
    """CPU seconds of each part per second of audio. The best of several passes over all clips."""
    torch.set_num_threads(1)
    front_end = VoxtralFrontEnd(str(TINY))
    sample = Sample("id", TASKS["asr"], "", TEXT, str(clips[0]), "ko", "m.jsonl:1")
    best: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start_sec = time.process_time()
        result = work()
        sec_per_sec = (time.process_time() - start_sec) / (CLIP_SEC * len(clips))
        best[name] = min(best.get(name, sec_per_sec), sec_per_sec)
        return result

    def one_pass() -> None:
        decoded = timed("decode", lambda: [soundfile.read(path, dtype="float32")[0] for path in clips])
        samples = timed("resample", lambda: [soxr.resample(clip, RATE_HZ, 16_000, quality="HQ") for clip in decoded])
        mels = timed("mel", lambda: [front_end.features(clip) for clip in samples])
        two_windows = 2 * front_end.window_samples
        ids = timed(
            "tokens", lambda: [(front_end.prompt_ids(sample, two_windows), front_end.target_ids(TEXT)) for _ in clips]
        )
        names = ("id", "language", "source", "audio_path", "prompt", "answer")
        rows = [
            {name: getattr(sample, name) for name in names}
            | {"audio": features.mel_KF, "num_frames": len(features.mel_KF), "fill": features.fill, "num_windows": 2}
            | {"task": "asr", "variant": 0, "num_samples": len(clip), "prompt_ids": prompt, "target_ids": target}
            for clip, features, (prompt, target) in zip(samples, mels, ids, strict=True)
        ]
        shape = (front_end.num_mel_bins,)
        shard = folder / "parts" / "00000.arrow"
        timed("write", lambda: write_atomically(shard, shard_bytes(rows, "mel", torch.float16, shape)))

    for _ in range(passes):
        one_pass()
    return best


class ProcessWatcher:
    """Samples CPU time and memory of the actors, and memory of this process, ten times a second."""

    def __init__(self) -> None:
        self.cpu_sec: dict[int, float] = {}
        self.actor_bytes = self.driver_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "ProcessWatcher":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.1):
            self.driver_bytes = max(self.driver_bytes, this.memory_info().rss)
            for process in this.children(recursive=True):
                try:
                    if "MapWorker" in process.cmdline()[0]:
                        times = process.cpu_times()
                        self.cpu_sec[process.pid] = times.user + times.system
                        memory = process.memory_info()
                        self.actor_bytes = max(self.actor_bytes, memory.rss - memory.shared)
                except (psutil.Error, IndexError):
                    continue  # the process has ended


def run_job(manifest: Path, audio_sec: float, num_actors: int, parts_sec: float) -> dict[str, Any]:
    """Run one featurize job with its own Ray.

    Args:
        parts_sec: CPU seconds of the parts per second of audio.
    """
    marks: list[tuple[float, int, float]] = []  # (time, rows done, CPU seconds of the actors)
    start_sec = time.perf_counter()
    with ProcessWatcher() as watcher, ray_session(manifest.parent / "ray.log", num_actors):
        ray_sec = time.perf_counter() - start_sec

        def on_progress(done: int, total: int) -> None:
            marks.append((time.perf_counter(), done, sum(watcher.cpu_sec.values())))

        report = featurize(
            [str(manifest)],
            Extractor(str(TINY)),
            manifest.parent / "features",
            rows_per_shard=ROWS_PER_SHARD,
            num_actors=num_actors,
            on_progress=on_progress,
        )
        end_sec = time.perf_counter()
    assert report.num_bad == 0
    # The first shards of all actors belong to the start.
    first = marks[min(2 * num_actors, len(marks) - 2)]
    steady_share = (marks[-1][1] - first[1]) / marks[-1][1]  # share of the rows
    steady_sec, _, cpu_sec = (last - before for last, before in zip(marks[-1], first, strict=True))
    is_long_enough = steady_sec >= MIN_STEADY_SEC and cpu_sec > 0
    bound = num_actors / parts_sec
    return {
        "hours": round(audio_sec / 3600, 2),
        "ray_start_sec": round(ray_sec, 1),
        "first_shard_sec": round(marks[0][0] - start_sec, 1),
        "total_sec": round(end_sec - start_sec, 1),
        "whole": round(audio_sec / (end_sec - start_sec) / bound, 2),
        "steady": round(steady_share * audio_sec / steady_sec / bound, 2) if is_long_enough else None,
        "cpu": round(steady_share * audio_sec * parts_sec / cpu_sec, 2) if is_long_enough else None,
        "cores": round(cpu_sec / steady_sec / num_actors, 2) if is_long_enough else None,
        "driver_gib": round(watcher.driver_bytes / GIB, 2),
        "actor_gib": round(watcher.actor_bytes / GIB, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", default="2,8", help="hours of audio; one job for each number")
    parser.add_argument("--num_actors", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5, help="passes over the parts; the best one counts")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = write_clips(folder)
        parts = measure_parts(clips, folder, flags.passes)
        parts_sec = sum(parts.values())
        print("part       audio s per CPU s   share")
        for part, seconds in parts.items():
            print(f"{part:9}  {1 / seconds:17.0f}  {seconds / parts_sec:5.0%}")
        print(f"{'all':9}  {1 / parts_sec:17.0f}", flush=True)
        rows = []
        for number, hours in enumerate(float(hours) for hours in flags.hours.split(",")):
            manifest, audio_sec = write_manifest(folder / str(number), clips, hours)
            rows.append(run_job(manifest, audio_sec, flags.num_actors, parts_sec))
    print("hours  Ray s  first shard s  total s  whole  steady  CPU   cores  driver GiB  actor GiB")
    for row in rows:
        print(
            "{hours:5}  {ray_start_sec:5}  {first_shard_sec:13}  {total_sec:7}  {whole:5}  {steady!s:6}  "
            "{cpu!s:4}  {cores!s:5}  {driver_gib:10}  {actor_gib:9}".format(**row)
        )
    rates = {part: round(1 / seconds) for part, seconds in parts.items()}
    print(json.dumps({"benchmark": "featurize", "num_actors": flags.num_actors, "parts": rates, "rows": rows}))


if __name__ == "__main__":
    main()
