"""Shared parts of the checks of both tiny models: error rates, a LoRA run, and the figures in README.md."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import texts
import torch
from peft import LoraConfig, get_peft_model
from rapidfuzz.distance import Levenshtein

Row = TypeVar("Row")


def cer(references: list[str], hypotheses: list[str]) -> float:
    """Corpus character error rate without spaces."""
    pairs = [(texts.normalise(r), texts.normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum(Levenshtein.distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def exact(references: list[str], hypotheses: list[str]) -> float:
    """Share of answers that match after normalisation."""
    return sum(texts.normalise(r) == texts.normalise(h) for r, h in zip(references, hypotheses, strict=True)) / len(
        references
    )


def draw_rows(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Yield batches endlessly; every row occurs once, in random order, before any row repeats."""
    rng = random.Random(0)
    order: list[int] = []
    while True:
        if len(order) < batch_size:
            order += rng.sample(range(len(rows)), len(rows))
        picked, order = order[:batch_size], order[batch_size:]
        yield [rows[i] for i in picked]


def adapt(
    model: torch.nn.Module,
    config: LoraConfig,
    draw: Callable[[], dict[str, torch.Tensor]],
    num_steps: int,
    peak_lr: float,
    warmup_steps: int,
) -> torch.nn.Module:
    """Train LoRA with AdamW on the batches that ``draw`` returns: warm-up, then linear to zero; return the model."""
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=peak_lr, weight_decay=0.0)
    model.train()
    for step in range(num_steps):
        warm, left = (step + 1) / warmup_steps, (num_steps - step) / num_steps
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(warm, left)
        loss = model(**draw()).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == num_steps - 1:
            print(f"lora step {step} loss {loss:.3f}", flush=True)
    return model


def folder_mb(folder: Path) -> float:
    """Size of a folder's files, in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def write_figures(readme: Path, model: str, figures: str) -> None:
    """Write a model's figures between its two marks in README.md."""
    start, end = f"<!-- figures of {model}: written by make.py -->", f"<!-- end of figures of {model} -->"
    head, rest = readme.read_text(encoding="utf-8").split(start)
    readme.write_text(f"{head}{start}{figures}{end}{rest.split(end)[1]}", encoding="utf-8")
