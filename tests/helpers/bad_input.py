"""A corpus of broken input: one manifest line per case, with the expected outcomes in featurize and prepare.

An outcome is ``row`` or the reason code of a quarantine entry.
"""

import json
import os
import struct
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

RATE = 16_000
PREPARE_LIMITS = {
    "min_sec": 0.0,
    "max_sec": 60.0,
    "min_chars_per_sec": 0.0,
    "max_chars_per_sec": 1e6,
    "min_peak_db": -160.0,
    "min_rms_db": -160.0,
    "max_clip_share": 1.0,
    "max_dc": 1.0,
    "max_zero_tail_sec": 1e6,
    "min_high_band_db": -160.0,
}
"""Limits of prepare that leave out only broken rows, not rows of bad quality."""


class Case(NamedTuple):
    """One line of the manifest.

    Attributes:
        name: What is broken.
        line: The line, without its end.
        featurize, prepare: ``row``, or the reason why the job leaves it out.
    """

    name: str
    line: bytes
    featurize: str
    prepare: str


def noise(path: Path, sec: float = 0.5, rate: int = RATE, channels: int = 1) -> str:
    """Write a clip that depends on its file name, so that prepare finds no duplicates."""
    generator = np.random.default_rng(list(path.name.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (max(1, round(sec * rate)), channels)
    soundfile.write(path, generator.normal(0, 0.1, shape).clip(-0.9, 0.9), rate)
    return str(path)


def wav_header(num_bytes: int, rate: int = RATE, kind: int = 1, bits: int = 16) -> bytes:
    """The 44 bytes before the samples of a mono file."""
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * bits // 8, bits // 8, bits)
    sizes = [struct.pack("<I", min(size, 2**32 - 1)) for size in (num_bytes + 36, 16, num_bytes)]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + sizes[1] + form + b"data" + sizes[2]


def hole(path: Path, head: bytes, size: int) -> None:
    """Write a sparse file: it takes no disk space, whatever its size."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def _audio_files(root: Path) -> dict[str, tuple[str, str]]:
    """Write the audio files. Returns {audio_path: outcomes}."""
    (root / "zero_bytes.wav").touch()
    (root / "header_only.wav").write_bytes(wav_header(0))
    (root / "cut_header.wav").write_bytes(wav_header(100)[:30])
    whole = Path(noise(root / "whole.flac", 2.0)).read_bytes()
    (root / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    (root / "cut_in_header.flac").write_bytes(whole[:30])
    for suffix in ("wav", "mp3", "ogg"):
        raw = Path(noise(root / f"whole.{suffix}", 2.0)).read_bytes()
        (root / f"cut_off.{suffix}").write_bytes(raw[: len(raw) // 2])
    (root / "text.wav").write_text("이것은 소리가 아니라 글입니다.\n" * 100, encoding="utf-8")
    (root / "random.mp3").write_bytes(np.random.default_rng(1).bytes(20_000))
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
    (root / "session.wav").write_text(session)
    (root / "playlist.wav").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.aac\n#EXT-X-ENDLIST\n")
    (root / "concat.wav").write_text("ffconcat version 1.0\nfile '/dev/zero'\n")
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        soundfile.write(root / f"{name}.wav", np.array([0.1, value, 0.2], np.float32), RATE, subtype="FLOAT")
    noise(root / "eight_channels.wav", channels=8)
    noise(root / "4_khz.wav", rate=4_000)
    noise(root / "one_sample.wav", sec=0.0)
    hole(root / "three_hours.wav", wav_header(3 * 3600 * 8_000, 4_000), 44 + 3 * 3600 * 8_000)
    (root / "claims_gigabytes.wav").write_bytes(wav_header(2**32 - 40) + b"\x01\x02" * 50)
    (root / "claims_terabytes.w64").write_bytes(_w64(1 << 50))
    claimed = bytearray(whole)
    claimed[21] |= 0x0F  # the 36 bits of STREAMINFO that count the samples
    claimed[22:26] = b"\xff" * 4
    (root / "claims_terabytes.flac").write_bytes(claimed)
    (root / "rate_0.wav").write_bytes(wav_header(100, 0) + b"\x01\x02" * 50)
    (root / "rate_1_hz.wav").write_bytes(wav_header(6000, 1) + b"\x01\x02" * 3000)
    (root / "rate_2_ghz.wav").write_bytes(wav_header(100, 2**31 - 1) + b"\x01\x02" * 50)
    hole(root / "hole.flac", b"", 1 << 36)
    hole(root / "hole.wav", b"", 1 << 20)
    (root / "folder.wav").mkdir()
    os.symlink(root / "loop.wav", root / "loop.wav")
    os.symlink(root / "gone.wav", root / "dangling.wav")
    os.symlink("/dev/zero", root / "device.wav")
    os.mkfifo(root / "pipe.wav")
    noise(root / "음성 파일" / unicodedata.normalize("NFD", "가 나.wav"))
    noise(root / "line\nend.wav")
    (root / "sub").mkdir()
    noise(root / "other" / "up.wav")
    unreadable, missing, usable = ("audio_unreadable",) * 2, ("audio_missing",) * 2, ("row", "row")
    files = {
        "zero_bytes.wav": unreadable,
        "header_only.wav": ("audio_empty",) * 2,
        "cut_header.wav": unreadable,
        "truncated.flac": unreadable,
        "cut_in_header.flac": unreadable,
        "cut_off.wav": ("audio_cut_off",) * 2,
        "cut_off.mp3": ("audio_cut_off",) * 2,
        "cut_off.ogg": ("audio_cut_off",) * 2,
        "text.wav": unreadable,
        "random.mp3": unreadable,
        "session.wav": unreadable,
        "playlist.wav": unreadable,
        "concat.wav": unreadable,
        "nan.wav": ("audio_not_finite",) * 2,
        "infinite.wav": ("audio_not_finite",) * 2,
        "eight_channels.wav": usable,
        "4_khz.wav": usable,
        "one_sample.wav": usable,
        "three_hours.wav": ("audio_too_long", "too_long"),
        "claims_gigabytes.wav": usable,  # the size that streaming programs write; the existing samples are used
        "claims_terabytes.w64": usable,
        "claims_terabytes.flac": usable,
        "rate_0.wav": unreadable,
        "rate_1_hz.wav": ("audio_too_long", "too_long"),
        "rate_2_ghz.wav": ("audio_empty", "speaking_rate"),
        "hole.flac": unreadable,
        "hole.wav": unreadable,
        "folder.wav": missing,
        "loop.wav": missing,
        "dangling.wav": missing,
        "device.wav": missing,
        "pipe.wav": missing,
        "/dev/zero": missing,
        "gone.wav": missing,
        "": ("empty_text", "audio_missing"),
        "a\0b.wav": missing,
        "a" * 5000: missing,
        "음성 파일/가 나.wav": usable,
        "line\nend.wav": usable,
        "sub/../other/up.wav": usable,
        "http://127.0.0.1:9/a.wav": ("audio_missing", "remote_audio"),
    }
    if os.geteuid():
        os.chmod(noise(root / "locked.wav"), 0)
        files["locked.wav"] = unreadable
    return files


def _w64(claimed: int) -> bytes:
    """A Sony Wave64 file (64-bit sizes) that claims the given size and has 100 bytes of samples."""
    riff = bytes.fromhex("726966662e91cf11a5d628db04c10000")
    wave, fmt, data = (name + bytes.fromhex("f3acd3118cd100c04f8edb8a") for name in (b"wave", b"fmt ", b"data"))
    form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    body = wave + fmt + struct.pack("<Q", 24 + 16) + form + data + struct.pack("<Q", 24 + claimed)
    return riff + struct.pack("<Q", claimed + 104) + body + b"\x03\x01" * 50


def _json(**values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()


def _text_lines() -> list[Case]:
    """Lines that are broken before any audio is read, and text rows."""
    tqa = b'{"instruction": "%s", "input": "", "output": "o"%s}'
    ten_mib = b"x" * (10 << 20)
    deep = {depth: b"[" * depth + b"]" * depth for depth in (150, 990, 5_000)}
    return [
        Case("not UTF-8", tqa % (b"\xb3\xd7", b""), "bad_utf8", "bad_encoding"),
        Case("lone surrogate", tqa % (b"\\ud800", b""), "bad_utf8", "bad_encoding"),
        Case("byte-order mark within", b"\xef\xbb\xbf" + tqa % (b"i", b""), "bad_json", "bad_json"),
        Case("cut off", b'{"instruction": "i", "outp', "bad_json", "bad_json"),
        Case("two objects", b"{}{}", "bad_json", "bad_json"),
        Case("null byte", b"\0", "bad_json", "bad_json"),
        Case("a list", b"[1, 2]", "bad_row", "bad_row"),
        Case("a number", b"3", "bad_row", "bad_row"),
        Case("null", b"null", "bad_row", "bad_row"),
        Case("deep without end", b"[" * 100_000, "bad_json", "bad_json"),
        Case("150 deep", tqa % (b"150", b', "x": ' + deep[150]), "row", "bad_json"),
        Case("990 deep", tqa % (b"990", b', "x": ' + deep[990]), "bad_json", "bad_json"),
        Case("5,000 deep", tqa % (b"5000", b', "x": ' + deep[5000]), "bad_json", "bad_json"),
        Case("an integer of 5,000 digits", tqa % (b"9", b', "x": ' + b"9" * 5_000), "bad_json", "bad_json"),
        Case("an integer of 4,000 digits", tqa % (b"id", b', "id": ' + b"9" * 4_000), "row", "row"),
        Case("no keys", b"{}", "unknown_task", "unknown_task"),
        Case("missing keys", _json(instruction="i"), "unknown_task", "unknown_task"),
        Case("a number for text", _json(instruction=1, output="o"), "bad_type", "bad_type"),
        Case("a list for text", _json(instruction="i", output=["o"]), "bad_type", "bad_type"),
        Case("null for text", _json(instruction="i", output=None), "bad_type", "missing_key"),
        Case("a number for input", _json(instruction="i", output="o", input=3), "bad_type", "bad_type"),
        Case("a list for id", _json(instruction="list id", output="o", id=["a"]), "row", "row"),
        Case("no language", _json(instruction="i", output="o", language="klingon"), "bad_language", "bad_language"),
        Case("empty answer", _json(instruction="i", output=" "), "empty_text", "empty_text"),
        Case("empty instruction", _json(instruction=" ", output="o"), "empty_text", "empty_text"),
        Case("control characters", tqa % (b"\\u0000\\u001b[2J", b""), "row", "row"),
        Case("10 MiB of no JSON", ten_mib, "bad_json", "bad_json"),
        Case("10 MiB in a key of no use", tqa % (b"ten", b', "x": "' + ten_mib + b'"'), "row", "row"),
        Case("10 MiB of key", b'{"' + ten_mib + b'": 1}', "unknown_task", "unknown_task"),
        Case("10 MiB of answer", _json(instruction="i", output=ten_mib.decode()), "row", "text_too_long"),
        Case("first of an id", _json(instruction="one", output="o", id="same"), "row", "row"),
        Case("second of an id", _json(instruction="two", output="o", id="same"), "row", "row"),
        Case("third of an id", _json(instruction="three", output="o", id="same"), "row", "row"),
        Case("old cache", _json(cache_path="c/1.pt", text="네"), "old_cache", "old_cache"),
        Case("old cache as audio", _json(audio_path="c/2.PT", transcript="네"), "old_cache", "old_cache"),
    ]


def _segments(root: Path) -> list[Case]:
    """Rows with a good clip but other values that are wrong."""
    huge = int("9" * 400)
    values_and_outcomes: list[tuple[dict[str, Any], str, str]] = [
        ({"start": -1, "duration": 0.2}, "bad_segment", "bad_segment"),
        ({"start": float("nan")}, "bad_segment", "bad_segment"),
        ({"start": float("inf")}, "bad_segment", "bad_segment"),
        ({"start": huge}, "bad_segment", "bad_segment"),
        ({"start": 0, "duration": float("nan")}, "bad_segment", "bad_segment"),
        ({"start": 0, "duration": -1}, "bad_segment", "bad_segment"),
        ({"start": "0.1"}, "bad_type", "bad_type"),
        ({"start": [0]}, "bad_type", "bad_type"),
        ({"duration": "0.5"}, "bad_type", "bad_type"),
        ({"duration": True}, "bad_type", "bad_type"),
        ({"channel": "left"}, "bad_type", "bad_type"),
        ({"channel": -1}, "bad_segment", "bad_segment"),
        ({"channel": 0.5}, "bad_segment", "bad_segment"),
        ({"channel": 3}, "audio_channel", "audio_channel"),
        ({"start": None, "duration": None, "channel": None, "split": None}, "row", "row"),
        ({"start": 99, "duration": 1}, "audio_empty", "audio_empty"),
        ({"start": 0.25, "duration": 99}, "audio_too_short", "audio_too_short"),
        ({"duration": 99}, "row", "duration_mismatch"),
        ({"start": 0.1, "duration": 0.2}, "row", "row"),
        ({"transcript_raw": 3}, "row", "bad_type"),
        ({"sample_rate": "16k"}, "row", "bad_type"),
        ({"sample_rate": 8_000}, "row", "wrong_rate"),
        ({"audio_bytes_from": {"file": "/etc/passwd"}}, "row", "row"),
        ({"speaker": ["a"], "session": {}}, "row", "row"),
        ({"cache_path": "c/3.pt"}, "row", "row"),
        ({"transcript": ""}, "row", "empty_text"),
        ({"transcript": 3}, "bad_type", "bad_type"),
        ({"language": 3}, "bad_type", "bad_type"),
    ]
    cases = []
    for number, (values, featurize, prepare) in enumerate(values_and_outcomes):
        row = {"audio_path": noise(root / f"row_{number}.wav"), "transcript": f"말 {number}", **values}
        cases.append(Case(f"{str(values)[:60]}", _json(**row), featurize, prepare))
    long = {"audio_path": "three_hours.wav", "transcript": "세 시간 중 이 초", "start": 3600, "duration": 2}
    return [*cases, Case("two seconds of three hours", _json(**long), "row", "row")]


def build(root: Path) -> tuple[Path, dict[int, Case]]:
    """Write the corpus: a manifest with a byte-order mark, both kinds of line ends, blank lines, no newline at the end.

    Returns:
        The manifest, and its cases by line number.
    """
    root.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(path[:60] or "empty path", _json(audio_path=path, transcript=f"글 {number}"), *outcomes)
        for number, (path, outcomes) in enumerate(_audio_files(root).items())
    ]
    first = _json(audio_path=noise(root / "good.wav"), transcript="네")
    good = Case("good, after a byte-order mark", first, "row", "row")
    cases = [good, *cases, *_segments(root), *_text_lines()]
    raw, numbered, number = b"\xef\xbb\xbf", dict[int, Case](), 0
    for index, case in enumerate(cases):
        number += 1
        numbered[number] = case
        raw += case.line + (b"\r\n" if index % 2 else b"\n")
        if index % 10 == 0:
            number += 1
            raw += b" \t\r\n"
    path = root / "broken.jsonl"
    path.write_bytes(raw.rstrip())
    return path, numbered
