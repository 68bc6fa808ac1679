"""Integer counts per utterance, from which every metric that adds up is derived.

Counts add up: over shards, tasks, speakers, in any order. Rates are only formed from sums, never averaged.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein, Opcodes

from voxray.core.tasks import TASKS
from voxray.metrics.loops import has_loop
from voxray.metrics.names import is_caption
from voxray.metrics.second_readings import best_of_readings
from voxray.text.normalize import KOREAN, Normalizer

_UNITS = re.compile(r"[a-z0-9]+(?:[./:%-][a-z0-9]+)*|[^\sa-z0-9]")
INVENTED_CHARS = 10
"""Fewer characters too many than this are no hallucination, however short the reference."""
CAPTION_BETA = 1.2
"""Weight of recall in the ROUGE-L of captions. Source: pycocoevalcap."""


@dataclass(frozen=True)
class Counts:
    """Counts of one utterance; sums over utterances have the same fields.

    Attributes:
        char_edits, char_ref: Edits and reference length in characters, spaces included.
        solid_edits, solid_ref: The same without any spaces.
        solid_sub, solid_del, solid_ins: Those edits by kind, in one shortest alignment.
        solid_pred, solid_common: Prediction's length without spaces; characters in both texts, as bags.
        word_edits, word_ref: Edits and reference length in words between spaces.
        word_sub, word_del, word_ins: Those edits by kind.
        spaced_edits: Edits in words after the prediction took the reference's spacing wherever characters agree.
        phonetic_edits, phonetic_ref: As ``solid`` against the second reading; against the only one where there is one.
        best_edits, best_ref: As ``solid`` against the better reading of every span.
        two_readings: 1 if there is a second reading.
        lcs_units, pred_units, ref_units: Longest common subsequence and lengths in ROUGE units; of several captions
            those of the one that is recalled best.
        top_lcs_units: Longest common subsequence with any reference.
        exact: 1 if equal after normalisation.
        looped: 1 if the prediction repeats itself (``loops.has_loop``) where the reference does not.
    """

    char_edits: int
    char_ref: int
    solid_edits: int
    solid_ref: int
    solid_sub: int
    solid_del: int
    solid_ins: int
    solid_pred: int
    solid_common: int
    word_edits: int
    word_ref: int
    word_sub: int
    word_del: int
    word_ins: int
    spaced_edits: int
    phonetic_edits: int
    phonetic_ref: int
    best_edits: int
    best_ref: int
    two_readings: int
    lcs_units: int
    pred_units: int
    ref_units: int
    top_lcs_units: int
    exact: int
    looped: int


COUNT_NAMES = tuple(item.name for item in fields(Counts))


def count(
    reference: str,
    prediction: str,
    normalizer: Normalizer = KOREAN,
    *,
    phonetic: str = "",
    units: Callable[[str], list[str]] | None = None,
) -> Counts:
    """Compare one prediction with its reference, all as raw text.

    Args:
        normalizer: Applied to every text.
        phonetic: Second reading of the reference, "" if it has none.
        units: What ROUGE-L is counted in, from a normalised text; without, ``rouge_units``.
    """
    ref, pred = normalizer.normalize(reference), normalizer.normalize(prediction)
    solid, solid_pred = ref.replace(" ", ""), pred.replace(" ", "")
    words, pred_words = ref.split(), pred.split()
    chars, by_word = Levenshtein.opcodes(solid, solid_pred), Levenshtein.opcodes(words, pred_words)
    (sub, deleted, inserted), (word_sub, word_del, word_ins) = kinds(chars), kinds(by_word)
    edits = sub + deleted + inserted
    second = normalizer.normalize(phonetic) if phonetic else ref
    best, phonetic_solid, phonetic_edits = (edits, len(solid)), solid, edits
    if two := second.replace(" ", "") != solid:
        phonetic_solid = second.replace(" ", "")
        phonetic_edits = Levenshtein.distance(phonetic_solid, solid_pred)
        best = best_of_readings(ref, second, solid_pred)
    ref_units, pred_units = (units or rouge_units)(ref), (units or rouge_units)(pred)
    lcs = LCSseq.similarity(ref_units, pred_units)
    return Counts(
        char_edits=Levenshtein.distance(ref, pred),
        char_ref=len(ref),
        solid_edits=edits,
        solid_ref=len(solid),
        solid_sub=sub,
        solid_del=deleted,
        solid_ins=inserted,
        solid_pred=len(solid_pred),
        solid_common=(Counter(solid) & Counter(solid_pred)).total(),
        word_edits=word_sub + word_del + word_ins,
        word_ref=len(words),
        word_sub=word_sub,
        word_del=word_del,
        word_ins=word_ins,
        spaced_edits=Levenshtein.distance(words, spaced_alike(ref, pred, chars)),
        phonetic_edits=phonetic_edits,
        phonetic_ref=len(phonetic_solid),
        best_edits=best[0],
        best_ref=best[1],
        two_readings=int(two),
        lcs_units=lcs,
        pred_units=len(pred_units),
        ref_units=len(ref_units),
        top_lcs_units=lcs,
        exact=int(ref == pred),
        looped=int(has_loop(solid_pred) and not has_loop(solid)),
    )


def kinds(opcodes: Opcodes) -> tuple[int, int, int]:
    """Substitutions, deletions (of the reference) and insertions of an alignment."""
    found = {"replace": 0, "delete": 0, "insert": 0, "equal": 0}
    for step in opcodes:
        found[step.tag] += max(step.src_end - step.src_start, step.dest_end - step.dest_start)
    return found["replace"], found["delete"], found["insert"]


def spaced_alike(ref: str, pred: str, opcodes: Opcodes) -> list[str]:
    """The prediction's words after it took the reference's spacing before every character that agrees.

    Args:
        opcodes: Alignment of the two texts without their spaces.
    Source: the idea of ESPnet's space-normalised hypotheses for KsponSpeech: only spacing beside errors stays wrong.
    """
    starts, begins = _word_starts(pred), _word_starts(ref)
    for step in opcodes:
        if step.tag == "equal":
            starts[step.dest_start : step.dest_end] = begins[step.src_start : step.src_end]
    solid = pred.replace(" ", "")
    cuts = [0, *(at for at in range(1, len(solid)) if starts[at]), len(solid)]
    return [solid[start:end] for start, end in pairwise(cuts) if end > start]


def _word_starts(text: str) -> list[bool]:
    """For every character that is no space, whether a word begins with it."""
    return [at == 0 for word in text.split(" ") for at in range(len(word))]


def rouge_units(normalized: str) -> list[str]:
    """Units of ROUGE-L: words and numbers of Latin text whole, everything else (Hangul) by character.

    Korean words carry their particles, so whole words would call nearly right answers wrong.
    """
    return _UNITS.findall(normalized)


def compute_metrics(
    task: str, rows: Iterable[Mapping[str, int]], names: Sequence[str] = ()
) -> dict[str, dict[str, float | int]]:
    """Metrics of one task from the counts of its utterances.

    Args:
        names: Metrics wanted; without, those of the task table. What does not derive from counts is passed over.
    Returns:
        {metric: {"value", "n"}}; a metric without any utterance is absent. See ``metric_ratio`` for what goes in.
    """
    columns = as_columns(rows)
    found = {}
    for name in names or TASKS[task].metrics:
        ratio = metric_ratio(task, name, columns)
        if ratio is not None:
            found[name] = {"value": ratio.value, "n": ratio.n}
    return found


@dataclass(frozen=True)
class Ratio:
    """A metric as the ratio of two sums over utterances.

    Attributes:
        top, bottom: One number per utterance, 0 over 0 for those that are left out.
        n: Utterances (for ``term_recall``: terms) that went in.
    """

    top: np.ndarray
    bottom: np.ndarray
    n: int

    @property
    def value(self) -> float:
        return float(self.top.sum() / self.bottom.sum())

    @property
    def columns(self) -> np.ndarray:
        """(utterances, 2), for ``of_sums``."""
        return np.stack([self.top, self.bottom], axis=1)

    @staticmethod
    def of_sums(sums: np.ndarray) -> np.ndarray:
        """Values, (n,), from sums of the columns, (n, 2); NaN where there is nothing below."""
        top, bottom = sums.T
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)


def as_columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str] = COUNT_NAMES) -> dict[str, np.ndarray]:
    """Counts of utterances as arrays."""
    rows = list(rows)
    return {name: np.array([row[name] for row in rows]) for name in names}


def metric_ratio(task: str, metric: str, columns: Mapping[str, np.ndarray]) -> Ratio | None:
    """A metric of some utterances; None if it does not derive from counts, or no utterance goes in.

    cer, cer_nospace, wer   edits over reference length; an utterance whose reference is empty has no error rate
    swer                    the same in words, after spacing was made alike (``spaced_alike``)
    cer_phonetic, cer_best  as ``cer_nospace``, against the second reading, or the better one of every span
    exact_match             share of utterances equal to their reference
    rouge_l                 mean F of the longest common subsequence, precision and recall weighing alike; for captions
                            recall weighs more, and each is the best over the references
    char_f1                 mean F1 of the two bags of characters without spaces, as KorQuAD's
    silence_hallucination   share of the utterances with an empty reference that are answered by some character
    repetition              share of utterances that repeat themselves (``looped``)
    hallucination           share of utterances that do, or have more characters inserted than the reference has (and
                            10 or more), or any where the reference is empty
    term_recall             share of the terms in references that are in the predictions

    Args:
        columns: {count: array}; ``term_recall`` needs ``terms_ref`` and ``terms_found`` as well.
    """
    if metric == "rouge_l" and is_caption(task):
        parts: tuple[np.ndarray, np.ndarray] | None = (_caption_rouge_l(columns), np.ones_like(columns["exact"]))
    elif metric in _RATES:
        edits, length = (columns[name] for name in _RATES[metric])
        parts = np.where(length > 0, edits, 0), length
    elif metric in _MEANS:
        parts = _MEANS[metric](columns), np.ones_like(columns["exact"])
    elif metric == "silence_hallucination":
        silent = columns["solid_ref"] == 0
        parts = silent & (columns["solid_ins"] > 0), silent
    elif metric == "term_recall" and "terms_ref" in columns:
        parts = columns["terms_found"], columns["terms_ref"]
    else:
        return None
    top, bottom = (np.asarray(part, np.float64) for part in parts)
    if not bottom.sum():
        return None
    return Ratio(top, bottom, int(bottom.sum() if metric == "term_recall" else (bottom > 0).sum()))


def _caption_rouge_l(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    precision = columns["top_lcs_units"] / np.maximum(columns["pred_units"], 1)
    recall = columns["lcs_units"] / np.maximum(columns["ref_units"], 1)
    weight = CAPTION_BETA**2
    below = recall + weight * precision
    return np.where(below > 0, (1 + weight) * precision * recall / np.where(below > 0, below, 1), 0.0)


def _f1(common: str, one: str, other: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Two texts without anything in them agree."""

    def values(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        total = columns[one] + columns[other]
        return np.where(total > 0, 2 * columns[common] / np.maximum(total, 1), 1.0)

    return values


def _hallucinated(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    length, inserted = columns["solid_ref"], columns["solid_ins"]
    too_many = (inserted >= INVENTED_CHARS) & (inserted > length)
    return (columns["looped"] > 0) | too_many | ((length == 0) & (inserted > 0))


_RATES = {
    "cer": ("char_edits", "char_ref"),
    "cer_nospace": ("solid_edits", "solid_ref"),
    "wer": ("word_edits", "word_ref"),
    "swer": ("spaced_edits", "word_ref"),
    "cer_phonetic": ("phonetic_edits", "phonetic_ref"),
    "cer_best": ("best_edits", "best_ref"),
}
_MEANS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "rouge_l": _f1("lcs_units", "pred_units", "ref_units"),
    "char_f1": _f1("solid_common", "solid_ref", "solid_pred"),
    "exact_match": lambda columns: columns["exact"],
    "repetition": lambda columns: columns["looped"],
    "hallucination": _hallucinated,
}


def as_row(counts: Counts) -> dict[str, int]:
    """The counts as columns of a prediction row."""
    return dict(vars(counts))
