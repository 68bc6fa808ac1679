"""Rows and hours that a run trains on, as its card tells them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import manifest, read_rows, write_rows

from voxray.audio.augment import WaveformAugmentation
from voxray.features.reader import Features
from voxray.recipes import trained_rows
from voxray.recipes.trained_rows import describe_trained_rows


def test_rows_are_counted_by_task_and_data_set(
    make_features: Callable[..., tuple[Path, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(manifest("asr.train"))[:6]
    for row in rows[:4]:
        row["dataset"] = "org/speech"
    rows[5]["dataset"] = 3  # not a name
    texts = read_rows(manifest("tqa.train"))[:3]
    paths = [write_rows(tmp_path / "a.jsonl", rows[:5]), write_rows(tmp_path / "b.jsonl", [*texts, rows[5]])]
    features = Features(make_features(*paths, folder=tmp_path / "f"), num_replay_sets=1)
    chosen = np.array([0, 1, 2, 4, 5, 6, 8])
    described = describe_trained_rows(features, chosen, 16_000)
    hours = features.num_samples[chosen] / 16_000 / 3600
    expected = [("asr", "org/speech", False, 3), ("asr", "a", False, 1), ("asr", "b", True, 1), ("tqa", "b", True, 2)]
    counts = [(each["task"], each["dataset"], each["replay"], each["rows"]) for each in described["rows"]]
    assert counts == expected
    assert [each["hours"] for each in described["rows"]] == pytest.approx([hours[:3].sum(), hours[3], hours[6], 0])
    assert sum(described["languages"].values()) == 7 and described["languages"]["ko"] >= 5
    assert [each["name"] for each in described["manifests"]] == ["a.jsonl", "b.jsonl"]
    assert all(len(each["content"]) == 64 for each in described["manifests"])
    monkeypatch.setattr(trained_rows, "ROWS_AT_ONCE", 2)
    assert describe_trained_rows(features, chosen, 16_000)["rows"] == described["rows"]
    Path(paths[0]).unlink()
    assert {each["dataset"] for each in describe_trained_rows(features, chosen, 16_000)["rows"]} == {"a", "b"}


def test_variants_of_a_row_count_once(make_features: Callable[..., tuple[Path, ...]], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", read_rows(manifest("asr.train"))[:3])
    waveform = WaveformAugmentation(num_variants=2, speeds=(0.9, 1.1))
    features = Features(make_features(path, folder=tmp_path / "f", waveform=waveform))
    assert len(features) == 6
    [entry] = describe_trained_rows(features, np.arange(6), 16_000)["rows"]
    assert entry["rows"] == 3
