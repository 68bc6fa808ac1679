"""Packed rows give the results of padded ones in training, on any number of workers, and after a resume."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import processes
from helpers.training import train as train_here
from torch.nn.attention import varlen

from voxray.batches.collate import collate_packed, collate_prompts, collate_training
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.models.adapters.lora import add_lora, trainable_parameters
from voxray.models.parts import packed_attention as packed
from voxray.models.parts.losses import pass_inputs
from voxray.models.parts.packed_attention import PACKED
from voxray.models.registry import get_family
from voxray.recipes.training_data import TrainingData
from voxray.training.loop import answer_loss

MIX = ("asr.train", "sqa.train", "tqa.train")


@pytest.fixture(scope="module")
def data(small, make_features) -> TrainingData:
    folders = make_features(*(small[name] for name in (*MIX, "asr.val", "tqa.val")))
    return TrainingData(folders[:3], folders[3:])


@pytest.fixture(scope="module")
def model() -> Any:
    family = get_family(TINY)
    torch.manual_seed(0)
    base = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    wrapped = add_lora(base, family, ("projector", "llm"), model_id=TINY, r=4, alpha=8, dropout=0.0)
    for name, parameter in trainable_parameters(wrapped):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # with zeros LoRA would have no effect
    return wrapped


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    family = get_family(TINY)
    model.zero_grad()
    losses = sum(answer_loss(model, family, batch, 0.0) for batch in batches)
    assert isinstance(losses, torch.Tensor)
    losses.sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in trainable_parameters(model)]
    return losses.detach(), torch.cat([grad.flatten() for grad in grads])


def random_rows(data: TrainingData, count: int = 12) -> list[Any]:
    features = Features(data.train)
    return [features.row(int(number)) for number in np.random.default_rng(0).permutation(len(features))[:count]]


def test_packed_loss_and_gradients_equal_the_padded_ones(data, model):
    """Transcription, spoken QA and text in one pack. Losses per task agree to 1e-5 per token."""
    front_end, rows = get_family(TINY).front_end(TINY), random_rows(data)
    tokens = sum(len(row.target_ids) for row in rows)
    padded, padded_grads = loss_and_gradients(model, [collate_training(rows, front_end)])
    single, single_grads = loss_and_gradients(model, [collate_training([row], front_end) for row in rows])
    in_pack, packed_grads = loss_and_gradients(model, [collate_packed(rows, front_end)])
    for losses, grads in ((single, single_grads), (in_pack, packed_grads)):
        assert (losses - padded).abs().max() / tokens < 1e-5
        assert (grads - padded_grads).abs().max() < 1e-4 * padded_grads.abs().max()
    assert (in_pack[:3] > 0).all(), "all three tasks are in the pack"


def test_samples_of_a_pack_do_not_see_each_other(data, model):
    """The logits of a sample do not depend on the others in its pack."""
    family = get_family(TINY)
    front_end, rows = family.front_end(TINY), random_rows(data)

    def logits(*order: int) -> list[torch.Tensor]:
        batch = collate_packed([rows[number] for number in order], front_end)
        ends = batch["segment_ends"].tolist()
        with torch.no_grad():
            logits_NV = family.answer_logits(model, pass_inputs(batch), torch.arange(ends[-1]))
        return [logits_NV[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    alone = logits(3)[0]
    assert torch.allclose(logits(3, 5)[0], alone, atol=1e-5)
    assert torch.allclose(logits(7, 1, 3)[2], alone, atol=1e-5)


def dense(query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, value_BHLD: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Reference attention: every query against every key, with other samples and later tokens masked."""
    group = query_BHLD.shape[1] // key_BHLD.shape[1]
    key_BHLD, value_BHLD = (tensor.repeat_interleave(group, dim=1) for tensor in (key_BHLD, value_BHLD))
    sample = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    position = torch.arange(ends[-1])
    visible = (sample[:, None] == sample[None]) & (position[:, None] >= position[None])
    scores = query_BHLD @ key_BHLD.transpose(2, 3) / query_BHLD.shape[-1] ** 0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value_BHLD).transpose(1, 2)


def fake_kernel(calls: list[dict[str, Any]]) -> Any:
    """A stand-in for ``torch.nn.attention.varlen.varlen_attn`` on a CPU, with one softmax per query."""

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        calls.append({"bounds": cu_seq_q, "max": (max_q, max_k), "window": window_size, "gqa": enable_gqa})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and type(max_q) is int
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1, "the kernel requires it"
        group, parts = query.shape[1] // key.shape[1], []
        for index in range(len(query)):
            start = cu_seq_k[int((cu_seq_k[1:] <= index).sum())]
            scores = (query[index].unflatten(0, (-1, group)) @ key[start : index + 1].permute(1, 2, 0)) * scale
            parts.append((scores.softmax(-1) @ value[start : index + 1].transpose(0, 1)).flatten(0, 1))
        return torch.stack(parts)

    real = inspect.signature(varlen.varlen_attn).parameters
    assert all(real[name].kind == item.kind for name, item in inspect.signature(varlen_attn).parameters.items())
    return varlen_attn


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_packed_attention_equals_the_reference(monkeypatch, flash, heads):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(varlen, "varlen_attn", fake_kernel(calls))
    monkeypatch.setattr(packed, "takes_flash", lambda *what: flash)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 11, count, 16).transpose(1, 2) for count in (heads[0], heads[1], heads[1]))
    segments = packed.Segments.of(torch.tensor([1, 6, 11]), torch.device("cpu"))
    layer = torch.nn.Module()
    output, weights = packed.packed_attention(layer, query, key, value, None, scaling=16**-0.5, segments=segments)
    assert weights is None and torch.allclose(output, dense(query, key, value, [1, 6, 11]), atol=1e-6)
    assert len(calls) == flash, "one call for the whole row"
    for call in calls:
        assert call["bounds"].tolist() == [0, 1, 6, 11] and call["max"] == (5, 5)
        assert call["window"] == (-1, 0) and call["gqa"] == (heads[0] != heads[1])


def test_the_flash_kernel_gives_the_loss_of_the_padded_batch(data, model, monkeypatch):
    front_end, rows = get_family(TINY).front_end(TINY), random_rows(data, 4)
    padded, _ = loss_and_gradients(model, [collate_training(rows, front_end)])
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(packed, "takes_flash", lambda *what: True)
    monkeypatch.setattr(varlen, "varlen_attn", fake_kernel(calls))
    losses, _ = loss_and_gradients(model, [collate_packed(rows, front_end)])
    assert (losses - padded).abs().max() / sum(len(row.target_ids) for row in rows) < 1e-5
    assert len(calls) == 2, "one call per layer"


CUDA, HALF = torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "dropout", "capability", "expected"),
    [
        (CUDA, HALF, 128, 0.0, (8, 0), True),
        (CUDA, torch.float16, 64, 0.0, (9, 0), True),
        (CUDA, torch.float32, 128, 0.0, (9, 0), False),
        (CUDA, HALF, 128, 0.0, (7, 5), False),  # a T4
        (CUDA, HALF, 128, 0.1, (9, 0), False),
        (CUDA, HALF, 100, 0.0, (9, 0), False),
        (CUDA, HALF, 512, 0.0, (9, 0), False),
        (torch.device("cpu"), HALF, 128, 0.0, (9, 0), False),
    ],
)
def test_when_the_flash_kernel_is_used(monkeypatch, device, dtype, head_dim, dropout, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert packed.takes_flash(device, dtype, head_dim, dropout) == expected
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not packed.takes_flash(device, dtype, head_dim, dropout)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not packed.takes_flash(device, dtype, head_dim, dropout), "PyTorch for AMD also calls its devices cuda"


@pytest.mark.gpu
def test_the_flash_kernel_equals_the_reference():
    """On a GPU, gradients included."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 300, count, 64, device="cuda", dtype=HALF).transpose(1, 2) for count in (8, 2, 2)]
    for tensor in inputs:
        tensor.requires_grad_()
    segments = packed.Segments.of(torch.tensor([1, 120, 300]), torch.device("cuda"))
    assert packed.takes_flash(inputs[0].device, HALF, 64, 0.0)
    output, _ = packed.packed_attention(torch.nn.Module(), *inputs, None, scaling=64**-0.5, segments=segments)
    grads = torch.autograd.grad(output.float().square().sum(), inputs)
    exact_inputs = [tensor.detach().float().cpu().requires_grad_() for tensor in inputs]
    exact = dense(*exact_inputs, [1, 120, 300])
    exact_grads = torch.autograd.grad(exact.square().sum(), exact_inputs)
    assert torch.allclose(output.float().cpu(), exact, atol=0.03)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert (grad.float().cpu() - exact_grad).abs().max() < 0.03 * exact_grad.abs().max()


def test_generation_and_padded_batches_work_after_packs(data):
    family = get_family(TINY)
    front_end, rows = family.front_end(TINY), random_rows(data, 6)

    def load() -> Any:
        return family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))

    used = load()
    with torch.no_grad():
        answer_loss(used, family, collate_packed(rows, front_end), 0.0)
        assert used.model.language_model.config._attn_implementation == PACKED
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": front_end.pad_id}
        prompts = collate_prompts(rows, front_end)
        assert torch.equal(family.generate(used, prompts, **options), family.generate(load(), prompts, **options))
        batch = collate_training(rows, front_end)
        assert torch.equal(answer_loss(used, family, batch, 0.0), answer_loss(load(), family, batch, 0.0))


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lr": 1e-3, "batching": "packed"}
    values |= {"pack_tokens": 200, "grad_accum": 2, "max_steps": 6, "eval_max_rows": 1, "eval_max_new_tokens": 4}
    values |= {"lora_dropout": 0.05, "freq_masks": 1, "time_masks": 1, "time_mask_share": 0.2, "save_steps": 2}
    return MultitaskSettings.model_validate({**values, "output_dir": str(output_dir), **changes})


def run(data: TrainingData, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    run_dir.mkdir(exist_ok=True)
    train_here(settings(run_dir, **changes), run_dir, data, Worker())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_packed_training_resumes_exactly(data, tmp_path, optim):
    """2 steps and then 4 equal 6 steps, with dropout and SpecAugment."""
    run(data, tmp_path / "resumed", max_steps=2, lr_schedule="constant", optim=optim)
    resumed = run(data, tmp_path / "resumed", lr_schedule="constant", optim=optim)
    straight = run(data, tmp_path / "straight", lr_schedule="constant", optim=optim)
    cosine = run(data, tmp_path / "cosine", optim=optim)
    assert [record["loss"] for record in resumed] == [record["loss"] for record in straight]
    assert weights(tmp_path / "resumed") == weights(tmp_path / "straight") != weights(tmp_path / "cosine")
    assert all(0 < record["efficiency"] <= 1 for record in cosine)


@pytest.mark.slow
def test_two_workers_train_packs_like_one(data, tmp_path):
    """Dropout is seeded per microbatch. Losses agree to 1e-5."""
    one = processes.run(settings(tmp_path / "a", grad_accum=4), data)
    two = processes.run(settings(tmp_path / "b", grad_accum=2), data, num_workers=2)
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], abs=1e-5)


def test_gradient_checkpointing_keeps_samples_apart(data, tmp_path):
    """The recomputation in the backward pass uses the same segments."""
    plain, recomputed = (run(data, tmp_path / str(flag), grad_ckpt=flag, max_steps=3) for flag in (False, True))
    assert [record["loss"] for record in recomputed] == pytest.approx([record["loss"] for record in plain], abs=1e-6)


def test_stored_encoder_outputs_can_be_packed(data, small, tmp_path):
    extractor = Extractor(TINY, FeatureSpec("encoder", dtype="float32"))
    manifests = [small[name] for name in MIX]
    folders = featurize(manifests, extractor, tmp_path / "f", rows_per_shard=8, use_ray=False).folders
    no_masks = {"freq_masks": 0, "time_masks": 0}
    stored = run(TrainingData(folders, ()), tmp_path / "a", store="encoder", **no_masks)
    mel = run(TrainingData(data.train, ()), tmp_path / "b", **no_masks)
    assert [record["loss"] for record in stored] == pytest.approx([record["loss"] for record in mel], abs=1e-6)
