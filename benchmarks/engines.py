"""Time Whisper's engines and their peers on real weights, in one process with one thread.

voxray's engines (transformers; ct2 in float32 and int8), transformers' pipeline (greedy, and as its model's generation
config says), and faster-whisper (float32 and int8, one beam, without its fallbacks) answer the same clips, and the same
recordings of several windows. Peers take turns, and the table shows medians over the rounds: CPU seconds per second of
audio, from samples to texts, and how many texts equal those of voxray's transformers engine. Prints one JSON line, too.

    OMP_NUM_THREADS=1 python benchmarks/engines.py --real FOLDER
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from voxray.audio.decode import decode  # noqa: E402
from voxray.commands.export import run_export  # noqa: E402
from voxray.config.export import ExportSettings  # noqa: E402
from voxray.core.manifest import Sample  # noqa: E402
from voxray.core.tasks import TASKS  # noqa: E402
from voxray.features.reader import FeatureRow  # noqa: E402
from voxray.generation.engines.load import load_engine  # noqa: E402
from voxray.generation.generate import SamplingParams  # noqa: E402
from voxray.generation.model import InferenceConfig  # noqa: E402
from voxray.models.registry import get_family  # noqa: E402

RATE_HZ = 16_000
MAX_NEW_TOKENS = 200
Clip = tuple[np.ndarray, str]
"""Samples and language code."""
Answer = Callable[[Sequence[Clip]], list[str]]


def read_clips(folder: Path) -> list[Clip]:
    rows = [json.loads(line) for line in (folder / "clips" / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    clips = [(decode(str(folder / "clips" / row["audio_path"]), RATE_HZ), row["language"]) for row in rows]
    return sorted((clip for clip in clips if len(clip[0]) <= 30 * RATE_HZ), key=lambda clip: len(clip[0]))


def make_recordings(clips: Sequence[Clip], number: int, seconds: float) -> list[Clip]:
    """English recordings that repeat the clips, each from another one on, with half a second between them."""
    speech = [samples for samples, language in clips if language == "en"]
    recordings = []
    for start in range(number):
        turned = (*speech[start:], *speech[:start])
        parts = [part for each in turned for part in (each, np.zeros(RATE_HZ // 2, np.float32))]
        recordings.append((np.resize(np.concatenate(parts), round(seconds * RATE_HZ)), "en"))
    return recordings


def voxray(model_id: str, engine_name: str, batch_size: int) -> Answer:
    front_end = get_family(model_id).front_end(model_id)
    config = InferenceConfig(model_id, "", SamplingParams(MAX_NEW_TOKENS), batch_size, engine=engine_name)
    engine, _ = load_engine(config, front_end)

    def row(number: int, samples: np.ndarray, language: str) -> FeatureRow:
        sample, features = Sample(str(number), TASKS["asr"], "", "", "clip", language, ""), front_end.features(samples)
        values = {name: getattr(sample, name) for name in ("id", "language", "source", "prompt", "answer")}
        values |= {"task": "asr", "prompt_ids": front_end.prompt_ids(sample, len(samples)), "target_ids": []}
        values |= {"audio": features.mel_KF, "fill": features.fill, "num_windows": features.num_windows}
        return FeatureRow.from_values({**values, "num_samples": len(samples)})

    def answer(clips: Sequence[Clip]) -> list[str]:
        rows = [row(number, *clip) for number, clip in enumerate(clips)]
        completions: dict[int, Any] = dict(engine.generate(rows, batch_size))
        return [completions[number].text for number in range(len(rows))]

    return answer


def library_pipeline(model_id: str, batch_size: int, **options: Any) -> Answer:
    from transformers import pipeline

    pipe: Any = pipeline("automatic-speech-recognition", model=model_id, dtype=torch.float32, batch_size=batch_size)

    def answer(clips: Sequence[Clip]) -> list[str]:
        texts = [""] * len(clips)
        for language in {language for _, language in clips}:  # the pipeline takes one language a call
            numbers = [number for number, clip in enumerate(clips) if clip[1] == language]
            inputs = [{"raw": clips[number][0], "sampling_rate": RATE_HZ} for number in numbers]
            is_long = any(len(clips[number][0]) > 30 * RATE_HZ for number in numbers)
            request = {"language": language, "task": "transcribe", "max_new_tokens": MAX_NEW_TOKENS, **options}
            results = pipe(inputs, return_timestamps=is_long, generate_kwargs=request)
            for number, result in zip(numbers, results, strict=True):
                texts[number] = result["text"].strip()
        return texts

    return answer


def faster_whisper(folder: str, compute_type: str) -> Answer:
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type=compute_type, cpu_threads=1)
    rules: dict[str, Any] = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
    rules |= dict.fromkeys(("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"))

    def answer(clips: Sequence[Clip]) -> list[str]:
        texts = []
        for samples, language in clips:
            is_short = len(samples) <= 30 * RATE_HZ
            segments, _ = model.transcribe(samples, language=language, without_timestamps=is_short, **rules)
            texts.append("".join(segment.text for segment in segments).strip())
        return texts

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="folder with whisper-base and clips (see tests/real)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--recordings", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of each recording")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    base, size = str(flags.real / "whisper-base"), flags.batch_size
    clips = read_clips(flags.real)
    data = {"short": clips, "long": make_recordings(clips, flags.recordings, flags.seconds)}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "int8"):
            values = {"model_id": base, "format": "ct2", "dtype": dtype, "output_dir": f"{folder}/{dtype}"}
            run_export(ExportSettings.model_validate(values))
        peers: dict[str, Answer] = {
            "voxray transformers": voxray(base, "transformers", size),
            "voxray ct2 float32": voxray(f"{folder}/float32", "ct2", size),
            "voxray ct2 int8": voxray(f"{folder}/int8", "ct2", size),
            "pipeline greedy": library_pipeline(base, size, num_beams=1),
            "pipeline as it comes": library_pipeline(base, size),
            "faster-whisper float32": faster_whisper(f"{folder}/float32", "float32"),
            "faster-whisper int8": faster_whisper(f"{folder}/int8", "int8"),
        }
        results = measure(peers, data, flags.rounds)
    print(f"{'':24}" + "".join(f"{name:>10}{'equal':>10}" for name in data))
    for peer, of_peer in results.items():
        cells = (f"{value['cpu_sec_per_sec']:10.3f}{value['equal']:>10}" for value in of_peer.values())
        print(f"{peer:24}" + "".join(cells))
    print(json.dumps({"benchmark": "engines", "results": results}))


def measure(
    peers: Mapping[str, Answer], data: Mapping[str, Sequence[Clip]], num_rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """{peer: {data set: CPU seconds per second of audio, and texts equal to those of the first peer}}."""
    results: dict[str, dict[str, dict[str, Any]]] = {peer: {} for peer in peers}
    for name, clips in data.items():
        audio_sec = sum(len(samples) for samples, _ in clips) / RATE_HZ
        times: dict[str, list[float]] = {peer: [] for peer in peers}
        texts: dict[str, list[str]] = {}
        for number in range(num_rounds):
            for peer, answer in peers.items():
                start = time.process_time()
                texts[peer] = answer(clips)
                times[peer].append((time.process_time() - start) / audio_sec)
                print(f"{name}, round {number + 1}: {peer} {times[peer][-1]:.3f}", file=sys.stderr, flush=True)
        first = next(iter(texts.values()))
        for peer in peers:
            equal = sum(a == b for a, b in zip(first, texts[peer], strict=True))
            results[peer][name] = {"cpu_sec_per_sec": median(times[peer]), "equal": f"{equal}/{len(clips)}"}
            results[peer][name]["texts"] = texts[peer]
    return results


if __name__ == "__main__":
    main()
