"""Log-mel side by side: transformers' WhisperFeatureExtractor (batch 1, padded to 30 s) against voxray's valid frames.

Both on one thread, in one run, on the same clips; equality is checked in the same run. Prints a table of ratios and one
JSON line with the same figures. A single band says that the mel product is dense on this machine (see LogMel).

    python benchmarks/features.py
"""

import json
import time

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from voxray.audio.logmel import SAMPLE_RATE_HZ, LogMel

WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ
SECONDS = (1, 5, 30)
MEL_BINS = (80, 128)
BUDGET_SEC = 1.5


def audio_sec_per_sec(work, clip_sec: int) -> float:
    """Seconds of audio per second of one thread; the best of several passes, as machines are noisy."""
    work()
    best, ends = float("inf"), time.perf_counter() + BUDGET_SEC
    while time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return clip_sec / best


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for bins in MEL_BINS:
        theirs, ours = WhisperFeatureExtractor(feature_size=bins), LogMel(bins)
        for clip_sec in SECONDS:
            samples = np.random.default_rng(clip_sec).normal(0, 0.1, clip_sec * SAMPLE_RATE_HZ).astype(np.float32)

            def padded(samples=samples, theirs=theirs) -> np.ndarray:
                return theirs(samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")["input_features"][0].T

            def valid(samples=samples, ours=ours) -> tuple[np.ndarray, float]:
                return ours.valid(samples, WINDOW_SAMPLES)

            mel, fill = valid()
            whole = np.full((WINDOW_SAMPLES // 160, bins), fill, np.float32)
            whole[: len(mel)] = mel
            equal = bool(np.array_equal(whole, padded()))
            slow, fast = audio_sec_per_sec(padded, clip_sec), audio_sec_per_sec(valid, clip_sec)
            rows.append({"bins": bins, "clip_sec": clip_sec, "ratio": round(fast / slow, 1), "bit_equal": equal})
            rows[-1] |= {"transformers": round(slow), "voxray": round(fast), "bands": ours.num_bands}
    print("bins  clip s  transformers  voxray  ratio  bit-equal  bands   (audio seconds per second of one thread)")
    for row in rows:
        print(
            "{bins:4}  {clip_sec:6}  {transformers:12}  {voxray:6}  {ratio:5}  {bit_equal!s:9}  {bands:5}".format(**row)
        )
    print(json.dumps({"benchmark": "features", "rows": rows}))


if __name__ == "__main__":
    main()
