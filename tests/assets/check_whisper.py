"""Measure the tiny Whisper before and after LoRA: clips, languages, long recordings. Writes README.md."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import soundfile
import texts
import torch
from corpus import read_jsonl
from peft import LoraConfig
from scores import adapt, cer, draw_rows, folder_mb, write_figures
from transformers import WhisperForConditionalGeneration, WhisperProcessor

LORA_MODULES = r".*\.(q_proj|v_proj)"  # of encoder and decoder, the usual choice for Whisper
NUM_STEPS, BATCH_SIZE, PEAK_LR, WARMUP_STEPS = 300, 16, 3e-3, 50
SAMPLE_RATE_HZ = 16_000
NUM_RECORDINGS, RECORDING_SEC = 10, 10


class Transcriber:
    """A model with its processor, and the manifests that it is measured on."""

    def __init__(self, folder: Path, speech: Path) -> None:
        self.model = WhisperForConditionalGeneration.from_pretrained(folder)
        assert {p.dtype for p in self.model.parameters()} == {torch.float32}  # stored in float16
        self.processor = WhisperProcessor.from_pretrained(folder)
        self.speech = speech

    def read(self, name: str) -> tuple[list[dict], list[np.ndarray]]:
        """Read a manifest and its clips."""
        rows = read_jsonl(self.speech / f"{name}.jsonl")
        return rows, [soundfile.read(self.speech / row["audio_path"], dtype="float32")[0] for row in rows]

    def mels(self, clips: list[np.ndarray]) -> torch.Tensor:
        """Compute log-mel windows, (clips, 80, 400)."""
        return self.processor(clips, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features

    def transcribe(self, name: str, return_timestamps: bool = False) -> tuple[list[dict], list[str]]:
        """Transcribe a manifest, each row in its language; return its rows and the transcripts."""
        rows, clips = self.read(name)
        languages = [row["language"] for row in rows]
        ids_BT = self.model.generate(
            input_features=self.mels(clips), language=languages, task="transcribe", return_timestamps=return_timestamps
        )
        return rows, self.processor.batch_decode(ids_BT, skip_special_tokens=True)

    def languages_right(self, name: str) -> float:
        """Share of a manifest's rows whose language is detected."""
        rows, clips = self.read(name)
        tokens = self.processor.tokenizer.convert_ids_to_tokens(self.model.detect_language(self.mels(clips)))
        return sum(f"<|{row['language']}|>" == token for row, token in zip(rows, tokens, strict=True)) / len(rows)

    def transcribe_long(self, samples: np.ndarray, language: str) -> str:
        """Transcribe a recording of any length as transformers does, window by window with timestamps."""
        inputs = self.processor(
            samples,
            sampling_rate=SAMPLE_RATE_HZ,
            truncation=False,
            padding="longest",
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids_BT = self.model.generate(**inputs, language=language, task="transcribe", return_timestamps=True)
        return self.processor.decode(ids_BT[0], skip_special_tokens=True)


def recordings(whisper: Transcriber, language: str) -> list[tuple[np.ndarray, str]]:
    """Concatenate held-out clips of the base's own voices, with pauses of 0.2 to 0.7 s, to recordings of about 10 s."""
    rng = random.Random(3)
    rows, clips = whisper.read("base.val")
    own = [i for i, row in enumerate(rows) if row["language"] == language]
    result = []
    while len(result) < NUM_RECORDINGS:
        parts, transcripts = [np.zeros(3200, np.float32)], []
        while sum(map(len, parts)) < (RECORDING_SEC - 1) * SAMPLE_RATE_HZ:
            i = rng.choice(own)
            parts += [clips[i], np.zeros(rng.randint(3200, 11_200), np.float32)]
            transcripts.append(rows[i]["transcript"])
        result.append((np.concatenate(parts), " ".join(transcripts)))
    return result


def measure(whisper: Transcriber, show: int = 0) -> dict[str, float]:
    """Score transcripts with and without timestamps, detected languages, and long recordings."""
    whisper.model.eval()
    figures = {}
    for name, timed in (("base.val", False), ("base.val", True), ("asr.val", False)):
        rows, hypotheses = whisper.transcribe(name, timed)
        key = f"{name} timed" if timed else name
        figures[key] = cer([row["transcript"] for row in rows], hypotheses)
        for language in texts.LANGUAGES:
            own = [i for i, row in enumerate(rows) if row["language"] == language]
            if own:
                figures[f"{key} {language}"] = cer([rows[i]["transcript"] for i in own], [hypotheses[i] for i in own])
        for row, text in list(zip(rows, hypotheses, strict=True))[:show]:
            print(f"  {key}: {row['transcript']} | {text}")
    figures["language"] = whisper.languages_right("base.val")
    figures["language women"] = whisper.languages_right("asr.val")
    for language in texts.LANGUAGES:
        long = recordings(whisper, language)
        hypotheses = [whisper.transcribe_long(samples, language) for samples, _ in long]
        figures[f"long {language}"] = cer([reference for _, reference in long], hypotheses)
        for (_, reference), text in list(zip(long, hypotheses, strict=True))[:show]:
            print(f"  long {language}: {reference} | {text}")
    return figures


def adapt_on_corpus(whisper: Transcriber) -> None:
    """Train LoRA on the transcription rows without timestamps, the usual way to fine-tune Whisper."""
    rows, clips = whisper.read("asr.train")
    mels, tokenizer = whisper.mels(clips), whisper.processor.tokenizer
    tokenizer.set_prefix_tokens(language="ko", task="transcribe", predict_timestamps=False)
    ids = [torch.tensor(tokenizer(row["transcript"]).input_ids) for row in rows]
    num_prompt = len(tokenizer.prefix_tokens)
    draws = draw_rows(list(range(len(rows))), BATCH_SIZE)

    def draw() -> dict[str, torch.Tensor]:
        picked = next(draws)
        pad = torch.nn.utils.rnn.pad_sequence
        ids_BT = pad([ids[i] for i in picked], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels_BT = pad([ids[i] for i in picked], batch_first=True, padding_value=-100)
        labels_BT[:, :num_prompt] = -100
        return {"input_features": mels[picked], "decoder_input_ids": ids_BT[:, :-1], "labels": labels_BT[:, 1:]}

    config = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=LORA_MODULES)
    whisper.model = adapt(whisper.model, config, draw, NUM_STEPS, PEAK_LR, WARMUP_STEPS)


def write_readme(here: Path, folder: Path, speech: Path) -> None:
    """Measure, check that fine-tuning has an effect, and write the figures to README.md."""
    torch.set_num_threads(1)  # as in training: a second thread gains little
    whisper = Transcriber(folder, speech)
    num_params = sum(p.numel() for p in whisper.model.parameters())
    before = measure(whisper, show=3)
    print("before", before, flush=True)
    start_sec = time.perf_counter()
    adapt_on_corpus(whisper)
    after = measure(whisper, show=3)
    train_sec = time.perf_counter() - start_sec
    print("after", after)
    rows = {
        "own voices, Korean men (base.val)": "base.val ko",
        "own voices, English (base.val)": "base.val en",
        "own voices, both (base.val)": "base.val",
        "the same, with timestamps": "base.val timed",
        "unheard Korean women (asr.val)": "asr.val",
        "long recordings of own voices, Korean": "long ko",
        "long recordings of own voices, English": "long en",
        "language detected, own voices (share)": "language",
        "language detected, Korean women (share)": "language women",
    }
    table = "\n".join(f"| {title} | {before[key]:.3f} | {after[key]:.3f} |" for title, key in rows.items())
    size = folder_mb(folder)
    figures = f"""
{num_params:,} parameters; `whisper-tiny/` {size:.1f} MB.
LoRA: r 32, alpha 64, dropout 0.05 on q_proj and v_proj of encoder and decoder; asr.train alone, without timestamps;
{NUM_STEPS} steps of {BATCH_SIZE} rows, peak rate {PEAK_LR:g}, {WARMUP_STEPS} warm-up steps, then linear to zero.
Training and scoring took {train_sec:.0f} s on one thread.
CER is without spaces; a long recording is about 10 s of `base.val` clips.

| CER | base | after LoRA |
|---|---|---|
{table}
"""
    write_figures(here / "README.md", "whisper", figures)
    assert size < 5, size
    assert before["base.val"] < 0.1 and max(before["long ko"], before["long en"]) < 0.2, before
    assert before["language"] > 0.95, before
    assert after["asr.val"] < 0.5 * before["asr.val"], (before, after)
