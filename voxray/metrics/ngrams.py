"""BLEU and chrF from what each answer adds to them, so that their intervals can be drawn; the figures are sacrebleu's.

Both count runs of characters, spaces left out, so that one count serves the two.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from voxray.metrics.captions import Caption

BLEU_TOKENIZER = "char"
"""Of sacrebleu. Korean words carry their particles, so BLEU over whole words calls nearly right answers wrong."""


@dataclass(frozen=True)
class Summed:
    """A metric of sums over answers; ``counts.Ratio`` is the simplest.

    Attributes:
        columns: (answers, columns).
        of_sums: From sums of the columns, (n, columns), to values, (n,).
        n: Answers.
    """

    columns: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    n: int

    @property
    def value(self) -> float:
        return float(self.of_sums(self.columns.sum(axis=0, keepdims=True))[0])


def bleu_and_chrf(answers: Sequence[Caption]) -> tuple[dict[str, Summed], dict[str, str]]:
    """Corpus BLEU on characters and chrF2, from 0 to 100, as sacrebleu's ``corpus_score`` gives them.

    Args:
        answers: References, one or more, and prediction of each, normalised: no white space but single spaces.
    Returns:
        {metric: sums}, {metric: signature}.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(tokenize=BLEU_TOKENIZER), CHRF()
    numbers = {len(references) for references, _ in answers}
    bleu.num_refs = chrf.num_refs = numbers.pop() if len(numbers) == 1 else -1  # sacrebleu's sign of "it varies"
    rows = [_counted(references, prediction, chrf) for references, prediction in answers]
    of_bleu, of_chrf = (np.array(side, np.float64) for side in zip(*rows, strict=True))
    found = {
        "bleu": Summed(of_bleu, lambda sums: _bleu(sums, bleu), len(rows)),
        "chrf": Summed(of_chrf, lambda sums: _chrf(sums, chrf), len(rows)),
    }
    return found, {name: metric.get_signature().format() for name, metric in (("bleu", bleu), ("chrf", chrf))}


def _counted(references: Sequence[str], prediction: str, chrf: Any) -> tuple[list[int], list[int]]:
    """What one answer adds: to BLEU its length, the closest reference's (the shorter of two), and the runs of 1 to 4
    characters that are right and that there are; to chrF, for 1 to 6, those there are, those of the reference, and
    those in both."""
    solid, others = prediction.replace(" ", ""), [text.replace(" ", "") for text in references]
    mine, wanted = _runs(solid, chrf.char_order), [_runs(text, chrf.char_order) for text in others]
    common = [[_common(*pair) for pair in zip(mine, other, strict=True)] for other in wanted]
    right = common[0][:4]
    if len(others) > 1:
        right = [_common(mine[at], reduce(or_, (other[at] for other in wanted))) for at in range(4)]
    length = min((abs(len(text) - len(solid)), len(text)) for text in others)[1]
    guessed = [runs.total() for runs in mine]
    of_chrf = [
        [number for at, runs in enumerate(other) for number in (guessed[at] if runs else 0, runs.total(), both[at])]
        for other, both in zip(wanted, common, strict=True)
    ]
    best = int(_chrf(np.array(of_chrf), chrf).argmax()) if len(others) > 1 else 0
    return [len(solid), length, *right, *guessed[:4]], of_chrf[best]


def _runs(solid: str, longest: int) -> list[Counter[str]]:
    return [Counter(solid[at : at + size] for at in range(len(solid) - size + 1)) for size in range(1, longest + 1)]


def _common(mine: Counter[str], wanted: Counter[str]) -> int:
    return sum(min(times, wanted[run]) for run, times in mine.items() if run in wanted)


def _bleu(sums: np.ndarray, bleu: Any) -> np.ndarray:
    scores = [
        bleu.compute_bleu(row[2:6], row[6:], row[0], row[1], bleu.smooth_method).score
        for row in np.rint(sums).astype(int).tolist()
    ]
    return np.array(scores)


def _chrf(sums: np.ndarray, chrf: Any) -> np.ndarray:
    """F of the mean precision and the mean recall, over the lengths of run that both sides have.

    Added up in sacrebleu's order, so that the last digit is its too.
    """
    precision, recall, orders = np.zeros((3, len(sums)))
    for at in range(0, sums.shape[1], 3):
        guessed, wanted, common = sums[:, at : at + 3].T
        there = (guessed > 0) & (wanted > 0)
        precision += np.where(there, common / np.maximum(guessed, 1), 0)
        recall += np.where(there, common / np.maximum(wanted, 1), 0)
        orders += there
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    weight = chrf.beta**2
    below = weight * precision + recall
    return 100 * np.where(below > 0, (1 + weight) * precision * recall / np.where(below > 0, below, 1), 0)
