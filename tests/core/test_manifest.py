"""Manifests: chunks cover a file exactly, and every row is used or refused with its line."""

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import Sample, chunks, parse_row, read_chunk, require_usable_row, sha256_hex
from voxray.core.source import Source

TQA = {"instruction": "i", "output": "o"}
AST = {"audio_path": "a.wav", "translation": "a", "target_language": "en"}


@pytest.fixture
def manifest(tmp_path: Path):
    def write(raw: bytes | str | list) -> str:
        path = tmp_path / "rows.jsonl"
        if isinstance(raw, list):
            raw = "".join(json.dumps(row) + "\n" for row in raw)
        path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
        return str(path)

    return write


@pytest.fixture
def clip(tmp_path: Path) -> str:
    (tmp_path / "clip.wav").write_bytes(b"RIFF")
    return "clip.wav"


def parse(row: object, manifest: str = "/m/rows.jsonl") -> Sample:
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(raw, manifest, 3)


def refusal(row: object, manifest: str = "/m/rows.jsonl") -> tuple[str, str]:
    with pytest.raises(BadRow) as error:
        parse(row, manifest)
    return error.value.reason, str(error.value)


# -- chunks


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"\n", b"\r\n", b"{}", b"a\rb", b"\xff", b"\xef\xbb\xbf", b"\x0b\x85"])), st.data()
)
def test_chunks_cover_a_file_exactly(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], data: st.DataObject):
    raw = b"".join(parts)
    size = data.draw(st.integers(1, 7))
    path = tmp_path_factory.getbasetemp() / "covered.jsonl"
    path.write_bytes(raw)
    if not raw:
        with pytest.raises(RunError, match="is empty"):
            list(chunks(str(path), size))
        return
    parts_read = list(chunks(str(path), size))
    lines = raw.split(b"\n")[: -1 if raw.endswith(b"\n") else None]
    assert b"".join(chunk.read_bytes() for chunk in parts_read) == raw
    assert [chunk.number for chunk in parts_read] == list(range(len(parts_read)))
    assert sum(chunk.num_lines for chunk in parts_read) == len(lines)
    assert {chunk.num_lines for chunk in parts_read[:-1]} <= {size} and 1 <= parts_read[-1].num_lines <= size
    for chunk in parts_read:
        own_lines = lines[chunk.first_line - 1 :][: chunk.num_lines]
        assert chunk.read_bytes().removesuffix(b"\n") == b"\n".join(own_lines)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["good", "blank", "bad"]), min_size=1), st.integers(1, 9), st.booleans(), st.booleans())
def test_rows_know_their_lines(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], size: int, crlf: bool, last_newline: bool
):
    text = {"good": json.dumps(TQA), "blank": " \t", "bad": "{"}
    raw = ("\r\n" if crlf else "\n").join(text[kind] for kind in kinds) + ("\n" if last_newline else "")
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(raw.encode())
    rows = [read_chunk(chunk) for chunk in chunks(str(path), size)]
    numbers = {kind: [number for number, other in enumerate(kinds, 1) if other == kind] for kind in text}
    assert [sample.source for part in rows for sample in part.samples] == [f"{path}:{n}" for n in numbers["good"]]
    assert [sample.id for part in rows for sample in part.samples] == [f"lines.jsonl:{n}" for n in numbers["good"]]
    assert [line for part in rows for line, _ in part.bad] == numbers["bad"]


def test_chunks_are_lazy(manifest):
    path = manifest("{}\n" * 100)
    walk = chunks(path, 10)
    assert next(walk).end == 30 and next(walk).first_line == 11


def test_byte_order_mark_is_skipped_at_the_start_only(manifest):
    line = json.dumps(TQA)
    path = manifest(f"\ufeff{line}\n\ufeff{line}\n")
    rows = [read_chunk(chunk) for chunk in chunks(path, 1)]
    assert [len(part.samples) for part in rows] == [1, 0]
    assert rows[1].bad[0][0] == 2 and rows[1].bad[0][1].reason == "bad_json"
    assert read_chunk(next(chunks(manifest("\ufeff\n" + line), 5))).samples[0].source.endswith(":2")


def test_only_a_newline_ends_a_row(manifest):
    raw = b'{"instruction": "i",\r"output":\x20"a\xe2\x80\xa8b\xc2\x85c"}\n'  # CR, line separator, next line
    samples = read_chunk(next(chunks(manifest(raw * 2), 5))).samples
    assert [sample.answer for sample in samples] == ["a\u2028b\x85c"] * 2
    assert [sample.source[-2:] for sample in samples] == [":1", ":2"]


def test_bytes_that_are_passed_are_not_read_again(manifest):
    chunk = next(chunks(manifest([TQA]), 5))
    Path(chunk.manifest).unlink()
    assert len(read_chunk(chunk, json.dumps(TQA).encode()).samples) == 1


# -- rows


def test_a_row_of_each_task(tmp_path: Path, clip: str):
    manifest = str(tmp_path / "m.jsonl")
    asr = parse({"audio_path": clip, "transcript": " 안녕 ", "language": "ko", "id": "u1"}, manifest)
    assert (asr.id, asr.task.name, asr.prompt, asr.answer, asr.language) == ("u1", "asr", "", "안녕", "ko")
    assert (asr.audio_path, asr.source) == (str(tmp_path / clip), f"{manifest}:3")
    sqa = parse({"audio_path": clip, "question": "q", "answer": "a", "input": 3}, manifest)
    assert (sqa.id, sqa.task.name, sqa.prompt, sqa.answer, sqa.language) == ("m.jsonl:3", "sqa", "q", "a", "")
    tqa = parse({"instruction": "i", "input": "x", "output": "o", "audio_path": 7}, manifest)
    assert (tqa.task.name, tqa.prompt, tqa.answer, tqa.audio_path) == ("tqa", "i\nx", "o", "")
    assert parse({**TQA, "input": None}).prompt == "i"
    assert parse({"audio_path": clip, "transcript": " "}, manifest).answer == ""  # nobody speaks: a valid answer


def test_a_row_with_a_transcript_and_a_translation_is_a_translation(tmp_path: Path, clip: str):
    """Its segments are those of the transcript, so the translation has none."""
    row = {"audio_path": clip, "transcript": "안녕", "segments": [{"start": 0, "end": 0.5, "text": "안녕"}]}
    assert parse(row, str(tmp_path / "m.jsonl")).segments and not parse(row, str(tmp_path / "m.jsonl")).target_language
    row |= {"translation": " Hello. ", "target_language": "en-US", "language": "kor"}
    sample = parse(row, str(tmp_path / "m.jsonl"))
    assert (sample.task.name, sample.answer, sample.prompt) == ("ast", "Hello.", "Translate the speech into English.")
    assert (sample.language, sample.target_language, sample.segments) == ("ko", "en", ())


@pytest.mark.parametrize(("row_id", "sample_id"), [("a", "a"), (7, "7"), (0, "0"), ("", None), (None, None)])
def test_ids(row_id: object, sample_id: str | None):
    assert parse({**TQA, "id": row_id}).id == (sample_id or "rows.jsonl:3")


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        (b'{"instruction": "\xff"}', "bad_utf8", "invalid start byte at byte 17"),
        (b"\x80\x02", "bad_utf8", "not UTF-8"),
        (b'{"instruction": "\\ud800", "output": "o"}', "bad_utf8", "'\\ud800'"),
        (b'{"instruction": "i", "output": "o", "note": ["\\udfff"]}', "bad_utf8", "'\\udfff'"),
        (b'{"\\ud800": 1}', "bad_utf8", "not Unicode text"),
        (b"{", "bad_json", "not JSON"),
        (b"{'instruction': 'i'}", "bad_json", "not JSON"),
        (b'{"instruction": "i"} {}', "bad_json", "Extra data"),
        (b"[" * 100_000, "bad_json", "not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "bad_json", "4300 digits"),
        (b"[1]", "bad_row", "a JSON list, not an object"),
        (b"null", "bad_row", "a JSON NoneType"),
        (b'"text"', "bad_row", "a JSON str"),
        ({"text": "x"}, "unknown_task", "keys text match no task"),
        ({}, "unknown_task", "(none)"),
        ({"instruction": 1, "output": "o"}, "bad_type", "instruction is int, not text"),
        ({"instruction": "i", "output": ["o"]}, "bad_type", "output is list, not text"),
        ({"instruction": 1, "output": 2}, "bad_type", "instruction is int"),
        ({"instruction": None, "output": "o"}, "bad_type", "instruction is null"),
        ({"instruction": "i", "output": None}, "bad_type", "output is null"),
        ({**TQA, "input": 3}, "bad_type", "input is int"),
        ({**TQA, "language": 3}, "bad_type", "language is int"),
        ({"instruction": "i", "output": " \n"}, "empty_text", "output is empty"),
        ({"instruction": " ", "output": "o"}, "empty_text", "instruction is empty"),
        ({"audio_path": "a.wav", "question": "", "answer": "a"}, "empty_text", "question is empty"),
        ({"audio_path": " ", "transcript": "a"}, "empty_text", "audio_path is empty"),
        ({"audio_path": 3, "transcript": "a"}, "bad_type", "audio_path is int"),
        ({"audio_path": "no.wav", "transcript": "a"}, "audio_missing", "audio file not found: no.wav"),
        ({"audio_path": "a\0b", "transcript": "a"}, "audio_missing", "zero byte"),
        ({"audio_path": "a" * 5000, "transcript": "a"}, "audio_missing", "not found"),
        ({"audio_path": "/", "transcript": "a"}, "audio_missing", "not an audio file: /"),
        ({**TQA, "language": "klingon"}, "bad_language", "'klingon'"),
        ({**TQA, "language": "한"}, "bad_language", "'한'"),
        ({**AST, "target_language": "kr"}, "bad_language", "target_language 'kr' is not known; did you mean 'ko'"),
        ({**AST, "target_language": "the king's"}, "bad_language", 'target_language "the king\'s" is not known; write'),
        ({**AST, "target_language": "auto"}, "bad_language", "target_language 'auto' names no language"),
        ({**AST, "target_language": " "}, "empty_text", "target_language is empty"),
        ({**AST, "target_language": None}, "bad_type", "target_language is null"),
        ({**AST, "target_language": 3}, "bad_type", "target_language is int, not text"),
        ({**AST, "translation": " "}, "empty_text", "translation is empty"),
        ({**AST, "translation": ["a"]}, "bad_type", "translation is list, not text"),
        ({**AST, "language": "klingon"}, "bad_language", "language 'klingon' is not known"),
        ({**AST, "target_language": "klingon", "transcript": "a"}, "bad_language", "target_language 'klingon'"),
        ({"audio_path": "a.wav", "translation": "a"}, "unknown_task", "ast: audio_path, translation, target_language"),
    ],
)
def test_bad_rows(row: object, code: str, message: str):
    reason, text = refusal(row)
    assert reason == code and message in text


def test_whole_surrogate_pairs_and_escapes_are_text():
    assert parse(b'{"instruction": "\\ud83d\\ude00 \\uac00", "output": "o"}').prompt == "😀 가"


def test_bad_rows_cross_processes():
    error = pickle.loads(pickle.dumps(BadRow("bad_json", "not JSON")))
    assert (error.reason, error.message, str(error)) == ("bad_json", "not JSON", "not JSON")


@pytest.mark.parametrize(
    ("written", "code"),
    [
        *(("ko", "ko"), ("KO", "ko"), ("ko-KR", "ko"), ("ko_KR", "ko"), ("Korean", "ko"), ("kor", "ko")),
        *((" en ", "en"), ("English", "en"), ("eng", "en"), ("en-US", "en"), ("fr", "fr")),
        *(("auto", ""), ("", ""), (None, "")),
    ],
)
def test_language_forms(written: str | None, code: str):
    assert parse({**TQA, "language": written}).language == code


# -- paths of clips


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_manifest", ["NFC", "NFD"])
def test_composed_and_decomposed_names_match(tmp_path: Path, on_disk: str, in_manifest: str):
    path = tmp_path / unicodedata.normalize(on_disk, "음성") / unicodedata.normalize(on_disk, "첫째.wav")
    path.parent.mkdir()
    path.touch()
    row = {"audio_path": unicodedata.normalize(in_manifest, "음성/첫째.wav"), "transcript": ""}
    assert Path(parse(row, str(tmp_path / "m.jsonl")).audio_path).samefile(path)


def test_backslashes_separate_folders(tmp_path: Path):
    """As lists from Windows write them; a file whose name has a backslash comes first."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").touch()
    row, manifest = {"audio_path": "clips\\a.wav", "transcript": ""}, str(tmp_path / "m.jsonl")
    assert parse(row, manifest).audio_path == str(tmp_path / "clips" / "a.wav")
    (tmp_path / "clips\\a.wav").touch()
    assert parse(row, manifest).audio_path == str(tmp_path / "clips\\a.wav")


def test_audio_within_the_row_and_long_paths_are_cut_in_messages():
    for path in (f"data:audio/wav;base64,{'A' * 5000}", "a" * 5000):
        reason, text = refusal({"audio_path": path, "transcript": "a"})
        assert reason == "audio_missing" and len(text) < 400 and text.endswith("…")
    assert "write it to a file" in refusal({"audio_path": "data:audio/wav;base64,AAAA", "transcript": "a"})[1]


def test_the_manifests_folder_comes_before_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("data/both.wav", "here/both.wav", "here/only.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    manifest = str(tmp_path / "data" / "m.jsonl")

    def resolved(path: str) -> str:
        return parse({"audio_path": path, "transcript": ""}, manifest).audio_path

    assert resolved("both.wav") == str(tmp_path / "data/both.wav")
    assert resolved("only.wav") == str(tmp_path / "here/only.wav")
    assert resolved(str(tmp_path / "here/both.wav")) == str(tmp_path / "here/both.wav")


# -- sources


@pytest.mark.parametrize("text", ["/a/m.jsonl:3", "m.jsonl:1", "C:/odd:name.jsonl:12", ""])
def test_a_source_is_written_as_it_was_read(text: str):
    assert str(Source.parse(text)) == text


def test_sources():
    assert Source.parse("/a/b:c.jsonl:7") == ("/a/b:c.jsonl", 7)
    assert [Source.parse(text).line for text in ("", "m.jsonl", "m.jsonl:", "m.jsonl:x", "m.jsonl:-1")] == [0] * 5


# -- the check on the driver


def test_a_manifest_with_one_usable_row_passes(manifest):
    require_usable_row((manifest(["bad"] * 200 + [TQA]),), lines_per_chunk=7)


def test_the_check_stops_at_the_first_usable_row(manifest, monkeypatch: pytest.MonkeyPatch):
    chunks_read = []
    monkeypatch.setattr("voxray.core.manifest.read_chunk", lambda chunk: chunks_read.append(chunk) or read_chunk(chunk))
    require_usable_row((manifest([TQA] * 50),), lines_per_chunk=5)
    assert len(chunks_read) == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", ": the manifest is empty"),
        (b"\n \n\n", ":1: no usable row, every line is blank"),
        (b"\n\n{\n[1]\n", ":3: no usable row in this manifest; the first fault: not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', ":1: no usable row in this manifest; the first fault: keys a match no task"),
        (b"\n" * 10 + b"[]", ":11: no usable row in this manifest; the first fault: a JSON list"),
    ],
)
def test_a_manifest_without_a_usable_row_names_its_first_fault(manifest, raw: bytes, message: str):
    path = manifest(raw)
    with pytest.raises(RunError) as error:
        require_usable_row((path,), lines_per_chunk=2)
    assert str(error.value).startswith(path + message)


def test_every_manifest_is_checked(manifest, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"bad\.jsonl:1: "):
        require_usable_row((manifest([TQA]), str(tmp_path / "bad.jsonl")))


def test_manifests_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(RunError, match=r"none\.jsonl: cannot read the manifest: No such file"):
        require_usable_row((str(tmp_path / "none.jsonl"),))
    with pytest.raises(RunError, match="cannot read the manifest: Is a directory"):
        require_usable_row((str(tmp_path),))


def test_digest_is_sha256():
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
