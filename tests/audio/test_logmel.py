"""Log-mel: bit-equal to transformers' Whisper extractor on the padded clip, padding included."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from voxray.audio.logmel import HOP_SAMPLES, SAMPLE_RATE_HZ, LogMel

SECOND = SAMPLE_RATE_HZ


def clip(kind: str, num_samples: int) -> np.ndarray:
    random = np.random.default_rng(num_samples)
    if kind == "noise":
        return (0.1 * random.normal(size=num_samples)).astype(np.float32)
    if kind == "silence":
        return np.zeros(num_samples, np.float32)
    if kind == "tone":
        return np.sin(0.05 * np.arange(num_samples)).astype(np.float32)
    if kind == "click":  # one loud sample at the very end: the last frames decide about the clamp
        samples = (1e-4 * random.normal(size=num_samples)).astype(np.float32)
        samples[-1] = 1.0
        return samples
    assert kind == "faint"  # below the floor: the clamp, the fill and the frames meet at -10
    return (1e-7 * random.normal(size=num_samples)).astype(np.float32)


def lengths(window: int) -> list[int]:
    small = [1, 2, 3, 159, 160, 161, 199, 200, 201, 202, 359, 360, 361, 399, 400, 401, 402, 7999, 8000, 8001]
    ends = [window - 401, window - 400, window - 201, window - 200, window - 199, window - 1, window, window + 1]
    return [*small, *ends, window + 201, 2 * window - 1, 2 * window, 3 * window - 200, 3 * window]


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("window", [64_000, 480_000])
def test_bit_equal_to_the_extractor(num_mel_bins: int, window: int):
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=window // SECOND)
    log_mel = LogMel(num_mel_bins)
    different = []
    for num_samples in lengths(window):
        kinds = ["noise", "silence", "tone", "click", "faint"] if num_samples <= 64_001 else ["noise"]
        for kind in kinds:
            samples = clip(kind, num_samples)
            padded = -(-num_samples // window) * window
            options = {"sampling_rate": SECOND, "padding": True, "pad_to_multiple_of": window, "truncation": False}
            wanted_BT = extractor(samples, **options, return_tensors="np")["input_features"][0]
            mel_KB, fill = log_mel.valid(samples, padded)
            full_TB = np.full((padded // HOP_SAMPLES, num_mel_bins), fill, np.float32)
            full_TB[: len(mel_KB)] = mel_KB
            assert wanted_BT.shape == full_TB.T.shape and mel_KB.dtype == np.float32
            if not np.array_equal(full_TB.T, wanted_BT):
                different.append((num_samples, kind, float(np.abs(full_TB.T - wanted_BT).max())))
    assert different == []


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 2), (121, 2), (122, 3), (160, 3), (16_000, 102)])
def test_only_frames_that_touch_the_clip_are_kept(num_samples: int, num_frames: int):
    assert len(LogMel(80).valid(np.ones(num_samples, np.float32), 480_000)[0]) == num_frames


def test_a_full_window_keeps_all_of_its_frames():
    assert LogMel(80).valid(np.ones(480_000, np.float32), 480_000)[0].shape == (3000, 80)


def test_the_clip_is_left_as_it_was():
    samples = np.ones(500)[::2]  # float64 and with gaps
    mel, fill = LogMel(80).valid(samples, 64_000)
    wanted, wanted_fill = LogMel(80).valid(np.ones(250, np.float32), 64_000)
    assert np.array_equal(mel, wanted) and fill == wanted_fill and samples.dtype == np.float64


@pytest.mark.parametrize(("num_samples", "padded"), [(0, 64_000), (64_001, 64_000)])
def test_clips_that_do_not_fit(num_samples: int, padded: int):
    with pytest.raises(ValueError, match=f"a clip of {num_samples} samples does not fit into {padded}"):
        LogMel(80).valid(np.zeros(num_samples, np.float32), padded)
