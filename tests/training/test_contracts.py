"""Contracts of training: loss on answers only, any division of a batch, text-only batches, exact resume."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import processes
from helpers.library import library_batch
from safetensors.torch import load_file

from voxray.batches.collate import collate_prompts, collate_training
from voxray.batches.packing import Batching
from voxray.batches.plan import Plan
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.models.interface import IGNORED
from voxray.models.registry import get_family
from voxray.recipes.training_data import TrainingData
from voxray.training.loop import answer_loss
from voxray.training.records import read_metrics

GOLDEN_LOSSES = [3.848973, 5.183604, 1.948669, 5.992448]


@pytest.fixture(scope="module")
def data(small, make_features) -> TrainingData:
    names = [f"{task}.{part}" for part in ("train", "val") for task in ("asr", "sqa", "tqa")]
    folders = make_features(*(small[name] for name in names))
    return TrainingData(folders[:3], folders[3:])


def settings(output_dir: Path, **changes) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lora_dropout": 0.0, "lr": 1e-3}
    values |= {"max_steps": 4, "per_device_bsz": 4, "eval_max_rows": 1, "eval_max_new_tokens": 4}
    values |= {"output_dir": str(output_dir)}
    return MultitaskSettings(**{**values, **changes})


def losses(records) -> list[float]:
    return [record["loss"] for record in records]


def sha(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_only_answer_tokens_have_a_loss(data):
    """Contract 1: labels are the answer tokens only, and the prompt is the same as in evaluation."""
    features, front_end = Features(data.train), get_family(TINY).front_end(TINY)
    for task in TASK_CODES.values():
        row = features.row(int((features.task == task).argmax()))
        batch, prompts = collate_training([row], front_end), collate_prompts([row], front_end)
        labels = batch["labels"][0]
        answer = labels[labels != IGNORED].tolist()
        assert answer == front_end.target_ids(row.answer)
        assert batch["input_ids"][0][labels == IGNORED].tolist() == prompts["input_ids"][0].tolist()
        assert batch["input_ids"][0].tolist() == prompts["input_ids"][0].tolist() + answer


def test_padding_has_no_labels(data):
    features, front_end = Features(data.train), get_family(TINY).front_end(TINY)
    rows = [features.row(number) for number in range(0, len(features), 5)]
    batch = collate_training(rows, front_end)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(row.target_ids) for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == [len(row.prompt_ids) + len(row.target_ids) for row in rows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == front_end.pad_id).all()
    assert batch["input_features"].shape == (sum(row.num_windows for row in rows), 128, 400)


def test_loss_equals_transformers(data):
    """The answer-only loss equals that of transformers on the same labels, with padding and audio."""
    family = get_family(TINY)
    features, front_end = Features(data.train), family.front_end(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    batch = collate_training([features.row(number) for number in (0, 13, 25, 7)], front_end)
    loss_T = answer_loss(model, family, batch, 0.0)
    reference = model(**library_batch(batch)).loss
    assert float(loss_T.sum()) / int((batch["labels"] != IGNORED).sum()) == pytest.approx(float(reference), rel=1e-5)
    assert (loss_T[:3] > 0).all(), "all three tasks are in this batch"


def test_loss_does_not_depend_on_how_a_batch_is_divided(data, tmp_path):
    """Contract 5: batch 4 = batch 2 x accumulation 2 = 2 workers x batch 2 (and 2 x 1 x accumulation 2)."""
    whole = losses(processes.run(settings(tmp_path / "a"), data))
    accumulated = losses(processes.run(settings(tmp_path / "b", per_device_bsz=2, grad_accum=2), data))
    two = losses(processes.run(settings(tmp_path / "c", per_device_bsz=2), data, num_workers=2))
    four = losses(processes.run(settings(tmp_path / "d", per_device_bsz=1, grad_accum=2), data, num_workers=2))
    assert len(whole) == 4 and whole[0] != whole[1]
    for divided in (accumulated, two, four):
        assert divided == pytest.approx(whole, abs=1e-5)


def test_text_only_batches_are_safe_on_any_rank(data, tmp_path):
    """Contract 6: ranks with only text beside ranks with only audio, and steps with only text. Losses stay right."""
    weights = {"asr": 1.0, "tqa": 3.0}
    common = {"per_device_bsz": 1, "task_weights": weights, "max_steps": 6}
    features = Features(data.train)
    plan = Plan(features.task, np.arange(len(features)), weights, 0, Batching("fixed", microbatch_size=1), 2)
    steps = [plan.step_microbatches(step) for step in range(6)]
    with_audio = [tuple(bool(features.num_windows[batch.rows[0]]) for batch in step) for step in steps]
    assert (False, False) in with_audio and any(any(ranks) and not all(ranks) for ranks in with_audio)
    together = losses(processes.run(settings(tmp_path / "a", **{**common, "per_device_bsz": 2}), data))
    divided = losses(processes.run(settings(tmp_path / "b", **common), data, num_workers=2))
    assert divided == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_resume_is_exact(data, tmp_path, num_workers):
    """Contract 4: 3 steps, and 3 more in new processes, equal 6 steps bit for bit, with dropout and partial steps."""
    common = {"per_device_bsz": 3, "lora_dropout": 0.1, "max_steps": 6, "save_steps": 3}
    straight = processes.run(settings(tmp_path / "a", **common), data, num_workers)
    processes.run(settings(tmp_path / "b", **common), data, num_workers)
    _forget_after(tmp_path / "b", 3)
    resumed = processes.run(settings(tmp_path / "b", **common), data, num_workers)
    assert sha(tmp_path / "a") == sha(tmp_path / "b")
    assert losses(straight) == losses(resumed)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]


def _forget_after(run_dir: Path, step: int) -> None:
    """Make a run look killed right after the checkpoint of ``step``, except that its records go to the end."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run_dir / "adapter")


@pytest.mark.slow
def test_any_number_of_workers_sees_the_same_batches(data, tmp_path):
    """2, then 1, then 3, then 2 workers equal 2 workers throughout, to 1e-5, with packs, dropout and SpecAugment."""
    common = {"per_device_bsz": 1, "save_steps": 2, "batching": "packed", "pack_tokens": 200, "lora_dropout": 0.05}
    common |= {"grad_accum": 2, "freq_masks": 1, "time_masks": 1, "time_mask_share": 0.3, "num_workers": 2}
    straight = losses(processes.run(settings(tmp_path / "a", **common, max_steps=8), data, num_workers=2))
    for num_workers in (2, 1, 3, 2):
        processes.run(settings(tmp_path / "b", **common, max_steps=8), data, num_workers, stop_after=2)
    resumed = losses(read_metrics(tmp_path / "b", "train"))
    assert len(resumed) == 8 and resumed[:2] == straight[:2] and resumed[2:] != straight[2:]
    assert resumed == pytest.approx(straight, abs=1e-5)


def test_dropout_depends_on_step_and_microbatch_only(data, tmp_path):
    """With dropout, accumulation in one process equals the same microbatches in two."""
    common = {"per_device_bsz": 2, "lora_dropout": 0.3, "max_steps": 2}
    one = losses(processes.run(settings(tmp_path / "a", **common, grad_accum=2), data))
    two = losses(processes.run(settings(tmp_path / "b", **common), data, num_workers=2))
    assert two == pytest.approx(one, abs=1e-5)
    none = losses(processes.run(settings(tmp_path / "c", **{**common, "lora_dropout": 0.0}, grad_accum=2), data))
    assert abs(none[1] - one[1]) > 1e-4, "dropout is on in the runs above"


def test_golden_losses(data, tmp_path):
    """A refactoring does not change the first losses of the recipe."""
    assert losses(processes.run(settings(tmp_path), data)) == pytest.approx(GOLDEN_LOSSES, abs=2e-4)


def test_damaged_checkpoint_is_named(data, tmp_path):
    processes.run(settings(tmp_path, save_steps=2), data)
    newest = tmp_path / "checkpoints" / "step-000004"
    (newest / "optimizer.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match=r"step-000004: damaged checkpoint"):
        processes.run(settings(tmp_path, max_steps=6), data)


def test_changed_data_is_refused(data, tmp_path, small, make_features):
    processes.run(settings(tmp_path), data)
    other = TrainingData(make_features(small["asr.val"]), data.validation)
    with pytest.raises(RunError, match="training data has changed since this run started"):
        processes.run(settings(tmp_path, max_steps=6), other)


def test_the_adapter_has_no_encoder_tensor(data, tmp_path):
    """The frozen encoder is not stored, and the LoRA weights have been trained."""
    processes.run(settings(tmp_path), data)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors and not any("audio_tower" in name for name in tensors)
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
