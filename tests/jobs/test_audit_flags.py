"""Flags of audit, each seen at work."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import TINY, write_rows
from helpers.running import load_job, parse_only
from test_prepare_flags import LIMITS, RATE, noise

from voxray.commands.audit import run_audit_job

WIDE = (
    "--min_sec 0 --max_sec 60 --min_chars_per_sec 0 --max_chars_per_sec 1000 --min_peak_db -160 --min_rms_db -160 "
    "--max_clip_share 1 --max_dc 1 --max_zero_tail_sec 99 --min_high_band_db -160 --max_duration_error_sec 9"
)
CLIPS = [entry for entry in LIMITS if "chars" not in entry[0] or "per_sec" in entry[0]]
TEXT = {"instruction": "물음", "input": ""}


def run(folder: Path, flags: str, **options: Any) -> dict:
    """Audit in this process, output under ``folder``/out; returns audit.json."""
    settings = parse_only("audit", f"--output_dir {folder}/out {flags}".split())
    return run_audit_job(settings, **{"use_ray": False, **options})


def fails(argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        load_job("audit").main(argv.split())
    assert isinstance(end.value.code, int)
    return end.value.code


def reasons(folder: Path, kind: str) -> list[str]:
    return [json.loads(line)["reason"] for line in (folder / f"{kind}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("flag", "samples", "value", "fault", "row"), CLIPS, ids=[entry[0] for entry in CLIPS])
def test_limits(tmp_path: Path, flag: str, samples: Any, value: str, fault: str, row: dict) -> None:
    """Each limit warns of a clip outside it, and only with the limit where it is."""
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    manifest = write_rows(tmp_path / "m.jsonl", [{"audio_path": "a.wav", "transcript": "열이 납니다", **row}])
    words = WIDE.split()
    others = " ".join(
        word for index in range(0, len(words), 2) for word in words[index : index + 2] if words[index] != f"--{flag}"
    )
    assert run(tmp_path, f"--input {manifest} {WIDE}")["warnings"] == {}
    assert run(tmp_path, f"--input {manifest} {others} --{flag} {value}")["warnings"] == {fault: 1}


def test_outlier_spread_and_max_examples(tmp_path: Path) -> None:
    """Sixty answers of 40 to 59 characters and six of 90, which are outliers or not, depending on the spread."""
    rows = [{**TEXT, "output": f"{n:02d}" + "가" * (38 + n % 20)} for n in range(60)]
    rows += [{**TEXT, "output": f"{n} " + "나" * 88} for n in range(6)]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    assert run(tmp_path, f"--input {manifest} --max_examples 4")["warnings"] == {"length_outlier": 6}
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("m.jsonl:6") == 4 and "the first 4; all are in warnings.jsonl" in report
    assert reasons(tmp_path / "out", "warnings") == ["length_outlier"] * 6
    assert run(tmp_path, f"--input {manifest} --outlier_spread 9")["warnings"] == {}


def test_files_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, outputs, units of length, the length limit, and the comparison of splits."""
    monkeypatch.chdir(tmp_path)
    first = write_rows(tmp_path / "f.jsonl", [{**TEXT, "output": "하나"}, {**TEXT, "output": "둘"}])
    write_rows(tmp_path / "g.jsonl", [{**TEXT, "output": "둘"}])
    line = f"--input {first},g.jsonl --storage_path {tmp_path}"
    with pytest.raises(Exception, match=r"1 fault\(s\) in 1 of 3"):
        run(tmp_path, line)
    assert reasons(tmp_path / "out", "faults") == ["leak_text"]
    settings = parse_only("audit", f"{line} --output_dir o/a --compare none --fix o/b/clean.jsonl".split())
    figures = run_audit_job(settings, use_ray=False)
    assert figures["faults"] == {"duplicate": 1}
    assert len((tmp_path / "o" / "b" / "clean.jsonl").read_text().splitlines()) == 2
    names = {path.name for path in (tmp_path / "o" / "a").iterdir()}
    assert names == {"report.html", "characters.png", "audit.json", "faults.jsonl", "warnings.jsonl"}
    figures = run(tmp_path, f"--input {first} --model_id {TINY}")
    longest = figures["all"]["num_tokens"]["max"]
    assert figures["length_unit"] == "tokens" and (tmp_path / "out" / "tokens.png").is_file()
    assert run(tmp_path, f"--input {first} --model_id {TINY} --max_len {longest:.0f}")["faults"] == {}
    with pytest.raises(Exception, match="fault"):
        run(tmp_path, f"--input {first} --model_id {TINY} --max_len {longest - 1:.0f}")
    assert reasons(tmp_path / "out", "faults")[0] == "over_max_len"


def test_max_len_without_a_model_says_that_it_is_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [{**TEXT, "output": "하나 둘 셋"}])
    assert run(tmp_path, f"--input {manifest} --max_len 1")["faults"] == {}
    output = capsys.readouterr().out
    assert "--max_len is not checked" in output and "lengths are in characters" in output


def test_same_side_files_are_not_compared_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {**TEXT, "output": "둘"}
    files = ",".join(write_rows(tmp_path / f"{name}.jsonl", [row]) for name in ("a.train", "b.train"))
    with pytest.raises(Exception, match="fault"):
        run(tmp_path, f"--input {files}")
    assert reasons(tmp_path / "out", "faults") == ["duplicate"]
    assert "no leaks were looked for; --compare files does" in capsys.readouterr().out
    with pytest.raises(Exception, match="fault"):
        run(tmp_path, f"--input {files} --compare files")
    assert reasons(tmp_path / "out", "faults") == ["leak_text"]
    assert "leaks were looked for between a.train.jsonl: a.train.jsonl | b.train.jsonl" in capsys.readouterr().out


def test_equal_texts_of_a_script_are_no_leaks(tmp_path: Path) -> None:
    row = {**TEXT, "output": "둘"}
    files = ",".join(write_rows(tmp_path / f"{name}.jsonl", [row]) for name in ("train", "val"))
    with pytest.raises(Exception, match="fault"):
        run(tmp_path, f"--input {files}")
    assert reasons(tmp_path / "out", "faults") == ["leak_text"]
    assert run(tmp_path, f"--input {files} --leaks scripted")["faults"] == {}


@pytest.mark.slow
@pytest.mark.ray
def test_actors_and_chunks(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job on Ray: the requested actors and chunks, and the same findings as in one process."""
    import ray

    sizes: list[int] = []
    strategy = ray.data.ActorPoolStrategy
    monkeypatch.setattr(
        ray.data, "ActorPoolStrategy", lambda **options: sizes.append(options["max_size"]) or strategy(**options)
    )
    (tmp_path / "a.wav").write_bytes(b"nothing")
    soundfile.write(tmp_path / "b.wav", noise(1), RATE)
    rows: list[dict] = [{**TEXT, "output": f"답 {n % 8}"} for n in range(9)]
    rows += [{"audio_path": f"{name}.wav", "transcript": "열이 납니다"} for name in "ab"]
    line = f"--input {write_rows(tmp_path / 'm.jsonl', rows)} --model_id {TINY}"
    chunks = f"--num_actors 3 --rows_per_chunk 4 --output_dir {tmp_path}/ray --fix {tmp_path}/clean.jsonl"
    load_job("audit").main(f"{line} {chunks}".split())
    assert sizes == [3], "three chunks, which the default size would make one"
    assert "9 row(s) written, 2 with faults left out" in capsys.readouterr().out
    with pytest.raises(Exception, match=r"2 fault\(s\) in 2 of 11 row\(s\)"):
        run(tmp_path, line)
    assert (tmp_path / "ray" / "faults.jsonl").read_text() == (tmp_path / "out" / "faults.jsonl").read_text()


def test_bad_inputs_and_outputs_end_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before Ray starts, in one line, with the exit status of settings (2) or of the run (1)."""
    manifest = write_rows(tmp_path / "m.jsonl", [{**TEXT, "output": "a"}])
    for argv, status, message in (
        (f"--input {tmp_path}/none.jsonl", 1, "none.jsonl: cannot read the manifest"),
        (f"--input {manifest} --fix {manifest}", 2, "that is an input"),
        (f"--input {manifest} --model_id {tmp_path}", 2, "--model_id"),
        (f"--input {manifest} --min_sec 9 --max_sec 3", 2, "--min_sec 9 is over --max_sec 3"),
        (f"--input {manifest} --output_dir {manifest}/x", 1, "cannot write there"),
        ("--max_len 0", 2, "--input"),
    ):
        assert fails(argv) == status
        output = capsys.readouterr().err
        assert message in output and "Traceback" not in output


def test_old_spellings() -> None:
    line = "--jsonl a.jsonl --out_dir o --max_length 640 --base_model x/y"
    settings = parse_only("audit", line.split())
    assert (settings.output_dir, settings.max_len, settings.model_id) == ("o", 640, "x/y")
    assert parse_only("audit", ["--train_jsonl", "/a.jsonl,/b.jsonl"]).input == ("/a.jsonl", "/b.jsonl")
