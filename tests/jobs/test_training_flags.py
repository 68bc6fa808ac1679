"""The effect of each flag of train_multitask, in runs of a few steps in this process."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, read_rows, write_rows
from helpers.running import parse_only
from helpers.training import train as train_here
from safetensors.torch import load_file, save_file

from voxray.batches import loader
from voxray.batches.loader import Loader
from voxray.batches.rank import Worker
from voxray.commands import train as command
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, SettingsError
from voxray.launch import elastic
from voxray.models.voxtral.family import Voxtral
from voxray.recipes import choose_rows, run_stage
from voxray.recipes.training_data import TrainingData
from voxray.training import validate
from voxray.training.engine import DataParallel
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 8


@dataclass
class Run:
    """A short training run and what was recorded of it."""

    run_dir: Path
    result: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    loader: Any = None
    layer_calls: int = 0
    batches: list[tuple[int, str]] = field(default_factory=list)
    """(rows, thread) of every collated batch."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of the input ids of every packed batch."""

    def records(self, kind: str = "train") -> list[dict[str, Any]]:
        return read_metrics(self.run_dir, kind)

    def column(self, name: str, kind: str = "train") -> list[float]:
        return [record[name] for record in self.records(kind)]

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.run_dir / "adapter" / "adapter_model.safetensors")

    def weights(self, part: str) -> torch.Tensor:
        """All of lora_A or lora_B as one vector."""
        return torch.cat([tensor.flatten() for name, tensor in sorted(self.adapter().items()) if part in name])


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Feature sets by name: ``text`` has 8 rows, ``speech`` and ``val`` a few of every task.

    ``empty`` has four clips, the second with an empty transcript.
    """
    folder = tmp_path_factory.mktemp("rows")
    text = write_rows(folder / "text.jsonl", read_rows(small["tqa.train"])[:ROWS])
    mixed = [row for task in ("asr", "sqa", "tqa") for row in read_rows(small[f"{task}.train"])[:4]]
    speech = write_rows(folder / "speech.jsonl", mixed)
    val = write_rows(folder / "val.jsonl", [row for task in ("asr", "tqa") for row in read_rows(small[f"{task}.val"])])
    empty = write_rows(folder / "empty.jsonl", [mixed[0], {**mixed[1], "transcript": ""}, *mixed[2:4]])
    paths = {"text": text, "speech": speech, "val": val, "empty": empty}
    return {name: (path, make_features(path)) for name, path in paths.items()}


@pytest.fixture
def train(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Train the tiny model on text rows, by default for one step, and record its batches and layer calls."""
    fit, collate_training, collate_packed = run_stage.fit, loader.collate_training, loader.collate_packed
    runs: list[Run] = []

    def recording_fit(state: Any, a_loader: Any, *args: Any) -> int:
        run = runs[-1]
        run.model, run.loader = state.model, a_loader

        def count(module: Any, inputs: Any) -> None:
            run.layer_calls += 1

        layer = next(
            module
            for name, module in state.model.named_modules()
            if name.endswith("language_model.layers.0.self_attn")  # an early part of the recomputed layers
        )
        with layer.register_forward_pre_hook(count):
            return fit(state, a_loader, *args)

    def recording_collate(rows: Any, front_end: Any, masks: Any) -> Any:
        time.sleep(0.02)  # long enough for a second thread to take the next batch
        runs[-1].batches.append((len(rows), threading.current_thread().name))
        return collate_training(rows, front_end, masks)

    monkeypatch.setattr(run_stage, "fit", recording_fit)

    def recording_collate_packed(rows: Any, front_end: Any, masks: Any) -> Any:
        batch = collate_packed(rows, front_end, masks)
        runs[-1].batches.append((len(rows), threading.current_thread().name))
        runs[-1].shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(loader, "collate_training", recording_collate)
    monkeypatch.setattr(loader, "collate_packed", recording_collate_packed)

    def run(rows: str = "text", val: str = "", **flags: Any) -> Run:
        run_dir = tmp_path / f"run{len(runs)}"
        run_dir.mkdir()
        runs.append(Run(run_dir))
        defaults = {"model_id": TINY, "train_jsonl": data[rows][0], "output_dir": str(run_dir), "num_workers": 0}
        defaults |= {"loader_workers": 0, "lora_dropout": 0.0, "lr": 1e-2}
        if "epochs" not in flags:
            defaults["max_steps"] = 1
        settings = MultitaskSettings.model_validate({**defaults, **flags})
        sets = TrainingData(data[rows][1], data[val][1] if val else ())
        runs[-1].result = train_here(settings, run_dir, sets, Worker())
        return runs[-1]

    yield run


def test_model_id(train: Train, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 0.9 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    default, changed = train(), train(model_id=str(other))
    assert default.column("loss") != changed.column("loss")
    config = json.loads((changed.run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(other)


def test_bf16(train: Train) -> None:
    full, half = train(), train(bf16=True)
    for run, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        kinds = {
            (parameter.requires_grad, parameter.dtype)
            for name, parameter in run.model.named_parameters()
            if "embed_positions" not in name  # transformers keeps the encoder's sinusoids in float32
        }
        assert kinds == {(False, dtype), (True, torch.float32)}
    assert full.column("loss") != half.column("loss")
    assert full.column("loss") == pytest.approx(half.column("loss"), rel=0.05)


def test_fp16(train: Train) -> None:
    full, half = train(), train(fp16=True)
    kinds = {(parameter.requires_grad, parameter.dtype) for _, parameter in half.model.named_parameters()}
    assert kinds >= {(False, torch.float16), (True, torch.float32)} and (True, torch.float16) not in kinds
    assert half.column("loss_scale") == [2.0**16] and "loss_scale" not in full.records()[0]
    assert full.column("loss") != half.column("loss")
    assert full.column("loss") == pytest.approx(half.column("loss"), rel=0.05)


def test_quantize(train: Train) -> None:
    losses = {kind: train(quantize=kind).column("loss")[0] for kind in ("none", "8bit", "4bit")}
    assert len(set(losses.values())) == 3
    assert [losses["8bit"], losses["4bit"]] == pytest.approx([losses["none"]] * 2, rel=0.1)
    stored = {parameter.dtype for parameter in train(quantize="4bit").model.parameters()}
    assert stored == {torch.uint8, torch.float32}


def test_tuning(train: Train) -> None:
    runs = {kind: train(tuning=kind, lora_r=4, lora_alpha=8) for kind in ("lora", "dora", "rslora", "full")}
    scales = {
        kind: {module.scaling["default"] for module in run.model.modules() if hasattr(module, "lora_A")}
        for kind, run in runs.items()
    }
    assert scales == {"lora": {2.0}, "dora": {2.0}, "rslora": {4.0}, "full": set()}
    parts = {
        kind: {name.rpartition("lora_")[2].partition(".")[0] for name in run.adapter()} for kind, run in runs.items()
    }
    assert parts["lora"] == parts["rslora"] == {"A", "B"} and parts["dora"] == {"A", "B", "magnitude_vector"}
    counts = json.loads((runs["full"].run_dir / "parameters.json").read_text())
    assert counts["encoder"]["trainable"] == 0
    assert all(counts[role]["trainable"] == counts[role]["total"] > 0 for role in ("projector", "llm"))
    for flags in ({"bf16": True}, {"fp16": True}, {"quantize": "4bit"}):
        with pytest.raises(ValueError, match="--tuning full trains the weights themselves, in float32: leave out --"):
            train(tuning="full", **flags)
    with pytest.raises(ValueError, match="--bf16 and --fp16: give one of them"):
        train(bf16=True, fp16=True)


def test_max_bad_steps(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_logits = Voxtral.answer_logits
    monkeypatch.setattr(Voxtral, "answer_logits", lambda *args: answer_logits(*args) * float("nan"))
    for limit in (1, 3):
        message = rf"^step {limit}: .* {limit} time\(s\) in a row \(--max_bad_steps\); rows of this step: text\.jsonl:"
        with pytest.raises(RunError, match=message):
            train(max_steps=9, max_bad_steps=limit)


def test_tf32(train: Train) -> None:
    for enabled in (True, False):
        train(tf32=enabled)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == enabled


@pytest.mark.parametrize("batching", ["length", "packed"])
def test_deterministic(train: Train, monkeypatch: pytest.MonkeyPatch, batching: str) -> None:
    """Every operation of a step has a deterministic kernel, and the losses are those of a run without the flag."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    losses = [
        train(deterministic=enabled, batching=batching, freeze_whisper=False).column("loss")
        for enabled in (True, False)
    ]
    assert losses[0] == losses[1]
    assert not torch.are_deterministic_algorithms_enabled()
    train(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_unused_flags_warn_without_a_gpu(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = f"--model_id {TINY} --train_jsonl {data['text'][0]} --output_dir {tmp_path} --num_workers 0 --max_steps 1"
    command.run_training(parse_only("train_multitask", [*line.split(), "--tf32", "--pin_memory"]))
    output = capsys.readouterr().out
    assert "warning: --tf32 has no effect" in output and "warning: --pin_memory has no effect" in output
    command.run_training(parse_only("train_multitask", [*line.split(), "--no-pin_memory"]))
    assert "warning" not in capsys.readouterr().out
    command.warn_about_unused_flags(parse_only("train_multitask", [*line.split(), "--tuning", "full", "--lora_r", "4"]))
    assert "warning: --lora_r has no effect: --tuning full has no LoRA" in capsys.readouterr().out


def test_pin_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train()
    assert run.loader.pin_memory is False, "no pinned memory on a CPU"
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor)
    args = (run.loader.features, run.loader.front_end, run.loader.plan, Worker(), 0, run.loader.masking)
    pinning = Loader(*args, pin_memory=True)
    _, [(_, batch)] = next(pinning.steps(0, 1))
    assert len(pinned) == len(batch)


def test_lora_r_and_alpha(train: Train) -> None:
    run = train(lora_r=4, lora_alpha=12)
    config = json.loads((run.run_dir / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert {min(tensor.shape) for tensor in run.adapter().values()} == {4}
    assert {module.scaling["default"] for module in run.model.modules() if hasattr(module, "lora_A")} == {3.0}


def test_lora_dropout(train: Train) -> None:
    without, with_it = (train(lora_dropout=share, max_steps=2).column("loss") for share in (0.0, 0.5))
    assert without[0] == with_it[0], "LoRA starts at zero, so dropout has no effect yet"
    assert without[1] != with_it[1]


def test_freeze_whisper(train: Train) -> None:
    for frozen in (True, False):
        run = train("speech", freeze_whisper=frozen)
        counts = json.loads((run.run_dir / "parameters.json").read_text())
        assert (counts["encoder"]["trainable"] == 0) == frozen


def test_lr_schedule_and_warmup_steps(train: Train) -> None:
    assert train(lr=0.3, warmup_steps=2, lr_schedule="linear", max_steps=4).column("lr") == pytest.approx(
        [0.1, 0.2, 0.3, 0.15]
    )
    assert train(lr=0.3, lr_schedule="constant", max_steps=3).column("lr") == pytest.approx([0.3] * 3)
    assert train(lr=0.3, lr_schedule="cosine", max_steps=4).column("lr") == pytest.approx(
        [0.3, 0.256066, 0.15, 0.043934], rel=1e-4
    )


def test_lr_scales_the_first_step(train: Train) -> None:
    small, large = (train(lr=lr).weights("lora_B").abs().max() for lr in (1e-3, 1e-2))
    assert large / small == pytest.approx(10, rel=0.01), "Adam's first step is lr in every weight with a gradient"


def test_weight_decay(train: Train) -> None:
    plain, decayed = (train(weight_decay=decay, lr=1e-2).weights("lora_A") for decay in (0.0, 10.0))
    assert torch.allclose(decayed, plain * (1 - 1e-2 * 10), atol=1e-6), "lora_A has no gradient in the first step"


def test_optim(train: Train) -> None:
    """Both kinds are AdamW, with other roundings."""
    plain, fused = (train(optim=name, lr=1e-2, max_steps=3) for name in ("adamw_torch", "adamw_torch_fused"))
    assert fused.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    assert torch.allclose(fused.weights("lora_B"), plain.weights("lora_B"), atol=1e-4)
    assert not torch.equal(fused.weights("lora_B"), plain.weights("lora_B"))


def test_max_grad_norm(train: Train) -> None:
    default, low, off, high = (train(max_grad_norm=norm) for norm in (1.0, 1e-7, 0.0, 1e9))
    assert default.column("grad_norm") == low.column("grad_norm"), "the norm before clipping is recorded"
    assert low.weights("lora_B").abs().mean() < 0.5 * default.weights("lora_B").abs().mean()
    assert torch.equal(off.weights("lora_B"), high.weights("lora_B")), "0 does not clip"


def test_label_smoothing(train: Train) -> None:
    sharp, smooth, flat = (train(label_smoothing=share).column("loss")[0] for share in (0.0, 0.1, 0.99))
    assert sharp != smooth
    # Nearly all mass is on the mean of -log p over the 4,096 tokens, which is at least log 4,096 = 8.3.
    assert flat > 8.3


def test_epochs_and_rows_per_step(train: Train) -> None:
    run = train(epochs=2, per_device_bsz=2, grad_accum=2)
    assert run.column("step") == [1, 2, 3, 4], "2 epochs of 8 rows, 4 per step"
    assert run.column("epoch") == pytest.approx([0.5, 1, 1.5, 2])
    assert [rows for rows, _ in run.batches] == [2] * 8, "two forward passes per step"
    assert run.layer_calls == 8


def test_batching(train: Train) -> None:
    """``packed``: one row that holds several samples. ``length``: batches of one task each."""
    packed = train("speech", batching="packed", pack_tokens=150, max_steps=2)
    assert all(shape[0] == 1 for shape in packed.shapes) and max(shape[1] for shape in packed.shapes) <= 150
    assert max(rows for rows, _ in packed.batches) > 1
    with pytest.raises(SettingsError, match="--pack_tokens 20: a row of"):
        train("speech", batching="packed", pack_tokens=20)
    sized = train("speech", batching="length", per_task_bsz="asr=4,sqa=1,tqa=2", epochs=1)
    sizes = {}
    for batch in (batch for step in range(7) for batch in sized.loader.plan.step_microbatches(step)):
        [task] = set(sized.loader.features.task[batch.rows].tolist())
        sizes.setdefault(task, []).append(len(batch.rows))
    assert {task: sorted(of_task) for task, of_task in sizes.items()} == {0: [4], 1: [1, 1, 1, 1], 2: [2, 2]}
    with pytest.raises(ValueError, match="--per_task_bsz: needs --batching length"):
        MultitaskSettings.model_validate({"train_jsonl": "t", "output_dir": "o", "per_task_bsz": "asr=4"})


def test_curriculum(train: Train) -> None:
    run = train("speech", curriculum="tqa:1,asr+tqa:2", epochs=9, per_device_bsz=4)
    tasks = [sorted({*run.loader.features.task[run.loader.plan.epoch_rows(epoch)].tolist()}) for epoch in range(3)]
    assert tasks == [[2], [0, 2], [0, 2]]
    assert run.result["steps"] == 1 + 2 + 2, "the curriculum replaces --epochs"


def test_max_steps(train: Train) -> None:
    assert train(max_steps=3).column("step") == [1, 2, 3]
    assert len(train(max_steps=3, epochs=9).records()) == 3


def test_drop_last(train: Train) -> None:
    default, dropped = (train(epochs=1, per_device_bsz=3, drop_last=drop) for drop in (False, True))
    assert [rows for rows, _ in default.batches] == [3, 3, 2]
    assert [rows for rows, _ in dropped.batches] == [3, 3]


def test_grad_ckpt(train: Train) -> None:
    plain, recomputed = train(max_steps=2), train(max_steps=2, grad_ckpt=True)
    assert (plain.layer_calls, recomputed.layer_calls) == (2, 4), "every layer runs again in the backward pass"
    assert plain.column("loss") == pytest.approx(recomputed.column("loss"), rel=1e-6)


@pytest.mark.slow
def test_compile(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are captured by torch.compile; ``test_layer_compile`` also compiles them."""
    from torch._dynamo.utils import counters

    capture = partial(torch.compile, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function, **_: capture(function))
    plain = train(max_steps=2)
    counters.clear()
    compiled = train(max_steps=2, compile=True)
    assert counters["stats"]["unique_graphs"] >= 2
    assert plain.column("loss") == pytest.approx(compiled.column("loss"), abs=1e-5)
    assert plain.adapter().keys() == compiled.adapter().keys()
    with pytest.raises(ValueError, match="--compile: cannot compile DoRA layers"):
        train(compile=True, tuning="dora")


def test_seed(train: Train) -> None:
    first, same, other = train(seed=3), train(seed=3), train(seed=4)
    assert first.column("loss") == same.column("loss") and torch.equal(first.weights("A"), same.weights("A"))
    assert first.column("loss") != other.column("loss"), "the order of rows differs"
    assert not torch.equal(first.weights("lora_A"), other.weights("lora_A"))


def test_loader_workers(train: Train) -> None:
    for number in (0, 2):
        threads = {name for _, name in train(max_steps=4, loader_workers=number).batches}
        assert threads == ({"MainThread"} if number == 0 else {"loader_0", "loader_1"})


def test_task_weights(train: Train) -> None:
    run = train("speech", task_weights="asr=1,tqa=2", epochs=1, per_device_bsz=12)
    names = {name for name in run.records()[0] if name.startswith("loss/")}
    assert names == {"loss/asr", "loss/tqa"}, "a task without a weight is not sampled"
    assert "loss/sqa" in train("speech", epochs=1, per_device_bsz=12).records()[0]
    assert {name: len(rows) for name, rows in run.loader.plan.rows_by_task.items()} == {"asr": 4, "sqa": 4, "tqa": 4}
    tasks = run.loader.features.task[run.loader.plan.epoch_rows(0)].tolist()
    assert (tasks.count(0), tasks.count(2)) == (4, 8)


def test_allow_empty(train: Train) -> None:
    """A clip with an empty transcript is left out of the training, unless it is meant as silence."""
    for flags, lost in (({}, [(2, "empty_text")]), ({"allow_empty": True}, [])):
        run = train("empty", **flags)
        path = run.run_dir / "quarantine.jsonl"
        ledger = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        assert [(line["line"], line["reason"]) for line in ledger] == lost
        assert len(run.loader.plan.rows) == 4 - len(lost)


def test_max_len(train: Train, data: dict[str, Any]) -> None:
    lengths = train("speech").loader.features.num_tokens
    limit = int(sorted(lengths)[5])
    run = train("speech", max_len=limit)
    ledger = [json.loads(line) for line in (run.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in ledger} == {"too_long"}
    assert {line["line"] for line in ledger} == {index + 1 for index, length in enumerate(lengths) if length > limit}
    assert len(run.loader.plan.rows) == sum(lengths <= limit)
    with pytest.raises(RunError, match="--max_len 1 "):
        train("speech", max_len=1)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, max_new_tokens) of every validation batch. A fake answers "1" to each row."""
    batches: list[tuple[int, int]] = []

    def fake_generate(model: Any, family: Any, front_end: Any, rows: Any, *, max_new_tokens: int) -> list[str]:
        batches.append((len(rows), max_new_tokens))
        return ["1"] * len(rows)

    monkeypatch.setattr(validate, "generate_texts", fake_generate)
    return batches


def test_val_jsonl_and_eval_steps(train: Train, generated: list[tuple[int, int]]) -> None:
    assert train(max_steps=4).records("validation") == [] and not generated
    assert train(val="val", max_steps=5, eval_steps=2).column("step", "validation") == [2, 4, 5]
    run = train(val="val", epochs=2, per_device_bsz=4)
    assert run.column("step", "validation") == [2, 4], "after every epoch"
    assert {"asr/cer", "asr/cer_nospace", "tqa/rouge_l"} <= set(run.records("validation")[0])


def test_eval_max_rows_and_new_tokens(train: Train, generated: list[tuple[int, int]]) -> None:
    for limit, rows in ((2, 4), (0, 8)):
        generated.clear()
        train(val="val", eval_max_rows=limit, eval_max_new_tokens=7)
        assert sum(count for count, _ in generated) == rows
        assert {tokens for _, tokens in generated} == {7}


def test_preview_rows(train: Train, generated: list[tuple[int, int]]) -> None:
    for rows, entries in ((0, 0), (1, 2), (3, 6)):
        run = train(val="val", preview_rows=rows)
        lines = (run.run_dir / "previews.jsonl").read_text().splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == ["1"] * entries, "the answers of the validation"
        assert f"rows: {rows}  #" in (run.run_dir / "previews.yaml").read_text()
    assert not (train().run_dir / "previews.yaml").exists(), "no validation rows"


def test_save_steps(train: Train) -> None:
    for every, names in ((2, ["step-000002", "step-000004", "step-000005"]), (9, ["step-000005"])):
        run = train(max_steps=5, save_steps=every)
        assert sorted(path.name for path in (run.run_dir / "checkpoints").iterdir()) == names


def test_log_steps(train: Train) -> None:
    log = (train(max_steps=5, log_steps=2).run_dir / "train.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in log if line.startswith("step ")] == ["step 2/5", "step 4/5", "step 5/5"]


def test_debug(train: Train, generated: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_rows, "DEBUG_ROWS", 3)
    monkeypatch.setattr(choose_rows, "DEBUG_VALIDATION_ROWS", 1)
    run = train("speech", val="val", debug=True, epochs=9, per_device_bsz=9)
    assert len(run.loader.plan.rows) == 9, "three rows of each task"
    assert len(run.records()) == run_stage.DEBUG_STEPS == 4
    assert {rows for rows, _ in generated} == {2}, "one of each of the two tasks"


def test_train_jsonl_output_dir_storage_path_features_dir(data: dict[str, Any], tmp_path: Path) -> None:
    def settings(**flags: Any) -> MultitaskSettings:
        defaults = {
            "model_id": TINY,
            "train_jsonl": data["text"][0],
            "output_dir": "run",
            "storage_path": str(tmp_path),
        }
        return MultitaskSettings.model_validate(
            {**defaults, "num_workers": 0, "max_steps": 1, "eval_steps": 9, **flags}
        )

    command.run_training(settings())
    assert (tmp_path / "run" / "adapter").is_dir() and len(list((tmp_path / "run" / "features").iterdir())) == 1
    command.run_training(settings(output_dir=str(tmp_path / "other"), features_dir="shared", rows_per_shard=3))
    assert (tmp_path / "other" / "settings.json").is_file() and not (tmp_path / "other" / "features").exists()
    [folder] = (tmp_path / "shared").iterdir()
    description = json.loads((folder / "set.json").read_text())
    expected = {"manifest": data["text"][0], "samples": ROWS, "rows": ROWS, "bad": 0, "shards": 3, "store": "mel"}
    assert expected.items() <= description.items()


def test_overwrite(data: dict[str, Any], tmp_path: Path) -> None:
    def settings(**flags: Any) -> MultitaskSettings:
        defaults = {"model_id": TINY, "train_jsonl": data["text"][0], "output_dir": str(tmp_path), "num_workers": 0}
        return MultitaskSettings.model_validate({**defaults, "max_steps": 2, **flags})

    command.run_training(settings())
    with pytest.raises(SettingsError, match=r"--lr \(was 0.0002, now 0.001\); give another --output_dir and"):
        command.run_training(settings(lr=1e-3))
    assert len(read_metrics(tmp_path, "train")) == 2, "a refused run changes nothing"
    command.run_training(settings(lr=1e-3, max_steps=1, overwrite=True))
    assert [record["lr"] for record in read_metrics(tmp_path, "train")] == [1e-3]


def test_strict(tmp_path: Path, small: dict[str, str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*read_rows(small["tqa.train"])[:2], {"instruction": "?", "output": ""}])

    def settings(**flags: Any) -> MultitaskSettings:
        defaults = {"model_id": TINY, "train_jsonl": path, "output_dir": str(tmp_path / "run"), "num_workers": 0}
        return MultitaskSettings.model_validate({**defaults, "max_steps": 1, **flags})

    with pytest.raises(RunError, match=rf"^{path}:3: output is empty \(--strict\)"):
        command.run_training(settings(strict=True))
    command.run_training(settings())
    [line] = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "empty_text" and json.loads(line)["line"] == 3


def test_num_workers(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[tuple[int, int]] = []

    def fake_train_on_workers(run: Any, sets: Any, num_workers: tuple[int, int]) -> dict[str, Any]:
        requested.append(num_workers)
        return {"steps": 0, "finished": True}

    monkeypatch.setattr(command, "train_on_workers", fake_train_on_workers)
    monkeypatch.setattr(command, "ray_session", lambda *args: nullcontext())
    monkeypatch.setattr(command, "require_capacity", lambda fewest: None)
    monkeypatch.setattr(command, "warn_about_cpus", lambda: None)
    monkeypatch.setattr(elastic, "is_connected", lambda: False)
    monkeypatch.setattr(command, "training_data", lambda *args, **kwargs: TrainingData((), ()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    for value in ("3", "auto", "1:4"):
        line = f"--model_id {TINY} --train_jsonl {data['text'][0]} --output_dir {tmp_path} --num_workers {value}"
        command.run_training(parse_only("train_multitask", line.split()))
    assert requested == [(3, 3), (5, 5), (1, 4)], "auto is one per GPU"
    monkeypatch.setattr(elastic, "is_connected", lambda: True)
    monkeypatch.setattr(elastic, "max_gpus", lambda: 8)
    assert elastic.count_workers("auto") == (8, 8), "of the whole cluster, once Ray is connected"


def test_strategy_zero_stage_and_offload_optimizer(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which engine is used; tests/training/test_sharding.py tests its effect."""
    from voxray.training import fsdp, zero

    engines: list[Any] = []

    def fake(name: str) -> Any:
        def engine(*args: Any, dtypes: Any, with_audio: bool, lr: float, weight_decay: float, **own: Any) -> Any:
            assert own.pop("fused") is False
            engines.append((name, own))
            return DataParallel(*args, lr=lr, weight_decay=weight_decay)

        return engine

    monkeypatch.setattr(zero, "Zero", fake("zero"))
    monkeypatch.setattr(fsdp, "Fsdp", fake("fsdp"))
    train(strategy="ddp")
    assert engines == []
    train(strategy="deepspeed")
    train(strategy="deepspeed", zero_stage=3)
    train(strategy="fsdp")
    train(strategy="fsdp", tuning="full", offload_optimizer=True)
    offloads = [{"offload_optimizer": value} for value in (False, True)]
    assert engines == [("zero", {"stage": 2}), ("zero", {"stage": 3}), *(("fsdp", own) for own in offloads)]
    assert parse_only("train_text", ["--train_jsonl", "x", "--output_dir", "y", "--zero_stage", "2"]).zero_stage == 2
    for value in ("1", "4", "two"):
        with pytest.raises(SystemExit):
            parse_only("train_text", ["--train_jsonl", "x", "--output_dir", "y", "--zero_stage", value])
