"""Properties of every importer: no line is lost, memory is constant, the format is detected, nothing is written."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import clip, lines, read

from voxray.core.errors import RunError
from voxray.core.manifest import chunks as manifest_chunks
from voxray.core.manifest import read_chunk
from voxray.core.tasks import detect_task
from voxray.corpora.importers import IMPORTERS, detect

NUM = 60
CV_HEADER = "client_id\tpath\tsentence\tlocale"


def kaldi(root: Path, sound: str) -> tuple[Path, Path]:
    lines(root / "text", *(f"u{number} 글 {number}" for number in range(NUM)))
    return root, lines(root / "wav.scp", *(f"u{number} {sound}" for number in range(NUM)))


def kaldi_segments(root: Path, sound: str) -> tuple[Path, Path]:
    lines(root / "text", *(f"u{number} 글 {number}" for number in range(NUM)))
    lines(root / "wav.scp", f"r1 {sound}")
    return root, lines(root / "segments", *(f"u{number} r1 {number} {number + 1}.5" for number in range(NUM)))


def nemo(root: Path, sound: str) -> tuple[Path, Path]:
    row = {"audio_filepath": sound, "duration": 0.1, "text": "네"}
    return (path := lines(root / "m.json", *[row] * NUM)), path


def ksponspeech(root: Path, sound: str) -> tuple[Path, Path]:
    return (path := lines(root / "train.trn", *[f"{sound} :: 네 b/"] * NUM)), path


def commonvoice(root: Path, sound: str) -> tuple[Path, Path]:
    path = lines(root / "train.tsv", CV_HEADER, *[f"s\t{sound}\t네\tko"] * NUM)
    return path, path


def huggingface(root: Path, sound: str) -> tuple[Path, Path]:
    path = lines(root / "metadata.csv", "file_name,text,language", *[f'{sound},"네, 그래요",ko'] * NUM)
    return root, path


def lhotse(root: Path, sound: str) -> tuple[Path, Path]:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": sound}], "duration": 1.0}
    row = {"id": "c", "type": "MonoCut", "start": 0, "duration": 1.0, "channel": 0, "recording": recording}
    path = lines(root / "cuts.jsonl", *[row | {"supervisions": [{"id": "s", "text": "네"}]}] * NUM)
    return path, path


def salmonn(root: Path, sound: str) -> tuple[Path, Path]:
    row = json.dumps({"path": sound, "text": "네", "task": "asr"}, ensure_ascii=False)
    path = lines(root / "a.json", '{"annotation": [', *[f"{row},"] * (NUM - 1), row, "]}")
    return path, path


def jsonl(root: Path, sound: str) -> tuple[Path, Path]:
    chat = {"messages": [{"role": "user", "content": "두통"}, {"role": "assistant", "content": "네"}]}
    kinds = [{"audio_path": sound, "transcript": "네"}, {"instruction": "가", "output": "나"}, chat]
    path = lines(root / "rows.jsonl", *(kinds * NUM)[:NUM])
    return path, path


def parquet(root: Path, sound: str) -> tuple[Path, Path]:
    audio = pa.array([{"bytes": b"x", "path": sound}] * NUM, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    texts = pa.array(["네" if number % 7 else None for number in range(NUM)])
    pq.write_table(pa.table({"audio": audio, "text": texts}), root / "train.parquet", row_group_size=7)
    return root, root / "train.parquet"


def table(root: Path, sound: str) -> tuple[Path, Path]:
    path = lines(root / "전사.csv", "파일명;전사;번호", *[f"{sound};네, 그래요;{number}" for number in range(NUM)])
    return root, path


def librispeech(root: Path, sound: str) -> tuple[Path, Path]:
    name = Path(sound).stem.replace(" ", "_")
    clip(root / f"{name}.wav")
    return root, lines(root / "84.trans.txt", *[f"{name} 네 그래요"] * NUM)


CORPORA = [kaldi, kaldi_segments, nemo, ksponspeech, commonvoice, huggingface, lhotse, salmonn, jsonl, parquet]
CORPORA += [table, librispeech]
FORMATS = {"kaldi_segments": "kaldi", "parquet": "huggingface"}
HEADERS = {"commonvoice": 1, "huggingface": 1, "salmonn": 1, "table": 1}


def test_every_importer_is_covered():
    assert {FORMATS.get(make.__name__, make.__name__) for make in CORPORA} == set(IMPORTERS)


def damage(raw: bytes, rng: random.Random, in_array: bool) -> bytes:
    """Damage a line in a random way. Inside a JSON array the brackets and quotes around it stay intact."""
    comma = b"," if raw.endswith(b",") else b""
    variants = [raw, b'{"a": 1}' + comma, raw.replace(b"\xeb", b"\xff"), b"3" + comma, b'{"a" 1}' + comma]
    variants += [] if in_array else [raw[: len(raw) // 2], b"%%% \x00", b"\xff\xfe", b"[" * 5000, raw + raw, b"  "]
    return rng.choice(variants)


@pytest.mark.parametrize("make", CORPORA)
@pytest.mark.parametrize("seed", [None, *range(8)])
def test_every_line_gives_a_row_or_a_fault(tmp_path, make, seed):
    path, main = make(tmp_path, clip(tmp_path / "가 나.wav"))
    name, before, blank = make.__name__, HEADERS.get(make.__name__, 0), 0
    if seed is not None and make is not parquet:
        all_lines = main.read_bytes().split(b"\n")[:-1]
        rng = random.Random(seed)
        body = slice(before, before + NUM)
        all_lines[body] = [damage(line, rng, make is salmonn) for line in all_lines[body]]
        blank = sum(not line.strip() for line in all_lines[body])
        main.write_bytes(b"\n".join(all_lines) + b"\n")
    rows, faults = read(FORMATS.get(name, name), path)
    own = [item for item in [*rows, *faults] if item.source_file == str(main)]
    assert len(own) == NUM - blank
    assert len({item.line for item in own}) == len(own)
    others = [item for item in [*rows, *faults] if item.source_file != str(main)]
    assert all(fault in faults for fault in others)
    if name.startswith("kaldi"):  # every line of text is in a row or in a fault
        assert {item.id for item in [*rows, *faults]} >= {f"u{number}" for number in range(NUM)}
    elif name != "parquet":
        assert not others
    if seed is None and make is not parquet:
        assert not faults
    elif seed is not None and make is not parquet:
        assert rows and faults, "damage is detected, and only where it is"


@pytest.mark.parametrize("make", CORPORA)
def test_the_format_is_detected_and_rows_are_manifest_rows(tmp_path, make):
    path, main = make(tmp_path, clip(tmp_path / "가 나.wav"))
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    assert detect(path) == detect(str(main)) == FORMATS.get(make.__name__, make.__name__)
    rows, _ = read(detect(path), path)
    assert all(detect_task(row.values) for row in rows)
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before, "importers only read"
    if make is not parquet:  # a clip inside Parquet has no path yet
        manifest = lines(tmp_path / "out.jsonl", *(row.values | {"id": row.id} for row in rows))
        (chunk,) = manifest_chunks(str(manifest), 1000)
        assert len(read_chunk(chunk).samples) == NUM


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", ["{broken", '{"audio_filepath": "x"}'], "nemo"),
        ("a.jsonl.gz", ['{"id": 1, "supervisions": [], "recording": {}}'], "lhotse"),
        ("a.json", ["{", '  "annotation": ['], "salmonn"),
        ("metadata.jsonl", ['{"file_name": "x", "text": "y"}'], "huggingface"),
        ("a.jsonl", ['{"other": 1}'], None),
        ("a.csv", ["a,b"], "table"),
        ("a.txt", ["just text"], "table"),
        ("a.jsonl", [], None),
    ],
)
def test_detect_files(tmp_path, name, content, expected):
    path = lines(tmp_path / name, *content, packed=name.endswith(".gz"))
    if expected is None:
        with pytest.raises(RunError, match=r"rename them|is empty"):
            detect(path)
    else:
        assert detect(path) == expected


def test_detect_folders(tmp_path):
    with pytest.raises(RunError, match="no such file"):
        detect(tmp_path / "gone")
    with pytest.raises(RunError, match="the folder has no files"):
        detect(tmp_path)
    clip(tmp_path / "a" / "b" / "x.pcm")
    lines(tmp_path / "a" / "b" / "x.txt", "네")
    assert detect(tmp_path) == "ksponspeech"


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_a_path_that_is_not_a_file_is_missing_audio(tmp_path, kind):
    odd = tmp_path / "odd.wav"
    if kind == "folder":
        odd.mkdir()
    else:
        os.symlink(odd, odd)
    _, faults = read("nemo", lines(tmp_path / "m.jsonl", {"audio_filepath": "odd.wav", "text": "네"}))
    assert [fault.reason for fault in faults] == ["audio_missing"]


SLOW = ("table", "nemo", "salmonn", "commonvoice", "ksponspeech", "lhotse", "huggingface")


@pytest.mark.parametrize("name", ["jsonl", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_memory_does_not_grow_with_the_corpus(tmp_path, name):
    """Streaming 5 MB of rows may take 4 MB more than sixty rows. A list of lines would take 9 MB.

    VmHWM is used, since the maximum of getrusage is inherited from the parent process.
    """
    make = next(make for make in CORPORA if make.__name__ == name)
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    small, _ = make(tmp_path / "small", clip(tmp_path / "a.wav"))
    path, main = make(tmp_path / "large", str(tmp_path / "a.wav"))
    head, *body = (
        main.read_bytes().removesuffix(b"\n]}\n").split(b"\n") if name == "salmonn" else main.read_bytes().split(b"\n")
    )
    block = b"\n".join(line for line in body if line.strip())
    separator = b",\n" if name == "salmonn" else b"\n"
    with open(main, "wb") as file:
        file.write(head)
        file.write(b"\n")
        for index in range(5_000_000 // len(block)):
            file.write(separator * bool(index) + block)
        file.write(b"]}\n" if name == "salmonn" else b"\n")
    code = (
        "import re, sys, pathlib; from voxray.corpora.importers import IMPORTERS;"
        "count = lambda path: sum(1 for _ in IMPORTERS[sys.argv[1]](pathlib.Path(path))); count(sys.argv[2]);"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); before = peak();"
        "print(count(sys.argv[3]), peak() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, name, str(small), str(path)], capture_output=True, text=True, check=True
    )
    num_rows, grown_kib = map(int, result.stdout.split())
    assert num_rows > 10_000
    assert grown_kib < 4 * 1024
