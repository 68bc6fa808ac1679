"""Log-mel: bit-equal to transformers' Whisper extractor on the padded clip, padding included."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from voxray.audio.logmel import (
    BLOCK_FRAMES,
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    SUM_STARTS,
    LogMel,
    _mel_product,
    _split_into_bands,
)

SECOND = SAMPLE_RATE_HZ


def clip(kind: str, num_samples: int) -> np.ndarray:
    random = np.random.default_rng(num_samples)
    if kind == "noise":
        return (0.1 * random.normal(size=num_samples)).astype(np.float32)
    if kind == "silence":
        return np.zeros(num_samples, np.float32)
    if kind == "tone":
        return np.sin(0.05 * np.arange(num_samples)).astype(np.float32)
    if kind == "click":  # one loud sample at the very end: the last frames determine the clamp
        samples = (1e-4 * random.normal(size=num_samples)).astype(np.float32)
        samples[-1] = 1.0
        return samples
    assert kind == "faint"  # below the floor: the clamp, the fill value and the frames are all at -10
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
            expected_BT = extractor(samples, **options, return_tensors="np")["input_features"][0]
            mel_KF, fill = log_mel.valid(samples, padded)
            full_TB = np.full((padded // HOP_SAMPLES, num_mel_bins), fill, np.float32)
            full_TB[: len(mel_KF)] = mel_KF
            assert expected_BT.shape == full_TB.T.shape and mel_KF.dtype == np.float32
            if not np.array_equal(full_TB.T, expected_BT):
                different.append((num_samples, kind, float(np.abs(full_TB.T - expected_BT).max())))
    assert different == []


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 2), (121, 2), (122, 3), (160, 3), (16_000, 102)])
def test_only_frames_that_overlap_the_clip_are_computed(num_samples: int, num_frames: int):
    assert len(LogMel(80).valid(np.ones(num_samples, np.float32), 480_000)[0]) == num_frames


def test_a_full_window_has_all_frames():
    assert LogMel(80).valid(np.ones(480_000, np.float32), 480_000)[0].shape == (3000, 80)


def test_the_clip_is_not_modified():
    samples = np.ones(500)[::2]  # float64 and with gaps
    mel, fill = LogMel(80).valid(samples, 64_000)
    expected, expected_fill = LogMel(80).valid(np.ones(250, np.float32), 64_000)
    assert np.array_equal(mel, expected) and fill == expected_fill and samples.dtype == np.float64


@pytest.mark.parametrize(("num_samples", "padded"), [(0, 64_000), (64_001, 64_000)])
def test_clips_that_do_not_fit(num_samples: int, padded: int):
    with pytest.raises(ValueError, match=f"a clip of {num_samples} samples does not fit into {padded}"):
        LogMel(80).valid(np.zeros(num_samples, np.float32), padded)


def test_results_do_not_depend_on_earlier_clips():
    """Long before short and silent before loud, compared with a new object for each clip."""
    log_mel = LogMel(128)
    for num_samples in (480_000, 1, 16_000, 100_000, 160, 479_999, 8_000, 16_000):
        for kind in ("noise", "silence", "click"):
            samples = clip(kind, num_samples)
            before = samples.copy()
            mel, fill = log_mel.valid(samples, 480_000)
            expected, expected_fill = LogMel(128).valid(samples, 480_000)
            assert np.array_equal(mel, expected) and fill == expected_fill, (num_samples, kind)
            assert np.array_equal(samples, before)


def test_results_are_not_overwritten():
    log_mel = LogMel(80)
    mel, _ = log_mel.valid(clip("noise", 16_000), 480_000)
    copy = mel.copy()
    log_mel.valid(clip("tone", 16_000), 480_000)
    assert np.array_equal(mel, copy)


def test_threads_share_an_object():
    log_mel = LogMel(128)
    clips = [clip("noise", 500 + 1_237 * number) for number in range(48)]
    expected = [log_mel.valid(samples, 64_000) for samples in clips]
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(lambda samples: log_mel.valid(samples, 64_000), clips * 5))
    for (mel, fill), (wanted_mel, expected_fill) in zip(result, expected * 5, strict=True):
        assert np.array_equal(mel, wanted_mel) and fill == expected_fill


def test_windows_longer_than_a_block():
    """Blocks end inside the clip, at frames that are no multiple of a power of two, for one and for three windows."""
    extractor, log_mel = WhisperFeatureExtractor(feature_size=128, chunk_length=30), LogMel(128)
    options = {"sampling_rate": SECOND, "padding": True, "pad_to_multiple_of": 480_000, "truncation": False}
    for num_frames in (BLOCK_FRAMES - 1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 2 * BLOCK_FRAMES + 1, 3_333):
        samples = clip("noise", num_frames * HOP_SAMPLES - 250)
        expected_BT = extractor(samples, **options, return_tensors="np")["input_features"][0]
        mel_KF, fill = log_mel.valid(samples, HOP_SAMPLES * expected_BT.shape[1])
        assert len(mel_KF) == num_frames
        assert np.array_equal(mel_KF.T, expected_BT[:, :num_frames]) and (expected_BT[:, num_frames:] == fill).all()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("starts", [(), ((0, 57),), ((0,),)])
def test_bands_that_round_differently_are_not_used(monkeypatch, starts: tuple, num_threads: int):
    """For any guess about the matrix library, the result is bit-equal to the dense product."""
    expected, expected_fill = LogMel(80).valid(clip("noise", 32_000), 64_000)
    monkeypatch.setattr("voxray.audio.logmel.SUM_STARTS", starts)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        mel, fill = LogMel(80).valid(clip("noise", 32_000), 64_000)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(mel, expected) and fill == expected_fill


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("starts", [*SUM_STARTS, (0, 57), (0, 33, 100)])
def test_bands_contain_every_filter(num_mel_bins: int, starts: tuple[int, ...]):
    """For any start of the sums, bands equal the dense product up to rounding, with far fewer weights."""
    (whole,) = _unsplit_bands(num_mel_bins)
    filters_FM = whole.filters_FM
    bands = _split_into_bands(filters_FM, starts)
    power_TF = torch.rand(70, 201, generator=torch.Generator().manual_seed(0))
    result = _mel_product(bands, power_TF, torch.full((70, num_mel_bins), torch.nan))
    torch.testing.assert_close(result, power_TF @ filters_FM, rtol=1e-5, atol=0)
    assert sum(band.filters_FM.numel() for band in bands) < filters_FM.numel() / 3


def _unsplit_bands(num_mel_bins: int) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("voxray.audio.logmel.SUM_STARTS", ())
        return LogMel(num_mel_bins)._bands
