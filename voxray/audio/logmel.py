"""Whisper's log-mel spectrogram, computed on the part of a padded clip that is not padding.

Whisper-type models hear clips zero-padded to whole windows. Most of those frames are one constant, so only the others
are computed: the result is bit-equal to the padded extractor's, at a cost that follows the clip and not the window.

What is left is done in fewer and cheaper steps than ``torch.stft``, ``abs``, square and matrix product take, each of
which was chosen because it rounds like the step it replaces (see ``_power`` and ``_bands``).

Shape letters: T frames, N taps of a frame, F frequencies, M mel bins, K frames that are kept.
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
DYNAMIC_RANGE = np.float32(8.0)  # decades kept below the loudest value of the clip
FOUR = np.float32(4.0)
MIN_FRAMES = 64  # matrix products narrower than this may round differently from the padded extractor's
FRAMES_AT_A_TIME = 512  # what is in work stays in the cache, and memory does not grow with the clip
BINS_OF_A_BAND = 16  # one register of the widest matrix kernels
SUMS_START_AT = ((0, 100), (0,))  # where MKL starts another sum of 201 products: at 100, or not at all


@dataclass(frozen=True)
class _Band:
    """A few neighbouring mel bins and the frequencies that they hear."""

    bins: slice
    frequencies: slice
    filters_FM: torch.Tensor
    adds: bool  # to the sum over lower frequencies, which an earlier band has left in these bins


class LogMel:
    """Log-mel features of one clip. Nothing is kept between clips, so threads may share an object.

    Args:
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3, Voxtral).
    Attributes:
        num_bands: Products that take the place of the dense one; 1 where only that keeps the bits, which is slower.
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

        The others all hold the clamp level of the clip, which is returned once.

        Args:
            samples: float32, shape (n,), 16 kHz.
            padded_samples: Length after padding, a multiple of 160 and at least n.
        Returns:
            mel (K, num_mel_bins) float32 and the constant that fills frames K to padded_samples / 160.
        Raises:
            ValueError: The clip is empty or longer than its padded length.
        Source: transformers ``WhisperFeatureExtractor._torch_extract_fbank_features``.
        """
        num_samples = len(samples)
        if not 0 < num_samples <= padded_samples:
            raise ValueError(f"a clip of {num_samples} samples does not fit into {padded_samples}")
        num_frames = num_valid_frames(num_samples, padded_samples)
        computed = min(max(num_frames, MIN_FRAMES), padded_samples // HOP_SAMPLES)
        frames_TN = _frames(samples, padded_samples, computed)
        log_TM = torch.empty(computed, self.num_mel_bins)
        num_blocks = -(-computed // FRAMES_AT_A_TIME)
        size = -(-computed // num_blocks)  # even blocks: the last one must not be narrow
        for start in range(0, computed, size):
            power_TF = _power(frames_TN[start : start + size] * self._window)
            _apply(self._bands, power_TF, log_TM[start : start + size])
        mel_KM = log_TM[:num_frames].clamp_(min=FLOOR).log10_().numpy()
        clamp = np.maximum(mel_KM.max(), SILENCE) - DYNAMIC_RANGE
        np.maximum(mel_KM, clamp, out=mel_KM)
        mel_KM += FOUR
        mel_KM /= FOUR
        return mel_KM, float((np.maximum(clamp, SILENCE) + FOUR) / FOUR)


def num_valid_frames(num_samples: int, padded_samples: int) -> int:
    """Frames of a zero-padded clip that differ from its padding.

    Frame t covers samples [160 t - 200, 160 t + 200) and the first tap of the Hann window is 0, so frames from
    (n + 198) // 160 + 1 on see only zeros.
    """
    return min((num_samples + 198) // HOP_SAMPLES + 1, padded_samples // HOP_SAMPLES)


def _frames(samples: np.ndarray, padded_samples: int, num_frames: int) -> torch.Tensor:
    """The first frames of the clip as the extractor sees it: zeros behind it, 200 samples mirrored at both ends.

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
    """Squared magnitudes of windowed frames, with the bits of ``torch.stft(...).abs() ** 2``.

    For complex numbers ``abs`` is the same hypot as ``torch.hypot``, but four times slower: it is computed for real and
    imaginary parts alike, as they lie next to each other. Apart, they are half as many; and the fastest way to take
    them apart is to read each pair as one integer and to keep its lower and its upper half.
    """
    pairs_TF = torch.fft.rfft(frames_TN).view(torch.int64)
    real_TF = pairs_TF.to(torch.int32).view(torch.float32)
    imaginary_TF = pairs_TF.bitwise_right_shift_(32).to(torch.int32).view(torch.float32)
    magnitude_TF = torch.hypot(real_TF, imaginary_TF, out=real_TF)
    return magnitude_TF.mul_(magnitude_TF)


def _bands(filters_FM: torch.Tensor) -> list[_Band]:
    """Cut the filters, of which 98 % are zeros, into bands; only if the products keep the bits of the whole.

    A matrix product adds up its terms in order, and zeros change no sum, so leaving them out is exact as long as each
    sum starts where the matrix library starts one. That is known for MKL and tried here; where no guess gives equal
    bits, the only band is the whole matrix.
    """
    whole = [_Band(slice(None), slice(None), filters_FM, adds=False)]

    def empty(power_TF: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(power_TF), filters_FM.shape[1])

    random = np.random.default_rng(0)
    trials = [
        torch.from_numpy(random.lognormal(0, 4, (num_frames, len(filters_FM))).astype(np.float32))
        for num_frames in (MIN_FRAMES, FRAMES_AT_A_TIME)
    ]
    for bands in (_cut(filters_FM, starts) for starts in SUMS_START_AT):
        if all(torch.equal(_apply(bands, power, empty(power)), _apply(whole, power, empty(power))) for power in trials):
            return bands
    return whole


def _cut(filters_FM: torch.Tensor, starts: tuple[int, ...]) -> list[_Band]:
    bands = []
    for low, high in zip(starts, (*starts[1:], len(filters_FM)), strict=True):
        for first in range(0, filters_FM.shape[1], BINS_OF_A_BAND):
            bins = slice(first, first + BINS_OF_A_BAND)
            heard = torch.nonzero(filters_FM[low:high, bins].any(dim=1)).flatten()
            if len(heard):
                frequencies = slice(low + int(heard[0]), low + int(heard[-1]) + 1)
                adds = bool(filters_FM[:low, bins].any())
                bands.append(_Band(bins, frequencies, filters_FM[frequencies, bins].contiguous(), adds))
    return bands


def _apply(bands: list[_Band], power_TF: torch.Tensor, mel_TM: torch.Tensor) -> torch.Tensor:
    """Fill ``mel_TM`` with the product of powers and filters."""
    for band in bands:
        part_TM, heard_TF = mel_TM[:, band.bins], power_TF[:, band.frequencies]
        if band.adds:
            torch.addmm(part_TM, heard_TF, band.filters_FM, out=part_TM)
        else:
            torch.mm(heard_TF, band.filters_FM, out=part_TM)
    return mel_TM
