"""Effects of the flags of prepare."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import write_rows
from helpers.running import load_job, parse_only

from voxray.audio.decode import Part, decode
from voxray.commands.prepare import _limits, run_prepare_job
from voxray.corpora.prepare.check_rows import ClipFolders, RowChecker

RATE = 16_000
WIDE = "--min_sec 0 --max_sec 60 --min_chars_per_sec 0 --max_chars_per_sec 1000"


def noise(sec: float, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(7).normal(0, level, round(sec * RATE)).clip(-0.9, 0.9)


def reason(folder: Path, samples: np.ndarray, flags: str, **row: Any) -> str:
    """Reason for which the checks drop a clip with these flags; "" if they accept it."""
    soundfile.write(folder / "a.wav", samples, RATE)
    settings = parse_only("prepare", f"--input x.jsonl --train_output {folder}/t.jsonl {flags}".split())
    values = {"audio_path": str(folder / "a.wav"), "transcript": "열이 납니다", **row}
    checker = RowChecker(_limits(settings), ClipFolders(folder))
    return checker.check_row({"source": "m:1", "id": "1", "values": values}).reason


LIMITS = [
    ("min_sec", noise(2), "2.5", "too_short", {}),
    ("max_sec", noise(4), "3.5", "too_long", {}),
    ("min_chars", noise(4), "6", "text_too_short", {}),
    ("max_chars", noise(4), "4", "text_too_long", {}),
    ("min_chars_per_sec", noise(4), "2", "speaking_rate", {}),
    ("max_chars_per_sec", noise(4), "1", "speaking_rate", {}),
    ("min_peak_db", noise(4, 0.0003), "-40", "too_quiet", {}),
    ("min_rms_db", noise(4, 0.002), "-50", "near_silence", {}),
    ("max_clip_share", np.append(noise(4), np.ones(500)), "0.001", "clipping", {}),
    ("max_dc", noise(4) + 0.05, "0.02", "dc_offset", {}),
    ("max_zero_tail_sec", np.append(noise(4), np.zeros(RATE)), "0.5", "zero_tail", {}),
    ("min_high_band_db", np.sin(np.arange(4 * RATE) / 10) / 2, "-60", "narrow_band", {}),
    ("max_duration_error_sec", noise(4), "0.1", "duration_mismatch", {"duration": 4.5}),
]
OFF = (
    "--min_chars 0 --max_chars 9999 --min_peak_db -160 --min_rms_db -160 --max_clip_share 1 --max_dc 1 "
    "--max_zero_tail_sec 99 --min_high_band_db -160 --max_duration_error_sec 9"
)


@pytest.mark.parametrize(("flag", "samples", "value", "fault", "row"), LIMITS, ids=[entry[0] for entry in LIMITS])
def test_limits(tmp_path: Path, flag: str, samples: np.ndarray, value: str, fault: str, row: dict) -> None:
    words = f"{WIDE} {OFF}".split()
    others = [word for at in range(0, len(words), 2) for word in words[at : at + 2] if words[at] != f"--{flag}"]
    assert reason(tmp_path, samples, f"{WIDE} {OFF}", **row) == ""
    assert reason(tmp_path, samples, f"{' '.join(others)} --{flag} {value}", **row) == fault


@pytest.mark.ray
@pytest.mark.slow
def test_files_split_and_workers(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output paths, share and seed of the split, duplicates, ledger, and the number of processes."""
    import ray

    sizes: list[int] = []
    strategy = ray.data.ActorPoolStrategy
    monkeypatch.setattr(
        ray.data, "ActorPoolStrategy", lambda **options: sizes.append(options["max_size"]) or strategy(**options)
    )
    rows = [{"instruction": f"물음 {n}", "input": "", "output": f"답 {n}"} for n in range(20)]
    manifest = write_rows(tmp_path / "raw.jsonl", [*rows, rows[0]])
    line = (
        f"--input {manifest} --format jsonl --storage_path {tmp_path} --train_output o/t.jsonl --val_output o/v.jsonl"
    )

    def run(flags: str, use_ray: bool = False) -> tuple[list[dict], list[dict], list[dict]]:
        run_prepare_job(parse_only("prepare", [*line.split(), *flags.split()]), use_ray=use_ray)
        names = ("o/t.jsonl", "o/v.jsonl", "ledger.jsonl")
        return tuple([json.loads(text) for text in (tmp_path / name).read_text().splitlines()] for name in names)  # type: ignore[return-value]

    ledger = f"--quarantine {tmp_path}/ledger.jsonl"
    train, val, lost = run(f"{ledger} --val_share 0.2 --num_actors 3 --rows_per_chunk 2", use_ray=True)
    assert (len(train), len(val), [entry["reason"] for entry in lost]) == (16, 4, ["duplicate"])
    assert sizes == [3]
    assert run(f"{ledger} --val_share 0.2 --seed 5")[1] != val
    train, val, lost = run(f"{ledger} --val_share 0.5 --duplicates keep")
    assert len(train) + len(val) == 21 and abs(len(val) - 10.5) <= 1 and not lost
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        load_job("prepare").main(["--input", "nowhere", "--train_output", "t.jsonl"])
    assert end.value.code == 1


def test_reading(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(4), RATE)
    values = {"audio_path": str(tmp_path / "a.wav"), "transcript": "(70%)/(칠십 퍼센트) 확률"}
    texts = []
    for reading in ("spelling", "phonetic"):
        settings = parse_only("prepare", f"--input x --train_output t.jsonl --reading {reading}".split())
        checked = RowChecker(_limits(settings), ClipFolders(tmp_path)).check_row(
            {"source": "m:1", "id": "1", "values": dict(values)}
        )
        texts.append(checked.values["transcript"])
    assert texts == ["70% 확률", "칠십 퍼센트 확률"]


def test_seed_command_of_split_and_clean_parses() -> None:
    line = (
        "--input data/raw_medqa.jsonl --train_output data/text_medqa.train.jsonl --val_output data/text_medqa.val.jsonl"
    )
    settings = parse_only("prepare", line.split())
    assert settings.val_output == "data/text_medqa.val.jsonl"
    assert (settings.min_sec, settings.max_sec) == (3, 25)
    old = parse_only("prepare", ["--input", "a.jsonl", "--out_train", "b.jsonl", "--out_val", "c.jsonl"])
    assert (old.train_output, old.val_output) == ("b.jsonl", "c.jsonl")


@pytest.mark.parametrize(("policy", "train"), [("refuse", None), ("scripted", 3), ("drop", 1), ("allow", 3)])
def test_leaks(tmp_path: Path, policy: str, train: int | None) -> None:
    """Two of three training rows have the text of a validation row, by other speakers."""
    from voxray.corpora.prepare.check_rows import CheckedRow, checked_path
    from voxray.corpora.prepare.write_manifests import OutputFiles, write_manifests

    rows = []
    for number, (speaker, text) in enumerate([("a", "x"), ("a", "x"), ("a", "y"), ("b", "x")]):
        values = {"audio_path": f"{number}.wav", "transcript": text}
        split = "val" if speaker == "b" else "train"
        hashes = {"audio_hash": f"h{number}", "text_hash": text, "leak_text": text}
        sides = {"group": f"speaker:{speaker}", "split": split}
        rows.append(vars(CheckedRow(f"m:{number + 1}", str(number), values, duration_sec=1.0, **hashes, **sides)))
    chunk = tmp_path / "000000.jsonl"
    write_rows(checked_path(chunk), rows)
    outputs = OutputFiles(tmp_path / "t.jsonl", tmp_path / "v.jsonl", tmp_path / "q.jsonl")
    settings = parse_only("prepare", f"--input x --train_output t.jsonl --leaks {policy}".split())
    outcome = write_manifests([chunk], outputs, val_share=0.25, seed=0, duplicates="drop", leak_policy=settings.leaks)
    outputs.finish(keep=True)
    num_texts = 0 if policy == "scripted" else 2
    assert (outcome.leaks.audio, outcome.leaks.text, outcome.leaks.speaker) == (0, num_texts, 0)
    if train is not None:
        assert outcome.tally.rows["train"] == train and outcome.tally.rows["leak_text"] == 3 - train


def test_test_output_and_audio_output(tmp_path: Path) -> None:
    """The corpus' test rows go to their own manifest, and 16 kHz copies hold exactly the samples of each row."""
    two_channels = np.stack([noise(8), noise(8)[::-1]], axis=1)
    soundfile.write(tmp_path / "long.wav", np.repeat(two_channels, 3, axis=0), 3 * RATE)
    rows = [
        {"audio_path": "long.wav", "start": start, "duration": 3.0, "channel": channel, "transcript": f"말 {number}"}
        | {"split": split, "speaker": split}
        for number, (split, start, channel) in enumerate(
            [("train", 0, 0), ("train", 4, 1), ("dev", 1, 0), ("test", 2, 1), ("Test", 4.5, 0)]
        )
    ]
    write_rows(tmp_path / "raw.jsonl", rows)
    line = f"--input {tmp_path}/raw.jsonl --storage_path {tmp_path} --train_output o/train.jsonl {WIDE}"
    line += " --val_output o/val.jsonl --test_output o/test.jsonl --audio_output o/audio --min_high_band_db -160"
    outcome = run_prepare_job(parse_only("prepare", line.split()), use_ray=False)
    assert {name: outcome.tally.rows[name] for name in ("train", "val", "test")} == {"train": 2, "val": 1, "test": 2}
    moved = (tmp_path / "o").rename(tmp_path / "moved")
    for name, wanted in (("train", rows[:2]), ("val", rows[2:3]), ("test", rows[3:])):
        written = [json.loads(text) for text in (moved / f"{name}.jsonl").read_text().splitlines()]
        for row, source in zip(written, wanted, strict=True):
            assert row["transcript"] == source["transcript"] and "start" not in row and "channel" not in row
            part = Part(source["start"], 3.0, source["channel"])
            audio = decode(str(moved / row["audio_path"]), RATE)
            assert np.abs(audio - decode(str(tmp_path / "long.wav"), RATE, part=part)).max() <= 0.5 / 32_768 + 1e-7
    assert len(list((moved / "audio").rglob("*.flac"))) == 5


def test_rows_like_those_of_the_test_set_do_not_train(tmp_path: Path) -> None:
    """With a test split only, validation rows are drawn from the rest; text shared with training is a leak."""
    from voxray.corpora.prepare.split import choose_split, count_leaks, record_held_out

    rows = [
        SimpleNamespace(reason="", audio_hash=str(number), leak_text=f"t{number % 9}", group=f"g{number}", split=split)
        for number, split in enumerate(["train"] * 9 + ["test"] * 2)
    ]
    split = choose_split(rows, 0.3, 0, with_validation=True, with_test=True)
    record_held_out(split, rows)
    sides = [split.side(row) for row in rows]
    assert sides[9:] == ["test", "test"] and sorted(sides[:9]) == ["train"] * 6 + ["val"] * 3
    leaks = {number for number in range(9) if sides[number] == "train" and split.leak(rows[number]) == "text"}
    assert leaks == {number for number in (0, 1) if sides[number] == "train"}
    assert count_leaks(split, rows).text == len(leaks) > 0
    assert "test" not in {choose_split(rows, 0.3, 0, with_validation=True).side(row) for row in rows}


def test_few_large_speakers_still_give_validation_rows() -> None:
    """Four speakers of 20 to 25 rows: a tenth of all rows is less than any of them."""
    from voxray.corpora.prepare.split import choose_split

    sizes = {"a": 25, "b": 20, "c": 22, "d": 23}
    rows = [
        SimpleNamespace(reason="", audio_hash="", leak_text="", group=group, split="")
        for group, size in sizes.items()
        for _ in range(size)
    ]
    for seed in range(5):
        assert choose_split(rows, 0.1, seed, with_validation=True).groups == {"b"}
    one_speaker = [row for row in rows if row.group == "a"]
    assert not choose_split(one_speaker, 0.1, 0, with_validation=True).groups
