"""Make training windows of the tiny Whisper: 4 s of clips, and the tokens that describe them.

A window with timestamps is a part of a longer recording, as in transformers' long-form ``generate``. Each utterance
that ends inside it is ``<|start|> text<|end|>``; an utterance that the window's end cuts off is only its start. After
two timestamps in a row at the end, ``generate`` continues from the first of them; after a single one, from the window's
end (``_retrieve_segment`` in transformers' ``models/whisper/generation_whisper.py``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import texts
import train_tokenizer as tok
from transformers import WhisperTokenizer
from whisper_folder import WINDOW_FRAMES, WINDOW_SAMPLES

SAMPLES_PER_TIMESTAMP, SAMPLES_PER_FRAME = 320, 160
MAX_GAP = 11_200  # 0.7 s of silence before an utterance
MIN_AUDIBLE = 1600  # 0.1 s; less of a cut utterance is not audible
PLAIN_SHARE, EMPTY_SHARE = 0.5, 0.04  # shares of the windows: one utterance without timestamps; silence
STOP_SHARE = 0.3  # probability that the recording ends after an utterance
PREVIOUS_SHARE = 0.2  # share of the windows with timestamps whose prompt has the previous text


@dataclass(frozen=True)
class Window:
    """One row: 4 s of samples, the decoder's tokens, which of them are learnt, and the CTC target.

    The recording ends at frame ``num_frames``; ``generate`` fills the rest with zeros, which is a loud mel value.
    ``spoken``, the CTC target, is None if an utterance is cut off, because it is unknown how much of it is audible.
    """

    samples: np.ndarray
    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]
    spoken: tuple[int, ...] | None
    num_frames: int


class Windows:
    """Draws windows from clips; every token id comes from the tokenizer."""

    def __init__(self, utterances: list[texts.Utterance], clips: list[np.ndarray], tokenizer: WhisperTokenizer) -> None:
        self.utterances, self.clips, self.tokenizer = utterances, clips, tokenizer
        self.of_language = {
            code: [i for i, u in enumerate(utterances) if u.language == code] for code in texts.LANGUAGES
        }
        self.id_of = {name: tokenizer.convert_tokens_to_ids(name) for name in tok.special_tokens()}
        self.first_timestamp = self.id_of[tok.NO_TIMESTAMPS] + 1

    def draw(self, rng: random.Random) -> Window:
        """Draw one window of any kind."""
        kind = rng.random()
        if kind < EMPTY_SHARE:
            return self.empty(rng)
        language = self.utterances[rng.randrange(len(self.utterances))].language
        return self.plain(rng, language) if kind < EMPTY_SHARE + PLAIN_SHARE else self.timed(rng, language)

    def text_ids(self, text: str) -> list[int]:
        """Encode text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def spoken_ids(self, text: str) -> list[int]:
        """Encode text for the CTC head: every word with a leading space, also the first."""
        return self.text_ids(" " + text)

    def plain(self, rng: random.Random, language: str) -> Window:
        """Make a window of one utterance, without timestamps."""
        i = rng.choice(self.of_language[language])
        start = rng.choice([0, rng.randint(0, 4000)])
        samples, end = _put_into_window([(start, self.clips[i])])
        text = self.utterances[i].text
        tokens = [*self._prompt(language), self.id_of[tok.NO_TIMESTAMPS], *self.text_ids(text), self.id_of[tok.END]]
        num_frames = _draw_end_frame(rng, end)
        return Window(samples, *self._learn(tokens, 0, no_timestamps=True), tuple(self.spoken_ids(text)), num_frames)

    def timed(self, rng: random.Random, language: str) -> Window:
        """Make a window of a recording: utterances with pauses between them, and their timestamps."""
        placed, spoken, tokens, is_cut, position = [], [], self._prompt(language), False, rng.randint(0, MAX_GAP)
        while True:
            i = rng.choice(self.of_language[language])
            end = position + len(self.clips[i])
            if position > WINDOW_SAMPLES - MIN_AUDIBLE:
                break
            if end > WINDOW_SAMPLES and not placed:
                continue  # the first utterance must fit; a window with only a cut utterance would teach nothing
            placed.append((position, self.clips[i]))
            tokens.append(self._timestamp(position))
            if end > WINDOW_SAMPLES:
                is_cut = True
                break
            tokens += [*self.text_ids(" " + self.utterances[i].text), self._timestamp(end)]
            spoken += self.spoken_ids(self.utterances[i].text)
            position = end + rng.randint(1600, MAX_GAP)
            if rng.random() < STOP_SHARE:
                break
        samples, end = _put_into_window(placed)
        tokens.append(self.id_of[tok.END])
        before = self._previous(rng, language) if rng.random() < PREVIOUS_SHARE else []
        num_frames = WINDOW_FRAMES if is_cut else _draw_end_frame(rng, end)
        learning = self._learn([*before, *tokens], len(before))
        return Window(samples, *learning, None if is_cut else tuple(spoken), num_frames)

    def empty(self, rng: random.Random) -> Window:
        """Make a silent window: the no-speech token follows the start of the transcript."""
        start = [self.id_of[tok.START], self.id_of[tok.NO_SPEECH], self.id_of[tok.END]]
        silence = np.zeros(WINDOW_SAMPLES, np.float32)
        if rng.random() < 0.5:  # as generate prompts with a known language: an empty segment
            start = [*self._prompt(rng.choice(texts.LANGUAGES)), self.first_timestamp, self.id_of[tok.END]]
            return Window(silence, tuple(start), (False,) * 3 + (True,) * 2, (), _draw_end_frame(rng, 0))
        return Window(silence, tuple(start), (False, True, True), (), _draw_end_frame(rng, 0))

    def _prompt(self, language: str) -> list[int]:
        return [self.id_of[tok.START], self.id_of[f"<|{language}|>"], self.id_of[tok.TRANSCRIBE]]

    def _timestamp(self, sample: int) -> int:
        return self.first_timestamp + round(sample / SAMPLES_PER_TIMESTAMP)

    def _previous(self, rng: random.Random, language: str) -> list[int]:
        text = self.utterances[rng.choice(self.of_language[language])].text
        ids = self.text_ids(" " + text)
        if rng.random() < 0.5:
            length = rng.randint(40, 140)
            ids = [self.first_timestamp, *ids, self.first_timestamp + length]
        return [self.id_of[tok.PREVIOUS], *ids]

    def _learn(
        self, tokens: list[int], num_before: int, no_timestamps: bool = False
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Mark the tokens to learn: the language token (so that it can be detected) and all after the prompt."""
        learnt = [False] * num_before + [False, True, False]
        learnt += [False] if no_timestamps else []
        return tuple(tokens), (*learnt, *[True] * (len(tokens) - len(learnt)))


def _put_into_window(placed: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Put clips into a silent window at their sample positions; return it and the end of the last clip in samples."""
    samples = np.zeros(WINDOW_SAMPLES, np.float32)
    end = 0
    for start, clip in placed:
        end = min(start + len(clip), WINDOW_SAMPLES)
        samples[start:end] += clip[: end - start]
    return samples, end


def _draw_end_frame(rng: random.Random, end: int) -> int:
    """Draw the recording's last mel frame: soon after the last sound, or the window's end (padded with silence)."""
    if rng.random() < 0.6:
        return WINDOW_FRAMES
    return min(WINDOW_FRAMES, (end + rng.randint(320, 6400)) // SAMPLES_PER_FRAME)
