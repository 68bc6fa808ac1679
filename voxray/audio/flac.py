"""Encode clips as 16 kHz mono FLAC: the smallest files without a loss that a model could hear."""

import io

import numpy as np
import soundfile

from voxray.audio.decode import PCM_RATE_HZ, to_pcm16
from voxray.audio.mix import resample
from voxray.core.errors import BadRow


def flac_bytes(samples: np.ndarray, rate_hz: int) -> bytes:
    """Resample a clip to 16 kHz, as ``decode`` does, and encode it as 16-bit FLAC.

    Args:
        samples: float32, shape (num_samples,), full scale 1.
        rate_hz: Sample rate.
    Raises:
        BadRow: The clip is shorter than one sample at 16 kHz (``audio_empty``).
    """
    if rate_hz != PCM_RATE_HZ:
        samples = resample(samples, rate_hz, PCM_RATE_HZ)
    if len(samples) == 0:
        raise BadRow("audio_empty", f"the clip is shorter than one sample at {PCM_RATE_HZ} Hz")
    file = io.BytesIO()
    soundfile.write(file, to_pcm16(samples), PCM_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()
