"""Chats in training: every answer has labels, and losses are those of transformers, however rows are batched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, read_rows, write_rows
from helpers import processes
from helpers.library import library_batch
from helpers.training import train as train_here

from voxray.batches.collate import collate_packed, collate_prompts, collate_training
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.features.reader import FeatureRow, Features
from voxray.features.shards import TASK_CODES
from voxray.generation.likelihood import reference_losses
from voxray.models.interface import IGNORED
from voxray.models.registry import get_family
from voxray.preflight.findings import Findings
from voxray.preflight.rows import read_rows as read_run_rows
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.training.loop import answer_loss
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT, TEXT_CHAT = TASK_CODES["chat"], TASK_CODES["text_chat"]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(number: int, transcript: str) -> list[dict[str, str]]:
    """Of one to three questions."""
    turns = [message("user", "<audio>무엇이 들립니까?"), message("assistant", transcript)]
    turns += [message("user", f"몇 번째입니까? {number}"), message("assistant", f"{number} 번째입니다")]
    turns += [message("user", "다음은?"), message("assistant", str(number + 1))]
    return turns[: 2 * (1 + number % 3)]


@pytest.fixture(scope="module")
def manifest(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chats with and without a clip, among transcripts and text questions."""
    clips = read_rows(small["asr.train"])
    rows = [
        {"audio_path": row["audio_path"], "messages": chat(number, row["transcript"])}
        for number, row in enumerate(clips[:6])
    ]
    system = message("system", "짧게 답하시오.")
    rows += [{"messages": [system, *chat(number, "혈압이 높습니다")[2:]]} for number in (1, 2, 5, 8)]
    for row in rows[6:]:
        row["messages"] = [{**turn, "content": turn["content"].replace("<audio>", "")} for turn in row["messages"]]
    rows += [*clips[6:9], *read_rows(small["tqa.train"])[:3]]
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def data(manifest: str, make_features: Any) -> TrainingData:
    folders = make_features(manifest)
    return TrainingData(folders, folders)


@pytest.fixture(scope="module")
def features(data: TrainingData) -> Features:
    return Features(data.train)


@pytest.fixture(scope="module")
def front_end() -> Any:
    return get_family(TINY).front_end(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return get_family(TINY).load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lora_dropout": 0.0, "lr": 1e-3}
    values |= {"max_steps": 4, "per_device_bsz": 4, "eval_max_rows": 2, "eval_max_new_tokens": 4}
    return MultitaskSettings.model_validate({**values, "output_dir": str(output_dir), **changes})


def all_rows(features: Features) -> list[FeatureRow]:
    return [features.row(number) for number in range(len(features))]


def answers(manifest: str) -> list[list[str]]:
    """The answers of every row."""
    keys = ("transcript", "output")
    return [
        [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        if "messages" in row
        else [next(row[key] for key in keys if key in row)]
        for row in read_rows(manifest)
    ]


def runs(numbers: np.ndarray) -> list[list[int]]:
    """Consecutive numbers together."""
    return [part.tolist() for part in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)]


def test_every_answer_has_labels_and_nothing_else(manifest: str, features: Features, front_end: Any) -> None:
    """Of padded and packed rows; their number is what the plan counts."""
    expected = answers(manifest)
    assert max(map(len, expected)) == 3 and features.task.tolist().count(CHAT) == 6
    rows = all_rows(features)
    padded, packed = collate_training(rows, front_end), collate_packed(rows, front_end)
    start = 0
    for number, row in enumerate(rows):
        ids, labels = padded["input_ids"][number].numpy(), padded["labels"][number].numpy()
        labelled = np.flatnonzero(labels != IGNORED)
        assert (labels[labelled] == ids[labelled]).all()
        spans = [ids[span].tolist() for span in runs(labelled)]
        assert [front_end.decode(span) for span in spans] == expected[number]
        assert [[*span[:-1], front_end.eos_id] for span in spans] == spans
        assert len(labelled) == features.num_labels(np.array([number]))[0]
        length = len(row.prompt_ids) + len(row.target_ids)
        part = slice(start, start + length)
        assert packed["input_ids"][0, part].tolist() == ids[:length].tolist()
        assert packed["labels"][0, part].tolist() == labels[:length].tolist() and labels[0] == IGNORED
        start += length
    for batch in (padded, packed):
        labels = batch["labels"].flatten()
        assert torch.equal(batch["answer_positions"] + 1, (labels != IGNORED).nonzero().flatten())


def test_prompts_of_evaluation_are_those_of_training(features: Features, front_end: Any) -> None:
    for row in all_rows(features):
        [prompt] = collate_prompts([row], front_end)["input_ids"].tolist()
        [ids] = collate_training([row], front_end)["input_ids"].tolist()
        assert ids == [*prompt, *row.target_ids] and min(ids) >= 0
        assert row.prompt_labels is None or len(row.prompt_labels) == len(prompt)
    assert {row.task for row in all_rows(features) if row.prompt_labels is not None} == {"chat", "text_chat"}


def test_loss_equals_transformers(features: Features, front_end: Any, model: Any) -> None:
    """The mean over all labels of rows of several answers, with padding and audio."""
    rows = [features.row(number) for number in (2, 5, 8, 1, 10)]
    batch = collate_training(rows, front_end)
    num_labels = int((batch["labels"] != IGNORED).sum())
    assert num_labels > sum(len(row.target_ids) for row in rows)
    losses = answer_loss(model, get_family(TINY), batch, 0.0)
    with torch.no_grad():
        reference = float(model(**library_batch(batch)).loss)
    assert float(losses.sum()) / num_labels == pytest.approx(reference, rel=1e-5)
    assert losses[CHAT] > 0 and losses[TEXT_CHAT] > 0


def test_packed_rows_have_the_losses_of_padded_ones(features: Features, front_end: Any) -> None:
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))  # packs change its attention
    rows = all_rows(features)
    with torch.no_grad():
        padded = answer_loss(model, family, collate_training(rows, front_end), 0.0)
        packed = answer_loss(model, family, collate_packed(rows, front_end), 0.0)
        alone = sum(answer_loss(model, family, collate_training([row], front_end), 0.0) for row in rows)
    torch.testing.assert_close(packed, padded, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(alone, padded, atol=2e-3, rtol=1e-5)


def test_a_reference_is_the_last_answer(features: Features, front_end: Any, model: Any) -> None:
    """Validation and evaluation score the last answer, after a conversation that is given."""
    row = features.row(2)
    assert row.prompt_labels is not None
    batch = collate_training([row], front_end)
    with torch.no_grad():
        log_probs = model(**library_batch(batch)).logits[0, -len(row.target_ids) - 1 : -1].log_softmax(-1)
    expected = -log_probs[torch.arange(len(row.target_ids)), torch.as_tensor(row.target_ids).long()].sum()
    assert reference_losses(model, get_family(TINY), front_end, [row]) == pytest.approx([float(expected)], rel=1e-4)


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def test_the_loss_of_a_step_is_the_mean_over_its_labels(data: TrainingData, tmp_path: Path) -> None:
    """In one pass of all rows, in several, and on two workers. Labels of earlier answers count."""
    features = Features(data.train)
    whole = processes.run(settings(tmp_path / "a", per_device_bsz=16, max_steps=2), data)
    assert len(features) == 16
    parts = processes.run(settings(tmp_path / "b", per_device_bsz=4, grad_accum=4, max_steps=2), data)
    two = processes.run(settings(tmp_path / "c", per_device_bsz=4, grad_accum=2, max_steps=2), data, num_workers=2)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(two) == pytest.approx(losses(whole), abs=1e-5)
    family, front_end = get_family(TINY), get_family(TINY).front_end(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        loss_T = answer_loss(model, family, collate_training(all_rows(features), front_end), 0.0)
    num_labels = features.num_labels(np.arange(16))
    assert losses(whole)[0] == pytest.approx(float(loss_T.sum()) / num_labels.sum(), rel=1e-4)
    of_chat = num_labels[features.task == CHAT].sum()
    assert whole[0]["loss/chat"] == pytest.approx(float(loss_T[CHAT]) / of_chat, rel=1e-4)


@pytest.mark.parametrize("batching", [{}, {"batching": "packed", "pack_tokens": 200, "grad_accum": 2}])
def test_a_mix_with_chats_resumes_exactly(data: TrainingData, tmp_path: Path, batching: dict[str, Any]) -> None:
    """2 steps and then 4 equal 6 steps, with weights of tasks and dropout."""
    weights = "chat=2,text_chat=1,asr=1,tqa=1"
    common = {"task_weights": weights, "lora_dropout": 0.1, "lr_schedule": "constant", "save_steps": 2, **batching}

    def run(folder: Path, steps: int) -> list[float]:
        folder.mkdir(exist_ok=True)
        train_here(settings(folder, **common, max_steps=steps), folder, data, Worker())
        return losses(read_metrics(folder, "train"))

    run(tmp_path / "resumed", 2)
    resumed, straight = run(tmp_path / "resumed", 6), run(tmp_path / "straight", 6)
    assert resumed == straight and len(set(straight)) == 6
    first, second = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("resumed", "straight")
    )
    assert first == second


def test_preflight_counts_the_labels(manifest: str, features: Features, front_end: Any) -> None:
    """Logits are computed at every label, and so is most of a step's memory."""
    values = {"train_jsonl": (manifest,), "output_dir": "unused", "model_id": TINY}
    rows = read_run_rows(RunContext.create(MultitaskSettings.model_validate(values)), Findings())
    assert rows is not None
    for name in ("num_prompt_tokens", "num_target_tokens", "num_prompt_labels"):
        assert np.array_equal(getattr(rows.train, name), getattr(features, name)), name
    numbers = [2, 8, 12]
    for packed, collate in ((False, collate_training), (True, collate_packed)):
        batch = collate([features.row(number) for number in numbers], front_end)
        shape = rows.shape(numbers, packed=packed)
        assert shape.num_answer_tokens == len(batch["answer_positions"])
        assert shape.num_tokens == batch["input_ids"].numel()


def test_features_of_earlier_versions_have_no_labels_in_prompts(small: dict[str, str], tmp_path: Path) -> None:
    """Their shards and index lack the column; they are used as they are."""
    import pyarrow as pa

    from voxray.core.storage import checksum
    from voxray.features.extract import Extractor
    from voxray.features.featurize import featurize

    def make() -> Path:
        report = featurize([small["tqa.train"]], Extractor(TINY), tmp_path, rows_per_shard=8, use_ray=False)
        return Path(str(report.folders[0]))

    folder = make()
    for path in (folder / "shards").glob("*.json"):
        report = json.loads(path.read_text())
        del report["index"]["num_prompt_labels"]
        path.write_text(json.dumps(report))
    table = pa.ipc.open_file(str(folder / "index.arrow")).read_all().drop_columns(["num_prompt_labels"])
    with pa.OSFile(str(folder / "index.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    description = json.loads((folder / "set.json").read_text())
    description["index_sha256"] = checksum(folder / "index.arrow")
    (folder / "set.json").write_text(json.dumps(description))
    shards = {path: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.arrow")}
    assert Features([folder]).num_labels(np.arange(3)).tolist() == Features([folder]).num_target_tokens[:3].tolist()
    assert make() == folder
    assert shards == {path: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.arrow")}
    assert Features([folder]).num_prompt_labels.tolist() == [0] * 12
