"""Tables as people have them: any encoding, separator, headings and place of the clips."""

from pathlib import Path

import openpyxl
import pytest
from helpers.bad_input import noise
from helpers.corpora import clip, lines, prepare, read, reasons

from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.corpora.importers import detect
from voxray.corpora.importers.table import CorpusTable, TableOptions, parse_seconds
from voxray.corpora.importers.table_file import find_encoding

HEADINGS = ("번호", "파일명", "전사 내용", "화자", "길이(ms)")
ROWS = [(str(n), f"환자{n}", f"환자 {n}번, 혈압이 120/80 입니다", "의사" if n % 2 else "환자", "100") for n in range(4)]
EXPECTED = [(f"환자{n}.m4a", f"환자 {n}번, 혈압이 120/80 입니다", "의사" if n % 2 else "환자", 0.1) for n in range(4)]


def write_clips(folder: Path) -> None:
    for _, name, *_ in ROWS:
        clip(folder / "녹음" / "2024" / f"{name}.m4a")


def write_text(path: Path, encoding: str, separator: str, quote: str = '"') -> Path:
    def line(row: tuple[str, ...]) -> str:
        return separator.join(f"{quote}{cell}{quote}" if separator in cell or quote == "'" else cell for cell in row)

    path.write_bytes("\r\n".join(map(line, [HEADINGS, *ROWS])).encode(encoding))
    return path


def contents(path: Path) -> list[tuple[str, str, str, float]]:
    rows, faults = read("table", path)
    assert not faults and {row.values["language"] for row in rows} == {"ko"}
    return [
        (Path(row.values["audio_path"]).name, *(row.values[key] for key in ("transcript", "speaker", "duration")))
        for row in rows
    ]


@pytest.mark.parametrize(
    ("name", "encoding", "separator"),
    [
        ("전사.csv", "cp949", ","),
        ("전사.csv", "utf-8", ","),
        ("전사.csv", "utf-8-sig", ";"),
        ("전사.txt", "utf-16", "\t"),
        ("전사.tsv", "utf-16-le", "\t"),
        ("전사.tsv", "cp949", "\t"),
        ("전사.txt", "utf-8", "|"),
    ],
)
def test_text_tables(tmp_path: Path, name: str, encoding: str, separator: str) -> None:
    write_clips(tmp_path)
    path = write_text(tmp_path / name, encoding, separator)
    assert detect(path) == "table" and contents(path) == EXPECTED


def test_excel(tmp_path: Path) -> None:
    """The first sheet with rows is read, whole numbers have no fraction, and other sheets can be named."""
    write_clips(tmp_path)
    book = openpyxl.Workbook()
    filled, other = book.create_sheet("전사"), book.create_sheet("다른 것")
    for row in [HEADINGS, *((int(n), *cells, 100.0) for n, *cells, _ in ROWS)]:
        filled.append(row)
    for row in [("file", "text"), ("환자0", "하나")]:
        other.append(row)
    book.save(tmp_path / "전사.xlsx")
    assert contents(tmp_path / "전사.xlsx") == EXPECTED
    assert detect(tmp_path) == "table", "a folder with one table"
    [row] = CorpusTable(tmp_path / "전사.xlsx", TableOptions(sheet="다른 것")).rows()
    assert row.values["transcript"] == "하나"
    with pytest.raises(RunError, match=r"--sheet x: .* has the sheets Sheet, 전사, 다른 것"):
        CorpusTable(tmp_path / "전사.xlsx", TableOptions(sheet="x"))
    lines(tmp_path / "broken.xlsx", "PK no zip")
    with pytest.raises(RunError, match="cannot be read as an Excel file"):
        CorpusTable(tmp_path / "broken.xlsx")


def test_the_description_says_what_was_guessed(tmp_path: Path) -> None:
    write_clips(tmp_path)
    description = CorpusTable(write_text(tmp_path / "a.csv", "cp949", ",")).description
    assert "cp949, commas" in description and "audio = 파일명, text = 전사 내용, speaker = 화자" in description
    assert "language ko" in description and "clips in 녹음/2024" in description


def test_columns_by_content(tmp_path: Path) -> None:
    """Headings that nobody knows: the cells of one column are clips, those of another have the most letters."""
    for n in range(3):
        clip(tmp_path / f"{n}.wav")
    lines(tmp_path / "a.csv", "x,y,z", *(f"{n},{n}.wav,sentence number {n}" for n in range(3)))
    rows, faults = read("table", tmp_path / "a.csv")
    assert [row.values["transcript"] for row in rows] == [f"sentence number {n}" for n in range(3)] and not faults
    assert "language" not in rows[0].values


def test_a_heading_whose_cells_are_no_clips_gives_way(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    lines(tmp_path / "a.csv", "path,recording,text", "batch7,a,하나 둘")
    [row], _ = read("table", tmp_path / "a.csv")
    assert row.values["audio_path"] == str(tmp_path / "a.wav")


def test_without_headings_as_ljspeech(tmp_path: Path) -> None:
    for n in range(2):
        clip(tmp_path / "wavs" / f"LJ001-000{n}.wav")
    table = [f'LJ001-000{n}|He said "{n} of them|He said "{word} of them' for n, word in enumerate(("zero", "one"))]
    lines(tmp_path / "metadata.csv", *table)
    assert detect(tmp_path) == "table"
    rows, faults = read("table", tmp_path / "metadata.csv")
    assert not faults and [row.line for row in rows] == [1, 2]
    assert [row.values["transcript"] for row in rows] == ['He said "zero of them', 'He said "one of them']


def test_times_channels_and_flags(tmp_path: Path) -> None:
    clip(tmp_path / "call.wav")
    header = "who;when;until;words;side"
    lines(tmp_path / "a.csv", header, "가;0:01,5;0:03;안녕하세요;1", "나;4;4;네 그래요;0", "다;x;9;말;0", "라;1;2")
    columns = {"audio": "", "text": "words", "start": "when", "end": "until", "speaker": "who", "channel": "side"}
    with pytest.raises(RunError, match=r"no column names audio files. The columns are who, when, until, words, side"):
        CorpusTable(tmp_path / "a.csv", TableOptions(columns))
    lines(
        tmp_path / "a.csv",
        f"clip;{header}",
        "call;가;0:01,5;0:03;안녕하세요;1",
        "call;나;4;4;네;0",
        "call;다;x;9;말;0",
        "라",
    )
    items = list(CorpusTable(tmp_path / "a.csv", TableOptions(columns)).rows())
    assert items[0].values == {
        **{"audio_path": str(tmp_path / "call.wav"), "transcript": "안녕하세요", "start": 1.5, "duration": 1.5},
        **{"channel": 1.0, "speaker": "가", "language": "ko"},
    }
    assert reasons(items[1:]) == [(3, "bad_segment"), (4, "bad_type"), (5, "bad_row")]
    with pytest.raises(RunError, match="--text_column wordz: the table has the columns clip, who, when"):
        CorpusTable(tmp_path / "a.csv", TableOptions({"text": "wordz"}))


def test_clips_of_another_machine_and_ambiguous_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        clip(tmp_path / "clips" / folder / "same.wav")
    clip(tmp_path / "clips" / "a" / "one.wav")
    (tmp_path / "table").mkdir()
    path = lines(tmp_path / "table" / "t.csv", "file,text", "C:\\녹음\\one.wav,하나 둘", "same,둘 셋", "gone,셋 넷")
    items = list(CorpusTable(path, TableOptions(audio_dir=str(tmp_path / "clips"))).rows())
    assert items[0].values["audio_path"] == str(tmp_path / "clips" / "a" / "one.wav")
    assert reasons(items[1:]) == [(3, "audio_ambiguous"), (4, "audio_missing")]


@pytest.mark.parametrize(
    ("heading", "cells", "splits"),
    [
        ("구분", ("외래", "입원"), [None, None]),
        ("구분", ("시험용", "입원"), ["시험용", "입원"]),
        ("split", ("a", "b"), ["a", "b"]),
    ],
)
def test_a_column_of_something_else_is_no_split(tmp_path, heading, cells, splits) -> None:
    for name in "ab":
        clip(tmp_path / f"{name}.wav")
    path = lines(tmp_path / "t.csv", f"file,text,{heading}", *(f"a.wav,글 글,{cell}" for cell in cells))
    assert [row.values.get("split") for row in read("table", path)[0]] == splits


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"file,text\na,\xb0\xff\xff\nb,\xb0\xff\xff\nc,\xb0\xff\xff\n")
    with pytest.raises(RunError, match="neither utf-8 nor cp949; name its encoding with --encoding"):
        find_encoding(path)
    path.write_bytes("file,text\na,漢字かな\n".encode("shift_jis"))
    clip(tmp_path / "a.wav")
    [row] = CorpusTable(path, TableOptions(encoding="shift_jis")).rows()
    assert row.values["transcript"] == "漢字かな" and row.values["language"] == "ja"
    assert reasons(list(CorpusTable(path, TableOptions(encoding="ascii")).rows())) == [(2, "bad_encoding")]
    with pytest.raises(RunError, match="--encoding no-such-encoding: Python has no such"):
        CorpusTable(path, TableOptions(encoding="no-such-encoding"))


@pytest.mark.parametrize(("text", "seconds"), [("83.5", 83.5), ("1:23,5", 83.5), ("01:00:02", 3602.0)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "start") == seconds


@pytest.mark.parametrize("text", ["-1", "nan", "x", "1:", "1e400"])
def test_bad_times(text: str) -> None:
    with pytest.raises(BadRow):
        parse_seconds(text, "start")


def test_the_flags_of_prepare(tmp_path: Path) -> None:
    """Each flag reads another column or file than the guess would."""
    for name in ("a", "b"):
        noise(tmp_path / "clips" / f"{name}.wav", 3.0)
    kinds = ("audio", "text", "speaker", "language", "start", "end", "duration", "channel", "split")
    book = openpyxl.Workbook()
    first, second = book.active, book.create_sheet("two")
    assert first is not None
    for sheet, name in ((first, "a"), (second, "b")):
        sheet.append([f"x{kind}" for kind in kinds])
        sheet.append([f"{name}.wav", "하나 둘 셋 넷", "가", "ko", 0.5, 2.0, None, 0, "train"])
    (tmp_path / "table").mkdir()
    book.save(tmp_path / "table" / "t.xlsx")
    flags = {f"{kind}_column": f"x{kind}" for kind in kinds} | {"sheet": "two", "audio_dir": str(tmp_path / "clips")}
    [row], _, ledger, _ = prepare(tmp_path, str(tmp_path / "table" / "t.xlsx"), min_sec=0.5, val_output="", **flags)
    assert Path(row["audio_path"]).name == "b.wav" and not ledger
    expected = {"transcript": "하나 둘 셋 넷", "speaker": "가", "language": "ko", "start": 0.5, "duration": 1.5}
    assert {key: row[key] for key in expected} == expected and row["channel"] == 0
    lines(tmp_path / "t.csv", "xaudio,xtext,xduration".encode("shift_jis"), "a.wav,かな かな,3".encode("shift_jis"))
    flags |= {"encoding": "shift_jis", "duration_column": "xduration", "sheet": ""}
    chosen = {name: flags[name] for name in ("encoding", "duration_column", "audio_column", "text_column", "audio_dir")}
    [row], _, _, _ = prepare(tmp_path, str(tmp_path / "t.csv"), min_sec=0.5, val_output="", **chosen)
    assert row["transcript"] == "かな かな" and row["duration"] == 3.0


def test_prepare_prints_the_guess_and_takes_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clips(tmp_path)
    table = write_text(tmp_path / "전사.csv", "cp949", ",")
    with pytest.raises(RunError, match="no usable row"):  # importers do not decode, and these clips are no audio
        prepare(tmp_path, str(table))
    assert "audio = 파일명" in capsys.readouterr().out
    jsonl = lines(tmp_path / "rows.jsonl", {"audio_path": "a.wav", "transcript": "네"})
    with pytest.raises(SettingsError, match=r"--text_column: only for tables \(.csv, .tsv, .txt, .xlsx\)"):
        prepare(tmp_path, str(jsonl), text_column="전사")
