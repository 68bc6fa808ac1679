"""How much of an audio file is missing: what its header states against what the file holds.

A download that broke off, or a copy to a full disk, leaves the first part of a file. Decoders read that part without an
error, and the row would keep the transcript of the whole. Containers of chunks state the bytes of their audio. FLAC,
and MP3 with a Xing, Info or VBRI header, state a number of samples. Ogg marks its last page.
"""

import io
import os
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, BinaryIO, Literal, NamedTuple

from voxray.audio.ffmpeg import packet_seconds
from voxray.audio.matroska import is_damaged, matroska_seconds
from voxray.audio.ogg import OggPages, read_ogg
from voxray.core.manifest import open_regular

MAX_CUT_SEC = 0.1
"""How much less than it states a file may hold: some programs count headers, padding or a last frame as audio."""
HEAD_BYTES = 1 << 16
TAIL_BYTES = 1 << 17  # a page of Ogg has at most 65,307 bytes
MAX_CHUNKS = 10_000  # a hostile file may have millions
MAX_TAGS = 8
MAX_TAG_BYTES = 2048
"""Most bytes of tags after the audio of an MP3 that states its length. With more, all of its frames are counted."""
MAX_DAMAGED_SHARE = 0.005
"""How much less than its positions state a damaged file may hold."""
OGG, MATROSKA = b"OggS", b"\x1a\x45\xdf\xa3"
STREAMED_BYTES = 1 << 40
"""No file has as much audio. Programs that do not know the size yet write one like 2^63 - 1."""
FLAC_UNKNOWN = (1 << 36) - 1
CONTAINERS = (b"RIFF", b"fLaC", b"OggS")
"""Headers of containers that people also call .pcm."""


class AudioFile:
    """The bytes of an audio file, on disk or in memory.

    Args:
        path: The file.
        raw: Its bytes, if they are in memory.
    Attributes:
        suffix: In lower case; "" if the file is called .pcm but has the header of a container.
        size: Size of the file in bytes.
        head: Its first 64 KiB.
    Raises:
        OSError: The file cannot be read, or is a pipe or a device.
    """

    def __init__(self, path: str, raw: bytes | None = None) -> None:
        self.path, self.suffix, self._raw = path, os.path.splitext(path)[1].lower(), raw
        if raw is not None:
            self.size, self.head = len(raw), raw[:HEAD_BYTES]
        else:
            with self.open() as file:
                self.head = file.read(HEAD_BYTES)
                self.size = len(self.head) if len(self.head) < HEAD_BYTES else file.seek(0, 2)
        if self.suffix == ".pcm" and self.head.startswith(CONTAINERS):
            self.suffix = ""

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes from ``start``, fewer at the end of the file."""
        if start + num_bytes <= len(self.head):
            return self.head[start : start + num_bytes]
        if self._raw is not None:
            return self._raw[start : start + num_bytes]
        with self.open() as file:
            file.seek(start)
            return file.read(num_bytes)

    @property
    def source(self) -> Any:
        """What decoders open: the path, or the bytes as a file."""
        return self.path if self._raw is None else io.BytesIO(self._raw)

    def open(self) -> BinaryIO:
        """Open the file at its start."""
        return open_regular(self.path) if self._raw is None else io.BytesIO(self._raw)

    @cached_property
    def ogg(self) -> OggPages:
        """What the pages of an Ogg file state. They are read once."""
        with self.open() as file:
            return read_ogg(file)

    def integer(self, start: int, num_bytes: int, byte_order: Literal["big", "little"] = "big") -> int:
        """An unsigned integer in the file."""
        return int.from_bytes(self.read(start, num_bytes), byte_order)


def missing_share(file: AudioFile, end_sec: float) -> float:
    """Share of a file's audio that its header states but the file does not hold.

    Args:
        end_sec: Length of the audio that was decoded, in seconds; infinity if it is unknown. MP3 and FLAC state
            seconds, so nothing of them is known to be missing then.
    Returns:
        From 0 to 1. 0 if the format states no length, and 1 if it is unknown how much is missing.
    """
    for start, magic, lengths in _FORMATS:
        if file.head.startswith(magic, start):
            stated, present = lengths(file, end_sec)
            break
    else:
        stated, present = _mp3(file, end_sec)
    return 0.0 if stated <= present or _is_unknown(stated) else 1 - max(0, present) / stated


def damaged_seconds(file: AudioFile, end_sec: float) -> float:
    """Seconds that damage in the middle of an Ogg or Matroska file took away.

    Decoders go on after the damage without an error. Positions in the file tell how long it was before. A file whose
    positions leap but whose structure is whole was recorded with gaps, so nothing is missing.

    Args:
        end_sec: Length of the audio that was decoded, in seconds; infinity if it is unknown.
    Returns:
        0 if no more than MAX_CUT_SEC and a share of MAX_DAMAGED_SHARE are missing.
    """
    stated_sec = 0.0
    if end_sec < float("inf"):
        if file.head.startswith(OGG):
            stated_sec = file.ogg.seconds
        elif file.head.startswith(MATROSKA):
            with file.open() as opened:
                stated_sec = matroska_seconds(opened)
    if stated_sec - end_sec <= MAX_CUT_SEC + MAX_DAMAGED_SHARE * stated_sec:
        return 0.0
    if file.head.startswith(OGG):
        return stated_sec - end_sec if file.ogg.is_damaged else 0.0
    with file.open() as opened:
        return stated_sec - end_sec if is_damaged(opened) else 0.0


def seconds_by_packets(file: AudioFile) -> float:
    """Length in seconds of an MP3 or Ogg file of which libsndfile only estimates the length, or counts only a part.

    It estimates the length of an MP3 whose first frame does not state it. Of several files in one it counts the first.

    Returns:
        0 if libsndfile counts all samples, or if FFmpeg cannot read the file.
    """
    if file.ogg.num_streams < 2 if file.head.startswith(OGG) else _mp3_states_all(file):
        return 0.0
    try:
        return packet_seconds(file.source)
    except ValueError:
        return 0.0


def _is_unknown(size: float) -> bool:
    """Whether a program stated a size before it knew it: one near 2^31 or 2^32, or more than any file has."""
    return 0x7F00_0000 <= size <= 0x8000_0000 or 0xFFFF_0000 <= size <= 0xFFFF_FFFF or size >= STREAMED_BYTES


# Each of the functions below returns the length of the audio, as stated and as present, in bytes or samples. A stated
# length of 0 is unknown.
_Lengths = tuple[float, float]


class _Chunked(NamedTuple):
    """A container of chunks, each with its name and size in front.

    Attributes:
        start: Where the first chunk starts.
        name_bytes, size_bytes: Length of name and size.
        byte_order: Of the size.
        align: Chunks start at multiples of this.
        audio: Start of the name of the chunk with the audio.
        counts_head: Whether the size includes name and size.
    """

    start: int
    name_bytes: int
    size_bytes: int
    byte_order: Literal["big", "little"]
    align: int
    audio: bytes
    counts_head: bool = False

    def __call__(self, file: AudioFile, end_sec: float) -> _Lengths:
        at, head_bytes = self.start, self.name_bytes + self.size_bytes
        for _ in range(MAX_CHUNKS):
            head = file.read(at, head_bytes)
            if len(head) < head_bytes:
                break
            size = int.from_bytes(head[self.name_bytes :], self.byte_order)
            size -= head_bytes if self.counts_head else 0
            at += head_bytes
            if head.startswith(self.audio):
                if size == 0xFFFF_FFFF and file.read(self.start, 4) == b"ds64":  # RF64: the size has 64 bits
                    size = file.integer(self.start + 16, 8, "little")
                return size, file.size - at
            at += max(0, size) + -size % self.align
        return 0, 0


def _mp4(file: AudioFile, end_sec: float) -> _Lengths:
    """Bytes of the box in which the file ends: its audio, or a fragment of it."""
    at = 0
    for _ in range(MAX_CHUNKS):
        size, name = file.integer(at, 4), file.read(at + 4, 4)
        if size == 1:  # the size has 64 bits and follows the name
            size = file.integer(at + 8, 8)
        if name in (b"mdat", b"moov", b"moof") and at + size > file.size:
            return size, file.size - at
        if size < 8 or at + size >= file.size:
            break
        at += size
    return 0, 0


def _matroska(file: AudioFile, end_sec: float) -> _Lengths:
    """Bytes of the segment, which follows the header and has everything else."""
    size, at = _matroska_size(file, 4)
    if file.read(at + size, 4) != b"\x18\x53\x80\x67":
        return 0, 0
    size, at = _matroska_size(file, at + size + 4)
    return size, file.size - at


def _matroska_size(file: AudioFile, at: int) -> tuple[int, int]:
    """The size of an element, 0 if it is unknown, and where its content starts. The zeros in front give its length."""
    num_bytes = 9 - file.integer(at, 1).bit_length()
    ones = (1 << 7 * num_bytes) - 1
    size = file.integer(at, num_bytes) & ones
    return (0 if size == ones else size), at + num_bytes


def _sun(file: AudioFile, end_sec: float) -> _Lengths:
    return file.integer(8, 4), file.size - file.integer(4, 4)


def _nist(file: AudioFile, end_sec: float) -> _Lengths:
    """The header is text: its length in bytes, then a line for every value."""
    values = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,12})\s", file.head[:4096])}
    frame_bytes = values.get(b"sample_n_bytes", 0) * values.get(b"channel_count", 1)
    header = file.head[8:16].strip()
    return values.get(b"sample_count", 0) * frame_bytes, file.size - int(header if header.isdigit() else 1024)


def _ogg(file: AudioFile, end_sec: float) -> _Lengths:
    """(1, 0) if the last page is incomplete or not marked as the last. Chained streams are marked too."""
    tail = file.read(max(0, file.size - TAIL_BYTES), TAIL_BYTES)
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return 0, 0
    page, num_sizes = tail[at:], int.from_bytes(tail[at + 26 : at + 27])
    is_whole = len(page) >= 27 + num_sizes + sum(page[27 : 27 + num_sizes])
    return (0, 0) if is_whole and page[5] & 4 else (1, 0)


def _flac(file: AudioFile, end_sec: float) -> _Lengths:
    """The header has the rate in 20 bits and the samples in the last 36 of the next 44."""
    rate_hz, num_samples = file.integer(18, 3) >> 4, file.integer(21, 5) & FLAC_UNKNOWN
    return (0 if num_samples == FLAC_UNKNOWN else num_samples), end_sec * rate_hz


class _Mp3Frame(NamedTuple):
    """The first frame of an MP3.

    Attributes:
        at: Where it starts.
        data: Its first bytes; empty if the file does not start with a frame.
        tag: Where the Xing or Info header starts in it, if there is one.
    """

    at: int
    data: bytes
    tag: int

    @property
    def is_version_1(self) -> bool:
        return self.data[1] & 0x18 == 0x18

    @property
    def has_xing(self) -> bool:
        return self.data[self.tag : self.tag + 4] in (b"Xing", b"Info")

    @property
    def has_vbri(self) -> bool:
        return self.data[36:40] == b"VBRI"

    def integer(self, start: int, num_bytes: int) -> int:
        return int.from_bytes(self.data[start : start + num_bytes], "big")


def _mp3_frame(file: AudioFile) -> _Mp3Frame:
    at = 0
    for _ in range(MAX_TAGS):
        if file.read(at, 3) != b"ID3":
            break
        a, b, c, d = file.read(at, 10)[6:].ljust(4, b"\0")  # 7 bits of the size each
        at += 10 + (a << 21 | b << 14 | c << 7 | d)
    data = file.read(at, 192)
    if len(data) < 192 or data[0] != 0xFF or data[1] & 0xE6 != 0xE2 or data[2] & 12 == 12:  # layer III
        return _Mp3Frame(at, b"", 0)
    is_version_1, is_mono = data[1] & 0x18 == 0x18, data[3] >> 6 == 3
    return _Mp3Frame(at, data, 4 + ((17 if is_mono else 32) if is_version_1 else (9 if is_mono else 17)))


def _mp3_states_all(file: AudioFile) -> bool:
    """Whether the first frame of an MP3 states how many frames there are, and that no others follow."""
    frame = _mp3_frame(file)
    num_bytes = 0
    if frame.data and frame.has_xing and frame.data[frame.tag + 7] & 3 == 3:  # both frames and bytes are stated
        num_bytes = frame.integer(frame.tag + 12, 4)
    elif frame.data and frame.has_vbri:
        num_bytes = frame.integer(46, 4)
    return num_bytes > 0 and file.size - frame.at - num_bytes <= MAX_TAG_BYTES


def _mp3(file: AudioFile, end_sec: float) -> _Lengths:
    """The first frame may be one without sound that states the number of frames."""
    frame = _mp3_frame(file)
    if not frame.data:
        return 0, 0
    data, tag = frame.data, frame.tag
    divisor = {0x18: 1, 0x10: 2}.get(data[1] & 0x18, 4)  # of MPEG 1, 2 and 2.5
    rate_hz = (44_100, 48_000, 32_000)[data[2] >> 2 & 3] / divisor
    num_frames = silence = 0
    if frame.has_xing and data[tag + 7] & 1:
        num_frames = frame.integer(tag + 8, 4)
        if data[tag + 7] & 15 == 15 and data[tag + 120 : tag + 124] in (b"LAME", b"Lavc", b"Lavf"):
            delays = frame.integer(tag + 141, 3)
            silence = (delays >> 12) + (delays & 0xFFF)
    elif frame.has_vbri:
        num_frames = frame.integer(50, 4)
    # a decoder may leave out its own delay and the first frame
    return (num_frames - 2) * (1152 if frame.is_version_1 else 576) - silence, end_sec * rate_hz


_RIFF = _Chunked(12, 4, 4, "little", 2, b"data")
_FORMATS: tuple[tuple[int, bytes, Callable[[AudioFile, float], _Lengths]], ...] = (
    (0, b"RIFF", _RIFF),
    (0, b"fLaC", _flac),
    (0, OGG, _ogg),
    (4, b"ftyp", _mp4),
    (4, b"moov", _mp4),
    (4, b"mdat", _mp4),
    (4, b"wide", _mp4),
    (0, MATROSKA, _matroska),
    (0, b"RF64", _RIFF),
    (0, b"BW64", _RIFF),
    (0, b"RIFX", _RIFF._replace(byte_order="big")),
    (0, b"FORM", _RIFF._replace(byte_order="big", audio=b"SSND")),
    (0, b"riff", _Chunked(40, 16, 8, "little", 8, b"data", counts_head=True)),  # Sony Wave64
    (0, b"caff", _Chunked(8, 4, 8, "big", 1, b"data")),
    (0, b".snd", _sun),
    (0, b"NIST", _nist),
)
"""Where the file has which bytes, and the function for the format. All others are taken for MP3."""
