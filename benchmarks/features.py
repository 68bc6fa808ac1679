"""Compare the log-mel of transformers' WhisperFeatureExtractor (batch 1, padded to 30 s) with voxray's valid frames.

Both run on one thread on the same clips, and their results are checked for equality. Prints a table of ratios and one
JSON line with the same figures. One band means that the mel product is dense on this machine (see ``LogMel``).

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
    """Seconds of audio per second of one thread. The best of several passes, because timings are noisy."""
    work()
    best_sec, deadline = float("inf"), time.perf_counter() + BUDGET_SEC
    while time.perf_counter() < deadline:
        start_sec = time.perf_counter()
        work()
        best_sec = min(best_sec, time.perf_counter() - start_sec)
    return clip_sec / best_sec


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for bins in MEL_BINS:
        extractor, log_mel = WhisperFeatureExtractor(feature_size=bins), LogMel(bins)
        for clip_sec in SECONDS:
            samples = np.random.default_rng(clip_sec).normal(0, 0.1, clip_sec * SAMPLE_RATE_HZ).astype(np.float32)

            def padded(samples=samples, extractor=extractor) -> np.ndarray:
                return extractor(samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")["input_features"][0].T

            def valid(samples=samples, log_mel=log_mel) -> tuple[np.ndarray, float]:
                return log_mel.valid(samples, WINDOW_SAMPLES)

            mel, fill = valid()
            window = np.full((WINDOW_SAMPLES // 160, bins), fill, np.float32)
            window[: len(mel)] = mel
            is_equal = bool(np.array_equal(window, padded()))
            padded_rate, valid_rate = audio_sec_per_sec(padded, clip_sec), audio_sec_per_sec(valid, clip_sec)
            ratio = round(valid_rate / padded_rate, 1)
            rows.append({"bins": bins, "clip_sec": clip_sec, "ratio": ratio, "bit_equal": is_equal})
            rows[-1] |= {"transformers": round(padded_rate), "voxray": round(valid_rate), "bands": log_mel.num_bands}
    print("bins  clip s  transformers  voxray  ratio  bit-equal  bands   (audio seconds per second of one thread)")
    for row in rows:
        print(
            "{bins:4}  {clip_sec:6}  {transformers:12}  {voxray:6}  {ratio:5}  {bit_equal!s:9}  {bands:5}".format(**row)
        )
    print(json.dumps({"benchmark": "features", "rows": rows}))


if __name__ == "__main__":
    main()
