"""Open files with FFmpeg (PyAV), and read what a container's header does not state."""

from collections.abc import Iterator
from typing import Any

NO_LENGTH = {"mp3", "aac"}
"""FFmpeg's names of containers that state no length. FFmpeg estimates it from the bit rate of the first frames."""


def open_ffmpeg(file: Any) -> Any:
    """Open an audio file. A playlist or session description in it can open no other file and no network.

    Args:
        file: A path, or a binary file in memory.
    Returns:
        PyAV's container, to be used in a ``with`` statement.
    Raises:
        av.error.FFmpegError: FFmpeg cannot read the file.
    """
    import av  # imported only where needed, since it loads all of FFmpeg

    protocols = "file" if isinstance(file, str) else "none"
    return av.open(file, mode="r", options={"protocol_whitelist": protocols})


def packet_seconds(file: Any) -> float:
    """Length of a file's audio in seconds, as the sum of all its packets. They are read, but not decoded.

    Raises:
        ValueError: FFmpeg cannot read the file, or it has no audio.
    """
    from av.error import FFmpegError

    try:
        with open_ffmpeg(file) as container:
            if not container.streams.audio:
                raise ValueError("no audio stream that FFmpeg can decode")
            stream = container.streams.audio[0]
            return float(sum(packet.duration or 0 for packet in container.demux(stream)) * stream.time_base)
    except FFmpegError as error:
        raise ValueError(str(error)) from None


def decoded_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames of a stream. A tag between two MP3 files in one is skipped, as other MP3 decoders do.

    Raises:
        av.error.FFmpegError: A packet is damaged.
    """
    from av.error import InvalidDataError

    has_audio = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:
            if container.format.name != "mp3" or not has_audio:
                raise
            continue
        has_audio = has_audio or bool(frames)
        yield from frames
