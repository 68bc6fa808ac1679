"""One channel of a clip, at the rate of the caller, from blocks of all its channels.

Eight channels at 655 kHz take 1.3 GB per minute, and a file of 0.3 MB can hold them. So only a block has all of them in
memory, and a clip of several blocks is resampled block by block.
"""

import numpy as np
import soxr

from voxray.core.errors import BadRow

BLOCK_VALUES = 1 << 22
"""Values that are decoded at a time, of all channels together."""
MAX_VALUES = 1 << 31
"""Most values of a clip, of all channels together: 6 h of two channels at 48 kHz. Small files can hold hours."""


class Mixer:
    """Averages the channels of a clip block by block, or takes one of them, and resamples it.

    Args:
        path: The file, for messages.
        channel: The channel to take, from 0; -1 averages all.
        sample_rate_hz: Rate of the result; 0 keeps the rate of the file.

    Attributes:
        num_samples: Samples added so far, per channel and at the rate of the file.
        is_finite: Whether all of them are finite.
    """

    def __init__(self, path: str, channel: int, sample_rate_hz: int = 0) -> None:
        self.num_samples = 0
        self.is_finite = True
        self._path, self._channel, self._sample_rate_hz = path, channel, sample_rate_hz
        self._rate_hz = 0
        self._first = np.empty(0, np.float32)
        self._bytes = bytearray()  # of all blocks if there are several: unlike an array, it grows in place
        self._stream: soxr.ResampleStream | None = None
        self._num_values = 0

    def add(self, block_NC: np.ndarray, rate_hz: int) -> None:
        """Add a block of samples, shape (num_samples, num_channels), at the rate of the file.

        Raises:
            BadRow: The clip has too many samples (``audio_too_long``) or lacks the channel (``audio_channel``).
        """
        num_channels = block_NC.shape[1]
        if self._channel >= num_channels:
            message = f"{self._path} has {num_channels} channel(s), so there is no channel {self._channel}"
            raise BadRow("audio_channel", message)
        self._num_values += block_NC.size
        if self._num_values > MAX_VALUES:
            raise BadRow("audio_too_long", f"{self._path} has over {MAX_VALUES:,} samples in {num_channels} channel(s)")
        if not len(block_NC):
            return
        block = _one_channel(block_NC, self._channel)
        self.is_finite = self.is_finite and bool(np.isfinite(block).all())
        is_first, self.num_samples, self._rate_hz = not self.num_samples, self.num_samples + len(block), rate_hz
        if is_first:
            self._first = block
            return
        if len(self._first):
            if self._resamples():
                self._stream = soxr.ResampleStream(rate_hz, self._sample_rate_hz, 1, quality="HQ")
            self._append(self._first)
            self._first = self._first[:0]
        self._append(block)

    def _append(self, block: np.ndarray, last: bool = False) -> None:
        self._bytes += (self._stream.resample_chunk(block, last) if self._stream else block).data

    def _resamples(self) -> bool:
        return bool(self.num_samples) and self._sample_rate_hz not in (0, self._rate_hz)

    def samples(self) -> np.ndarray:
        """The samples of one channel, float32, shape (num_samples,). Blocks give the samples of the whole clip."""
        if self._stream is not None:
            self._append(self._first, last=True)
            self._stream = None
        if self._bytes:
            return np.frombuffer(self._bytes, np.float32)
        return resample(self._first, self._rate_hz, self._sample_rate_hz) if self._resamples() else self._first


def resample(samples: np.ndarray, rate_hz: int, sample_rate_hz: int) -> np.ndarray:
    """Resample with soxr's HQ setting, whose filter keeps 7 kHz unchanged and leaves no alias."""
    return soxr.resample(samples, rate_hz, sample_rate_hz, quality="HQ")


def _one_channel(block_NC: np.ndarray, channel: int) -> np.ndarray:
    if block_NC.shape[1] == 1:
        return block_NC[:, 0]
    return block_NC[:, channel].copy() if channel >= 0 else block_NC.mean(axis=1, dtype=np.float32)
