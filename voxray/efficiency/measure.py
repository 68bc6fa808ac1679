"""Measure latency, throughput and memory of a model with the steps that evaluation runs.

These are the steps of ``generate_greedy``: decode the file, extract features, ``ModelFamily.prefill`` (encoder, prompt,
first token), then one ``DecodeState.decode_step`` per token. The clock stops when the device has finished its work, not
when the work was submitted.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from voxray.audio.decode import decode
from voxray.batches.collate import collate_prompts, to_device
from voxray.core.manifest import Sample
from voxray.efficiency.peak_memory import PeakMemory
from voxray.features.reader import FeatureRow
from voxray.models.front_end import FrontEnd
from voxray.models.interface import ModelFamily


@dataclass(frozen=True)
class LoadedModel:
    """The model to measure, and the device it is on."""

    model: Any
    family: ModelFamily
    front_end: FrontEnd
    device: torch.device

    def synchronise(self) -> None:
        """Wait until a GPU has finished all submitted work. On a CPU there is nothing to wait for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class AnswerTimes:
    """The times of one batch of answers, in seconds.

    Attributes:
        decode_sec: From files to samples.
        features_sec: From samples to the input batch of the model.
        ttft_sec: From the batch to the first token of every row: copy to the device, encoder and prefill.
        ttft_submit_sec: As ``ttft_sec``, but only until the work was submitted to the device. This is what the old
            evaluator reported as time to first token.
        step_secs: Of every decode step after the first token, each for one token of all rows.
        first_step_submit_sec: Of the first decode step, only until the work was submitted.
    """

    decode_sec: float
    features_sec: float
    ttft_sec: float
    ttft_submit_sec: float
    step_secs: tuple[float, ...]
    first_step_submit_sec: float

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
    """The feature row of a clip, from its decoded samples."""
    features = front_end.features(samples)
    values = {name: getattr(sample, name) for name in ("id", "language", "source", "prompt", "answer")}
    values |= {"task": sample.task.name, "target_ids": [], "prompt_ids": front_end.prompt_ids(sample, len(samples))}
    values |= {"audio": features.mel_KF, "fill": features.fill, "num_windows": features.num_windows}
    return FeatureRow.from_values({**values, "num_samples": len(samples)})


def answer_once(loaded: LoadedModel, sample: Sample, batch_size: int, new_tokens: int) -> AnswerTimes:
    """Answer ``batch_size`` copies of a clip in one batch. All generate ``new_tokens`` tokens, past the end of text.

    Args:
        sample: ``audio_path`` is the file.
        new_tokens: At least 2.
    """
    front_end, clock = loaded.front_end, time.perf_counter
    start = clock()
    clips = [decode(sample.audio_path, front_end.sample_rate_hz) for _ in range(batch_size)]
    decoded = clock()
    cpu_batch = collate_prompts([prompt_row(front_end, sample, samples) for samples in clips], front_end)
    loaded.synchronise()
    batch_ready = clock()
    batch = to_device(cpu_batch, loaded.device)
    state, logits_BV = loaded.family.prefill(loaded.model, batch)
    ids_B = logits_BV.argmax(-1)
    prefill_submitted = clock()
    loaded.synchronise()
    first_token = clock()
    step_secs: list[float] = []
    first_step_submit_sec = 0.0
    for _ in range(new_tokens - 1):
        step_start = clock()
        ids_B = state.decode_step(ids_B).argmax(-1)
        step_submitted = clock()
        loaded.synchronise()
        step_secs.append(clock() - step_start)
        first_step_submit_sec = first_step_submit_sec or step_submitted - step_start
    assert len(ids_B) == batch_size
    return AnswerTimes(
        decode_sec=decoded - start,
        features_sec=batch_ready - decoded,
        ttft_sec=first_token - batch_ready,
        ttft_submit_sec=prefill_submitted - batch_ready,
        step_secs=tuple(step_secs),
        first_step_submit_sec=first_step_submit_sec,
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
    """Answer a clip ``warmup`` + ``repeats`` times and measure the last ``repeats``.

    Returns:
        The entry of efficiency.json for one batch size, and the values that the old evaluator would have reported.
    """
    memory = PeakMemory(loaded.device)
    memory.reset()
    memory_before_gib = memory.current_gib()
    runs = []
    on_progress(0, warmup + repeats)
    for number in range(warmup + repeats):
        run = answer_once(loaded, sample, batch_size, new_tokens)
        runs += [run] if number >= warmup else []
        on_progress(number + 1, warmup + repeats)
    peak_gib = max(memory_before_gib, memory.peak_gib())
    samples = decode(sample.audio_path, loaded.front_end.sample_rate_hz)
    clip_sec = len(samples) / loaded.front_end.sample_rate_hz
    row = prompt_row(loaded.front_end, sample, samples)
    entry: dict[str, Any] = {
        "batch_size": batch_size,
        "clip_sec": clip_sec,
        "num_windows": row.num_windows * batch_size,
        "num_prompt_tokens": len(row.prompt_ids),
        "num_new_tokens": batch_size * new_tokens,
        "num_steps": new_tokens - 1,
        "ttft_sec": spread([run.ttft_sec for run in runs]),
        "tpot_sec": spread([run.tpot_sec for run in runs]),
        "decode_sec": spread([run.decode_sec for run in runs]),
        "features_sec": spread([run.features_sec for run in runs]),
        "total_sec": spread([run.total_sec for run in runs]),
        "rtfx": spread([batch_size * clip_sec / run.total_sec for run in runs]),
        "rtfx_model_only": spread([batch_size * clip_sec / run.generation_sec for run in runs]),
        "tokens_per_sec": spread([batch_size * new_tokens / run.generation_sec for run in runs]),
        "peak_memory_gib": peak_gib,
        "memory_held_before_gib": memory_before_gib,
        "memory_kind": memory.kind,
    }
    return entry, {
        "ttft_sec": statistics.fmean(run.ttft_submit_sec for run in runs),
        "tpot_sec": statistics.fmean(run.first_step_submit_sec for run in runs),
        "inference_sec": statistics.fmean(run.ttft_submit_sec + run.first_step_submit_sec for run in runs),
        "num_runs": len(runs),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all values of a measurement."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high, "values": list(values)}
