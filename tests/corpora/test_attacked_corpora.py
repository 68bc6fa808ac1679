"""Inputs with which people broke prepare: nothing is lost, mixed up or overwritten without a word."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import soundfile
from conftest import TINY, write_rows
from helpers.bad_input import RATE, noise
from helpers.corpora import clip, lines, prepare, read, read_json_lines, reasons
from helpers.running import load_job, parse_only

from voxray.commands.infer import run_inference
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.yaml_file import read_yaml
from voxray.corpora.importers import detect
from voxray.corpora.importers.embedded import embedded_audio
from voxray.corpora.importers.lines import decode_text
from voxray.corpora.importers.table import CorpusTable, TableOptions
from voxray.corpora.importers.table_file import find_encoding, open_table
from voxray.corpora.prepare.fingerprints import audio_hash
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize

LIMITS = {"min_sec": 0.5, "val_output": "", "max_chars_per_sec": 100, "min_chars_per_sec": 0}


@pytest.mark.parametrize("text", ["le café est fermé", "für", "niño", "Straße", "짙은 안개", "뷁"])
def test_utf8_stays_utf8(text: str) -> None:
    assert decode_text(text.encode(), korean_code_page=True) == text


@pytest.mark.parametrize("text", ["짙", "네 짙", "짙은 안개"])
def test_cp949_is_still_read(text: str) -> None:
    assert decode_text(text.encode("cp949"), korean_code_page=True) == text


def test_a_missing_clip_is_not_replaced_by_another_speakers(tmp_path: Path) -> None:
    clip(tmp_path / "spk2" / "001.wav")
    lines(tmp_path / "t.csv", "file,text", "spk1/001.wav,하나 둘", "spk2/001.wav,둘 셋", "D:\\old\\001.wav,셋 넷")
    rows, faults = read("table", tmp_path / "t.csv")
    assert [row.values["transcript"] for row in rows] == ["둘 셋", "셋 넷"] and reasons(faults) == [
        (2, "audio_missing")
    ]


def test_clips_of_the_current_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = clip(tmp_path / "clips" / "sub" / "x1.wav"), clip(tmp_path / "cwd" / "x1.wav")
    monkeypatch.chdir(Path(outside).parent)
    path = lines(tmp_path / "t.csv", "file,text", "x1.wav,하나 둘")
    [row] = CorpusTable(path, TableOptions(audio_dir=str(tmp_path / "clips"))).rows()
    assert row.values["audio_path"] == inside
    with pytest.raises(RunError, match=r"--audio_dir .*gone: no such folder"):
        CorpusTable(path, TableOptions(audio_dir=str(tmp_path / "gone")))


def test_excel_with_wrong_dimensions_and_errors(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [
        ("file", "text", "speaker"),
        *((f"{n}.wav", f"글 {n} 번", "가") for n in range(5)),
        ("5.wav", "#N/A", ""),
    ]:
        book.worksheets[0].append(row)
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "t.xlsx", "w") as damaged:
        for name in whole.namelist():
            damaged.writestr(name, whole.read(name).replace(b'ref="A1:C7"', b'ref="A1:B3"'))
    for number in range(6):
        clip(tmp_path / f"{number}.wav")
    rows, _ = read("table", tmp_path / "t.xlsx")
    assert len(rows) == 6 and rows[0].values["speaker"] == "가" and rows[5].values["transcript"] == ""


@pytest.mark.parametrize("first", ["0.wav,hello there", "0.wav,label", "0.wav,stop"])
def test_the_first_row_of_a_table_without_headings_counts(tmp_path: Path, first: str) -> None:
    """Its clip is missing, or one of its cells is a word that is a heading elsewhere."""
    for number in (1, 2):
        clip(tmp_path / f"{number}.wav")
    rows, faults = read("table", lines(tmp_path / "t.csv", first, "1.wav,one two", "2.wav,three four"))
    assert [row.line for row in rows] == [2, 3] and reasons(faults) == [(1, "audio_missing")]


def test_plain_quotes_between_bars(tmp_path: Path) -> None:
    for number in range(3):
        clip(tmp_path / "wavs" / f"c{number}.wav")
    texts = ['"we went home', "and then we slept", 'until the morning"']
    lines(tmp_path / "metadata.csv", *(f"c{number}|{text}" for number, text in enumerate(texts)))
    rows, faults = read("table", tmp_path / "metadata.csv")
    assert [row.values["transcript"] for row in rows] == texts and not faults


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "it’s fine, naïve café"),
        ("gbk", "患者的血压很高"),
        ("shift_jis", "血圧がとても高いです"),
        ("euc_jp", "血圧が高いです"),
    ],
)
def test_other_encodings_are_not_taken_for_korean(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "t.csv").write_bytes("".join(f"{n}.wav;{text}\n" for n in range(20)).encode(encoding))
    with pytest.raises(RunError, match="name its encoding with --encoding"):
        find_encoding(tmp_path / "t.csv")


def test_the_corpuss_own_split(tmp_path: Path) -> None:
    """LibriSpeech folders and Korean names of splits, also if one cell of the column is blank."""
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        for number in range(3):
            noise(tmp_path / "libri" / part / f"{part[:2]}{number}-1.wav", 1.0)
        lines(tmp_path / "libri" / part / "1.trans.txt", *(f"{part[:2]}{n}-1 TEXT {n} OF {part}" for n in range(3)))
    both = {
        **LIMITS,
        "val_output": str(tmp_path / "out" / "val.jsonl"),
        "test_output": str(tmp_path / "out" / "test.jsonl"),
    }
    train, val, _, summary = prepare(tmp_path, str(tmp_path / "libri"), **both)
    assert {row["transcript"].split()[-1] for row in train} == {"train-clean-100"}
    assert {row["transcript"].split()[-1] for row in val} == {"dev-clean"} and summary["test"]["rows"] == 3
    table = [
        f"{part[:2]}{n}-1.wav,글 {part} {n},{name}"
        for part, name in (("train-clean-100", "학습"), ("dev-clean", "검증"), ("test-clean", "시험"))
        for n in range(3)
    ]
    table[0] = table[0].removesuffix("학습")
    path = lines(tmp_path / "libri" / "t.csv", "파일명,전사,구분", *table)
    train, val, _, summary = prepare(tmp_path, str(path), **both)
    assert (len(train), len(val), summary["test"]["rows"]) == (3, 3, 3)
    assert all("train" in row["transcript"] for row in train)


def test_outputs_never_replace_inputs(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "in.jsonl", [{"audio_path": noise(tmp_path / "a.wav", 4.0), "transcript": "네"}]))
    os.symlink(tmp_path, tmp_path / "link")
    before = path.read_bytes()
    for name, value in (("quarantine", path), ("val_output", tmp_path / "link" / "in.jsonl"), ("train_output", path)):
        with pytest.raises(SettingsError, match=f"--{name} .*: that is an input"):
            prepare(tmp_path, str(path), **{name: str(value)})
    with pytest.raises(SettingsError, match=r"that is the file of --train_output too"):
        prepare(tmp_path, str(path), train_output=str(tmp_path / "z"), val_output=str(tmp_path / "z"))
    with pytest.raises(SettingsError, match="a folder; name a file"):
        prepare(tmp_path, str(path), val_output=str(tmp_path / "link"))
    for flags in (
        ["--jsonl", str(path), "--output_path", str(path)],
        ["--audio_path", str(tmp_path / "a.wav"), "--output_path", str(tmp_path / "a.wav")],
        ["--audio_path", str(tmp_path), "--output_path", str(tmp_path / "a.wav")],
    ):
        with pytest.raises(SettingsError, match="that is an input"):
            run_inference(parse_only("infer", ["--model_id", TINY, *flags]), "")
    assert path.read_bytes() == before and (tmp_path / "a.wav").stat().st_size > 1000


def test_answers_in_the_folder_of_the_clips_are_replaced(tmp_path: Path) -> None:
    """Only clips are inputs there, so the same command runs twice."""
    noise(tmp_path / "a.wav", 1.0)
    (tmp_path / "answers.jsonl").write_text("earlier")
    flags = ["--audio_path", str(tmp_path), "--output_path", str(tmp_path / "answers.jsonl"), "--max_new_tokens", "2"]
    run_inference(parse_only("infer", ["--model_id", TINY, *flags]), "")
    assert [row["id"] for row in read_json_lines(tmp_path / "answers.jsonl")] == ["a.wav"]


def test_features_of_another_clip_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is not beside the manifest is one of the current folder, which may differ in the next run."""
    manifest = write_rows(tmp_path / "data" / "m.jsonl", [{"audio_path": "a.wav", "transcript": "네"}])
    rows = []
    for folder, seconds in (("one", 2.0), ("two", 3.0)):
        noise(tmp_path / folder / "a.wav", seconds)
        monkeypatch.chdir(tmp_path / folder)
        report = featurize((manifest,), Extractor(TINY), tmp_path / "features", rows_per_shard=8, use_ray=False)
        rows.append(report.num_made)
    assert rows == [1, 1]


def test_other_languages_and_names_keep_their_marks(tmp_path: Path) -> None:
    texts = {"I like C++ code": "en", "(he)/(she) went": "en", "ER+ PR+ 환자와 C++": "ko"}
    rows = [
        {"audio_path": noise(tmp_path / f"{n}.wav", 2.0), "transcript": text, "language": code}
        for n, (text, code) in enumerate(texts.items())
    ]
    train, *_ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows), **LIMITS)
    assert [row["transcript"] for row in train] == list(texts)


def test_mixed_channels_are_counted_with_copies_and_not_on_mono_files(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "call.wav", np.random.default_rng(0).normal(0, 0.1, (2 * RATE, 2)), RATE)
    noise(tmp_path / "mono.wav", 2.0)
    rows = [
        {"audio_path": "call.wav"},
        {"audio_path": "call.wav", "channel": 0},
        {"audio_path": "call.wav", "channel": 1},
    ]
    rows += [{"audio_path": "mono.wav"}, {"audio_path": "mono.wav", "channel": 0, "start": 0.5}]
    rows = [{**row, "transcript": f"글 {n}"} for n, row in enumerate(rows)]
    copies = {**LIMITS, "audio_output": str(tmp_path / "copies"), "duplicates": "keep"}
    *_, summary = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows), **copies)
    assert summary["mixed_channels"] == 1


def test_equal_samples_at_another_rate_are_another_sound() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 100).astype(np.float32)
    assert audio_hash(samples, 8_000) != audio_hash(samples, 16_000)


@pytest.mark.parametrize("kind", ["xlsx", "state", "tar", "yaml"])
def test_pipes_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    names = {"xlsx": "t.xlsx", "state": "state.json", "tar": "audio_0.tar", "yaml": "s.yaml"}
    os.mkfifo(tmp_path / names[kind])
    if kind == "xlsx":
        with pytest.raises(RunError, match="not a regular file"):
            open_table(tmp_path / "t.xlsx")
    elif kind == "state":
        assert reasons(read("huggingface", tmp_path)[1]) == [(1, "damaged_file")]
    elif kind == "tar":
        path = lines(tmp_path / "m.json", {"audio_filepath": "a.wav", "text": "글", "shard_id": 0})
        assert reasons(read("nemo", path)[1]) == [(1, "audio_unreadable")]
    else:
        with pytest.raises(ValueError, match="not a regular file"):
            read_yaml(tmp_path / "s.yaml")


def test_yaml_that_grows_by_aliases(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "s.yaml").write_text("\n".join(levels))
    with pytest.raises(ValueError, match="over 100,000 values"):
        read_yaml(tmp_path / "s.yaml")


@pytest.mark.parametrize("name", ["base64", "rot13", "utf-7", "unicode_escape", "none"])
def test_encodings_that_are_not_of_text(tmp_path: Path, name: str) -> None:
    lines(tmp_path / "t.csv", "file,text", "a.wav,b")
    with pytest.raises(RunError, match=f"--encoding {name}: "):
        open_table(tmp_path / "t.csv", name)


@pytest.mark.parametrize("name", ["t.csv", "m.jsonl"])
def test_damaged_gzip_files(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / f"{name}.gz", *(f"{n}.wav,{'글' * n}" for n in range(99)), packed=True)
    path.write_bytes(path.read_bytes()[:60] + b"\xff" * 40)
    renamed = path.rename(tmp_path / name)
    with pytest.raises(RunError):
        list(CorpusTable(renamed).rows()) if name == "t.csv" else detect(renamed)


def test_the_same_name_twice_in_an_archive(tmp_path: Path) -> None:
    import tarfile

    for folder in ("a", "b"):
        noise(tmp_path / folder / "utt.wav", 1.0)
    with tarfile.open(tmp_path / "audio_0.tar", "w") as archive:
        for folder in ("a", "b"):
            archive.add(tmp_path / folder / "utt.wav", f"{folder}/utt.wav")
    rows = [{"audio_filepath": name, "text": "글", "shard_id": 0} for name in ("utt.wav", "b/utt.wav")]
    [row], faults = read("nemo", lines(tmp_path / "m.json", *rows))
    assert embedded_audio(row.values["audio_bytes_from"]) == (tmp_path / "b" / "utt.wav").read_bytes()
    assert reasons(faults) == [(1, "audio_ambiguous")]


def test_messages_that_led_astray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "a.wav")
    lines(tmp_path / "sep.csv", "sep=;", "file;text;startMs;note", "a.wav;네 그래요;20;x")
    [row], _ = read("table", tmp_path / "sep.csv")
    assert row.values["start"] == pytest.approx(0.02)
    assert CorpusTable(tmp_path / "sep.csv").description.count("not used: note")
    (tmp_path / "old.csv").write_bytes(b"file;text\ra.wav;one two\r")
    assert len(read("table", tmp_path / "old.csv")[0]) == 1
    lines(tmp_path / "empty.csv", "", "")
    with pytest.raises(RunError, match="no line of text"):
        CorpusTable(tmp_path / "empty.csv")
    assert detect(lines(tmp_path / "x.csv", "file_name;text", "a.wav;one two")) == "table"
    (tmp_path / "t.xls").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
    with pytest.raises(RunError, match="before 2007"):
        detect(tmp_path / "t.xls")
    with pytest.raises(SystemExit) as end:
        load_job("infer").main(["--config", "/dev/zero"])
    assert end.value.code == 2 and "not a regular file" in capsys.readouterr().err
    (tmp_path / "pairs").mkdir()
    clip(tmp_path / "pairs" / "0.wav")
    lines(tmp_path / "pairs" / "0.TXT", "네")
    lines(tmp_path / "pairs" / "notes.csv", "a,b", "c,d")
    assert [row.values["transcript"] for row in read(detect(tmp_path / "pairs"), tmp_path / "pairs")[0]] == ["네"]


def test_scoring_moves_another_evaluation_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(name: str, text: str) -> str:
        return write_rows(tmp_path / name, [{"id": "1", "task": "asr", "reference": "네", "prediction": text}])

    for name in ("a.jsonl", "a.jsonl", "b.jsonl"):
        load_job("evaluate").main(["--score_only", answers(name, name), "--output_dir", str(tmp_path / "out")])
    assert list((tmp_path / "out" / "predictions-earlier").glob("part-*.parquet"))
    assert "predictions-earlier" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["score_only"].endswith("b.jsonl")


def test_unreadable_rows_raise_only_bad_row(tmp_path: Path) -> None:
    with pytest.raises(BadRow):
        embedded_audio({"file": str(tmp_path / "gone.parquet"), "row": 0})
    assert read_json_lines(lines(tmp_path / "x.jsonl", {"a": 1})) == [{"a": 1}]
