"""Integer counts per utterance, and the metrics that are ratios of their sums.

Counts add up over shards, tasks and speakers, in any order. Rates are always computed from sums and never averaged.

jiwer and rouge-score give the same values (but rouge-score gives 0 to two empty texts). They are the oracles of
tests/metrics/test_metrics.py and test_transcripts.py, and not used here because they are slower. Measured on utterances
of 2 to 40 words: jiwer, which calls the same rapidfuzz functions, 8 to 24 times (one batched call: 3.6 to 10 times);
rouge-score, which returns F instead of counts that add up, 10 to 40 times (texts of 1,000 words: over 900 times).
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
MIN_HALLUCINATED_CHARS = 10
"""Fewer inserted characters than this are no hallucination, however short the reference."""
TERM_METRICS = {"term_recall": ("terms_found", "terms_ref"), "context_leak": ("terms_leaked", "terms_absent")}
"""{metric: columns of ``terms.count_terms``}"""
CAPTION_BETA = 1.2
"""Weight of recall in the ROUGE-L of captions. Source: pycocoevalcap."""


@dataclass(frozen=True)
class Counts:
    """Counts of one utterance; sums over utterances have the same fields.

    ``solid`` means "without spaces". The field names are columns of stored predictions.

    Attributes:
        char_edits, char_ref: Edits and reference length in characters, spaces included.
        solid_edits, solid_ref: Edits and reference length in characters, without spaces.
        solid_sub, solid_del, solid_ins: Substitutions, deletions and insertions of ``solid_edits``, in one shortest
            alignment.
        solid_pred, solid_common: Characters of the prediction, and of both texts as multisets, without spaces.
        word_edits, word_ref: Edits and reference length in words between spaces.
        word_sub, word_del, word_ins: Substitutions, deletions and insertions of ``word_edits``.
        spaced_edits: Edits in words after the prediction's spacing was replaced by the reference's wherever the
            characters agree.
        phonetic_edits, phonetic_ref: As ``solid``, against the second reading; against the only reading if there is
            just one.
        best_edits, best_ref: As ``solid``, against the better reading of every span.
        two_readings: 1 if there is a second reading.
        lcs_units, pred_units, ref_units: Longest common subsequence and lengths in ROUGE units. With several reference
            captions: those of the reference with the highest recall.
        top_lcs_units: Longest common subsequence with any reference.
        exact: 1 if equal after normalisation.
        looped: 1 if the prediction repeats itself (``loops.has_loop``) and the reference does not.
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
        units: Splits a normalised text into the units of ROUGE-L; ``rouge_units`` by default.
    """
    ref, pred = normalizer.normalize(reference), normalizer.normalize(prediction)
    solid_ref, solid_pred = ref.replace(" ", ""), pred.replace(" ", "")
    words, pred_words = ref.split(), pred.split()
    char_opcodes, word_opcodes = Levenshtein.opcodes(solid_ref, solid_pred), Levenshtein.opcodes(words, pred_words)
    (sub, deleted, inserted), (word_sub, word_del, word_ins) = edit_kinds(char_opcodes), edit_kinds(word_opcodes)
    edits = sub + deleted + inserted
    second = normalizer.normalize(phonetic) if phonetic else ref
    solid_phonetic = second.replace(" ", "")
    two_readings = solid_phonetic != solid_ref
    best, phonetic_edits = (edits, len(solid_ref)), edits
    if two_readings:
        phonetic_edits = Levenshtein.distance(solid_phonetic, solid_pred)
        best = best_of_readings(ref, second, solid_pred)
    split = units or rouge_units
    ref_units, pred_units = split(ref), split(pred)
    lcs = LCSseq.similarity(ref_units, pred_units)
    return Counts(
        char_edits=Levenshtein.distance(ref, pred),
        char_ref=len(ref),
        solid_edits=edits,
        solid_ref=len(solid_ref),
        solid_sub=sub,
        solid_del=deleted,
        solid_ins=inserted,
        solid_pred=len(solid_pred),
        solid_common=(Counter(solid_ref) & Counter(solid_pred)).total(),
        word_edits=word_sub + word_del + word_ins,
        word_ref=len(words),
        word_sub=word_sub,
        word_del=word_del,
        word_ins=word_ins,
        spaced_edits=Levenshtein.distance(words, apply_reference_spacing(ref, pred, char_opcodes)),
        phonetic_edits=phonetic_edits,
        phonetic_ref=len(solid_phonetic),
        best_edits=best[0],
        best_ref=best[1],
        two_readings=int(two_readings),
        lcs_units=lcs,
        pred_units=len(pred_units),
        ref_units=len(ref_units),
        top_lcs_units=lcs,
        exact=int(ref == pred),
        looped=int(has_loop(solid_pred) and not has_loop(solid_ref)),
    )


def edit_kinds(opcodes: Opcodes) -> tuple[int, int, int]:
    """Substitutions, deletions and insertions that turn the reference into the prediction."""
    counts = {"replace": 0, "delete": 0, "insert": 0, "equal": 0}
    for step in opcodes:
        counts[step.tag] += max(step.src_end - step.src_start, step.dest_end - step.dest_start)
    return counts["replace"], counts["delete"], counts["insert"]


def apply_reference_spacing(ref: str, pred: str, opcodes: Opcodes) -> list[str]:
    """The words of the prediction, with the spacing of the reference before every character on which the two agree.

    Only spacing next to errors can then still be wrong.

    Args:
        opcodes: Alignment of the two texts without spaces.
    Source: the idea of ESPnet's space-normalised hypotheses for KsponSpeech.
    """
    starts, ref_starts = _word_starts(pred), _word_starts(ref)
    for step in opcodes:
        if step.tag == "equal":
            starts[step.dest_start : step.dest_end] = ref_starts[step.src_start : step.src_end]
    solid_pred = pred.replace(" ", "")
    cuts = [0, *(index for index in range(1, len(solid_pred)) if starts[index]), len(solid_pred)]
    return [solid_pred[start:end] for start, end in pairwise(cuts) if end > start]


def _word_starts(text: str) -> list[bool]:
    """For every character that is not a space, whether it is the first of a word."""
    return [index == 0 for word in text.split(" ") for index in range(len(word))]


def rouge_units(normalized: str) -> list[str]:
    """Units of ROUGE-L: whole words and numbers of Latin text, single characters of everything else (Hangul).

    Korean words include their particles, so whole words would count nearly correct answers as wrong.
    """
    return _UNITS.findall(normalized)


def compute_metrics(
    task: str, rows: Iterable[Mapping[str, int]], names: Sequence[str] = ()
) -> dict[str, dict[str, float | int]]:
    """Metrics of one task from the counts of its utterances.

    Args:
        names: Metrics to compute, by default those of the task table. Names that are not computed from counts are
            skipped.
    Returns:
        {metric: {"value", "n"}} as defined by ``metric_ratio``; a metric to which no utterance contributes is absent.
    """
    columns = as_columns(rows)
    ratios = {name: metric_ratio(task, name, columns) for name in names or TASKS[task].metrics}
    return {name: {"value": ratio.value, "n": ratio.n} for name, ratio in ratios.items() if ratio is not None}


@dataclass(frozen=True)
class Ratio:
    """A metric as the ratio of two sums over utterances.

    Attributes:
        numerator, denominator: (utterances,); both are 0 for an utterance that is left out.
        n: Utterances (for the metrics of ``TERM_METRICS``: terms) that contribute.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    n: int

    @property
    def value(self) -> float:
        return float(self.numerator.sum() / self.denominator.sum())

    @property
    def columns(self) -> np.ndarray:
        """(utterances, 2), for ``from_sums``."""
        return np.stack([self.numerator, self.denominator], axis=1)

    @property
    def contributes(self) -> np.ndarray:
        """(utterances,), whether each one counts."""
        return self.denominator > 0

    def select(self, index: np.ndarray) -> "Ratio":
        """The ratio over some of the utterances."""
        denominator = self.denominator[index]
        return Ratio(self.numerator[index], denominator, int((denominator > 0).sum()))

    @staticmethod
    def from_sums(sums: np.ndarray) -> np.ndarray:
        """Values, (n,), from sums of the columns, (n, 2); NaN where the denominator is 0."""
        numerator, denominator = sums.T
        return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)


def as_columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str] = COUNT_NAMES) -> dict[str, np.ndarray]:
    """Counts of utterances as arrays."""
    rows = list(rows)
    return {name: np.array([row[name] for row in rows]) for name in names}


def metric_ratio(task: str, metric: str, columns: Mapping[str, np.ndarray]) -> Ratio | None:
    """A metric over utterances; None if it is not computed from counts or no utterance contributes.

    cer, cer_nospace, wer   edits over reference length; utterances with an empty reference are left out
    swer                    wer with the reference's spacing where characters agree (``apply_reference_spacing``)
    cer_phonetic, cer_best  as ``cer_nospace``, against the second reading or the better reading of every span
    exact_match             share of utterances equal to their reference
    rouge_l                 mean F1 of the longest common subsequence; for captions recall has more weight, and
                            precision and recall are each the maximum over the references
    char_f1                 mean F1 of the two multisets of characters without spaces, as in KorQuAD
    silence_hallucination   share of the utterances with an empty reference whose prediction is not empty
    repetition              share of predictions that repeat themselves (``looped``)
    hallucination           share of predictions that repeat themselves, or have at least 10 inserted characters and
                            more than the reference has characters, or are not empty although the reference is
    term_recall             share of the terms in references that are in the predictions
    context_leak            share of the terms that a prompt has and the reference has not, which are in the prediction

    Args:
        columns: {count: array}; the last two also need the columns of ``terms.count_terms``.
    """
    if metric == "rouge_l" and is_caption(task):
        parts: tuple[np.ndarray, np.ndarray] = (_caption_rouge_l(columns), np.ones_like(columns["exact"]))
    elif metric in _RATES:
        edits, length = (columns[name] for name in _RATES[metric])
        parts = np.where(length > 0, edits, 0), length
    elif metric in _MEANS:
        parts = _MEANS[metric](columns), np.ones_like(columns["exact"])
    elif metric == "silence_hallucination":
        silent = columns["solid_ref"] == 0
        parts = silent & (columns["solid_ins"] > 0), silent
    elif metric in TERM_METRICS and "terms_ref" in columns:
        counted, of = TERM_METRICS[metric]
        parts = columns[counted], columns[of]
    else:
        return None
    numerator, denominator = (np.asarray(part, np.float64) for part in parts)
    if not denominator.sum():
        return None
    n = denominator.sum() if metric in TERM_METRICS else (denominator > 0).sum()
    return Ratio(numerator, denominator, int(n))


def _caption_rouge_l(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    precision = columns["top_lcs_units"] / np.maximum(columns["pred_units"], 1)
    recall = columns["lcs_units"] / np.maximum(columns["ref_units"], 1)
    weight = CAPTION_BETA**2
    denominator = recall + weight * precision
    f_score = (1 + weight) * precision * recall / np.where(denominator > 0, denominator, 1)
    return np.where(denominator > 0, f_score, 0.0)


def _f1(common: str, one: str, other: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """F1 from the columns of common units and of the two lengths; 1 for two empty texts."""

    def values(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        total = columns[one] + columns[other]
        return np.where(total > 0, 2 * columns[common] / np.maximum(total, 1), 1.0)

    return values


def _hallucinated(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    length, inserted = columns["solid_ref"], columns["solid_ins"]
    too_many = (inserted >= MIN_HALLUCINATED_CHARS) & (inserted > length)
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
