"""Make everything in this folder: the tiny Voxtral, the tiny Whisper and the synthetic speech.

    python tests/assets/make.py tokenizer       voxtral-tiny/tekken.json, a subset of Tekken (cut_tokenizer.py)
    python tests/assets/make.py corpus          speech/: espeak-ng clips and manifests (texts.py, voices.py, corpus.py)
    python tests/assets/make.py base            voxtral-tiny/: the base, trained from scratch (pretrain_voxtral.py)
    python tests/assets/make.py check           measure it on its own and new voices, with LoRA; writes README.md
    python tests/assets/make.py whisper         whisper-tiny/: tokenizer and base model (train_tokenizer.py, windows.py,
                                                pretrain_whisper.py)
    python tests/assets/make.py check_whisper   measure it the same way, also on long recordings and languages
    python tests/assets/make.py all             the six in this order, about 50 minutes on two cores

It needs the espeak-ng program; tests only need its output. Texts, speakers, rows and samples are the same in every
run. Two things differ: Ogg files contain a random stream number, and trained weights depend on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import corpus
import cut_tokenizer
import texts

HERE = Path(__file__).parent
MODEL, WHISPER, SPEECH = HERE / "voxtral-tiny", HERE / "whisper-tiny", HERE / "speech"
VOCAB_SIZE = 4096
NUM_WHISPER_TOKENS = 1500  # of text, at most
sys.path.insert(0, str(HERE.parents[1]))  # voxray, when it is not installed


def make_tokenizer() -> None:
    """Write ``voxtral-tiny/tekken.json``."""
    MODEL.mkdir(exist_ok=True)
    cut_tokenizer.write_tokenizer(MODEL / "tekken.json", texts.all_strings(), VOCAB_SIZE)


def make_corpus() -> None:
    """Write ``speech/``."""
    corpus.write_corpus(SPEECH)


def make_base() -> None:
    """Train the base model and write it with its processor to ``voxtral-tiny/``."""
    import pretrain_voxtral

    pretrain_voxtral.train_base(MODEL)


def make_check() -> None:
    """Measure the base before and after LoRA and write the figures to README.md."""
    import check_voxtral

    check_voxtral.write_readme(HERE, MODEL, SPEECH)


def make_whisper() -> None:
    """Train the tiny Whisper's tokenizer, then its base model, and write the whole folder ``whisper-tiny/``."""
    import pretrain_whisper
    import train_tokenizer

    train_tokenizer.write_tokenizer(WHISPER, texts.all_strings(), NUM_WHISPER_TOKENS)
    pretrain_whisper.train_whisper(WHISPER)


def make_check_whisper() -> None:
    """Measure the tiny Whisper before and after LoRA and write the figures to README.md."""
    import check_whisper

    check_whisper.write_readme(HERE, WHISPER, SPEECH)


STEPS = {
    "tokenizer": make_tokenizer,
    "corpus": make_corpus,
    "base": make_base,
    "check": make_check,
    "whisper": make_whisper,
    "check_whisper": make_check_whisper,
}


def main() -> None:
    """Run one step or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "all"])
    chosen = parser.parse_args().step
    for name, step in STEPS.items():
        if chosen in (name, "all"):
            step()


if __name__ == "__main__":
    main()
