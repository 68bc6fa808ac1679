"""Records of a training run: speed, epochs, likelihood and previews."""

import hashlib
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, read_rows
from helpers.library import library_batch
from helpers.training import train as train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxray.batches.collate import collate_training
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.features.reader import Features
from voxray.generation.generate import generate_texts
from voxray.metrics.names import validation_metrics
from voxray.models.registry import get_family
from voxray.models.voxtral.family import Voxtral
from voxray.recipes.training_data import TrainingData
from voxray.training import gpu_stats, validate, validation_hook
from voxray.training.callbacks import Callbacks
from voxray.training.gpu_stats import GpuStats
from voxray.training.loop import warmup_warning
from voxray.training.previews import PREVIEWS_YAML, PreviewSettings, preview, read_settings
from voxray.training.records import published_name, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("asr", "sqa", "tqa")


@pytest.fixture(scope="module")
def data(small, make_features) -> TrainingData:
    folders = make_features(*(small[f"{task}.{part}"] for part in ("train", "val") for task in TASKS))
    return TrainingData(folders[:3], folders[3:])


def settings(output_dir: Path, **changes) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lr": 1e-3, "max_steps": 2}
    values |= {"per_device_bsz": 4, "eval_max_rows": 2, "eval_max_new_tokens": 4, "output_dir": str(output_dir)}
    return MultitaskSettings(**{**values, **changes})


def train(run_dir: Path, data: TrainingData, *, after_validation: Any = lambda step: None, **changes) -> dict[str, Any]:
    run_dir.mkdir(exist_ok=True)

    def report(metrics: dict[str, Any]) -> None:
        after_validation(metrics["step"])

    return train_here(settings(run_dir, **changes), run_dir, data, Worker(), Callbacks(report))


def read_previews(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "previews.jsonl").read_text(encoding="utf-8").splitlines()]


def sha(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


# metrics.jsonl


def test_a_step_records_its_speed(data, small, tmp_path, monkeypatch):
    """Seconds of audio are those of the sound files. A slow loader makes ``data_wait`` large."""
    train(tmp_path / "a", data, max_steps=9)
    records = read_metrics(tmp_path / "a", "train")
    clips = [row["audio_path"] for task in ("asr", "sqa") for row in read_rows(small[f"{task}.train"])]
    audio_sec = sum(record["audio_sec_per_sec"] * record["sec"] for record in records)  # 9 steps, one epoch
    assert audio_sec == pytest.approx(sum(soundfile.info(clip).duration for clip in clips), rel=1e-3)
    assert sum(record["samples_per_sec"] * record["sec"] for record in records) == pytest.approx(36)
    assert all(0 <= record["data_wait"] <= 1 and record["peak_memory_gib"] > 0.05 for record in records)
    assert not any(name.startswith("gpu_") for record in records for name in record), "no GPU here"

    read_row = Features.row
    monkeypatch.setattr(Features, "row", lambda features, number: time.sleep(0.1) or read_row(features, number))
    train(tmp_path / "b", data, loader_workers=0, eval_max_rows=1, max_steps=1)
    [slow] = read_metrics(tmp_path / "b", "train")
    assert slow["data_wait"] * slow["sec"] == pytest.approx(0.4, abs=0.15), "4 rows of 0.1 s each"
    assert slow["data_wait"] > np.mean([record["data_wait"] for record in records[1:]])


def test_epoch_summaries_count_repeated_steps_once(data, tmp_path):
    train(tmp_path, data, epochs=2, max_steps=0, eval_steps=99, save_steps=14)
    for path in (tmp_path / "checkpoints").glob("step-000018"):
        path.rename(tmp_path / "gone")  # as if it had been killed after step 14, in the second epoch
    train(tmp_path, data, epochs=2, max_steps=0, eval_steps=99, save_steps=14)
    steps, epochs = read_metrics(tmp_path, "train"), read_metrics(tmp_path, "epoch")
    assert [(record["step"], record["epoch"], record["steps"]) for record in epochs] == [(9, 1, 9), (18, 2, 9)]
    features = Features(data.train)
    for record, in_epoch in zip(epochs, (steps[:9], steps[9:]), strict=True):
        assert record["sec"] == pytest.approx(sum(step["sec"] for step in in_epoch))
        tokens = {task: features.num_target_tokens[features.task == code].sum() for code, task in enumerate(TASKS)}
        loss_sums = [record[f"loss/{task}"] * tokens[task] for task in TASKS]
        assert record["loss"] == pytest.approx(sum(loss_sums) / sum(tokens.values())), "weighted by tokens"
        assert all(min(s.get(f"loss/{t}", 99) for s in in_epoch) < record[f"loss/{t}"] for t in TASKS)
    log = (tmp_path / "train.log").read_text()
    assert f"epoch 2: {epochs[1]['sec']:.1f} s for 9 steps  loss {epochs[1]['loss']:.4f}" in log
    assert " of their tokens are not padding" in log
    charts = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert "epoch/sec" in charts and "epoch/epoch" not in charts


def test_recorded_values_are_published(data, tmp_path):
    published: dict[tuple[str, str], float] = {}
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    callbacks = Callbacks(publish=lambda name, task, value: published.update({(name, task): value}))
    train_here(settings(run_dir, max_steps=1), run_dir, data, Worker(), callbacks)
    [record] = read_metrics(run_dir, "train")
    assert published["loss", ""] == record["loss"]
    assert published["audio_sec_per_sec", ""] == record["audio_sec_per_sec"]
    assert {task for name, task in published if name == "loss"} - {""} == {
        name.partition("/")[2] for name in record if name.startswith("loss/")
    }
    [validation] = read_metrics(run_dir, "validation")
    assert published["validation_perplexity", "tqa"] == validation["tqa/perplexity"]
    assert published["validation_overall_macro", ""] == validation["overall/macro"]
    assert published_name("epoch", "loss/asr") == ("epoch_loss", "asr")


class FakeNvml:
    """NVML of one GPU that reports no power, like a MIG slice."""

    class NVMLError(Exception):
        pass

    num_queries = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        FakeNvml.num_queries += 1
        return SimpleNamespace(gpu=FakeNvml.num_queries)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("not supported")


def test_nvml_is_queried_once_a_second_and_may_fail(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    now = [100.0]
    monkeypatch.setattr(gpu_stats, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stats = GpuStats(torch.device("cuda", 0))
    memory = {"peak_memory_gib": 1.0, "gpu_memory_gib": 3.0}
    assert [stats.read() for _ in range(5)] == [{**memory, "gpu_util_percent": 1}] * 5
    now[0] += 1.1
    assert stats.read() == {**memory, "gpu_util_percent": 2}
    monkeypatch.setattr(FakeNvml, "nvmlInit", lambda self: (_ for _ in ()).throw(FakeNvml.NVMLError("no driver")))
    assert GpuStats(torch.device("cuda", 0)).read() == {"peak_memory_gib": 1.0}
    assert set(GpuStats(torch.device("cpu")).read()) == {"peak_memory_gib"}


# validation


def test_loss_and_perplexity_equal_transformers(data, monkeypatch):
    """Compared with the loss of transformers, row by row, on the base without an adapter."""
    family = get_family(TINY)
    model: Any = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    rows, answer_logits, training_modes = np.arange(len(features)), Voxtral.answer_logits, []

    def watched_logits(family: Any, model: Any, *args: Any) -> torch.Tensor:
        training_modes.append(any(module.training for module in model.modules()))
        return answer_logits(family, model, *args)

    monkeypatch.setattr(Voxtral, "answer_logits", watched_logits)
    model.train()
    metrics = validate.validate(
        model,
        family,
        validate.ValidationRows(front_end, features, rows),
        Worker(),
        batch_size=8,
        loss_batch_size=5,
        max_new_tokens=1,
    ).metrics
    assert all(module.training for module in model.modules()), "restored afterwards"
    assert training_modes and not any(training_modes), "no dropout"
    model.eval()
    for code, task in enumerate(TASKS):
        nll = tokens = 0.0
        for row in rows[features.task == code]:
            batch = collate_training([features.row(int(row))], front_end)
            count = int((batch["labels"] != -100).sum())
            with torch.no_grad():
                nll += float(model(**library_batch(batch)).loss) * count
            tokens += count
        assert metrics[f"{task}/loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert metrics[f"{task}/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert set(metrics) <= set(validation_metrics()) and {"sqa/bleu", "tqa/distinct_1", "overall/macro"} <= set(metrics)


def test_validation_is_the_same_for_any_number_of_workers(data, monkeypatch):
    """Bit for bit, and on each of them. The workers are threads, with a barrier in place of the collective."""
    family = get_family(TINY)
    model: Any = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    held_out = validate.ValidationRows(front_end, features, np.arange(len(features)))

    def validate_on(world_size: int) -> list[Any]:
        values: list[Any] = [None] * world_size
        barrier = threading.Barrier(world_size, timeout=60)

        def gather(value: Any, worker: Worker) -> list[Any]:
            values[worker.rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        def work(rank: int) -> Any:
            worker, sizes = Worker(rank, world_size), {"batch_size": 2, "loss_batch_size": 3, "max_new_tokens": 3}
            return validate.validate(model, family, held_out, worker, **sizes)

        monkeypatch.setattr(validate, "gather", gather)
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(work, range(world_size)))

    [alone] = validate_on(1)
    assert len(alone.texts) == 12 and alone.metrics["tqa/perplexity"] > 1
    for world_size in (2, 5, 8):
        assert all(validation == alone for validation in validate_on(world_size))


def test_the_best_steps_are_in_the_result(data, tmp_path, monkeypatch):
    values = iter([0.5, 0.3, 0.3, 0.4])

    def fake_validate(*args: Any, **sizes: Any) -> Any:
        value = next(values)
        metrics = {"asr/cer_nospace": value, "tqa/rouge_l": value, "asr/loss": 9 - value, "overall/macro": value}
        return validate.Validation(metrics, {int(row): "" for row in args[2].rows})

    monkeypatch.setattr(validation_hook, "validate", fake_validate)
    result = train(tmp_path, data, max_steps=4, eval_steps=1)
    best = {"asr/cer_nospace": {"step": 2, "value": 0.3}, "tqa/rouge_l": {"step": 1, "value": 0.5}}
    assert result["best"] == {**best, "overall/macro": {"step": 1, "value": 0.5}}
    assert "best asr/cer_nospace: 0.3000 at step 2" in (tmp_path / "train.log").read_text()


# previews


def test_previews_are_shown_at_every_validation(data, small, tmp_path):
    train(tmp_path, data, eval_steps=1)
    entries = read_previews(tmp_path)
    expected = [(step, task) for step in (1, 2) for task in TASKS for _ in range(2)]
    assert [(entry["step"], entry["task"]) for entry in entries] == expected
    keys = {"asr": ("", "transcript"), "sqa": ("question", "answer"), "tqa": ("instruction", "output")}
    for task, (prompt, answer) in keys.items():
        first = [entry for entry in entries if entry["task"] == task][:2]
        rows = read_rows(small[f"{task}.val"])[:2]
        assert [entry["reference"] for entry in first] == [row[answer] for row in rows]
        assert all(row.get(prompt, "") in entry["prompt"] for entry, row in zip(first, rows, strict=True))
        assert {"id", "prediction", "temperature", "top_p", "max_new_tokens"} < set(first[0])
    assert f"6 previews in {tmp_path / 'previews.jsonl'}" in (tmp_path / "train.log").read_text()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    text = board.Tensors("previews/sqa/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | reference | generated |") and entries[-3]["reference"] in text
    assert "data_wait" in str(board.Tags()["scalars"])


def test_previews_yaml_is_read_again_before_each_validation(data, tmp_path):
    """Edits take effect during the run. An invalid file is reported once, and the last valid settings are used."""
    path, edits = tmp_path / PREVIEWS_YAML, {1: "rows: 1\nmax_new_tokens: 2\ntemperature: 1.5\n", 2: "rows: [1\n"}
    edits |= {3: "rows: [1\n", 4: "rows: 1\ntop_p: 1.5\n", 5: "rows: 0\n"}
    texts: list[str] = []

    def edit(step: int) -> None:
        texts.append(path.read_text())
        path.write_text(edits.get(step, ""))

    train(tmp_path, data, max_steps=6, eval_steps=1, after_validation=edit)
    lines = texts[0].splitlines()[1:]
    assert all("  # " in line for line in lines), "every key has a comment"
    assert [line.partition("  #")[0] for line in lines] == [
        *("temperature: 0.0", "top_p: 1.0", "max_new_tokens: 4", "rows: 2")
    ]
    entries = read_previews(tmp_path)
    assert [[e["step"] for e in entries].count(step) for step in range(1, 7)] == [6, 3, 3, 3, 3, 0]
    assert {(e["temperature"], e["max_new_tokens"]) for e in entries if e["step"] > 1} == {(1.5, 2)}
    warnings = [line for line in (tmp_path / "train.log").read_text().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all(line.startswith(f"warning: {path}: ") for line in warnings)
    assert "top_p: " in warnings[1] and "got 1.5" in warnings[1] and "temperature 1.5" in warnings[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: -1", "rows: .*got -1"),
        ("temprature: 1", "temprature: Extra inputs"),
        ("temperature: .nan", "temperature: .*finite"),
        ("max_new_tokens: yes", "max_new_tokens: must be a number"),
        ("- rows", "holds a list"),
        ("rows: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &a [*a]\n\x00", "special characters"),
    ],
)
def test_errors_in_previews_yaml_are_one_line(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path / "p.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read_settings(tmp_path / "absent.yaml")
    (tmp_path / "p.yaml").write_text("rows: 3  # a comment\n")
    assert read_settings(tmp_path / "p.yaml") == PreviewSettings(rows=3)


def test_sampled_previews_do_not_change_training(data, tmp_path):
    common = {"max_steps": 3, "eval_steps": 2, "lora_dropout": 0.3}
    for name, rows in (("off", 0), ("greedy", 2), ("sampled", 2), ("again", 2)):
        (tmp_path / name).mkdir()
        if name in {"sampled", "again"}:
            text = "temperature: 2.0\ntop_p: 0.95\nmax_new_tokens: 6\nrows: 2\n"
            (tmp_path / name / PREVIEWS_YAML).write_text(text)
        train(tmp_path / name, data, preview_rows=rows, **common)
    assert len({sha(tmp_path / name) for name in ("off", "greedy", "sampled", "again")}) == 1
    sampled, again = read_previews(tmp_path / "sampled"), read_previews(tmp_path / "again")
    assert sampled == again, "samples depend on seed, step and rows only"
    greedy = [entry["prediction"] for entry in read_previews(tmp_path / "greedy")]
    assert len(sampled) == 12 and [entry["prediction"] for entry in sampled] != greedy
    assert read_previews(tmp_path / "off") == []


def test_previews_of_repeated_steps_are_deleted(data, tmp_path):
    train(tmp_path, data, max_steps=3, eval_steps=1, save_steps=2)
    (tmp_path / "checkpoints" / "step-000003").rename(tmp_path / "gone")
    with open(tmp_path / "previews.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 1, "task": "as')  # cut off by a kill
    train(tmp_path, data, max_steps=3, eval_steps=1, save_steps=2)
    assert [entry["step"] for entry in read_previews(tmp_path)] == [1] * 6 + [2] * 6 + [3] * 6


def test_sampling_restores_the_random_state(data):
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, rows = Features(data.validation), np.arange(3)
    preview_settings = PreviewSettings(temperature=1.0, max_new_tokens=2)
    engine = SimpleNamespace(own_passes=nullcontext)
    state: Any = SimpleNamespace(model=model, family=family, worker=Worker(), engine=engine)
    held_out = validate.ValidationRows(family.front_end(TINY), features, rows)
    before = torch.get_rng_state()
    options = {"seeds": (0, 1), "batch_size": 2, "max_new_tokens": 2}
    assert len(preview(preview_settings, state, held_out, validate.Validation({}, {}), **options)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_top_p_samples_the_most_likely_tokens(data):
    """A tiny top_p leaves one token, so sampling equals greedy decoding."""
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    rows = [features.row(number) for number in range(4)]
    greedy = generate_texts(model, family, front_end, rows, max_new_tokens=6)
    sampled = [
        generate_texts(model, family, front_end, rows, max_new_tokens=6, temperature=3.0, top_p=top_p, seed=1)
        for top_p in (1e-6, 1.0)
    ]
    assert sampled[0] == greedy != sampled[1]


def test_an_existing_previews_yaml_overrides_the_flag(data, tmp_path):
    train(tmp_path, data, max_steps=1, preview_rows=1)
    assert "overrides" not in (tmp_path / "train.log").read_text() and len(read_previews(tmp_path)) == 3
    train(tmp_path, data, max_steps=2, preview_rows=5)
    assert "says rows: 1, which overrides --preview_rows" in (tmp_path / "train.log").read_text()


def test_a_warm_up_that_outlasts_the_run_is_named() -> None:
    settings = MultitaskSettings(train_jsonl="a", output_dir="b", warmup_steps=50)
    assert warmup_warning(settings, 27).startswith(
        "warning: --warmup_steps 50 of 27 steps: the rate never reaches --lr"
    )
    assert "--warmup_steps 2 is a tenth" in warmup_warning(settings, 27) and not warmup_warning(settings, 51)
