"""The featurize job against the sum of its parts, and how its time and memory grow with the data.

The parts (read and decode FLAC at 48 kHz, resample, log-mel, tokens, write shards) are timed one after the other in one
process with one thread. Together they give a rate per core; times the actors, that is what the job could reach. The job
runs on Ray like ``jobs/featurize.py``, once per ``--hours``. Three ratios to that bound:

    whole    all the time there is, Ray's start included
    steady   from the first shard to the last; the start does not count
    CPU      seconds of processor time: the parts' against what the actors used. This one holds on a busy machine

A core that other processes use as well makes the first two ratios smaller, as the parts are timed in processor time.
``cores`` shows how much of their cores the actors had in the steady time: ``steady`` is ``CPU`` times ``cores``. It is
below 1 where others take the cores or where actors wait for work; only an idle machine tells which.
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

from voxray.commands.train import ray_session
from voxray.core.manifest import Sample
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.shards import shard_bytes
from voxray.models.voxtral.front_end import VoxtralFrontEnd

TINY = Path(__file__).resolve().parents[1] / "tests/assets/voxtral-tiny"
RATE_HZ, CLIP_SEC = 48_000, 7.7
NUM_CLIPS = 64  # different ones; the others are hard links to them
ROWS_PER_SHARD = 64  # the default of the job
TEXT = "환자는 어제부터 열이 나고 기침을 하며 혈압은 120/80 이었습니다"
GIB = 1 << 30
MIN_STEADY_SEC = 5.0  # less is too short to be measured


def write_clips(folder: Path) -> list[Path]:
    """Speech-like to FLAC: noise that falls off with frequency, in syllables, 16 bits."""
    paths = []
    for number in range(NUM_CLIPS):
        random, size = np.random.default_rng(number), round(RATE_HZ * CLIP_SEC)
        spectrum = np.fft.rfft(random.normal(size=size)) / np.maximum(np.fft.rfftfreq(size, 1 / RATE_HZ), 100.0)
        noise = np.fft.irfft(spectrum, size) * (0.05 + np.abs(np.sin(np.arange(size) * 12 / RATE_HZ)))
        paths.append(folder / f"clip-{number}.flac")
        soundfile.write(paths[-1], (0.5 * noise / np.abs(noise).max()).astype(np.float32), RATE_HZ, subtype="PCM_16")
    return paths


def write_manifest(folder: Path, clips: list[Path], hours: float) -> tuple[Path, float]:
    """Returns: the manifest and the seconds of audio that it names."""
    folder.mkdir()
    num_rows = round(hours * 3600 / CLIP_SEC)
    with open(folder / "m.jsonl", "w", encoding="utf-8") as manifest:
        for number in range(num_rows):
            os.link(clips[number % len(clips)], folder / f"{number}.flac")
            row = {"audio_path": f"{number}.flac", "transcript": TEXT, "id": str(number)}
            manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder / "m.jsonl", num_rows * CLIP_SEC


def measure_parts(clips: list[Path], folder: Path, passes: int) -> dict[str, float]:
    """Processor seconds of each part per second of audio, the best of some passes over all clips."""
    torch.set_num_threads(1)
    front_end = VoxtralFrontEnd(str(TINY))
    task = Sample("id", TASKS["asr"], "", TEXT, str(clips[0]), "ko", "m.jsonl:1")
    best: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        spent = (time.process_time() - began) / (CLIP_SEC * len(clips))
        best[name] = min(best.get(name, spent), spent)
        return result

    def one_pass() -> None:
        decoded = timed("decode", lambda: [soundfile.read(path, dtype="float32")[0] for path in clips])
        samples = timed("resample", lambda: [soxr.resample(clip, RATE_HZ, 16_000, quality="HQ") for clip in decoded])
        made = timed("mel", lambda: [front_end.features(clip) for clip in samples])
        two_windows = 2 * front_end.window_samples
        ids = timed(
            "tokens", lambda: [(front_end.prompt_ids(task, two_windows), front_end.target_ids(TEXT)) for _ in clips]
        )
        names = ("id", "language", "source", "audio_path", "prompt", "answer")
        rows = [
            {name: getattr(task, name) for name in names}
            | {"audio": features.mel_KF, "num_frames": len(features.mel_KF), "fill": features.fill, "num_windows": 2}
            | {"task": "asr", "variant": 0, "num_samples": len(clip), "prompt_ids": prompt, "target_ids": target}
            for clip, features, (prompt, target) in zip(samples, made, ids, strict=True)
        ]
        shape = (front_end.num_mel_bins,)
        shard = folder / "parts" / "00000.arrow"
        timed("write", lambda: write_atomically(shard, shard_bytes(rows, "mel", torch.float16, shape)))

    for _ in range(passes):
        one_pass()
    return best


class Watch:
    """Processor time and memory of the actors, and memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self.cpu_sec: dict[int, float] = {}
        self.actor_bytes = self.driver_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.1):
            self.driver_bytes = max(self.driver_bytes, this.memory_info().rss)
            for process in this.children(recursive=True):
                try:
                    if "MapWorker" in process.cmdline()[0]:
                        spent = process.cpu_times()
                        self.cpu_sec[process.pid] = spent.user + spent.system
                        memory = process.memory_info()
                        self.actor_bytes = max(self.actor_bytes, memory.rss - memory.shared)
                except (psutil.Error, IndexError):
                    continue  # ended meanwhile


def run_job(manifest: Path, audio_sec: float, num_actors: int, parts_sec: float) -> dict[str, Any]:
    """One featurize job with its own Ray.

    Args:
        parts_sec: What the parts take of one core per second of audio.
    """
    marks: list[tuple[float, int, float]] = []
    began = time.perf_counter()
    with Watch() as watch, ray_session(manifest.parent / "ray.log", num_actors):
        ray_sec = time.perf_counter() - began

        def on_progress(done: int, total: int) -> None:
            marks.append((time.perf_counter(), done, sum(watch.cpu_sec.values())))

        report = featurize(
            [str(manifest)],
            Extractor(str(TINY)),
            manifest.parent / "features",
            rows_per_shard=ROWS_PER_SHARD,
            num_actors=num_actors,
            on_progress=on_progress,
        )
        ended = time.perf_counter()
    assert report.num_bad == 0
    # The first shards of all actors belong to the start: nothing was there to be done before them.
    first = marks[min(2 * num_actors, len(marks) - 2)]
    share = (marks[-1][1] - first[1]) / marks[-1][1]  # of all rows
    steady_sec, _, spent_sec = (last - then for last, then in zip(marks[-1], first, strict=True))
    enough = steady_sec >= MIN_STEADY_SEC and spent_sec > 0
    bound = num_actors / parts_sec
    return {
        "hours": round(audio_sec / 3600, 2),
        "ray_start_sec": round(ray_sec, 1),
        "first_shard_sec": round(marks[0][0] - began, 1),
        "total_sec": round(ended - began, 1),
        "whole": round(audio_sec / (ended - began) / bound, 2),
        "steady": round(share * audio_sec / steady_sec / bound, 2) if enough else None,
        "cpu": round(share * audio_sec * parts_sec / spent_sec, 2) if enough else None,
        "cores": round(spent_sec / steady_sec / num_actors, 2) if enough else None,
        "driver_gib": round(watch.driver_bytes / GIB, 2),
        "actor_gib": round(watch.actor_bytes / GIB, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", default="2,8", help="hours of audio, one job for each")
    parser.add_argument("--num_actors", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5, help="passes over the parts, of which the best counts")
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
