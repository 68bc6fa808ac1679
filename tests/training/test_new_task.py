"""A new task needs one more entry in the task table: features, training and validation then work for its rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, read_rows, write_rows
from helpers.training import train as train_here

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.task_definitions import Task
from voxray.core.tasks import use_own_tasks
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.models.registry import get_family
from voxray.recipes.run_stage import TrainingData

pytestmark = pytest.mark.usefixtures("one_thread")

MOOD = Task("mood", ("audio_path", "mood"), "chat", "Which mood?", "mood", ("exact_match",))


@pytest.fixture
def mood_task() -> Iterator[None]:
    """Add the entry."""
    use_own_tasks({"mood": MOOD})
    yield
    use_own_tasks({})


@pytest.mark.parametrize("flags", [{"batching": "packed", "pack_tokens": 300}, {"task_weights": "mood=1,aac=2,tqa=1"}])
def test_a_new_task_trains_and_validates(
    mood_task: None, small: dict[str, str], tmp_path: Path, flags: dict[str, Any]
) -> None:
    clips = read_rows(small["asr.train"])
    rows = [{"audio_path": row["audio_path"], "mood": "calm"} for row in clips[:4]]
    rows += [{"audio_path": row["audio_path"], "caption": "사람이 말한다"} for row in clips[4:8]]
    path = write_rows(tmp_path / "m.jsonl", [*rows, *read_rows(small["tqa.train"])[:4]])
    folders = featurize([path], Extractor(TINY), tmp_path / "f", rows_per_shard=8, use_ray=False).folders
    features, front_end = Features(folders), get_family(TINY).front_end(TINY)
    assert features.task.tolist() == [TASK_CODES[name] for name in ("mood", "aac", "tqa") for _ in range(4)]
    prompt = front_end.show(features.row(0).prompt_ids.tolist())
    assert prompt == "<s>[INST][BEGIN_AUDIO][AUDIO]x50Which mood?[/INST]"
    values = {"train_jsonl": path, "val_jsonl": path, "model_id": TINY, "num_workers": 0, "max_steps": 2}
    values |= {"output_dir": str(tmp_path), "eval_max_rows": 1, "eval_max_new_tokens": 2, "per_device_bsz": 12, **flags}
    settings = MultitaskSettings.model_validate(values)
    result = train_here(settings, tmp_path, TrainingData(folders, folders), Worker())
    assert result["finished"] and result["mood/exact_match"] == 0 and "mood/rouge_l" not in result
    assert {"aac/rouge_l", "aac/exact_match", "tqa/rouge_l"} < set(result)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert all({"loss/mood", "loss/aac", "loss/tqa"} & set(record) for record in steps)
    assert any(record.get("loss/mood", 0) > 0 for record in steps) and "loss/asr" not in steps[0]
