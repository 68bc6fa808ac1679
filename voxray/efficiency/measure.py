"""How long a model takes to answer and how much memory it needs, measured the way evaluation answers.

The parts of an answer are those of ``generate_greedy``: decode the file, extract features, ``ModelFamily.prefill``
(encoder, prompt, first token), then one ``DecodeState.decode_step`` per token. The clock stops when the device has
finished its work, not when the work was submitted.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from voxray.audio.decode import decode
from voxray.batches.collate import collate_prompts
from voxray.core.manifest import Sample
from voxray.efficiency.peak_memory import PeakMemory
from voxray.features.reader import FeatureRow
from voxray.models.interface import FrontEnd, ModelFamily


@dataclass(frozen=True)
class LoadedModel:
    """A model that is measured.

    Attributes:
        device: Where it is.
    """

    model: Any
    family: ModelFamily
    front_end: FrontEnd
    device: torch.device

    def synchronise(self) -> None:
        """Wait until a GPU has done what it was asked for; a CPU has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class AnswerTimes:
    """The times of one batch of answers, in seconds.

    Attributes:
        decode_sec: From files to samples.
        features_sec: From samples to the batch that the model takes.
        ttft_sec: From the batch to the first token of every row: copied to the device, heard, prompt read.
        asked_sec: The same until the device was asked, not done: what the old evaluator took for it.
        step_secs: Of every further token of all rows.
        first_step_asked_sec: Of the first of them until the device was asked.
    """

    decode_sec: float
    features_sec: float
    ttft_sec: float
    asked_sec: float
    step_secs: tuple[float, ...]
    first_step_asked_sec: float

    @property
    def tpot_sec(self) -> float:
        """Time per output token after the first: the mean over all steps."""
        return sum(self.step_secs) / len(self.step_secs)

    @property
    def generation_sec(self) -> float:
        return self.ttft_sec + sum(self.step_secs)

    @property
    def total_sec(self) -> float:
        return self.decode_sec + self.features_sec + self.generation_sec


def prompt_row(front_end: FrontEnd, sample: Sample, samples: np.ndarray) -> FeatureRow:
    """A clip that was just decoded as a row to answer."""
    features = front_end.features(samples)
    values = {name: getattr(sample, name) for name in ("id", "language", "source", "prompt", "answer")}
    values |= {"task": sample.task.name, "target_ids": [], "prompt_ids": front_end.prompt_ids(sample, len(samples))}
    values |= {"audio": features.mel_KF, "fill": features.fill, "num_windows": features.num_windows}
    return FeatureRow.of({**values, "num_samples": len(samples)})


def answer_once(loaded: LoadedModel, sample: Sample, batch_size: int, new_tokens: int) -> AnswerTimes:
    """Answer a clip ``batch_size`` times together, each with ``new_tokens`` tokens, whatever they say.

    Args:
        sample: With the file in ``audio_path``.
        new_tokens: At least 2.
    """
    front_end, clock = loaded.front_end, time.perf_counter
    began = clock()
    clips = [decode(sample.audio_path, front_end.sample_rate_hz) for _ in range(batch_size)]
    decoded = clock()
    prepared = collate_prompts([prompt_row(front_end, sample, samples) for samples in clips], front_end)
    loaded.synchronise()
    ready = clock()
    batch = {name: tensor.to(loaded.device) for name, tensor in prepared.items()}
    state, logits_BV = loaded.family.prefill(loaded.model, batch)
    ids_B = logits_BV.argmax(-1)
    asked = clock()
    loaded.synchronise()
    first = clock()
    step_secs: list[float] = []
    first_step_asked_sec = 0.0
    for _ in range(new_tokens - 1):
        step_began = clock()
        ids_B = state.decode_step(ids_B).argmax(-1)
        step_asked = clock()
        loaded.synchronise()
        step_secs.append(clock() - step_began)
        first_step_asked_sec = first_step_asked_sec or step_asked - step_began
    assert len(ids_B) == batch_size
    return AnswerTimes(
        decode_sec=decoded - began,
        features_sec=ready - decoded,
        ttft_sec=first - ready,
        asked_sec=asked - ready,
        step_secs=tuple(step_secs),
        first_step_asked_sec=first_step_asked_sec,
    )


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    sample: Sample,
    *,
    batch_size: int,
    new_tokens: int,
    warmup: int,
    repeats: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Answer a clip over and over.

    Returns:
        What stands in efficiency.json for one batch size, and the figures that the old evaluator would have given.
    """
    memory = PeakMemory(loaded.device)
    memory.restart()
    held_gib = memory.now_gib()
    answered = []
    for number in range(warmup + repeats):
        run = answer_once(loaded, sample, batch_size, new_tokens)
        answered += [run] if number >= warmup else []
        on_progress(number + 1, warmup + repeats)
    peak_gib, samples = max(held_gib, memory.peak_gib()), decode(sample.audio_path, loaded.front_end.sample_rate_hz)
    clip_sec = len(samples) / loaded.front_end.sample_rate_hz
    row = prompt_row(loaded.front_end, sample, samples)
    found: dict[str, Any] = {
        "batch_size": batch_size,
        "clip_sec": clip_sec,
        "num_windows": row.num_windows * batch_size,
        "num_prompt_tokens": len(row.prompt_ids),
        "num_new_tokens": batch_size * new_tokens,
        "num_steps": new_tokens - 1,
        "ttft_sec": spread([run.ttft_sec for run in answered]),
        "tpot_sec": spread([run.tpot_sec for run in answered]),
        "decode_sec": spread([run.decode_sec for run in answered]),
        "features_sec": spread([run.features_sec for run in answered]),
        "total_sec": spread([run.total_sec for run in answered]),
        "rtfx": spread([batch_size * clip_sec / run.total_sec for run in answered]),
        "rtfx_model_only": spread([batch_size * clip_sec / run.generation_sec for run in answered]),
        "tokens_per_sec": spread([batch_size * new_tokens / run.generation_sec for run in answered]),
        "peak_memory_gib": peak_gib,
        "memory_held_before_gib": held_gib,
        "memory_kind": memory.kind,
    }
    return found, {
        "ttft_sec": statistics.fmean(run.asked_sec for run in answered),
        "tpot_sec": statistics.fmean(run.first_step_asked_sec for run in answered),
        "inference_sec": statistics.fmean(run.asked_sec + run.first_step_asked_sec for run in answered),
        "num_runs": len(answered),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of what was measured, and every single value."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high, "values": list(values)}
