"""The elements of a Matroska or WebM file: the length it states, and whether any of them are lost or damaged."""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

SEGMENT, INFO, TRACKS, CLUSTER = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675
TRACK, SCALE, DURATION, CLUSTER_TIME, BLOCK, BLOCK_GROUP = 0xAE, 0x2AD7B1, 0x4489, 0xE7, 0xA3, 0xA0
IN_SEGMENT = {INFO, TRACKS, CLUSTER, 0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF}
IN_CLUSTER = {CLUSTER_TIME, BLOCK, BLOCK_GROUP, 0xA7, 0xAB, 0xAF, 0x5854}
OPENED = {SEGMENT, INFO, TRACKS, CLUSTER}
DEFAULT_SCALE = 1_000_000  # nanoseconds
MAX_VALUE_BYTES = 8


class _Element(NamedTuple):
    name: int
    size: int
    value: bytes
    is_complete: bool


def matroska_seconds(file: BinaryIO) -> float:
    """Length that the header of a file with a single track states, in seconds.

    Args:
        file: Stands at its start.
    Returns:
        0 if the length is unknown, or if the file has several tracks: it is that of the longest.
    """
    scale, duration, num_tracks = DEFAULT_SCALE, 0.0, 0
    for element in _elements(file):
        if element.name == SCALE:
            scale = int.from_bytes(element.value, "big")
        elif element.name == DURATION and len(element.value) in (4, 8):
            [duration] = struct.unpack(">f" if len(element.value) == 4 else ">d", element.value)
        elif element.name == TRACK:
            num_tracks += 1
        elif element.name == CLUSTER_TIME:
            seconds = (duration - int.from_bytes(element.value, "big")) * scale / 1e9
            return seconds if num_tracks == 1 and 0 < seconds < 1e9 else 0.0
    return 0.0


def is_damaged(file: BinaryIO) -> bool:
    """Whether an element has an unknown name or ends after the file: bytes in front of it are missing or damaged.

    Args:
        file: Stands at its start.
    """
    is_in_segment = False
    for element in _elements(file):
        is_in_segment = is_in_segment or element.name == CLUSTER
        if is_in_segment and (element.name not in IN_SEGMENT | IN_CLUSTER or not element.is_complete):
            return True
    return False


def _elements(file: BinaryIO) -> Iterator[_Element]:
    """All elements; also those in segments, clusters and the descriptions of the file and its tracks."""
    size = file.seek(0, 2)
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        name_bytes = 9 - head[0].bit_length()
        size_bytes = 9 - head[name_bytes].bit_length() if name_bytes < min(5, len(head)) else 9
        if size_bytes > 8:
            yield _Element(0, 0, b"", False)
            return
        name = int.from_bytes(head[:name_bytes], "big")
        ones = (1 << 7 * size_bytes) - 1
        length = int.from_bytes(head[name_bytes : name_bytes + size_bytes], "big") & ones
        at += name_bytes + size_bytes
        file.seek(at)
        value = file.read(length) if length <= MAX_VALUE_BYTES else b""
        end = at if name in OPENED else at + length
        yield _Element(name, length, value, end <= size)
        at = end
