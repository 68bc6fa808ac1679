"""Kaldi's log-mel filter bank, the input features of BEATs.

Shape letters: B rows, N samples, T frames, S samples of a frame, F frequencies, M mel bins.
"""

import warnings
from functools import cache

import torch
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms: 100 frames a second
N_FFT = 512  # the next power of two
NUM_MEL_BINS = 128
LOWEST_HZ = 20.0
PRE_EMPHASIS = 0.97
FULL_SCALE = 2.0**15  # Kaldi takes samples as 16-bit integers
FLOOR = torch.finfo(torch.float32).eps  # smallest energy, that of silence, before the logarithm


def num_fbank_frames(num_samples: int) -> int:
    """Number of complete frames in a clip: 1 + (480,000 - 400) // 160 = 2,998 for 30 s."""
    return max(0, 1 + (num_samples - FRAME_SAMPLES) // HOP_SAMPLES)


def kaldi_fbank(waveform_BN: torch.Tensor) -> torch.Tensor:
    """Log-mel energies of clips, computed in float64.

    SALMONN's own code also computes them in float64, since its samples are float64. In float32 the quiet bins have
    rounding errors of up to 1e-3, which differ between processors. Under float16 autocast the energies overflow.

    ``torchaudio.compliance.kaldi.fbank`` is not used. It takes one clip per call and builds its filters on the CPU each
    time (533 operations for a batch of 8, here 21), and in the default dtype, so in float32 at best.
    ``test_agrees_with_torchaudio`` in tests/audio/test_fbank.py compares the two within 2e-4.

    Args:
        waveform_BN: Samples at 16 kHz, -1 to 1.
    Returns:
        float32, shape (B, num_fbank_frames(N), 128).
    Source: Kaldi's ``compute-fbank-feats`` with a povey window, without dither and energy.
    """
    window_S, filters_FM = _constants(waveform_BN.device)
    frames_BTS = (waveform_BN.double() * FULL_SCALE).unfold(-1, FRAME_SAMPLES, HOP_SAMPLES)
    frames_BTS = frames_BTS - frames_BTS.mean(-1, keepdim=True)
    previous_BTS = torch.cat([frames_BTS[..., :1], frames_BTS[..., :-1]], dim=-1)
    frames_BTS = (frames_BTS - PRE_EMPHASIS * previous_BTS) * window_S
    power_BTF = torch.fft.rfft(frames_BTS, n=N_FFT).abs().square()
    return (power_BTF @ filters_FM).clamp(min=FLOOR).log().float()


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Window and mel filters in float64. They are not module buffers, which ``model.to(bfloat16)`` would convert."""
    hann_S = torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # one of the lowest of 128 filters is all zeros: bins are closer than frequencies
        filters_FM = mel_filter_bank(
            num_frequency_bins=1 + N_FFT // 2,
            num_mel_filters=NUM_MEL_BINS,
            min_frequency=LOWEST_HZ,
            max_frequency=SAMPLE_RATE_HZ / 2,
            sampling_rate=SAMPLE_RATE_HZ,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return hann_S.pow(0.85).to(device), torch.from_numpy(filters_FM).to(device)
