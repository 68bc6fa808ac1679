"""A step of training reads values of the device once: the losses and the norm of the gradients, together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.device_reads import DeviceReads
from helpers.training import train

from voxray.batches.collate import ON_CPU
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import MultitaskSettings, WhisperSettings
from voxray.recipes.training_data import TrainingData
from voxray.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_READ = {"tolist": 1}


def counted_steps(monkeypatch: pytest.MonkeyPatch, settings: Any, data: TrainingData) -> list[DeviceReads]:
    """Train; returns the counts of every step, without AdamW's, whose numbers of steps are on the CPU in any case."""
    counted: list[DeviceReads] = []
    train_step = loop.train_step

    def counting_step(state: Any, loader: Any, settings: Any, step: int, microbatches: Any, *args: Any) -> Any:
        counts = DeviceReads(batch[name] for _, batch in microbatches for name in ON_CPU if name in batch)
        counted.append(counts)
        apply = state.engine.apply
        state.engine.apply = counts.without_counting(apply)
        with counts:
            result = train_step(state, loader, settings, step, microbatches, *args)
        state.engine.apply = apply
        return result

    monkeypatch.setattr(loop, "train_step", counting_step)
    Path(settings.output_dir).mkdir()
    train(settings, Path(settings.output_dir), data)
    return counted


@pytest.mark.parametrize("batching", ["fixed", "packed"])
@pytest.mark.parametrize(
    ("name", "tasks", "store"),
    [
        ("voxtral", ("asr", "sqa", "tqa"), "mel"),
        ("voxtral", ("asr", "sqa", "tqa"), "encoder"),
        ("voxtral", ("tqa",), "mel"),
        ("whisper", ("asr",), "mel"),
        ("whisper", ("asr",), "encoder"),
        ("salmonn", ("asr", "tqa"), "mel"),
        ("salmonn", ("asr",), "encoder"),
    ],
)
def test_a_step_reads_the_device_once(
    name: str,
    tasks: tuple[str, ...],
    store: str,
    batching: str,
    small: dict[str, str],
    salmonn: str,
    make_features: Callable[..., tuple[Path, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bases = {"voxtral": TINY, "whisper": WHISPER, "salmonn": salmonn}
    classes = {"voxtral": MultitaskSettings, "whisper": WhisperSettings, "salmonn": SalmonnSettings}
    folders = make_features(*(small[f"{task}.train"] for task in tasks), model_id=bases[name], store=store)
    values = {"model_id": bases[name], "train_jsonl": "unused", "output_dir": str(tmp_path / "run"), "store": store}
    values |= {"num_workers": 0, "max_steps": 2, "per_device_bsz": 3, "grad_accum": 2, "batching": batching}
    values |= {"pack_tokens": 300} if batching == "packed" else {}
    values |= {"freeze_encoder": True} if name == "whisper" and store == "encoder" else {}
    steps = counted_steps(monkeypatch, classes[name].model_validate(values), TrainingData(folders, ()))
    assert [dict(counts.reads) for counts in steps] == [ONE_READ] * 2


def test_reads_are_counted() -> None:
    """Each of these lines reads once; a tensor that is known to be on the CPU may be read."""
    values, on_cpu = torch.arange(6), torch.arange(3)
    with DeviceReads([on_cpu]) as counts:
        assert values[values > 2].shape == (3,)
        assert int(values.sum()) == 15
        assert values.tolist() == [0, 1, 2, 3, 4, 5]
        assert len(values.repeat_interleave(values)) == 15
        assert on_cpu.tolist() == [0, 1, 2]
        assert values.index_select(0, on_cpu).shape == (3,)
    assert counts.reads == {"index": 1, "_local_scalar_dense": 1, "tolist": 1, "repeat_interleave": 1}
