"""Kaldi's log-mel filter bank, as BEATs hears sound.

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
FULL_SCALE = 2.0**15  # Kaldi counts samples as 16-bit whole numbers
FLOOR = torch.finfo(torch.float32).eps  # energies of silence, before the logarithm


def num_fbank_frames(num_samples: int) -> int:
    """Frames that fit into a clip as a whole: 30 s are 1 + (480,000 - 400) // 160 = 2,998."""
    return max(0, 1 + (num_samples - FRAME_SAMPLES) // HOP_SAMPLES)


def kaldi_fbank(waveform_BN: torch.Tensor) -> torch.Tensor:
    """Log-mel energies of clips, computed in float64.

    SALMONN's own code computes them so, since its samples are float64. In float32 the quiet bins are rounded by up to
    1e-3, differently on every processor; in float16, to which autocast would turn the products, energies of 16-bit
    samples overflow.

    Args:
        waveform_BN: Samples at 16 kHz, -1 to 1.
    Returns:
        float32, shape (B, num_fbank_frames(N), 128).
    Source: Kaldi's ``compute-fbank-feats`` with a povey window and neither dither nor energy; torchaudio
        ``compliance.kaldi.fbank`` (a test holds the two against each other).
    """
    window_S, filters_FM = _constants(waveform_BN.device)
    frames_BTS = (waveform_BN.double() * FULL_SCALE).unfold(-1, FRAME_SAMPLES, HOP_SAMPLES)
    frames_BTS = frames_BTS - frames_BTS.mean(-1, keepdim=True)
    before_BTS = torch.cat([frames_BTS[..., :1], frames_BTS[..., :-1]], dim=-1)
    frames_BTS = (frames_BTS - PRE_EMPHASIS * before_BTS) * window_S
    power_BTF = torch.fft.rfft(frames_BTS, n=N_FFT).abs().square()
    return (power_BTF @ filters_FM).clamp(min=FLOOR).log().float()


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Window and filters; no buffers of a module, whose type a model in bfloat16 would change."""
    hann_S = torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lowest of 128 bins lie closer than the frequencies: one hears nothing
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
