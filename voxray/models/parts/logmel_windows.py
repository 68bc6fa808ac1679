"""Log-mel in whole windows: what the front ends of models with a Whisper-type encoder have in common.

Shape letters: K valid mel frames, F mel bins.
"""

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES, N_FFT, SAMPLE_RATE_HZ, LogMel
from voxray.core.errors import RunError, one_line
from voxray.models.interface import AudioFeatures, FrontEnd

FEATURES_VERSION = "logmel-1"
ENCODER_STRIDE = 2  # the encoder's second convolution: 3,000 mel frames -> 1,500 encoder frames


class WindowedLogMel:
    """Features of clips that are padded up to whole windows.

    Args:
        model_id: Base model, for messages and its preprocessor.
        num_mel_bins: Bins of one frame.
        encoder_positions: Outputs of the encoder for one window.
    Raises:
        RunError: The model's own preprocessor computes other features than ours.
    """

    sample_rate_hz = SAMPLE_RATE_HZ
    counts_samples = False

    def __init__(self, model_id: str, num_mel_bins: int, encoder_positions: int) -> None:
        self.model_id, self.num_mel_bins = model_id, num_mel_bins
        self.encoder_positions = encoder_positions
        self.window_frames = encoder_positions * ENCODER_STRIDE
        self.window_samples = self.window_frames * HOP_SAMPLES
        self._check_preprocessor()

    def _check_preprocessor(self) -> None:
        from transformers import WhisperFeatureExtractor

        try:
            found = WhisperFeatureExtractor.from_pretrained(self.model_id)
        except (OSError, ValueError) as error:
            reason = one_line(error, 200)
            raise RunError(f"--model_id {self.model_id}: no usable preprocessor_config.json: {reason}") from None
        wanted = {"sampling_rate": SAMPLE_RATE_HZ, "n_fft": N_FFT, "hop_length": HOP_SAMPLES}
        for name, value in {**wanted, "feature_size": self.num_mel_bins, "dither": 0.0}.items():
            if getattr(found, name) != value:
                raise RunError(
                    f"--model_id {self.model_id}: its preprocessor has {name} {getattr(found, name)}, not {value}"
                )

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_logmel"}

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Log-mel of one clip; the clamp to 8 decades is over the whole recording, as in the processor.

        Args:
            samples: float32, shape (num_samples,), 16 kHz.
        """
        if not hasattr(self, "_logmel"):
            self._logmel = LogMel(self.num_mel_bins)
        num_windows = self.num_windows(len(samples))
        mel_KF, fill = self._logmel.valid(samples, num_windows * self.window_samples)
        return AudioFeatures(mel_KF, fill, num_windows)

    def num_windows(self, num_samples: int) -> int:
        """Whole windows that a clip of so many samples at 16 kHz fills; the last one is padded up."""
        return -(-num_samples // self.window_samples)


def window_lengths(num_samples: int, window_samples: int) -> list[int]:
    """Samples of a clip in each of its windows."""
    return [min(window_samples, num_samples - start) for start in range(0, num_samples, window_samples)]


def padded_windows(mel_KF: np.ndarray, fill: float, num_windows: int, front_end: FrontEnd) -> np.ndarray:
    """A clip's log-mel as the model takes it: valid frames, then the fill, cut into windows.

    Returns:
        float32, shape (num_windows, num_mel_bins, window_frames).
    """
    padded_KF = np.full((num_windows * front_end.window_frames, front_end.num_mel_bins), fill, np.float32)
    padded_KF[: len(mel_KF)] = mel_KF
    mel_WTF = padded_KF.reshape(num_windows, front_end.window_frames, front_end.num_mel_bins)
    return np.ascontiguousarray(mel_WTF.transpose(0, 2, 1))
