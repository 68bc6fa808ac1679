"""`voxray new`: a table of clips becomes manifests, settings and commands, and the settings train."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import WHISPER, manifest, read_rows, write_rows
from helpers.running import load_job, parse_only

from voxray.commands import prepare
from voxray.commands.new import run_new
from voxray.config.new import NewSettings
from voxray.config.parse import settings_from
from voxray.core.errors import RunError, SettingsError


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CP949 table of Korean clips, in the current folder. Rows are checked in this process."""
    lines = ["파일명,전사,화자"]
    for row in read_rows(manifest("asr.train"))[:24]:
        lines.append(f'{row["audio_path"]},"{row["transcript"]}",{Path(row["audio_path"]).stem.rpartition("-")[2]}')
    path = tmp_path / "전사.csv"
    path.write_text("\n".join(lines), encoding="cp949")
    monkeypatch.chdir(tmp_path)
    original = prepare.run_prepare_job
    monkeypatch.setattr("voxray.commands.new.run_prepare_job", lambda *args, **kw: original(*args, use_ray=False, **kw))
    return path


def new(table: Path, **changes: str) -> list[str]:
    settings = {"project": "my project", "data": str(table), "model_id": WHISPER, **changes}
    return run_new(settings_from(NewSettings, settings))


def test_data_settings_and_commands(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = new(table, leaks="scripted")
    folder = table.parent / "my project"
    num_rows = [len((folder / "data" / f"{part}.jsonl").read_text().splitlines()) for part in ("train", "val")]
    assert sum(num_rows) == 24 and min(num_rows) > 0 and not (folder / "data" / "test.jsonl").exists()
    text = (folder / "train.yaml").read_text()
    assert text.startswith("".join(f"# {command}\n" for command in commands))
    values = yaml.safe_load(text)
    assert values["model_id"] == WHISPER and values["output_dir"] == str(folder / "run")
    assert 0 < values["warmup_steps"] < 10, "the default of 50 steps is longer than this run"
    output = capsys.readouterr().out
    assert "memory of one worker" in output and "not fitted" not in output and commands[0] in output
    train, evaluate_base, evaluate, compare, infer = (shlex.split(command)[1:] for command in commands)
    assert Path(train[0]).name == "train_whisper.py" and Path(train[2]) == Path("my project/train.yaml")
    parse_only("train_whisper", train[1:])
    before, after = parse_only("evaluate", evaluate_base[1:]), parse_only("evaluate", evaluate[1:])
    assert before.val_jsonl == after.val_jsonl == (str(folder / "data" / "val.jsonl"),)
    assert (before.model_id, after.lora_dir) == (WHISPER, str(folder / "run"))
    compared = parse_only("compare", compare[1:])
    assert compared.runs == (before.output_dir, after.output_dir)
    parse_only("infer", infer[1:])
    (folder / "run" / "settings.json").write_text("{}")
    (folder / "run" / "checkpoints").mkdir()
    with pytest.raises(SettingsError, match="--project my project: holds a run or other files"):
        new(table)


def test_rows_of_the_corpuss_test_split_are_what_evaluate_answers(table: Path) -> None:
    lines = table.read_text(encoding="cp949").splitlines()
    cells = ["split", "test", "test", *["train"] * (len(lines) - 3)]
    table.write_text("\n".join(map(",".join, zip(lines, cells, strict=True))), encoding="cp949")
    commands = new(table, leaks="allow")
    data = table.parent / "my project" / "data"
    num_rows = [len(read_rows(str(data / f"{name}.jsonl"))) for name in ("train", "val", "test")]
    assert num_rows[2] == 2 and sum(num_rows) == 24 and num_rows[1]
    for command in commands[1:3]:
        assert parse_only("evaluate", shlex.split(command)[2:]).val_jsonl == (str(data / "test.jsonl"),)


def test_language_and_precision_are_repeated(table: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "speaker": str(n % 4), "language": ""} for n, row in enumerate(read_rows(manifest("asr.train")))]
    data = Path(write_rows(table.parent / "rows.jsonl", rows[:12]))
    new(data, leaks="allow")
    line = capsys.readouterr().out.splitlines()[-1]
    num_train = len(read_rows(str(table.parent / "my project" / "data" / "train.jsonl")))
    assert line.startswith(f"{num_train} of {num_train} training rows name no language") and "--language ko" in line

    def write_settings(settings: NewSettings, folder: Path, values: dict) -> str:
        (folder / "train.yaml").write_text("bf16: true\nquantize: 4bit\n")
        return "train_whisper"

    monkeypatch.setattr("voxray.commands.new._write_settings", write_settings)
    commands = new(data, leaks="allow", language="ko")
    assert "name no language" not in capsys.readouterr().out
    for command, job in zip((*commands[1:3], commands[4]), ("evaluate", "evaluate", "infer"), strict=True):
        settings = parse_only(job, shlex.split(command)[2:])
        assert settings.bf16 and settings.quantize == "4bit"
    assert settings.language == "ko"


def test_settings_that_do_not_fit_are_written_too(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = new(table, leaks="scripted", memory_gib="0.001")
    assert "train.yaml are not fitted to a machine" in capsys.readouterr().out and len(commands) == 5
    assert new(table, leaks="scripted") == commands, "what the first call left is replaced"
    assert "not fitted" not in capsys.readouterr().out


def test_a_base_that_is_not_there_ends_it_before_the_clips_are_read(table: Path) -> None:
    absent = table.parent / "absent-whisper"
    with pytest.raises(RunError, match=f"--model_id {absent}: no such folder"):
        new(table, model_id=str(absent))
    assert not (table.parent / "my project").exists()


def test_data_that_cannot_be_used_leaves_no_folder(table: Path) -> None:
    with pytest.raises(RunError, match="the file is empty"):
        (table.parent / "empty.jsonl").write_text("")
        new(table.parent / "empty.jsonl")
    assert not (table.parent / "my project").exists()


def test_the_folder_is_the_word_after_new() -> None:
    settings = parse_only("new", ["my-project", "--data", "a.csv", "--memory_gib", "80"])
    assert (settings.project, settings.memory_gib, settings.val_output) == (
        "my-project",
        80,
        "my-project/data/val.jsonl",
    )
    for words in (["--data", "a.csv"], ["a", "b", "--data", "a.csv"]):
        with pytest.raises(SystemExit) as end:
            parse_only("new", words)
        assert end.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_five_commands_run(table: Path, evaluation_here: None) -> None:
    train, base, evaluate, compare, infer = (shlex.split(command)[2:] for command in new(table, leaks="scripted"))
    load_job("train_whisper").main([*train, "--num_workers", "0", "--max_steps", "2"])
    for words in (base, evaluate):
        load_job("evaluate").main([*words, "--gen_max_new_tokens", "4"])
    load_job("compare").main(compare)
    clip = read_rows(manifest("asr.train"))[0]["audio_path"]
    load_job("infer").main([clip if word == "clip.wav" else word for word in infer])
    folder = table.parent / evaluate[evaluate.index("--output_dir") + 1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "cer_nospace" in metrics["asr"]
