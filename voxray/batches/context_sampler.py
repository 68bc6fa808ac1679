"""Draws the context of training rows: their own one, terms that nobody says, or none."""

import unicodedata
import zlib
from collections.abc import Mapping

import numpy as np

from voxray.core.context import SHARES, join_terms, split_terms
from voxray.core.tasks import TASKS, template_codes
from voxray.features.context import with_context
from voxray.features.reader import FeatureRow, Features
from voxray.models.front_end import FrontEnd

CONTEXT_STREAM = 2  # of the random numbers; 1 is SpecAugment's
MAX_TRIES = 16
"""Rows that are looked at for terms that nobody says."""


class ContextSampler:
    """Replaces the contexts of transcription rows, by (seed, step, row). It has no state to resume.

    A prompt never gets longer than the stored one, so plans and packs hold with any context.

    Args:
        rows: Row numbers of the training, from which terms are taken.
        shares: {one of ``context.SHARES``: share}, which add up to 1.
    """

    def __init__(
        self, features: Features, rows: np.ndarray, front_end: FrontEnd, shares: Mapping[str, float], seed: int
    ) -> None:
        is_transcription = np.isin(features.task[rows], template_codes("transcription"))
        self._features, self._rows = features, rows[is_transcription]
        self._front_end, self._shares, self._seed = front_end, [shares[name] for name in SHARES], seed

    def __call__(self, row: FeatureRow, step: int) -> FeatureRow:
        """The row with the context of a step."""
        if not row.prompt or TASKS[row.task].template != "transcription":
            return row
        rng = np.random.default_rng([self._seed, step, zlib.crc32(row.source.encode()), CONTEXT_STREAM])
        name = SHARES[rng.choice(len(SHARES), p=self._shares)]
        if name == "true":
            return row
        return self._false_context(row, rng) if name == "false" else with_context(row, "", self._front_end)

    def _false_context(self, row: FeatureRow, rng: np.random.Generator) -> FeatureRow:
        """The row with terms of another row, or without a context if few rows have one that fits."""
        transcript, own = _solid(row.answer), {*map(_solid, split_terms(row.prompt))}
        for _ in range(MAX_TRIES):
            other = self._features.prompt(int(self._rows[rng.integers(len(self._rows))]))
            terms = [term for term in split_terms(other) if _solid(term) not in transcript and _solid(term) not in own]
            rng.shuffle(terms)
            while terms:
                changed = with_context(row, join_terms(terms), self._front_end)
                if len(changed.prompt_ids) <= len(row.prompt_ids):
                    return changed
                terms = terms[: len(terms) // 2]
        return with_context(row, "", self._front_end)


def _solid(text: str) -> str:
    """Text without spaces and case."""
    return "".join(unicodedata.normalize("NFC", text).split()).casefold()
