"""Whisper's log-mel spectrogram, computed on the part of a padded clip that is not padding.

Whisper-type models hear clips zero-padded to whole windows. Most of those frames are one constant, so only the others
are computed: the result is bit-equal to the padded extractor's, at a cost that follows the clip and not the window.
"""

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE_HZ = 16_000
N_FFT = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms: 100 frames a second
FLOOR = 1e-10  # silence has log10 power -10
MIN_FRAMES = 64  # matrix products narrower than this may round differently from the padded extractor's
DYNAMIC_RANGE = 8.0  # decades kept below the loudest value of the clip


class LogMel:
    """Log-mel features of one clip.

    Args:
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3, Voxtral).
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
        self._filters_MF = torch.from_numpy(filters).to(torch.float32).T
        self._window = torch.hann_window(N_FFT)

    def valid(self, samples: np.ndarray, padded_samples: int) -> tuple[np.ndarray, float]:
        """Compute the frames of a zero-padded clip that differ from its padding.

        Frame t covers samples [160 t - 200, 160 t + 200) and the first tap of the Hann window is 0, so frames from
        (n + 198) // 160 + 1 on see only zeros. They all hold the clamp level of the clip, which is returned once.

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
        num_frames = min((num_samples + 198) // HOP_SAMPLES + 1, padded_samples // HOP_SAMPLES)
        # Beyond the clip a frame of zeros is enough, except at the very end, where the extractor reflects real samples.
        length = min(max(num_samples + N_FFT + HOP_SAMPLES, MIN_FRAMES * HOP_SAMPLES), padded_samples)
        padded = torch.zeros(length)
        padded[:num_samples] = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
        spectrum = torch.stft(padded, N_FFT, HOP_SAMPLES, window=self._window, return_complex=True)
        power_FT = (spectrum[..., : max(num_frames, min(MIN_FRAMES, spectrum.shape[-1]))].abs() ** 2).contiguous()
        log_MK = torch.clamp(self._filters_MF @ power_FT, min=FLOOR).log10()[:, :num_frames]
        clamp = torch.maximum(log_MK.max(), torch.tensor(-10.0)) - DYNAMIC_RANGE
        mel_MK = (torch.maximum(log_MK, clamp) + 4.0) / 4.0
        fill = (torch.maximum(clamp, torch.tensor(-10.0)) + 4.0) / 4.0
        return mel_MK.T.contiguous().numpy(), float(fill)
