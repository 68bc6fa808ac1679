"""One channel of a clip, from blocks of all its channels.

Eight channels at 655 kHz take 1.3 GB per minute, and a file of 0.3 MB can hold them. So only a block has all of them in
memory.
"""

import numpy as np

from voxray.core.errors import BadRow

BLOCK_VALUES = 1 << 22
"""Values that are decoded at a time, of all channels together."""
MAX_VALUES = 1 << 31
"""Most values of a clip, of all channels together: 6 h of two channels at 48 kHz. Small files can hold hours."""


class Mixer:
    """Averages the channels of a clip block by block, or takes one of them.

    Args:
        path: The file, for messages.
        channel: The channel to take, from 0; -1 averages all.
    """

    def __init__(self, path: str, channel: int) -> None:
        self._path, self._channel = path, channel
        self._first = np.empty(0, np.float32)
        self._bytes = bytearray()  # of all blocks if there are several: unlike an array, it grows in place
        self._num_values = 0

    def add(self, block_NC: np.ndarray) -> None:
        """Add a block of samples, shape (num_samples, num_channels).

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
        if not len(self._first):
            self._first = block
            return
        if not self._bytes:
            self._bytes += self._first.data
        self._bytes += block.data

    def samples(self) -> np.ndarray:
        """The samples of one channel, float32, shape (num_samples,)."""
        return np.frombuffer(self._bytes, np.float32) if self._bytes else self._first


def _one_channel(block_NC: np.ndarray, channel: int) -> np.ndarray:
    if block_NC.shape[1] == 1:
        return block_NC[:, 0]
    return block_NC[:, channel].copy() if channel >= 0 else block_NC.mean(axis=1, dtype=np.float32)
