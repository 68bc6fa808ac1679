"""What a run says of itself while it trains: speed, epochs, likelihood and previews."""

import hashlib
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, read_rows

from voxray.batches.collate import collate_training
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.features.reader import Features
from voxray.generation.generate import generate_texts
from voxray.metrics.names import validation_metrics
from voxray.models.registry import get_family
from voxray.models.voxtral.family import Voxtral
from voxray.recipes import multitask
from voxray.recipes.training_data import TrainingData
from voxray.training import gpu_stats as hardware
from voxray.training import validate
from voxray.training import validation_hook as validator
from voxray.training.callbacks import Callbacks
from voxray.training.gpu_stats import GpuStats
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

    return multitask.train(settings(run_dir, **changes), run_dir, data, Worker(), Callbacks(report))


def shown(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "previews.jsonl").read_text(encoding="utf-8").splitlines()]


def sha(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


# speed


def test_a_step_says_how_fast_it_was(data, small, tmp_path, monkeypatch):
    """Seconds of audio are those of the sound files; waiting is what a slow loader makes the loop wait."""
    train(tmp_path / "a", data, max_steps=9)
    records = read_metrics(tmp_path / "a", "train")
    clips = [row["audio_path"] for task in ("asr", "sqa") for row in read_rows(small[f"{task}.train"])]
    heard = sum(record["audio_sec_per_sec"] * record["sec"] for record in records)
    assert heard == pytest.approx(sum(soundfile.info(clip).duration for clip in clips), rel=1e-3), "9 steps, one epoch"
    assert sum(record["samples_per_sec"] * record["sec"] for record in records) == pytest.approx(36)
    assert all(0 <= record["data_wait"] <= 1 and record["peak_memory_gib"] > 0.05 for record in records)
    assert not any(name.startswith("gpu_") for record in records for name in record), "there is none"

    read = Features.row
    monkeypatch.setattr(Features, "row", lambda features, number: time.sleep(0.1) or read(features, number))
    train(tmp_path / "b", data, loader_workers=0, eval_max_rows=1, max_steps=1)
    [slow] = read_metrics(tmp_path / "b", "train")
    assert slow["data_wait"] * slow["sec"] == pytest.approx(0.4, abs=0.15), "four rows"
    assert slow["data_wait"] > np.mean([record["data_wait"] for record in records[1:]])


def test_an_epoch_is_summed_up_and_a_resumed_one_counts_every_step_once(data, tmp_path):
    train(tmp_path, data, epochs=2, max_steps=0, eval_steps=99, save_steps=14)
    for path in (tmp_path / "checkpoints").glob("step-000018"):
        path.rename(tmp_path / "gone")  # as if it had been killed after step 14, in the second epoch
    train(tmp_path, data, epochs=2, max_steps=0, eval_steps=99, save_steps=14)
    steps, epochs = read_metrics(tmp_path, "train"), read_metrics(tmp_path, "epoch")
    assert [(record["step"], record["epoch"], record["steps"]) for record in epochs] == [(9, 1, 9), (18, 2, 9)]
    features = Features(data.train)
    for record, mine in zip(epochs, (steps[:9], steps[9:]), strict=True):
        assert record["sec"] == pytest.approx(sum(step["sec"] for step in mine))
        tokens = {task: features.num_target_tokens[features.task == code].sum() for code, task in enumerate(TASKS)}
        each = [record[f"loss/{task}"] * tokens[task] for task in TASKS]
        assert record["loss"] == pytest.approx(sum(each) / sum(tokens.values())), "by tokens"
        assert all(min(s.get(f"loss/{t}", 99) for s in mine) < record[f"loss/{t}"] for t in TASKS)
    log = (tmp_path / "train.log").read_text()
    assert f"epoch 2: {epochs[1]['sec']:.1f} s for 9 steps  loss {epochs[1]['loss']:.4f}" in log
    assert " of their tokens are no padding" in log


def test_everything_recorded_is_published(data, tmp_path):
    seen: dict[tuple[str, str], float] = {}
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run = settings(run_dir, max_steps=1)
    host = Callbacks(publish=lambda name, task, value: seen.update({(name, task): value}))
    multitask.train(run, run_dir, data, Worker(), host)
    [record] = read_metrics(run_dir, "train")
    assert seen["loss", ""] == record["loss"] and seen["audio_sec_per_sec", ""] == record["audio_sec_per_sec"]
    assert {task for name, task in seen if name == "loss"} - {""} == {
        name.partition("/")[2] for name in record if name.startswith("loss/")
    }
    [validation] = read_metrics(run_dir, "validation")
    assert seen["validation_perplexity", "tqa"] == validation["tqa/perplexity"]
    assert seen["validation_overall_macro", ""] == validation["overall/macro"]
    assert published_name("epoch", "loss/asr") == ("epoch_loss", "asr")


class FakeNvml:
    """NVML of one GPU that knows no power, as a part of a GPU (MIG) does not."""

    class NVMLError(Exception):
        pass

    asked = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        FakeNvml.asked += 1
        return SimpleNamespace(gpu=FakeNvml.asked)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("not supported")


def test_a_gpu_is_asked_once_a_second_and_owes_no_answer(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    now = [100.0]
    monkeypatch.setattr(hardware, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = GpuStats(torch.device("cuda", 0))
    usual = {"peak_memory_gib": 1.0, "gpu_memory_gib": 3.0}
    assert [found.read() for _ in range(5)] == [{**usual, "gpu_util_percent": 1}] * 5
    now[0] += 1.1
    assert found.read() == {**usual, "gpu_util_percent": 2}
    monkeypatch.setattr(FakeNvml, "nvmlInit", lambda self: (_ for _ in ()).throw(FakeNvml.NVMLError("no driver")))
    assert GpuStats(torch.device("cuda", 0)).read() == {"peak_memory_gib": 1.0}
    assert set(GpuStats(torch.device("cpu")).read()) == {"peak_memory_gib"}


# validation


def test_loss_and_perplexity_are_those_of_transformers(data, monkeypatch):
    """By the library's own loss, row by row, on the base as it is loaded."""
    family = get_family(TINY)
    model: Any = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    rows, answer_logits, in_training = np.arange(len(features)), Voxtral.answer_logits, []

    def watched_logits(family: Any, model: Any, *args: Any) -> torch.Tensor:
        in_training.append(any(module.training for module in model.modules()))
        return answer_logits(family, model, *args)

    monkeypatch.setattr(Voxtral, "answer_logits", watched_logits)
    model.train()
    found = validate.validate(
        model, family, front_end, features, rows, Worker(), batch_size=8, loss_batch_size=5, max_new_tokens=1
    ).metrics
    assert all(module.training for module in model.modules()), "as it was"
    assert in_training and not any(in_training), "no dropout"
    model.eval()
    for code, task in enumerate(TASKS):
        nll = tokens = 0.0
        for row in rows[features.task == code]:
            batch = collate_training([features.row(int(row))], front_end)
            del batch["task"]
            count = int((batch["labels"] != -100).sum())
            with torch.no_grad():
                nll += float(model(**batch).loss) * count
            tokens += count
        assert found[f"{task}/loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert found[f"{task}/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert set(found) <= set(validation_metrics()) and {"sqa/bleu", "tqa/distinct_1", "overall/macro"} <= set(found)


def test_validation_is_the_same_for_any_number_of_workers(data, monkeypatch):
    """To the last bit, and on each of them; the workers are threads that meet where processes would gather."""
    family = get_family(TINY)
    model: Any = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    rows = np.arange(len(features))

    def on(world_size: int) -> list[Any]:
        values: list[Any] = [None] * world_size
        meeting = threading.Barrier(world_size, timeout=60)

        def gather(value: Any, worker: Worker) -> list[Any]:
            values[worker.rank] = value
            meeting.wait()
            found = list(values)
            meeting.wait()
            return found

        def work(rank: int) -> Any:
            worker, sizes = Worker(rank, world_size), {"batch_size": 2, "loss_batch_size": 3, "max_new_tokens": 3}
            return validate.validate(model, family, front_end, features, rows, worker, **sizes)

        monkeypatch.setattr(validate, "gather", gather)
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(work, range(world_size)))

    [alone] = on(1)
    assert len(alone.texts) == 12 and alone.metrics["tqa/perplexity"] > 1
    for world_size in (2, 5, 8):
        assert all(found == alone for found in on(world_size))


def test_a_run_says_which_step_was_best(data, tmp_path, monkeypatch):
    rates = iter([0.5, 0.3, 0.3, 0.4])

    def scored(*args: Any, **sizes: Any) -> Any:
        rate = next(rates)
        metrics = {"asr/cer_nospace": rate, "tqa/rouge_l": rate, "asr/loss": 9 - rate, "overall/macro": rate}
        return validate.Validation(metrics, {int(row): "" for row in args[4]})

    monkeypatch.setattr(validator, "validate", scored)
    result = train(tmp_path, data, max_steps=4, eval_steps=1)
    best = {"asr/cer_nospace": {"step": 2, "value": 0.3}, "tqa/rouge_l": {"step": 1, "value": 0.5}}
    assert result["best"] == {**best, "overall/macro": {"step": 1, "value": 0.5}}
    assert "best asr/cer_nospace: 0.3000 at step 2" in (tmp_path / "train.log").read_text()


# previews


def test_previews_are_shown_at_every_validation(data, small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, data, eval_steps=1)
    entries = shown(tmp_path)
    places = [(step, task) for step in (1, 2) for task in TASKS for _ in range(2)]
    assert [(entry["step"], entry["task"]) for entry in entries] == places
    wanted = {"asr": ("", "transcript"), "sqa": ("question", "answer"), "tqa": ("instruction", "output")}
    for task, (prompt, answer) in wanted.items():
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
    """Edits take effect while the run goes on; a broken file is told once and leaves the last good values."""
    path, edits = tmp_path / PREVIEWS_YAML, {1: "rows: 1\nmax_new_tokens: 2\ntemperature: 1.5\n", 2: "rows: [1\n"}
    edits |= {3: "rows: [1\n", 4: "rows: 1\ntop_p: 1.5\n", 5: "rows: 0\n"}
    first: list[str] = []

    def edit(step: int) -> None:
        first.append(path.read_text())
        path.write_text(edits.get(step, ""))

    train(tmp_path, data, max_steps=6, eval_steps=1, after_validation=edit)
    assert first[0].splitlines()[1:] == [line for line in first[0].splitlines() if "  # " in line], "a comment each"
    assert [line.partition("  #")[0] for line in first[0].splitlines()[1:]] == [
        *("temperature: 0.0", "top_p: 1.0", "max_new_tokens: 4", "rows: 2")
    ]
    entries = shown(tmp_path)
    assert [[e["step"] for e in entries].count(step) for step in range(1, 7)] == [6, 3, 3, 3, 3, 0]
    assert {(e["temperature"], e["max_new_tokens"]) for e in entries if e["step"] > 1} == {(1.5, 2)}
    warnings = [line for line in (tmp_path / "train.log").read_text().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all(line.startswith(f"warning: {path}: ") for line in warnings)
    assert "top_p: " in warnings[1] and "got 1.5" in warnings[1] and "temperature 1.5" in warnings[1]


@pytest.mark.parametrize(
    ("text", "fault"),
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
def test_faults_of_previews_yaml_are_one_line(tmp_path, text, fault):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=fault) as error:
        read_settings(tmp_path / "p.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read_settings(tmp_path / "absent.yaml")
    (tmp_path / "p.yaml").write_text("rows: 3  # as written\n")
    assert read_settings(tmp_path / "p.yaml") == PreviewSettings(rows=3)


def test_sampled_previews_leave_training_as_it_is(data, tmp_path):
    common = {"max_steps": 3, "eval_steps": 2, "lora_dropout": 0.3}
    for name, rows in (("off", 0), ("on", 2), ("drawn", 2), ("again", 2)):
        (tmp_path / name).mkdir()
        if name in {"drawn", "again"}:
            text = "temperature: 2.0\ntop_p: 0.95\nmax_new_tokens: 6\nrows: 2\n"
            (tmp_path / name / PREVIEWS_YAML).write_text(text)
        train(tmp_path / name, data, preview_rows=rows, **common)
    assert len({sha(tmp_path / name) for name in ("off", "on", "drawn", "again")}) == 1
    drawn, again = shown(tmp_path / "drawn"), shown(tmp_path / "again")
    assert drawn == again, "what is drawn depends on seed, step and row alone"
    greedy = [entry["prediction"] for entry in shown(tmp_path / "on")]
    assert len(drawn) == 12 and [entry["prediction"] for entry in drawn] != greedy
    assert shown(tmp_path / "off") == []


def test_previews_of_steps_that_are_done_again_are_dropped(data, tmp_path):
    train(tmp_path, data, max_steps=3, eval_steps=1, save_steps=2)
    (tmp_path / "checkpoints" / "step-000003").rename(tmp_path / "gone")
    with open(tmp_path / "previews.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 1, "task": "as')  # cut off by a kill
    train(tmp_path, data, max_steps=3, eval_steps=1, save_steps=2)
    assert [entry["step"] for entry in shown(tmp_path)] == [1] * 6 + [2] * 6 + [3] * 6


def test_drawing_leaves_the_random_state_as_it_was(data):
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, rows = Features(data.validation), np.arange(3)
    how = PreviewSettings(temperature=1.0, max_new_tokens=2)
    trainee: Any = SimpleNamespace(model=model, family=family, worker=Worker())
    parts = (family.front_end(TINY), features, rows, validate.Validation({}, {}))
    before = torch.get_rng_state()
    assert len(preview(how, trainee, *parts, step=1, seed=0, batch_size=2, max_new_tokens=2)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_top_p_keeps_to_the_likeliest_tokens(data):
    """A tiny top_p leaves one token, so drawing gives what temperature 0 gives."""
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    features, front_end = Features(data.validation), family.front_end(TINY)
    rows = [features.row(number) for number in range(4)]
    greedy = generate_texts(model, family, front_end, rows, max_new_tokens=6)
    drawn = [
        generate_texts(model, family, front_end, rows, max_new_tokens=6, temperature=3.0, top_p=top_p, seed=1)
        for top_p in (1e-6, 1.0)
    ]
    assert drawn[0] == greedy != drawn[1]


def test_a_flag_that_an_edited_file_outdoes_is_told(data, tmp_path):
    train(tmp_path, data, max_steps=1, preview_rows=1)
    assert "holds over" not in (tmp_path / "train.log").read_text() and len(shown(tmp_path)) == 3
    train(tmp_path, data, max_steps=2, preview_rows=5)
    assert "says rows: 1, which holds over --preview_rows" in (tmp_path / "train.log").read_text()
