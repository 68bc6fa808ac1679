"""Whisper's log-mel spectrogram, computed only for the frames of a padded clip that are not padding.

Whisper-type models take clips that are zero-padded to whole windows. All padding frames have one constant value, so
only the others are computed. The result is bit-equal to the padded extractor's, at a cost that depends on the length of
the clip and not on the window.

The frames are computed in fewer and cheaper steps than ``torch.stft``, ``abs``, square and matrix product. Each step
rounds exactly like the step that it replaces (see ``_power`` and ``_bands``).

Shape letters: T frames, N taps of a frame, F frequencies, M mel bins, K valid frames.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE_HZ = 16_000
N_FFT = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms: 100 frames a second
FLOOR = 1e-10  # silence has log10 power -10
SILENCE = np.float32(-10.0)
DYNAMIC_RANGE = np.float32(8.0)  # decades below the loudest value of the clip
FOUR = np.float32(4.0)
MIN_FRAMES = 64  # matrix products of fewer frames may round differently from the padded extractor's
BLOCK_FRAMES = 512  # frames per step: they fit into the CPU cache, and memory does not grow with the clip
BAND_BINS = 16  # one register of the widest matrix kernels
SUM_STARTS = ((0, 100), (0,))  # where MKL starts a new partial sum of 201 products: at 100 as well, or only at 0


@dataclass(frozen=True)
class _Band:
    """A few neighbouring mel bins and the frequencies with non-zero weights in them."""

    bins: slice
    frequencies: slice
    filters_FM: torch.Tensor
    accumulates: bool  # whether to add to the sum over lower frequencies that an earlier band left in these bins


class LogMel:
    """Log-mel features of one clip. Has no state between clips, so threads may share an object.

    Args:
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3, Voxtral).
    Attributes:
        num_bands: Number of small products that replace the dense one. 1 if only the dense product, which is slower,
            gives equal bits.
    """

    def __init__(self, num_mel_bins: int) -> None:
        filters = mel_filter_bank(
            num_frequency_bins=1 + N_FFT // 2,
            num_mel_filters=num_mel_bins,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE_HZ / 2,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.num_mel_bins = num_mel_bins
        filters_FM = torch.from_numpy(filters).to(torch.float32)
        self._bands = _bands(filters_FM)
        self.num_bands = len(self._bands)
        self._window = torch.hann_window(N_FFT)

    @torch.inference_mode()
    def valid(self, samples: np.ndarray, padded_samples: int) -> tuple[np.ndarray, float]:
        """Compute the frames of a zero-padded clip that differ from its padding.

        Args:
            samples: float32, shape (n,), 16 kHz.
            padded_samples: Length after padding, a multiple of 160 and at least n.
        Returns:
            mel (K, num_mel_bins) float32, and the value of all bins of frames K to padded_samples / 160 (the clamp
            level of the clip).
        Raises:
            ValueError: The clip is empty or longer than its padded length.
        Source: transformers ``WhisperFeatureExtractor._torch_extract_fbank_features``.
        """
        num_samples = len(samples)
        if not 0 < num_samples <= padded_samples:
            raise ValueError(f"a clip of {num_samples} samples does not fit into {padded_samples}")
        num_frames = num_valid_frames(num_samples, padded_samples)
        num_computed = min(max(num_frames, MIN_FRAMES), padded_samples // HOP_SAMPLES)
        frames_TN = _frames(samples, padded_samples, num_computed)
        mel_TM = torch.empty(num_computed, self.num_mel_bins)
        num_blocks = -(-num_computed // BLOCK_FRAMES)
        size = -(-num_computed // num_blocks)  # blocks of equal size: the last one must not have few frames
        for start in range(0, num_computed, size):
            power_TF = _power(frames_TN[start : start + size] * self._window)
            _mel_product(self._bands, power_TF, mel_TM[start : start + size])
        mel_KM = mel_TM[:num_frames].clamp_(min=FLOOR).log10_().numpy()
        clamp = np.maximum(mel_KM.max(), SILENCE) - DYNAMIC_RANGE
        np.maximum(mel_KM, clamp, out=mel_KM)
        mel_KM += FOUR
        mel_KM /= FOUR
        return mel_KM, float((np.maximum(clamp, SILENCE) + FOUR) / FOUR)


def num_valid_frames(num_samples: int, padded_samples: int) -> int:
    """Number of frames of a zero-padded clip that differ from its padding.

    Frame t covers samples [160 t - 200, 160 t + 200) and the first tap of the Hann window is 0, so frames from
    (n + 198) // 160 + 1 on have only zeros.
    """
    return min((num_samples + 198) // HOP_SAMPLES + 1, padded_samples // HOP_SAMPLES)


def _frames(samples: np.ndarray, padded_samples: int, num_frames: int) -> torch.Tensor:
    """First frames of the padded clip: zeros after the samples, 200 samples mirrored at both ends of the whole.

    Returns:
        frames_TN, overlapping views of one tensor.
    """
    half = N_FFT // 2
    padded = np.zeros((num_frames - 1) * HOP_SAMPLES + N_FFT, np.float32)
    padded[half : half + len(samples)] = samples[: len(padded) - half]
    padded[:half] = padded[2 * half : half : -1]
    beyond = len(padded) - half - padded_samples
    if beyond > 0:  # the last frame of the padded length reaches 40 samples beyond it
        padded[-beyond:] = padded[-beyond - 2 : -2 * beyond - 2 : -1]
    return torch.from_numpy(padded).as_strided((num_frames, N_FFT), (HOP_SAMPLES, 1))


def _power(frames_TN: torch.Tensor) -> torch.Tensor:
    """Squared magnitudes of windowed frames, bit-equal to ``torch.stft(...).abs() ** 2``.

    ``abs`` of complex numbers equals ``torch.hypot`` but is four times slower, since it computes a result for the real
    and for the imaginary part, which are adjacent in memory. Hypot on separate tensors computes half as many. The
    fastest way to separate the parts is to read each pair as one integer and take its lower and its upper half.
    """
    pairs_TF = torch.fft.rfft(frames_TN).view(torch.int64)
    real_TF = pairs_TF.to(torch.int32).view(torch.float32)
    imaginary_TF = pairs_TF.bitwise_right_shift_(32).to(torch.int32).view(torch.float32)
    magnitude_TF = torch.hypot(real_TF, imaginary_TF, out=real_TF)
    return magnitude_TF.mul_(magnitude_TF)


def _bands(filters_FM: torch.Tensor) -> list[_Band]:
    """Split the filters, of which 98 % are zeros, into bands, if the products are bit-equal to the dense one.

    A matrix product adds its terms in order and zeros do not change a sum, so omitting them is exact if each partial
    sum starts where the matrix library starts one. ``SUM_STARTS`` has the starts known for MKL, which are tried here.
    If none gives equal bits, the only band is the whole matrix.
    """
    whole = [_Band(slice(None), slice(None), filters_FM, accumulates=False)]

    def empty(power_TF: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(power_TF), filters_FM.shape[1])

    random = np.random.default_rng(0)
    trials = [
        torch.from_numpy(random.lognormal(0, 4, (num_frames, len(filters_FM))).astype(np.float32))
        for num_frames in (MIN_FRAMES, BLOCK_FRAMES)
    ]
    for bands in (_split_into_bands(filters_FM, starts) for starts in SUM_STARTS):
        if all(
            torch.equal(_mel_product(bands, power, empty(power)), _mel_product(whole, power, empty(power)))
            for power in trials
        ):
            return bands
    return whole


def _split_into_bands(filters_FM: torch.Tensor, starts: tuple[int, ...]) -> list[_Band]:
    bands = []
    for low, high in zip(starts, (*starts[1:], len(filters_FM)), strict=True):
        for first in range(0, filters_FM.shape[1], BAND_BINS):
            bins = slice(first, first + BAND_BINS)
            nonzero = torch.nonzero(filters_FM[low:high, bins].any(dim=1)).flatten()
            if len(nonzero):
                frequencies = slice(low + int(nonzero[0]), low + int(nonzero[-1]) + 1)
                accumulates = bool(filters_FM[:low, bins].any())
                bands.append(_Band(bins, frequencies, filters_FM[frequencies, bins].contiguous(), accumulates))
    return bands


def _mel_product(bands: list[_Band], power_TF: torch.Tensor, mel_TM: torch.Tensor) -> torch.Tensor:
    """Fill ``mel_TM`` with the product of powers and filters, and return it."""
    for band in bands:
        band_TM, band_TF = mel_TM[:, band.bins], power_TF[:, band.frequencies]
        if band.accumulates:
            torch.addmm(band_TM, band_TF, band.filters_FM, out=band_TM)
        else:
            torch.mm(band_TF, band.filters_FM, out=band_TM)
    return mel_TM
