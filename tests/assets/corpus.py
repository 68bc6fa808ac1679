"""Write the synthetic corpus: clips and the JSONL manifests beside them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import texts
import voices

NUM_TRAIN, NUM_VAL, NUM_BASE_VAL = 300, 80, 40
NUM_SQA_TRAIN, NUM_SQA_VAL = 120, 40
NUM_TQA_TRAIN, NUM_TQA_VAL = 240, 40
MAX_BYTES = 5_000_000


class HeldOut:
    """All held-out texts. They have their own seed, so every step of make.py draws the same ones."""

    def __init__(self) -> None:
        rng = random.Random(2024)
        draw = texts.heldout_utterance
        korean = texts.distinct(rng, "ko", NUM_VAL + NUM_TQA_VAL + NUM_BASE_VAL // 2, draw)
        self.val = korean[:NUM_VAL]
        self.tqa = korean[NUM_VAL : NUM_VAL + NUM_TQA_VAL]
        self.base = korean[NUM_VAL + NUM_TQA_VAL :] + texts.distinct(rng, "en", NUM_BASE_VAL // 2, draw)
        self.guard = texts.LeakGuard([u.text for u in (*self.val, *self.tqa, *self.base)])


def write_corpus(folder: Path) -> None:
    """Write clips and manifests to ``folder`` (emptied first), then check sizes, lengths and leaks."""
    shutil.rmtree(folder, ignore_errors=True)
    heldout = HeldOut()
    rng = random.Random(7)
    train = texts.distinct(rng, "ko", NUM_TRAIN, texts.utterance, heldout.guard)
    train = _write_clips(folder, "train", train, rng, adaptation=True)
    val = _write_clips(folder, "val", heldout.val, rng, adaptation=True)
    base = _write_clips(folder, "base", heldout.base, rng, adaptation=False)

    write_jsonl(folder / "asr.train.jsonl", [asr_row(*one) for one in train])
    write_jsonl(folder / "asr.val.jsonl", [asr_row(*one) for one in val])
    write_jsonl(folder / "base.val.jsonl", [asr_row(*one) for one in base])
    write_jsonl(folder / "sqa.train.jsonl", [sqa_row(rng, *one) for one in rng.sample(train, NUM_SQA_TRAIN)])
    write_jsonl(folder / "sqa.val.jsonl", [sqa_row(rng, *one) for one in rng.sample(val, NUM_SQA_VAL)])
    tqa_train = texts.distinct(rng, "ko", NUM_TQA_TRAIN, texts.utterance, heldout.guard)
    write_jsonl(folder / "tqa.train.jsonl", [tqa_row(rng, i, u) for i, u in enumerate(tqa_train)])
    write_jsonl(folder / "tqa.val.jsonl", [tqa_row(rng, i, u) for i, u in enumerate(heldout.tqa)])
    check_corpus(folder, heldout)


def asr_row(audio_path: str, utterance: texts.Utterance) -> dict:
    """Make a transcription row."""
    return {"audio_path": audio_path, "transcript": utterance.text, "language": utterance.language}


def sqa_row(rng: random.Random, audio_path: str, utterance: texts.Utterance) -> dict:
    """Make a spoken QA row: a question about the clip, with the answer in one word."""
    question, answer = texts.ask(rng, utterance)
    return {"audio_path": audio_path, "question": question, "answer": answer}


def tqa_row(rng: random.Random, index: int, about: texts.Utterance) -> dict:
    """Make a text QA row; every eighth has everything in the instruction and an empty input."""
    question, answer = texts.ask(rng, about)
    if index % 8 == 7:
        return {"instruction": f"{about.text}. {question}", "input": "", "output": answer}
    return {"instruction": question, "input": about.text, "output": answer}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, with Hangul unescaped."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict]:
    """Read rows from JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_corpus(folder: Path, heldout: HeldOut) -> None:
    """Assert that no held-out text is in a training row, no clip is too long, and the folder is small enough."""
    for path in sorted(folder.glob("*.train.jsonl")):
        for row in read_jsonl(path):
            for key in ("transcript", "question", "answer", "instruction", "input", "output"):
                assert not heldout.guard.leaks(row.get(key, "")), (path.name, row)
    train_clips = {row["audio_path"] for row in read_jsonl(folder / "asr.train.jsonl")}
    assert {row["audio_path"] for row in read_jsonl(folder / "sqa.train.jsonl")} <= train_clips
    for name in ("asr.val", "sqa.val", "base.val"):
        assert train_clips.isdisjoint(row["audio_path"] for row in read_jsonl(folder / f"{name}.jsonl")), name
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert num_bytes < MAX_BYTES, num_bytes
    print(f"corpus: {len(list(folder.rglob('*.*')))} files, {num_bytes / 1e6:.2f} MB, no leak")


def _write_clips(
    folder: Path, split: str, utterances: list[texts.Utterance], rng: random.Random, adaptation: bool
) -> list[tuple[str, texts.Utterance]]:
    """Synthesise each text in a random voice of the set; return (path relative to the manifests, text) pairs."""
    speakers = [voices.draw_speaker(rng, utterance.language, adaptation) for utterance in utterances]
    clips = voices.speak_all(
        [(utterance.text, speaker) for utterance, speaker in zip(utterances, speakers, strict=True)]
    )
    written = []
    (folder / split).mkdir(parents=True)
    for i, (samples, utterance, speaker) in enumerate(zip(clips, utterances, speakers, strict=True)):
        assert len(samples) <= voices.MAX_SEC * voices.SAMPLE_RATE_HZ, (utterance.text, len(samples))
        suffix = {0: ".wav", 1: ".flac"}.get(i, ".ogg")  # one WAV and one FLAC per split, to test their decoders
        path = f"{split}/{i:03d}-{speaker.voice.replace('+', '_')}{suffix}"
        (folder / path).write_bytes(voices.encode(samples, suffix))
        written.append((path, utterance))
    if split == "val":
        (folder / "sample.wav").write_bytes(voices.encode(clips[0], ".wav"))
    return written
