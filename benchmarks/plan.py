"""Compare the plan with other samplers on the same lengths: padding, balance and planning speed.

Lengths follow the task mix of the seed data: 43 % speech recognition (375 audio tokens and a transcript), 5 % spoken
QA, 52 % text QA. Batches hold ``--rows`` rows, or as many tokens as that many average rows:

    random    a fixed number of rows in random order
    length    transformers' LengthGroupedSampler
    bucket    lhotse's DynamicBucketingSampler, 30 buckets, a token budget (only if lhotse is installed)
    grouped   voxray --batching length
    packed    voxray --batching packed

``efficiency`` is the share of tokens that are not padding (for packs: of their budget). ``imbalance`` is how many more
tokens the most loaded of eight ranks computes over an epoch than the least loaded. ``shares`` is the largest error of a
task's share with weights 1.0, 1.5, 1.2 (only voxray keeps shares). Prints a table and one JSON line.

    python benchmarks/plan.py --rows 16 --count 200000 --large 10000000
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from voxray.batches.packing import Batching
from voxray.batches.plan import Plan
from voxray.core.tasks import TASKS

RANKS = 8
WEIGHTS = {"asr": 1.0, "sqa": 1.5, "tqa": 1.2}


def seed_mix(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Task codes and lengths in tokens of ``count`` rows."""
    random, codes = np.random.default_rng(0), {name: code for code, name in enumerate(TASKS)}
    task = random.choice([codes["asr"], codes["sqa"], codes["tqa"]], count, p=[0.43, 0.05, 0.52]).astype(np.int8)
    text = np.clip(random.lognormal(4.6, 0.6, count), 8, 900).astype(np.int32)
    spoken = (375 + np.clip(random.lognormal(3.4, 0.5, count), 3, 200)).astype(np.int32)
    return task, np.select([task == codes["asr"], task == codes["sqa"]], [spoken, 375 + text // 2], text)


def batch_figures(batches: list[np.ndarray], tokens: np.ndarray, budget: int | None) -> dict[str, float]:
    """Efficiency of batches, and imbalance of ranks that take them in turn."""
    real = np.array([tokens[batch].sum() for batch in batches])
    padded = np.array([budget or len(batch) * tokens[batch].max() for batch in batches])
    computed = real if budget else padded  # the empty end of a pack costs nothing
    ranks = [computed[rank::RANKS].sum() for rank in range(RANKS)]
    return {"efficiency": float(real.sum() / padded.sum()), "imbalance": float(max(ranks) / min(ranks) - 1)}


def make_plan(task: np.ndarray, tokens: np.ndarray, batching: Batching, weights: Any = None) -> Plan:
    return Plan(task, np.arange(len(task)), weights, 0, batching, 8, num_tokens=tokens)


def first_epoch(plan: Plan) -> list[np.ndarray]:
    microbatches = plan.epoch_microbatches(0)
    return [microbatches[number] for number in range(len(microbatches))]


def random_batches(tokens: np.ndarray, rows: int) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(tokens))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def transformers_batches(tokens: np.ndarray, rows: int) -> list[np.ndarray]:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(0)
    order = np.array(list(LengthGroupedSampler(rows, lengths=tokens.tolist(), generator=generator)))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def lhotse_batches(tokens: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches of cuts that are as many seconds long as the rows have tokens. The budget includes padding."""
    from lhotse import CutSet, MonoCut, Recording  # pyright: ignore[reportMissingImports]
    from lhotse.dataset import DynamicBucketingSampler  # pyright: ignore[reportMissingImports]

    def cuts() -> Iterator[Any]:
        for number, length in enumerate(tokens.tolist()):
            recording = Recording(str(number), [], sampling_rate=1, num_samples=length, duration=float(length))
            yield MonoCut(str(number), start=0, duration=float(length), channel=0, recording=recording)

    sampler = DynamicBucketingSampler(
        CutSet.from_cuts(cuts()),
        max_duration=float(budget),
        num_buckets=30,
        shuffle=True,
        seed=0,
        quadratic_duration=None,
    )
    return [np.array([int(cut.id) for cut in batch]) for batch in sampler]


def measure(name: str, make: Callable[[], list[np.ndarray]], tokens: np.ndarray, budget: int | None) -> dict[str, Any]:
    start_sec = time.perf_counter()
    batches = make()
    seconds = time.perf_counter() - start_sec
    return {"name": name, **batch_figures(batches, tokens, budget), "per_sec": sum(map(len, batches)) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows per batch")
    parser.add_argument("--count", type=int, default=200_000, help="rows per epoch")
    parser.add_argument("--large", type=int, default=10_000_000, help="rows of a large plan; 0 skips it")
    flags = parser.parse_args()
    task, tokens = seed_mix(flags.count)
    budget = round(float(tokens.mean()) * flags.rows / 256) * 256
    figures = [
        measure("random", lambda: random_batches(tokens, flags.rows), tokens, None),
        measure("length", lambda: transformers_batches(tokens, flags.rows), tokens, None),
    ]
    try:
        figures.append(measure("bucket", lambda: lhotse_batches(tokens, budget), tokens, None))
    except ImportError:
        print("lhotse is not installed and is skipped")
    for name, batching in (
        ("grouped", Batching("length", microbatch_size=flags.rows)),
        ("packed", Batching("packed", pack_tokens=budget)),
    ):

        def plan_epoch(batching: Batching = batching) -> list[np.ndarray]:
            return first_epoch(make_plan(task, tokens, batching))

        row = measure(name, plan_epoch, tokens, budget if name == "packed" else None)
        drawn = task[make_plan(task, tokens, batching, WEIGHTS).epoch_microbatches(0).rows]
        weights = np.array(list(WEIGHTS.values()))
        error = np.abs(np.bincount(drawn, minlength=len(WEIGHTS)) / len(drawn) - weights / weights.sum()).max()
        figures.append({**row, "share_error": float(error)})
    print(f"{flags.count:,} rows, {flags.rows} rows or {budget:,} tokens per batch")
    print("name     efficiency  imbalance     rows/s  shares")
    for row in figures:
        shares = f"{row['share_error']:.5f}" if "share_error" in row else ""
        print(f"{row['name']:8} {row['efficiency']:10.4f}  {row['imbalance']:9.2%}  {row['per_sec']:9,.0f}  {shares}")
    large = {}
    if flags.large:
        task, tokens = seed_mix(flags.large)
        before, start_sec = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        steps = make_plan(task, tokens, Batching("packed", pack_tokens=budget)).steps_in_epoch(0)
        seconds = time.perf_counter() - start_sec
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        large = {"rows": flags.large, "steps": steps, "sec": round(seconds, 1), "grown_gib": round(grown, 2)}
        print(f"{flags.large:,} rows packed in {seconds:.1f} s ({steps:,} steps); memory grew by {grown:.2f} GiB")
    print(json.dumps({"benchmark": "plan", "rows": figures, "large": large}))


if __name__ == "__main__":
    main()
