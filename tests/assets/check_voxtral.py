"""Measure the tiny Voxtral on voices it was trained on and on new voices, before and after LoRA. Writes README.md."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import texts
import torch
from corpus import read_jsonl
from examples import Encoder, collate, generate, read_rows
from peft import LoraConfig
from scores import adapt, cer, draw_rows, exact, folder_mb, write_figures
from transformers import VoxtralForConditionalGeneration

LORA_MODULES = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|model\.multi_modal_projector\.linear_[12]"
)
NUM_STEPS, BATCH_SIZE, PEAK_LR, WARMUP_STEPS = 300, 16, 2e-3, 20


def load(folder: Path) -> VoxtralForConditionalGeneration:
    """Load the base, which is stored in float16, in float32."""
    model = VoxtralForConditionalGeneration.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return model


def majority(speech: Path, task: str) -> float:
    """Exact match of always answering with the most frequent answer of the training rows."""
    key = "answer" if task == "sqa" else "output"
    top = Counter(row[key] for row in read_jsonl(speech / f"{task}.train.jsonl")).most_common(1)[0][0]
    answers = [row[key] for row in read_jsonl(speech / f"{task}.val.jsonl")]
    return exact(answers, [top] * len(answers))


def measure(model: torch.nn.Module, speech: Path, encoder: Encoder, show: int = 0) -> dict[str, float]:
    """Generate answers to all four validation manifests and score them."""
    figures = {}
    for name, key in (("base", "transcript"), ("asr", "transcript"), ("sqa", "answer"), ("tqa", "output")):
        rows = read_jsonl(speech / f"{name}.val.jsonl")
        hypotheses = generate(model, *read_rows(speech, rows, encoder), encoder)
        references = [row[key] for row in rows]
        figures[name] = (cer if key == "transcript" else exact)(references, hypotheses)
        if name in ("sqa", "tqa"):
            figures[f"{name}_either"] = exact(
                references, [answer.removesuffix(texts.polite("", "ko")) for answer in hypotheses]
            )
        if name == "base":
            for language in texts.LANGUAGES:
                chosen = [i for i, row in enumerate(rows) if row["language"] == language]
                figures[f"base_{language}"] = cer([references[i] for i in chosen], [hypotheses[i] for i in chosen])
        for reference, hypothesis in list(zip(references, hypotheses, strict=True))[:show]:
            print(f"  {name}: {reference} | {hypothesis}")
    return figures


def adapt_on_corpus(model: VoxtralForConditionalGeneration, speech: Path, encoder: Encoder) -> torch.nn.Module:
    """Train LoRA (llm and projector) on the three mixed training manifests; return the adapted model."""
    rows = [row for task in ("asr", "sqa", "tqa") for row in read_jsonl(speech / f"{task}.train.jsonl")]
    examples, mels = read_rows(speech, rows, encoder)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LORA_MODULES)
    draws = draw_rows(examples, BATCH_SIZE)
    return adapt(model, config, lambda: collate(next(draws), mels), NUM_STEPS, PEAK_LR, WARMUP_STEPS)


def write_readme(here: Path, model_folder: Path, speech: Path) -> None:
    """Measure, check that the demo shows an effect, and write the figures to README.md."""
    torch.set_num_threads(2)
    encoder = Encoder(model_folder / "tekken.json")
    model = load(model_folder)
    num_params = sum(p.numel() for p in model.parameters())
    before = measure(model, speech, encoder, show=3)
    print("before", before, flush=True)
    start_sec = time.perf_counter()
    after = measure(adapt_on_corpus(model, speech, encoder), speech, encoder, show=3)
    train_sec = time.perf_counter() - start_sec
    print("after", after)
    floor = {task: majority(speech, task) for task in ("sqa", "tqa")}
    sizes = {folder: folder_mb(folder) for folder in (model_folder, speech)}
    assert sizes[model_folder] < 6 and sizes[speech] < 5, sizes
    figures = f"""
{num_params:,} parameters; `voxtral-tiny/` {sizes[model_folder]:.1f} MB, `speech/` {sizes[speech]:.1f} MB.
LoRA: r 16, alpha 32 on the language model's linear layers and the projector; the three training manifests mixed;
{NUM_STEPS} steps of {BATCH_SIZE} rows, peak rate {PEAK_LR:g}, {WARMUP_STEPS} warm-up steps, then linear to zero.
Training and scoring took {train_sec:.0f} s. CER is without spaces, EM is exact match.

| | base | after LoRA | most frequent answer |
|---|---|---|---|
| own voices, Korean men (base.val) | CER {before["base_ko"]:.3f} | {after["base_ko"]:.3f} | |
| own voices, English (base.val) | CER {before["base_en"]:.3f} | {after["base_en"]:.3f} | |
| own voices, both (base.val) | CER {before["base"]:.3f} | {after["base"]:.3f} | |
| unheard Korean women (asr.val) | CER {before["asr"]:.3f} | {after["asr"]:.3f} | |
| spoken questions (sqa.val) | EM {before["sqa"]:.3f} | {after["sqa"]:.3f} | {floor["sqa"]:.3f} |
| the same, with or without the full ending | EM {before["sqa_either"]:.3f} | {after["sqa_either"]:.3f} | |
| written questions (tqa.val) | EM {before["tqa"]:.3f} | {after["tqa"]:.3f} | {floor["tqa"]:.3f} |
| the same, with or without the full ending | EM {before["tqa_either"]:.3f} | {after["tqa_either"]:.3f} | |
"""
    write_figures(here / "README.md", "voxtral", figures)
    assert before["base"] < 0.15, before
    assert after["asr"] < 0.5 * before["asr"], (before, after)
    assert all(after[task] > floor[task] for task in floor), (after, floor)
