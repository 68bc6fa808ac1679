"""Shared parts of training the tiny base models from scratch: synthetic speech, a CTC head, the loop.

Both train on English voices and Korean men's voices. Korean women's voices are left to fine-tuning. A CTC loss on the
audio side, whose head is discarded afterwards, trains the encoder first; without it attention takes far longer to use
the audio. Shapes: B rows, T positions, F mel bins.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import texts
import torch
import voices
from torch.nn import functional

CTC_WEIGHT = 0.3
SAVE_EVERY = 500  # steps


def safe_utterance(rng: random.Random, language: str, guard: texts.LeakGuard) -> texts.Utterance:
    """Draw a sentence that contains no held-out text."""
    while guard.leaks((one := texts.utterance(rng, language)).text):
        pass
    return one


def speak_base(
    rng: random.Random, guard: texts.LeakGuard, num_clips: dict[str, int]
) -> tuple[list[texts.Utterance], list[np.ndarray]]:
    """Synthesise ``num_clips`` sentences per language in the base's voices; clips over MAX_SEC are dropped."""
    utterances = [safe_utterance(rng, language, guard) for language, num in num_clips.items() for _ in range(num)]
    lines = [(one.text, voices.draw_speaker(rng, one.language, adaptation=False)) for one in utterances]
    started = time.perf_counter()
    clips = voices.speak_all(lines)
    short = [i for i, clip in enumerate(clips) if len(clip) <= voices.MAX_SEC * voices.SAMPLE_RATE_HZ]
    print(f"base: {len(short)} clips in {time.perf_counter() - started:.0f} s", flush=True)
    return [utterances[i] for i in short], [clips[i] for i in short]


def spec_augment(mels_BFT: torch.Tensor, rng: random.Random) -> None:
    """Mask in each clip, in place, one band of up to an eighth of the mel bins and two spans of up to 12 frames."""
    num_bins = mels_BFT.shape[1]
    for mel_FT in mels_BFT:
        fill = mel_FT.mean()
        width, low = rng.randint(0, num_bins // 8), rng.randint(0, num_bins - num_bins // 8 - 1)
        mel_FT[low : low + width] = fill
        for _ in range(2):
            width, start = rng.randint(0, 12), rng.randint(0, 250)
            mel_FT[:, start : start + width] = fill


class CtcHead(torch.nn.Module):
    """Predicts the text from hidden states of the audio side; used in training only.

    Args:
        width: Size of a hidden state.
        tokens: Every token id that a target may hold.
    """

    def __init__(self, width: int, tokens: set[int]) -> None:
        super().__init__()
        self.label_of = {token: i + 1 for i, token in enumerate(sorted(tokens))}  # 0 is the blank
        self.head = torch.nn.Linear(width, len(tokens) + 1)

    def loss(self, hidden_BTD: torch.Tensor, targets: list[Sequence[int]]) -> torch.Tensor:
        """Mean over the rows of the CTC loss of their target token ids."""
        log_probs = self.head(hidden_BTD).log_softmax(-1)
        return functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([self.label_of[token] for target in targets for token in target]),
            torch.full((len(targets),), log_probs.shape[1]),
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )


def fit(
    modules: list[torch.nn.Module],
    losses: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    save: Callable[[], None],
    num_steps: int,
    peak_lr: float,
    warmup_steps: int = 200,
) -> None:
    """Train with AdamW, warm-up and half a cosine; save the model every SAVE_EVERY steps and at the end.

    Args:
        modules: Modules to train: the model and its CTC head.
        losses: Draws a batch and returns its answer loss and its CTC loss.
        save: Writes the current model.
    """
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
        return min((step + 1) / warmup_steps, 1.0) * max(decay, 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.perf_counter()
    for step in range(num_steps):
        answer_loss, ctc_loss = losses()
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + CTC_WEIGHT * ctc_loss).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == num_steps - 1:
            elapsed_sec = time.perf_counter() - started
            print(f"step {step} answer {answer_loss:.3f} ctc {ctc_loss:.3f} {elapsed_sec:.0f} s", flush=True)
        if step % SAVE_EVERY == SAVE_EVERY - 1 or step == num_steps - 1:
            save()
