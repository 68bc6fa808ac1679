"""Evaluation side by side: voxray's generation and a plain loop around transformers' generate, at equal output.

The 30 s Voxtral of ``benchmarks/train.py`` with random weights answers rows in the seeds' mix. Random weights never end
an answer, so each row has a length at which both sides end it: a transcript 5 tokens a second of its clip, give or take
a fifth, a chat answer drawn from a log-normal distribution around 40 tokens, 256 at most. voxray orders rows by clip
and prompt alone, as always; it does not know these lengths. One side after the other, with the same batch size, threads
and type:

    plain    rows in the order of the manifest, padded on the left, each batch generated until all of its rows are done;
             log-mel by transformers' feature extractor, batch by batch
    voxray   its own loop, from log-mel that was made by its own front end

``answers`` is generation alone, from the same stored log-mel; ``whole`` begins at the audio files. RTFx is seconds of
audio over seconds of work, with the text rows' work in it. Prints a table, and one JSON line.

    python benchmarks/evaluate.py --rows 96
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import features_of, read_clips, write_model, write_rows
from transformers import LogitsProcessor, LogitsProcessorList, WhisperFeatureExtractor

from voxray.batches.collate import collate_prompts
from voxray.features.reader import FeatureRow, Features
from voxray.generation.continuous_batching import generate_greedy
from voxray.generation.generate import by_expected_length
from voxray.models.registry import get_family

TOKENS_PER_SEC, CHAT_TOKENS, MAX_NEW_TOKENS = 5.0, 40, 256


class EndAt(LogitsProcessor):
    """Lets every row of a batch end at its own length."""

    def __init__(self, lengths: list[int], prompt_length: int, eos_id: int) -> None:
        self.lengths, self.prompt_length, self.eos_id = torch.tensor(lengths), prompt_length, eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        over = input_ids.shape[1] - self.prompt_length >= self.lengths
        scores[over] = -float("inf")
        scores[over, self.eos_id] = 0
        return scores


def lengths_of(features: Features) -> list[int]:
    """At how many tokens each row's answer ends."""
    random, found = np.random.default_rng(1), []
    for row in range(len(features)):
        stored = features.row(row)
        if stored.task == "asr":
            length = stored.num_samples / 16_000 * TOKENS_PER_SEC * random.uniform(0.8, 1.2)
        else:
            length = random.lognormal(np.log(CHAT_TOKENS), 0.8)
        found.append(int(np.clip(length, 1, MAX_NEW_TOKENS)))
    return found


def plain(
    model: Any, front_end: Any, rows: list[FeatureRow], lengths: list[int], size: int, clips: Any, extract: Any
) -> list[list[int]]:
    """A loop as in public scripts.

    Args:
        clips: {row: samples} to make log-mel of; None takes the stored one.
    """
    found: list[list[int]] = []
    for start in range(0, len(rows), size):
        numbers = range(start, min(start + size, len(rows)))
        batch = collate_prompts([rows[number] for number in numbers], front_end)
        heard = [clips[number] for number in numbers if number in clips] if clips is not None else []
        if heard:
            options = {"sampling_rate": 16_000, "padding": "max_length", "return_tensors": "pt"}
            batch["input_features"] = extract(heard, max_length=480_000, **options).input_features
        width = batch["input_ids"].shape[1]
        ending = EndAt([lengths[number] for number in numbers], width, front_end.eos_id)
        special = {"pad_token_id": front_end.pad_id, "eos_token_id": front_end.eos_id, "do_sample": False}
        with torch.inference_mode():
            ids_BL = model.generate(
                **batch, max_new_tokens=MAX_NEW_TOKENS, logits_processor=LogitsProcessorList([ending]), **special
            )
        for ids in ids_BL[:, width:].tolist():
            found.append(ids[: ids.index(front_end.eos_id)] if front_end.eos_id in ids else ids)
    return found


def ours(model: Any, family: Any, front_end: Any, features: Features, lengths: list[int], size: int) -> list[list[int]]:
    order = by_expected_length(features, range(len(features)))
    stored = [features.row(row) for row in order]
    options = {"batch_size": size, "limits": [lengths[row] for row in order]}
    found = {
        order[answer.number]: answer.ids for answer in generate_greedy(model, family, front_end, stored, **options)
    }
    return [found[row] for row in range(len(features))]


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What some work gives, and its seconds by the clock and of CPU time, which other processes disturb less."""
    began, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - began, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=131072, help="131072 is Voxtral's own")
    parser.add_argument("--answers_only", action="store_true")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, model_id = write_rows(folder, flags.rows), write_model(folder / "model", flags.vocabulary)
        family = get_family(model_id)
        front_end, extract = family.front_end(model_id), WhisperFeatureExtractor.from_pretrained(model_id)
        model = family.load_model(model_id, dtype=torch.float32, device=torch.device("cpu"))
        features = features_of(manifest, model_id, folder / "f")
        rows, lengths = [features.row(row) for row in range(len(features))], lengths_of(features)
        audio_sec = float(features.num_samples.sum()) / 16_000
        plain(model, front_end, rows[:2], [4, 4], 2, None, extract)  # so that nobody pays for the first call
        size, sides = flags.batch_size, {}
        theirs, sides["plain answers"] = timed(lambda: plain(model, front_end, rows, lengths, size, None, extract))
        mine, sides["voxray answers"] = timed(lambda: ours(model, family, front_end, features, lengths, size))
        if not flags.answers_only:
            clips = partial(read_clips, manifest)
            _, sides["plain whole"] = timed(lambda: plain(model, front_end, rows, lengths, size, clips(), extract))
            made = partial(features_of, manifest, model_id, folder / "g")
            _, sides["voxray whole"] = timed(lambda: ours(model, family, front_end, made(), lengths, size))

    equal = sum(one == other for one, other in zip(theirs, mine, strict=True))
    print("            plain s  voxray s  ratio  of CPU time  RTFx plain  RTFx voxray")
    figures: dict[str, Any] = {"rows": flags.rows, "batch_size": flags.batch_size, "vocabulary": flags.vocabulary}
    figures |= {"equal": equal, "tokens": sum(map(len, theirs)), "audio_sec": round(audio_sec)}
    for kind in ("answers", "whole")[: len(sides) // 2]:
        (slow, slow_cpu), (fast, fast_cpu) = sides[f"plain {kind}"], sides[f"voxray {kind}"]
        rates, ratios = (audio_sec / slow, audio_sec / fast), (slow / fast, slow_cpu / fast_cpu)
        shown = f"{kind:10} {slow:8.1f}  {fast:8.1f}  {ratios[0]:5.2f}  {ratios[1]:11.2f}"
        print(f"{shown}  {rates[0]:10.2f}  {rates[1]:11.2f}")
        figures[kind] = {"plain_sec": round(slow, 1), "voxray_sec": round(fast, 1), "ratio": round(ratios[0], 2)}
        figures[kind] |= {"cpu_ratio": round(ratios[1], 2)}
        figures[kind] |= {"rtfx_plain": round(rates[0], 2), "rtfx_voxray": round(rates[1], 2)}
    print(f"{equal} of {len(mine)} answers are equal, token for token")
    print(json.dumps({"benchmark": "evaluate", **figures}))


if __name__ == "__main__":
    main()
