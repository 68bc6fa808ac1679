"""Compare the speed of voxray's generation with a plain loop around transformers' generate, at equal output.

The 30 s Voxtral of ``benchmarks/train.py`` with random weights answers rows in the task mix of the seed data. Random
weights never end an answer, so every row has a fixed answer length, the same on both sides: for a transcript 5 tokens
per second of its clip, plus or minus a fifth; for a chat answer drawn from a log-normal distribution around 40 tokens,
at most 256. voxray orders rows by clip and prompt only and does not know these lengths. The sides run one after the
other, with the same batch size, threads and dtype:

    plain    rows in the order of the manifest, padded on the left; each batch is generated until all its rows are done;
             log-mel by transformers' feature extractor, batch by batch
    voxray   its own loop, with log-mel of its own front end

``answers`` measures generation only, from the same stored log-mel; ``whole`` starts from the audio files. RTFx is
seconds of audio per second of work; the work includes the text rows. Prints a table and one JSON line.

    python benchmarks/evaluate.py --rows 96
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import library_batch, make_features, read_clips, write_model, write_rows
from transformers import LogitsProcessor, LogitsProcessorList, WhisperFeatureExtractor

from voxray.batches.collate import collate_prompts
from voxray.features.reader import FeatureRow, Features
from voxray.generation.continuous_batching import generate_greedy
from voxray.generation.generate import sort_by_expected_length
from voxray.models.registry import get_family

TOKENS_PER_SEC, CHAT_TOKENS, MAX_NEW_TOKENS = 5.0, 40, 256


class ForcedLengths(LogitsProcessor):
    """Ends the answer of every row of a batch at a fixed length."""

    def __init__(self, lengths: list[int], prompt_length: int, eos_id: int) -> None:
        self.lengths, self.prompt_length, self.eos_id = torch.tensor(lengths), prompt_length, eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_done = input_ids.shape[1] - self.prompt_length >= self.lengths.to(scores.device)
        scores[is_done] = -float("inf")
        scores[is_done, self.eos_id] = 0
        return scores


def draw_answer_lengths(features: Features) -> list[int]:
    """Answer length of every row, in tokens."""
    random, lengths = np.random.default_rng(1), []
    for row in range(len(features)):
        stored = features.row(row)
        if stored.task == "asr":
            length = stored.num_samples / 16_000 * TOKENS_PER_SEC * random.uniform(0.8, 1.2)
        else:
            length = random.lognormal(np.log(CHAT_TOKENS), 0.8)
        lengths.append(int(np.clip(length, 1, MAX_NEW_TOKENS)))
    return lengths


def generate_plain(
    model: Any, front_end: Any, rows: list[FeatureRow], lengths: list[int], batch_size: int, clips: Any, extract: Any
) -> list[list[int]]:
    """Answer rows with a loop as in public scripts; returns the token ids of every row.

    Args:
        clips: {row: samples} to compute log-mel from; None uses the stored log-mel.
    """
    answers: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        numbers = range(start, min(start + batch_size, len(rows)))
        batch = library_batch(collate_prompts([rows[number] for number in numbers], front_end))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        batch_clips = [clips[number] for number in numbers if number in clips] if clips is not None else []
        if batch_clips:
            options = {"sampling_rate": 16_000, "padding": "max_length", "return_tensors": "pt"}
            batch["input_features"] = extract(batch_clips, max_length=480_000, **options).input_features
        width = batch["input_ids"].shape[1]
        forced = ForcedLengths([lengths[number] for number in numbers], width, front_end.eos_id)
        special = {"pad_token_id": front_end.pad_id, "eos_token_id": front_end.eos_id, "do_sample": False}
        with torch.inference_mode():
            ids_BL = model.generate(
                **batch, max_new_tokens=MAX_NEW_TOKENS, logits_processor=LogitsProcessorList([forced]), **special
            )
        for ids in ids_BL[:, width:].tolist():
            answers.append(ids[: ids.index(front_end.eos_id)] if front_end.eos_id in ids else ids)
    return answers


def generate_voxray(
    model: Any, family: Any, front_end: Any, features: Features, lengths: list[int], batch_size: int, **options: Any
) -> list[list[int]]:
    """Answer the first rows with voxray's loop, one for each of ``lengths``; returns the token ids of every row."""
    order = sort_by_expected_length(features, range(len(lengths)))
    stored = [features.row(row) for row in order]
    options |= {"batch_size": batch_size, "limits": [lengths[row] for row in order]}
    completions = generate_greedy(model, family, front_end, stored, **options)
    ids_by_row = {order[completion.index]: completion.ids for completion in completions}
    return [ids_by_row[row] for row in range(len(lengths))]


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Result of a function, and its seconds of wall time and of CPU time. Other processes affect CPU time less."""
    start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - start_sec, time.process_time() - start_cpu_sec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=131072, help="size of the vocabulary; Voxtral has 131072")
    parser.add_argument("--answers_only", action="store_true", help="do not measure from the audio files")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, model_id = write_rows(folder, flags.rows), write_model(folder / "model", flags.vocabulary)
        family = get_family(model_id)
        front_end, extract = family.front_end(model_id), WhisperFeatureExtractor.from_pretrained(model_id)
        model = family.load_model(model_id, dtype=torch.float32, device=torch.device("cpu"))
        features = make_features(manifest, model_id, folder / "f")
        rows, lengths = [features.row(row) for row in range(len(features))], draw_answer_lengths(features)
        audio_sec = float(features.num_samples.sum()) / 16_000
        generate_plain(model, front_end, rows[:2], [4, 4], 2, None, extract)  # warm-up
        seconds: dict[str, tuple[float, float]] = {}

        def run_plain(clips: Any = None) -> list[list[int]]:
            return generate_plain(model, front_end, rows, lengths, flags.batch_size, clips, extract)

        def run_voxray(stored: Features) -> list[list[int]]:
            return generate_voxray(model, family, front_end, stored, lengths, flags.batch_size)

        plain_ids, seconds["plain answers"] = timed(run_plain)
        voxray_ids, seconds["voxray answers"] = timed(lambda: run_voxray(features))
        if not flags.answers_only:
            _, seconds["plain whole"] = timed(lambda: run_plain(read_clips(manifest)))
            _, seconds["voxray whole"] = timed(lambda: run_voxray(make_features(manifest, model_id, folder / "g")))

    num_equal = sum(one == other for one, other in zip(plain_ids, voxray_ids, strict=True))
    print("            plain s  voxray s  ratio  of CPU time  RTFx plain  RTFx voxray")
    figures: dict[str, Any] = {"rows": flags.rows, "batch_size": flags.batch_size, "vocabulary": flags.vocabulary}
    figures |= {"equal": num_equal, "tokens": sum(map(len, plain_ids)), "audio_sec": round(audio_sec)}
    for kind in ("answers", "whole")[: len(seconds) // 2]:
        (plain_sec, plain_cpu), (voxray_sec, voxray_cpu) = seconds[f"plain {kind}"], seconds[f"voxray {kind}"]
        rates = audio_sec / plain_sec, audio_sec / voxray_sec
        ratios = plain_sec / voxray_sec, plain_cpu / voxray_cpu
        line = f"{kind:10} {plain_sec:8.1f}  {voxray_sec:8.1f}  {ratios[0]:5.2f}  {ratios[1]:11.2f}"
        print(f"{line}  {rates[0]:10.2f}  {rates[1]:11.2f}")
        figures[kind] = {"plain_sec": round(plain_sec, 1), "voxray_sec": round(voxray_sec, 1)}
        figures[kind] |= {"ratio": round(ratios[0], 2), "cpu_ratio": round(ratios[1], 2)}
        figures[kind] |= {"rtfx_plain": round(rates[0], 2), "rtfx_voxray": round(rates[1], 2)}
    print(f"{num_equal} of {len(voxray_ids)} answers are equal, token for token")
    print(json.dumps({"benchmark": "evaluate", **figures}))


if __name__ == "__main__":
    main()
