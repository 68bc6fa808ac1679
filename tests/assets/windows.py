"""Make the windows the tiny Whisper learns from: clips laid into 4 s, and the tokens that describe them.

With timestamps a window is a piece of a longer recording, as transformers' long-form ``generate`` will meet it. Each
utterance that ends inside it is ``<|start|> text<|end|>``; one that the window's end cuts off is its start alone. Two
timestamps in a row at the end make ``generate`` go on from the first of the two, a single one from the window's end
(``_retrieve_segment`` in transformers' ``models/whisper/generation_whisper.py``).
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
MIN_HEARD = 1600  # 0.1 s; of an utterance cut off later than this nothing can be heard
PLAIN_SHARE, EMPTY_SHARE = 0.5, 0.04  # of the windows: one utterance without timestamps; nothing said
STOP_SHARE = 0.3  # after each utterance: the recording is over
PREVIOUS_SHARE = 0.2  # of the windows with timestamps: they know what was said before


@dataclass(frozen=True)
class Window:
    """One row: 4 s of samples, the decoder's tokens, which of them are learnt, and what the CTC head spells.

    ``num_frames`` is where the recording ends; ``generate`` fills the rest with zeros, a loud mel value. ``spoken`` is
    None where an utterance is cut off, for nobody knows how much of it was heard.
    """

    samples: np.ndarray
    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]
    spoken: tuple[int, ...] | None
    num_frames: int


class Windows:
    """Draws windows from clips; every token id comes from the tokenizer."""

    def __init__(self, said: list[texts.Utterance], clips: list[np.ndarray], tokenizer: WhisperTokenizer) -> None:
        self.said, self.clips, self.tokenizer = said, clips, tokenizer
        self.of_language = {code: [i for i, u in enumerate(said) if u.language == code] for code in texts.LANGUAGES}
        self.id_of = {name: tokenizer.convert_tokens_to_ids(name) for name in tok.special_tokens()}
        self.first_timestamp = self.id_of[tok.NO_TIMESTAMPS] + 1

    def draw(self, rng: random.Random) -> Window:
        """Draw one window of any kind."""
        kind = rng.random()
        if kind < EMPTY_SHARE:
            return self.empty(rng)
        language = self.said[rng.randrange(len(self.said))].language
        return self.plain(rng, language) if kind < EMPTY_SHARE + PLAIN_SHARE else self.timed(rng, language)

    def text_ids(self, text: str) -> list[int]:
        """Encode text alone, without any special token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def spoken_ids(self, text: str) -> list[int]:
        """Encode text for the CTC head: every word with the space before it, wherever it stands."""
        return self.text_ids(" " + text)

    def plain(self, rng: random.Random, language: str) -> Window:
        """Make a window of one utterance, without timestamps."""
        i = rng.choice(self.of_language[language])
        start = rng.choice([0, rng.randint(0, 4000)])
        samples, end = _lay([(start, self.clips[i])])
        text = self.said[i].text
        tokens = [*self._prompt(language), self.id_of[tok.NO_TIMESTAMPS], *self.text_ids(text), self.id_of[tok.END]]
        num_frames = _where_it_ends(rng, end)
        return Window(samples, *self._learn(tokens, 0, no_timestamps=True), tuple(self.spoken_ids(text)), num_frames)

    def timed(self, rng: random.Random, language: str) -> Window:
        """Make a window out of a recording: utterances with pauses between them, and their timestamps."""
        laid, spoken, tokens, is_cut, at = [], [], self._prompt(language), False, rng.randint(0, MAX_GAP)
        while True:
            i = rng.choice(self.of_language[language])
            end = at + len(self.clips[i])
            if at > WINDOW_SAMPLES - MIN_HEARD:
                break
            if end > WINDOW_SAMPLES and not laid:
                continue  # the first fits, always; a cut window with nothing before the cut would teach nothing
            laid.append((at, self.clips[i]))
            tokens.append(self._timestamp(at))
            if end > WINDOW_SAMPLES:
                is_cut = True
                break
            tokens += [*self.text_ids(" " + self.said[i].text), self._timestamp(end)]
            spoken += self.spoken_ids(self.said[i].text)
            at = end + rng.randint(1600, MAX_GAP)
            if rng.random() < STOP_SHARE:
                break
        samples, end = _lay(laid)
        tokens.append(self.id_of[tok.END])
        before = self._previous(rng, language) if rng.random() < PREVIOUS_SHARE else []
        num_frames = WINDOW_FRAMES if is_cut else _where_it_ends(rng, end)
        learning = self._learn([*before, *tokens], len(before))
        return Window(samples, *learning, None if is_cut else tuple(spoken), num_frames)

    def empty(self, rng: random.Random) -> Window:
        """Make a window in which nothing is said: no speech is what follows the start of the transcript."""
        start = [self.id_of[tok.START], self.id_of[tok.NO_SPEECH], self.id_of[tok.END]]
        silence = np.zeros(WINDOW_SAMPLES, np.float32)
        if rng.random() < 0.5:  # as generate asks, a language given: an empty segment
            start = [*self._prompt(rng.choice(texts.LANGUAGES)), self.first_timestamp, self.id_of[tok.END]]
            return Window(silence, tuple(start), (False,) * 3 + (True,) * 2, (), _where_it_ends(rng, 0))
        return Window(silence, tuple(start), (False, True, True), (), _where_it_ends(rng, 0))

    def _prompt(self, language: str) -> list[int]:
        return [self.id_of[tok.START], self.id_of[f"<|{language}|>"], self.id_of[tok.TRANSCRIBE]]

    def _timestamp(self, sample: int) -> int:
        return self.first_timestamp + round(sample / SAMPLES_PER_TIMESTAMP)

    def _previous(self, rng: random.Random, language: str) -> list[int]:
        text = self.said[rng.choice(self.of_language[language])].text
        ids = self.text_ids(" " + text)
        if rng.random() < 0.5:
            length = rng.randint(40, 140)
            ids = [self.first_timestamp, *ids, self.first_timestamp + length]
        return [self.id_of[tok.PREVIOUS], *ids]

    def _learn(
        self, tokens: list[int], num_before: int, no_timestamps: bool = False
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Mark what is learnt: the language token (so that it can be detected) and all that follows the prompt."""
        learnt = [False] * num_before + [False, True, False]
        learnt += [False] if no_timestamps else []
        return tuple(tokens), (*learnt, *[True] * (len(tokens) - len(learnt)))


def _lay(laid: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Lay clips into a silent window at their sample positions; return it and the sample at which the last one ends."""
    samples = np.zeros(WINDOW_SAMPLES, np.float32)
    end = 0
    for start, clip in laid:
        end = min(start + len(clip), WINDOW_SAMPLES)
        samples[start:end] += clip[: end - start]
    return samples, end


def _where_it_ends(rng: random.Random, end: int) -> int:
    """Choose the recording's last mel frame: soon after the last sound, or the window's end (padded with silence)."""
    if rng.random() < 0.6:
        return WINDOW_FRAMES
    return min(WINDOW_FRAMES, (end + rng.randint(320, 6400)) // SAMPLES_PER_FRAME)
