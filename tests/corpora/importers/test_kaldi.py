"""Kaldi folders: files are joined by id, nothing is run, every line is accounted for."""

import pytest
from helpers.corpora import clip, lines, read, reasons

from voxray.core.errors import RunError


def folder(tmp_path, scp, text, **others):
    data = tmp_path / "data" / "train"
    for name, content in {"wav.scp": scp, "text": text, **others}.items():
        lines(data / name, *content)
    return data


def test_recordings_without_segments(tmp_path):
    first, second = clip(tmp_path / "a b" / "가.wav"), clip(tmp_path / "b.flac")
    data = folder(
        tmp_path,
        [f"u1 {first}", "u2\tb.flac", "u3 data/train/../../b.flac"],  # u2, u3: relative to the recipe's root
        ["u3 셋", "u1 하나 둘", "u2"],
        utt2spk=["u1 s1", "u2 s1"],
        spk2gender=["s1 f"],
        utt2lang=["u1 ko"],
    )
    rows, faults = read("kaldi", data)
    assert faults == []
    assert [row.id for row in rows] == ["u1", "u2", "u3"]
    assert rows[0].values == {
        "audio_path": first,
        "transcript": "하나 둘",
        "speaker": "s1",
        "gender": "f",
        "language": "ko",
    }
    assert rows[1].values == {"audio_path": second, "transcript": "", "speaker": "s1", "gender": "f"}
    assert (rows[2].source_file, rows[2].line) == (str(data / "wav.scp"), 3)


def test_segments(tmp_path):
    sound = clip(tmp_path / "r.wav")
    data = folder(
        tmp_path,
        [f"r1 {sound}", f"r2 {sound}", "r3 gone.wav"],
        [*(f"u{number} 글" for number in range(1, 9)), "extra 글"],
        segments=[
            "u1 r1 0 1.25",
            "u2 r1 1.5 -1",
            "u3 r1 2 1",
            "u4 r1 nan 1",
            "u5 r9 0 1",
            "u6 r3 0 1",
            "u7 r1 0",
            "u8 r1 -1 2",
            "u9 r1 0 1",
            "u1 r1 3 4",
        ],
    )
    rows, faults = read("kaldi", data)
    first = {"audio_path": sound, "start": 0.0, "duration": 1.25, "session": "r1", "transcript": "글"}
    assert [row.values for row in rows] == [
        first,
        {"audio_path": sound, "start": 1.5, "session": "r1", "transcript": "글"},
    ]
    assert [(fault.id, fault.reason) for fault in faults] == [
        ("u3", "bad_segment"),
        ("u4", "bad_segment"),
        ("u5", "missing_audio_entry"),
        ("u6", "audio_missing"),
        ("u7", "bad_segment"),
        ("u8", "bad_segment"),
        ("u9", "missing_text"),
        ("u1", "duplicate_id"),
        ("r2", "unused_recording"),
        ("extra", "missing_audio_entry"),
    ]


def test_bad_lines_are_one_fault_each(tmp_path):
    sound = clip(tmp_path / "r.wav")
    data = folder(
        tmp_path,
        [f"u1 {sound}\r", f"u2 {sound}", f"u1 {sound}", f"u3 {sound}".encode() + b"\xff", "", f"u4 {sound}"],
        ["\ufeffu1 하나\r", "u2 둘".encode("cp949"), "u2 둘", "u3 셋"],
    )
    rows, faults = read("kaldi", data)
    assert [(row.id, row.values["transcript"]) for row in rows] == [("u1", "하나")]
    assert sorted((fault.id, fault.reason) for fault in faults) == [
        ("u1", "duplicate_id"),
        ("u2", "bad_encoding"),
        ("u2", "duplicate_id"),
        ("u3", "bad_encoding"),
        ("u4", "missing_text"),
    ]


GOOD_PIPES = [
    ("sph2pipe -f wav -p -c 1 {f} |", 0),
    ("/opt/kaldi/tools/sph2pipe_v2.5/sph2pipe -f wav -p -c 2 {f} |", 1),
    ("flac -c -d -s {f} |", None),
    ("flac -dc {f} 2>/dev/null |", None),
    ("sox {f} -t wav -r 16000 -b 16 - |", None),
    ("sox -t flac {f} -c 1 -t wav - remix 2 rate 16k |", 1),
    ("ffmpeg -nostdin -i {f} -f wav -ar 16000 -ac 1 pipe:1 |", None),
    ("cat {f} | sox -t wav - -t wav - |", None),
    ("cat '{f}' |", None),
]
BAD_PIPES = [
    "cat {f} ; rm -rf {d} |",
    "cat {f} && touch {d}/ran |",
    "touch {d}/ran | cat {f} |",
    "cat {f} $(touch {d}/ran) |",
    "cat {f} `touch {d}/ran` |",
    "cat {f} > {d}/ran |",
    "cat <(touch {d}/ran) {f} |",
    "sh -c 'touch {d}/ran; cat {f}' |",
    "python {d}/x.py {f} |",
    "cat {f} {f} |",
    "cat gone.wav |",
    "cat {d}/secret |",
    "cat $HOME/{f} |",
    "cat {d}/*.wav |",
    "sox {f} -t wav - speed 0.9 |",
    "sox {f} -t wav - trim 5 |",
    "sox -m {f} {f} -t wav - |",
    "sox {f} -t wav - remix 1 2 |",
    "ffmpeg -ss 5 -i {f} -f wav - |",
    "ffmpeg -i {f} -af atempo=2 -f wav - |",
    "sph2pipe -t 1:2 {f} |",
    "flac remix 1 {f} |",
    "cat '{f} |",
    "| |",
    "|",
    "| tee {d}/ran",
]


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """Starting any process fails the test."""
    import os
    import subprocess

    def never(*arguments, **keywords):
        raise AssertionError(f"a process was started: {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "popen"), (os, "posix_spawn"), (os, "execve")):
        monkeypatch.setattr(module, name, never)
    sound = clip(tmp_path / "clips" / "r.wav")
    lines(tmp_path / "clips" / "secret", "not for you")
    return sound


@pytest.mark.parametrize(("pipe", "channel"), GOOD_PIPES)
def test_the_file_of_a_converting_pipe_is_used(tmp_path, guarded, pipe, channel):
    data = folder(tmp_path, [f"u1 {pipe.format(f=guarded)}"], ["u1 글"])
    rows, faults = read("kaldi", data)
    assert faults == []
    assert rows[0].values == {"audio_path": guarded, "transcript": "글"} | (
        {} if channel is None else {"channel": channel}
    )


@pytest.mark.parametrize("pipe", BAD_PIPES)
def test_any_other_pipe_is_a_fault_and_never_run(tmp_path, guarded, pipe):
    data = folder(tmp_path, [f"u1 {pipe.format(f=guarded, d=tmp_path / 'clips')}", f"u2 {guarded}"], ["u1 글", "u2 글"])
    rows, faults = read("kaldi", data)
    assert [row.id for row in rows] == ["u2"]
    assert reasons(faults) == [(1, "kaldi_pipe")]
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {"r.wav", "secret"}


def test_archives_and_folders_without_text_are_refused(tmp_path):
    data = folder(tmp_path, ["u1 raw.ark:123"], ["u1 글"])
    _, faults = read("kaldi", data)
    assert "archive" in faults[0].message
    (data / "text").unlink()
    with pytest.raises(RunError, match="no text"):
        read("kaldi", data)
