"""The pages of an Ogg file: how long the audio is that they state, and whether any of them are lost or damaged."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

MAGIC = b"OggS\0"
HEAD_BYTES = 27
SEARCH_BYTES = 1 << 16
CONTINUED, FIRST = 1, 2  # flags of a page
NO_POSITION = (1 << 64) - 1
OPUS_RATE_HZ = 48_000
OPUS_PACKET = 5_760  # most samples of a packet
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass
class _Stream:
    """One of the streams that follow each other.

    Attributes:
        rate_hz: Of the positions; 0 for a codec whose positions are unknown.
        packet_samples: Most samples of a packet.
        skip: Samples at the start that decoders leave out.
        first, last: Position at the start of the audio and at its end, in samples.
    """

    serial: int
    rate_hz: int = 0
    packet_samples: int = 0
    skip: int = 0
    first: int = -1
    last: int = 0


@dataclass
class OggPages:
    """What the pages of a file state.

    Attributes:
        num_streams: Number of streams that follow each other, as in a file of several files.
        seconds: Length of the audio; 0 if it is unknown.
        is_damaged: Whether bytes between pages or whole pages are missing, or the checksum of a page is wrong.
    """

    num_streams: int = 0
    seconds: float = 0.0
    is_damaged: bool = False
    _streams: list[_Stream] = field(default_factory=list[_Stream])


@dataclass(frozen=True)
class _Page:
    data: bytes
    is_intact: bool

    def integer(self, start: int, num_bytes: int) -> int:
        return int.from_bytes(self.data[start : start + num_bytes], "little")

    @property
    def num_packets(self) -> int:
        """Packets that end in the page."""
        return sum(size < 255 for size in self.data[HEAD_BYTES : HEAD_BYTES + self.data[26]])


def read_ogg(file: BinaryIO) -> OggPages:
    """Read all pages of a file.

    Args:
        file: Is read from where it stands to its end.
    """
    result = OggPages()
    sequence, was_first, is_mixed = -1, False, False
    for page in _pages(file):
        flags, position, serial = page.data[5], page.integer(6, 8), page.integer(14, 4)
        if flags & FIRST:
            if was_first:
                is_mixed = True  # streams side by side, such as a video and its sound
            else:
                result._streams.append(_new_stream(page))
            sequence = page.integer(18, 4) - 1
        elif not result._streams or serial != result._streams[-1].serial:
            is_mixed = True
        was_first = bool(flags & FIRST)
        is_next = page.integer(18, 4) == sequence + 1
        sequence = page.integer(18, 4)
        result.is_damaged |= not page.is_intact or not is_next
        if not is_mixed and 0 < position < NO_POSITION:
            _extend(result._streams[-1], page, position, is_next)
    result.num_streams = len(result._streams)
    if not is_mixed and all(stream.rate_hz for stream in result._streams):
        result.seconds = sum(_seconds(stream) for stream in result._streams)
    return result


def _extend(stream: _Stream, page: _Page, position: int, is_next: bool) -> None:
    """Add a page with audio. The first page of a recorded broadcast has the position in the broadcast."""
    if stream.first < 0:
        starts_at_0 = is_next and position <= page.num_packets * stream.packet_samples
        stream.first = stream.skip if starts_at_0 else position
    stream.last = position


def _seconds(stream: _Stream) -> float:
    return max(0, stream.last - max(0, stream.first)) / stream.rate_hz


def _new_stream(page: _Page) -> _Stream:
    """A stream, from its first page."""
    packet = page.data[HEAD_BYTES + page.data[26] :]
    stream = _Stream(page.integer(14, 4))
    if packet.startswith(b"OpusHead"):
        skip = int.from_bytes(packet[10:12], "little")
        return _Stream(stream.serial, OPUS_RATE_HZ, OPUS_PACKET, skip)
    if packet.startswith(b"\x01vorbis") and len(packet) >= 29:
        rate_hz, long_block = int.from_bytes(packet[12:16], "little"), 1 << (packet[28] >> 4)
        return _Stream(stream.serial, rate_hz, long_block // 2)
    return stream


def _pages(file: BinaryIO) -> Iterator[_Page]:
    """The complete pages. Bytes between pages are left out, and the page after them is not intact."""
    lost = False
    while len(head := file.read(HEAD_BYTES)) == HEAD_BYTES:
        sizes = file.read(head[26]) if head.startswith(MAGIC) else b""
        body = file.read(sum(sizes))
        data = head + sizes + body
        if head.startswith(MAGIC) and len(data) == HEAD_BYTES + head[26] + sum(sizes) and _has_its_checksum(data):
            yield _Page(data, not lost)
            lost = False
            continue
        lost = True
        if not _seek_page(file, file.tell() - len(data) + 1):
            return


def _seek_page(file: BinaryIO, start: int) -> bool:
    """Go to the next page from ``start``. Returns whether there is one."""
    while True:
        file.seek(start)
        block = file.read(SEARCH_BYTES)
        if (at := block.find(MAGIC)) >= 0:
            file.seek(start + at)
            return True
        if len(block) < SEARCH_BYTES:
            return False
        start += SEARCH_BYTES - len(MAGIC) + 1


def _has_its_checksum(page: bytes) -> bool:
    """Ogg's CRC-32 has zlib's polynomial, but starts at 0 and takes the highest bit of a byte first."""
    bits = (page[:22] + bytes(4) + page[26:]).translate(REVERSED)
    checksum = zlib.crc32(bits, 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int.from_bytes(page[22:26], "little") == int(f"{checksum:032b}"[::-1], 2)
