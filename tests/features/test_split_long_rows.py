"""Rows too long for training: divided at their segments, or listed; never cut in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import WHISPER, manifest, read_rows, write_rows

from voxray.audio.decode import decode
from voxray.audio.quality import QualityLimits
from voxray.audit.measure_rows import AuditLimits, RowMeasurer
from voxray.commands.train import run_training
from voxray.config.train import WhisperSettings
from voxray.core.manifest import Sample, chunks, samples_at
from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.features.split_long_rows import split_at_segments, write_parts
from voxray.models.registry import get_family

FRONT_END = get_family(WHISPER).front_end(WHISPER)
PAUSE_SEC = 0.25


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A recording with segments, the same without, one whose segments say something else, and a short clip."""
    folder, texts, segments, parts, at = tmp_path_factory.mktemp("long"), [], [], [], 0.0
    for row in read_rows(manifest("asr.train"))[:5]:
        samples = decode(row["audio_path"], 16_000)
        end = at + len(samples) / 16_000
        segments.append({"start": round(at, 3), "end": round(end, 3), "text": row["transcript"]})
        texts.append(row["transcript"])
        parts += [samples, np.zeros(int(PAUSE_SEC * 16_000), np.float32)]
        at = end + PAUSE_SEC
    soundfile.write(folder / "long.wav", np.concatenate(parts), 16_000)
    long = {"audio_path": str(folder / "long.wav"), "transcript": " ".join(texts), "language": "ko"}
    other = [{**segments[0], "text": "something else"}, *segments[1:]]
    short = read_rows(manifest("asr.train"))[5]
    return [{**long, "segments": segments}, long, {**long, "segments": other}, short]


def test_parts_are_as_many_segments_as_fit() -> None:
    times = [(0.0, 1.0, "a"), (1.2, 3.9, "b"), (4.0, 9.0, "c"), (9.5, 10.0, "d"), (10.0, 13.0, "e")]
    sample = Sample("x", TASKS["asr"], "", "a b c d e", "f.wav", "ko", "m:1", 2.0, 0.0, 1, tuple(times))
    parts = split_at_segments(sample, 4.0)
    assert [(row["id"], row["transcript"]) for row in parts] == [("x#1", "a b"), ("x#2", "c"), ("x#3", "d e")]
    assert [(row["start"], row["duration"]) for row in parts] == [(2.0, 3.9), (6.0, 5.0), (11.5, 3.5)]
    assert parts[2]["segments"] == [{"start": 0, "end": 0.5, "text": "d"}, {"start": 0.5, "end": 3.5, "text": "e"}]
    assert all(row["channel"] == 1 and row["part_of"] == "m:1" and row["language"] == "ko" for row in parts)


def test_only_rows_with_fitting_segments_are_divided(
    rows: list[dict[str, Any]], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "m.jsonl", rows)
    folders = make_features(path, model_id=WHISPER, folder=tmp_path / "f")
    assert Features(folders).num_windows.tolist()[0] > 1
    assert write_parts(folders, FRONT_END, tmp_path / "parts.jsonl") == {f"{path}:1"}
    parts = read_rows(str(tmp_path / "parts.jsonl"))
    assert " ".join(row["transcript"] for row in parts) == rows[0]["transcript"], "all of it is there, once"
    divided = Features(make_features(str(tmp_path / "parts.jsonl"), model_id=WHISPER, folder=tmp_path / "f"))
    assert (divided.num_windows == 1).all() and len(divided) == len(parts)
    assert [sample.source for sample in samples_at({f"{path}:4", f"{path}:1"})] == [f"{path}:1", f"{path}:4"]


def test_an_audit_finds_what_cannot_be_divided(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    text = read_rows(manifest("tqa.val"))[:1]
    [chunk] = chunks(write_rows(tmp_path / "m.jsonl", [*rows, *text]), 64)
    limits = AuditLimits(QualityLimits(), 0.0, 100.0, 1.0, 448)
    measured = RowMeasurer(limits, FRONT_END).measure_chunk(chunk, 0)
    reasons = [[reason for reason, _ in row.faults] for row in measured]
    assert reasons == [[], ["audio_too_long"], ["segments_differ"], [], ["unsupported_task"]]


def test_training_takes_the_parts_and_lists_what_it_cannot_divide(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", [*rows, {**rows[3], "language": ""}])
    values = {"model_id": WHISPER, "train_jsonl": path, "val_jsonl": path, "output_dir": str(tmp_path / "run")}
    values |= {"num_workers": 0, "max_steps": 1, "max_len": 128, "eval_max_new_tokens": 4, "lora_dropout": 0.0}
    run_training(WhisperSettings.model_validate(values))
    ledger = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    of_train = sorted((line["line"], line["reason"]) for line in ledger)
    assert of_train == [(2, "audio_too_long")] * 2 + [(3, "segments_differ")] + [(5, "no_language")] * 2
    assert "trained on 4 s at most" in next(line["message"] for line in ledger if line["line"] == 2)
    parts = len(read_rows(str(tmp_path / "run" / "divided.train.jsonl")))
    [record] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:1]
    assert record["kind"] == "train" and parts == len(read_rows(str(tmp_path / "run" / "divided.validation.jsonl")))
