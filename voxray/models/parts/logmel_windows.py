"""Log-mel in whole windows: the shared part of front ends for models with a Whisper-type encoder.

Shape letters: K valid mel frames of a clip, W windows, T mel frames of a window, F mel bins.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES, N_FFT, SAMPLE_RATE_HZ, LogMel
from voxray.core.errors import RunError, one_line
from voxray.models.front_end import AudioFeatures, FrontEnd

FEATURES_VERSION = "logmel-1"
ENCODER_STRIDE = 2  # of the encoder's second convolution: 3,000 mel frames -> 1,500 encoder positions


class WindowedLogMel:
    """Log-mel features of clips that are padded to whole windows.

    Args:
        model_id: Base with a preprocessor_config.json.
        num_mel_bins: Values of one frame.
        encoder_positions: Outputs of the encoder for one window.
    Raises:
        RunError: The preprocessor cannot be read or computes other features than voxray.
    """

    sample_rate_hz = SAMPLE_RATE_HZ
    languages: frozenset[str] | None = None  # codes of the languages that the base has; None for any
    needs_num_samples = False

    def __init__(self, model_id: str, num_mel_bins: int, encoder_positions: int) -> None:
        self.model_id, self.num_mel_bins = model_id, num_mel_bins
        self.encoder_positions = encoder_positions
        self.window_frames = encoder_positions * ENCODER_STRIDE
        self.window_samples = self.window_frames * HOP_SAMPLES
        self._read_preprocessor()

    def _read_preprocessor(self) -> None:
        from transformers import WhisperFeatureExtractor

        try:
            preprocessor = WhisperFeatureExtractor.from_pretrained(self.model_id)
        except (OSError, ValueError) as error:
            reason = one_line(error, 200)
            raise RunError(f"--model_id {self.model_id}: no usable preprocessor_config.json: {reason}") from None
        check_preprocessor(preprocessor, self.model_id, self.num_mel_bins)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_logmel"}

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        return ""

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Log-mel of one clip, clamped to 8 decades below the maximum of the whole clip, as in the processor.

        Args:
            samples: float32, shape (num_samples,), at 16 kHz.
        """
        if not hasattr(self, "_logmel"):
            self._logmel = LogMel(self.num_mel_bins)
        num_windows = self.num_windows(len(samples))
        mel_KF, fill = self._logmel.valid(samples, num_windows * self.window_samples)
        return AudioFeatures(mel_KF, fill, num_windows)

    def num_windows(self, num_samples: int) -> int:
        """Number of whole windows that a clip of ``num_samples`` at 16 kHz is padded to."""
        return -(-num_samples // self.window_samples)


def check_preprocessor(preprocessor: Any, model_id: str, num_mel_bins: int) -> None:
    """Check that a feature extractor computes the log-mel that voxray computes.

    Raises:
        RunError: It computes another one.
    """
    required = {"sampling_rate": SAMPLE_RATE_HZ, "n_fft": N_FFT, "hop_length": HOP_SAMPLES}
    for name, value in {**required, "feature_size": num_mel_bins, "dither": 0.0}.items():
        if getattr(preprocessor, name) != value:
            stored = getattr(preprocessor, name)
            raise RunError(f"--model_id {model_id}: its preprocessor has {name} {stored}, not {value}")


def samples_by_window(front_end: FrontEnd, num_samples: int) -> list[int]:
    """Samples that count in each window of a clip: all that are not padding, if the front end has no other rule."""
    if rule := getattr(front_end, "samples_by_window", None):
        return rule(num_samples)
    return window_lengths(num_samples, front_end.window_frames * HOP_SAMPLES)


def window_lengths(num_samples: int, window_samples: int) -> list[int]:
    """Number of unpadded samples in each window of a clip."""
    return [min(window_samples, num_samples - start) for start in range(0, num_samples, window_samples)]


def padded_windows(mel_KF: np.ndarray, fill: float, num_windows: int, front_end: FrontEnd) -> np.ndarray:
    """Pad a clip's log-mel with ``fill`` and split it into windows.

    Returns:
        mel_WFT, float32, shape (num_windows, num_mel_bins, window_frames).
    """
    padded_KF = np.full((num_windows * front_end.window_frames, front_end.num_mel_bins), fill, np.float32)
    padded_KF[: len(mel_KF)] = mel_KF
    mel_WTF = padded_KF.reshape(num_windows, front_end.window_frames, front_end.num_mel_bins)
    return np.ascontiguousarray(mel_WTF.transpose(0, 2, 1))
