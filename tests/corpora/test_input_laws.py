"""Properties of input: every line is a row or a fault for any bytes, ids become unique, first rows are remembered."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxray.core.manifest import Chunk, read_chunk
from voxray.core.source import Source
from voxray.corpora.prepare.unique import FirstSeen, UniqueIds

FRAGMENTS = [
    b"{",
    b"}",
    b"[",
    b'"',
    b":",
    b",",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"null",
    b"NaN",
    b"1e999",
]
FRAGMENTS += [
    b'"instruction"',
    b'"output"',
    b'"audio_path"',
    b'"transcript"',
    b'"start"',
    b'"id"',
    b'"x.pt"',
    b"9" * 400,
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.pt", "ko", "/", ".."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("instruction", "input", "output", "audio_path", "transcript", "question", "answer", "language", "id", "start")
ROWS = st.dictionaries(st.sampled_from([*KEYS, "duration", "channel", "features"]), VALUES, max_size=8)
LINES = (
    st.binary(max_size=60)
    | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join)
    | ROWS.map(lambda row: json.dumps(row).encode())
)


@settings(deadline=None, max_examples=60)
@given(st.lists(LINES, max_size=8), st.booleans())
@example([b'{"instruction": "i", "output": "o"}', b"\xff", b" "], False)
def test_any_bytes_are_rows_or_faults(parts, crlf):
    raw = (b"\r\n" if crlf else b"\n").join(parts)
    rows = read_chunk(Chunk("/nowhere/m.jsonl", 0, 0, len(raw), 1, raw.count(b"\n") + 1), raw)
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [number for number, line in enumerate(lines, 1) if line.strip()]
    numbers = [Source.parse(sample.source).line for sample in rows.samples] + [number for number, _ in rows.bad]
    assert sorted(numbers) == expected
    for _, error in rows.bad:
        assert error.reason and error.message and len(error.message) <= 1000 and "\n" not in error.message
    for sample in rows.samples:
        assert json.dumps([sample.id, sample.prompt, sample.answer], ensure_ascii=False).encode()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", "b#2"])))
def test_ids_become_unique_and_the_first_stay(ids):
    unique = UniqueIds()
    new_ids = [unique(row_id) for row_id in ids]
    assert len(set(new_ids)) == len(ids)
    assert all(new == old or new.startswith(f"{old}#") for new, old in zip(new_ids, ids, strict=True))
    assert not ids or new_ids[0] == ids[0]


def test_first_row_of_a_key():
    first_seen = FirstSeen()
    sources = [("a", "x:1"), ("b", "y:2"), ("a", "y:3"), ("b", "x:9"), ("a", "x:1")]
    assert [first_seen(key, source) for key, source in sources] == ["", "", "x:1", "y:2", "x:1"]
