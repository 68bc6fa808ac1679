"""NeMo, lhotse, SALMONN and chat files: JSON in four shapes."""

import gzip
import json
import unicodedata

import pytest
from helpers.corpora import clip, lines, read, reasons

from voxray.corpora.importers import lines as lines_module


def test_nemo(tmp_path):
    sound = clip(tmp_path / "음성 파일" / unicodedata.normalize("NFD", "가.wav"))
    manifest = lines(
        tmp_path / "train.json",
        {"audio_filepath": "음성 파일/가.wav", "offset": 0.5, "duration": 1, "text": "네", "lang": "ko", "extra": 1},
        {"audio_filepath": sound, "duration": 0.1, "text": "", "source_lang": "ko", "target_lang": "ko", "id": "x"},
        {"audio_filepath": sound, "duration": 0.1, "text": "yes", "source_lang": "ko", "target_lang": "en"},
        {"audio_filepath": sound, "duration": 0.1},
        {"duration": 0.1, "text": "네"},
        {"audio_filepath": "gone.wav", "text": "네"},
        {"audio_filepath": "s3://bucket/a.wav", "text": "네"},
        {"audio_filepath": sound, "text": "네", "offset": -1},
        {"audio_filepath": sound, "text": "네", "duration": "3"},
        {"audio_filepath": [sound], "text": "네"},
        {"audio_filepath": str(tmp_path), "text": "네"},
        {"audio_filepath": sound, "text": 3},
        "{broken",
        "[1]",
        b'{"text": "\xb3\xd7"}',
        '{"text": "\\ud800"}',
        "[" * 100_000,
        "",
        bom=True,
        end="\r\n",
    )
    rows, faults = read("nemo", manifest)
    assert rows[0].values == {"audio_path": sound, "transcript": "네", "start": 0.5, "duration": 1, "language": "ko"}
    assert rows[0].id == "train.json:1"
    assert rows[1].id == "x" and rows[1].values["language"] == rows[1].values["source_lang"] == "ko"
    assert "start" not in rows[1].values
    assert reasons(faults) == [
        (3, "unknown_task"),
        (4, "missing_key"),
        (5, "missing_key"),
        (6, "audio_missing"),
        (7, "remote_audio"),
        (8, "bad_segment"),
        (9, "bad_type"),
        (10, "bad_type"),
        (11, "audio_missing"),
        (12, "bad_type"),
        (13, "bad_json"),
        (14, "bad_row"),
        (15, "bad_encoding"),
        (16, "bad_encoding"),
        (17, "bad_json"),
    ]


def test_an_endless_line_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1000)
    sound = clip(tmp_path / "a.wav")
    row = {"audio_filepath": sound, "text": "네"}
    rows, faults = read("nemo", lines(tmp_path / "m.jsonl", row, "x" * 3_000_000, row))
    assert [row.line for row in rows] == [1, 3]
    assert reasons(faults) == [(2, "line_too_long")]


def cut(sound, supervisions, **changes):
    source = {"type": "file", "channels": [0], "source": sound}
    recording = {"id": "r1", "sources": [source], "sampling_rate": 16000, "num_samples": 160000, "duration": 10.0}
    times = {"start": 0, "duration": 10.0, "channel": 0}
    return {"id": "c1", "type": "MonoCut", **times, "supervisions": supervisions, "recording": recording} | changes


def supervision(**changes):
    base = {"id": "s1", "recording_id": "r1", "start": 0, "duration": 2.0, "channel": 0, "text": "네"}
    return base | {"speaker": "p1", "language": "ko"} | changes


def test_lhotse(tmp_path):
    sound = clip(tmp_path / "a.wav")
    one, base = [supervision()], cut(sound, [])["recording"]
    stereo = base | {"sources": [{"type": "file", "channels": [0, 1], "source": sound}]}
    three = [
        supervision(start=1),
        supervision(id="s2", start=8.5, duration=1.5, text="둘"),
        supervision(id="s3", start=9, duration=3),
    ]
    path = lines(
        tmp_path / "cuts.jsonl.gz",
        cut(sound, one),
        cut("a.wav", one, start=2.5, duration=2.0, id="c2"),
        cut(sound, one, recording=stereo, channel=1),
        cut(sound, three, start=100.0),
        cut(sound, []),
        cut(sound, one, type="MixedCut"),
        cut(sound, one, type="MultiCut", channel=[0, 1]),
        cut(sound, one, recording=base | {"sources": [{"type": "command", "channels": [0], "source": "touch ran"}]}),
        cut(sound, one, recording=base | {"transforms": [{"name": "Speed", "kwargs": {"factor": 0.9}}]}),
        cut(sound, one, recording=base | {"transforms": [{"name": "Resample", "kwargs": {"sampling_rate": 8000}}]}),
        cut(sound, one, recording=None),
        cut(sound, one, channel=3),
        cut("gone.wav", one),
        cut(sound, [supervision(text=None)]),
        cut(sound, one, start="0"),
        cut(sound, [3]),
        packed=True,
    )
    rows, faults = read("lhotse", path)
    shared = {"audio_path": sound, "transcript": "네", "session": "r1", "sample_rate": 16000, "speaker": "p1"}
    assert rows[0].values == shared | {"duration": 10.0, "language": "ko"} and rows[0].id == "c1"
    assert rows[1].values == shared | {"duration": 2.0, "start": 2.5, "language": "ko"}
    assert rows[2].values["channel"] == 1
    assert [(row.id, row.values["start"], row.values["duration"], row.line) for row in rows[3:5]] == [
        ("s1", 101.0, 2.0, 4),
        ("s2", 108.5, 1.5, 4),
    ]
    assert [row.line for row in rows[5:]] == [7, 10]
    assert reasons(faults) == [
        (4, "bad_segment"),
        (5, "missing_text"),
        (6, "unsupported_cut"),
        (8, "unsupported_source"),
        (9, "unsupported_cut"),
        (11, "missing_audio_entry"),
        (12, "audio_channel"),
        (13, "audio_missing"),
        (14, "missing_key"),
        (15, "bad_type"),
        (16, "bad_type"),
    ]


def test_a_truncated_gzip_file_gives_its_rows_and_one_fault(tmp_path):
    sound = clip(tmp_path / "a.wav")
    rows = [cut(sound, [supervision(text=f"{number} {hash(str(number))}")]) for number in range(200)]
    path = lines(tmp_path / "cuts.jsonl.gz", *rows, packed=True)
    path.write_bytes(path.read_bytes()[:-200])
    rows, faults = read("lhotse", path)
    assert 0 < len(rows) < 200
    assert reasons(faults) == [(len(rows) + 1, "damaged_file")]
    path.write_bytes(gzip.compress(b"{}\n")[:5])
    assert reasons(read("lhotse", path)[1]) == [(1, "damaged_file")]


def annotation(sound):
    return [
        {"path": sound, "text": "네", "task": "asr"},
        {"path": "a.wav", "text": "둘", "task": "QA", "Q": '몇 개? [{"}]'},
        {"path": sound, "text": "개가 짖는다", "task": "audiocaption"},
        {"path": sound, "text": "비가 온다", "task": "audiocaption_v2"},
        {"path": sound, "text": "아니요"},
        {"path": sound, "text": "x", "task": "phone_recognition"},
        {"path": sound, "text": "x", "task": "QA"},
        {"path": "gone.wav", "text": "x", "task": "asr"},
        {"path": sound, "text": "x", "task": "asr", "expand_wav": [sound]},
        {"text": "x", "task": "asr"},
        [1],
        "text",
    ]


SALMONN_FAULTS = ["unknown_task", "missing_key", "audio_missing", "several_audios", "missing_key", "bad_row", "bad_row"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_salmonn(tmp_path, monkeypatch, indent, chunk):
    """For any layout of the file and any chunk boundaries."""
    original = lines_module.open_text

    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, _):
            return self.file.read(chunk)

    monkeypatch.setattr(lines_module, "open_text", lambda path: Slow(original(path)))
    sound = clip(tmp_path / "a.wav")
    whole = {"version": {"annotation": []}, "n": [1, {"a": [2]}], "annotation": annotation(sound), "after": [{"b": 1}]}
    path = lines(tmp_path / "train.json", json.dumps(whole, ensure_ascii=False, indent=indent), bom=True)
    rows, faults = read("salmonn", path)
    assert [row.values for row in rows] == [
        {"audio_path": sound, "transcript": "네"},
        {"audio_path": sound, "question": '몇 개? [{"}]', "answer": "둘"},
        {"audio_path": sound, "caption": "개가 짖는다"},
        {"audio_path": sound, "caption": "비가 온다", "question": "Please write down what your hear in the audio."},
        {"audio_path": sound, "transcript": "아니요"},
    ]
    assert [fault.reason for fault in faults] == SALMONN_FAULTS
    if indent:
        text = path.read_text(encoding="utf-8-sig").split("\n")
        assert [text[row.line - 1].strip() for row in rows] == ["{"] * len(rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"annotation": [GOOD, {"path": 1,, }, GOOD]}', [0, (1, "bad_json"), 0]),
        ('{"annotation": [GOOD, {"a": 1}}, GOOD]}', [0, (1, "bad_json"), 0]),
        ('{"annotation": [GOOD\n, {"path": "a', [0, (2, "damaged_file")]),
        ('{"annotation": [GOOD', [(1, "damaged_file")]),
        ('{"annotation": [GOOD], {"path": 3}]}', [0, (1, "damaged_file")]),
        ('{"annotation": []}', []),
        ('{"other": [GOOD]}', [(1, "bad_json")]),
        ("[GOOD]", [(1, "bad_json")]),
        ("", [(1, "bad_json")]),
    ],
)
def test_a_broken_annotation_file(tmp_path, text, expected):
    sound = clip(tmp_path / "a.wav")
    good = json.dumps({"path": sound, "text": "네", "task": "asr"}, ensure_ascii=False)
    rows, faults = read("salmonn", lines(tmp_path / "a.json", text.replace("GOOD", good)))
    assert len(rows) == expected.count(0)
    assert reasons(faults) == [fault for fault in expected if fault != 0]


def chat(content, answer="네", **others):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **others}


def test_jsonl(tmp_path):
    sound = clip(tmp_path / "a.wav")
    audio = {"type": "audio", "audio": "a.wav"}
    system = {"role": "system", "content": "짧게."}
    several = [chat("a")["messages"][1], *chat("b")["messages"]]
    path = lines(
        tmp_path / "rows.jsonl",
        {"audio_path": "a.wav", "transcript": "네", "domain": "진료", "id": 7},
        {"audio_path": sound, "question": "몇?", "answer": "둘"},
        {"instruction": "답", "input": "", "output": "네"},
        chat("<audio>", audios=["a.wav"]),
        chat("<audio>\nTranscribe the audio.", audios=[sound], language="ko"),
        chat([audio, {"type": "text", "text": "무슨 말?"}]),
        chat([{"type": "audio_url", "audio_url": {"url": sound}}, {"type": "text", "text": "무슨 말?"}]),
        chat("두통이 있어요"),
        {"messages": [system, *chat("두통")["messages"]]},
        {"messages": chat("a")["messages"] * 2},
        {"messages": [*chat([audio, {"type": "text", "text": "무슨 말?"}])["messages"][:1], *several], "note": 1},
        {"messages": [system]},
        chat("<audio><audio>", audios=[sound]),
        chat([audio, audio]),
        chat([{"type": "image", "image": "x.png"}]),
        chat([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]),
        chat("<audio>", audios=["gone.wav"]),
        chat("<audio>", audios=5),
        chat("두통", answer=3),
        {"messages": "x"},
        {"other": 1},
        {"audio_path": "gone.wav", "transcript": "네"},
        {"audio_path": sound, "transcript": None},
    )
    rows, faults = read("jsonl", path)
    asr, sqa = {"audio_path": sound, "transcript": "네"}, {"audio_path": sound, "question": "무슨 말?", "answer": "네"}
    assert [row.values for row in rows] == [
        asr | {"domain": "진료"},
        {"audio_path": sound, "question": "몇?", "answer": "둘"},
        {"instruction": "답", "input": "", "output": "네"},
        asr,
        asr | {"language": "ko"},
        sqa,
        sqa,
        {"instruction": "두통이 있어요", "input": "", "output": "네"},
        {"instruction": "짧게.\n두통", "input": "", "output": "네"},
        {"messages": chat("a")["messages"] * 2},
        {"audio_path": sound, "messages": [{"role": "user", "content": "<audio>무슨 말?"}, *several], "note": 1},
    ]
    assert rows[0].id == "7"
    assert reasons(faults) == [
        (12, "unsupported_chat"),
        (13, "audio_count"),
        (14, "several_audios"),
        (15, "unsupported_chat"),
        (16, "audio_missing"),
        (17, "audio_missing"),
        (18, "bad_type"),
        (19, "bad_type"),
        (20, "bad_type"),
        (21, "unknown_task"),
        (22, "audio_missing"),
        (23, "missing_key"),
    ]


@pytest.mark.parametrize("depth", [99, 101, *range(960, 1000, 3), 100_000])
def test_rows_that_can_be_read_can_be_written(tmp_path, depth):
    """JSON that was just shallow enough to read was too deep to write, which ended the job."""
    from voxray.corpora.prepare.check_rows import spool

    text = '{"instruction": "i", "output": "o", "x": ' + "[" * depth + "]" * depth + "}"
    rows, faults = read("jsonl", lines(tmp_path / "m.jsonl", text))
    assert [len(rows), len(faults)] == ([1, 0] if depth < 100 else [0, 1])
    spool(iter([*rows, *faults]), tmp_path, 10)


@pytest.mark.parametrize("name", ["nemo", "lhotse", "salmonn", "huggingface"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}])
def test_a_speaker_that_is_not_a_name_is_a_fault(tmp_path, name, value):
    sound = clip(tmp_path / "a.wav")
    row = {
        "nemo": {"audio_filepath": sound, "text": "네", "speaker": value},
        "lhotse": cut(sound, [supervision(speaker=value)]),
        "salmonn": {"annotation": [{"path": sound, "text": "네", "task": "asr", "speaker": value}]},
        "huggingface": {"file_name": sound, "text": "네", "speaker": value},
    }[name]
    rows, faults = read(name, lines(tmp_path / "metadata.jsonl", row))
    assert not rows and reasons(faults) == [(1, "bad_type")]
