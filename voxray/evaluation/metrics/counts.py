"""Integer counts per utterance, from which every metric is derived.

Counts add up: over shards, tasks, speakers, in any order. Rates are only formed from sums, never averaged.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from rapidfuzz.distance import LCSseq, Levenshtein

from voxray.tasks import TASKS
from voxray.text.normalize import normalize_ko_v1

_UNITS = re.compile(r"[a-z0-9]+(?:[./:%-][a-z0-9]+)*|[^\sa-z0-9]")


@dataclass(frozen=True)
class Counts:
    """Counts of one utterance; sums over utterances have the same fields.

    Attributes:
        char_edits, char_ref: Edits and reference length in characters, spaces included.
        solid_edits, solid_ref: The same without any spaces.
        word_edits, word_ref: The same in words between spaces.
        lcs_units, pred_units, ref_units: Longest common subsequence and lengths in ROUGE units.
        exact: 1 if equal after normalisation.
    """

    char_edits: int
    char_ref: int
    solid_edits: int
    solid_ref: int
    word_edits: int
    word_ref: int
    lcs_units: int
    pred_units: int
    ref_units: int
    exact: int


COUNT_NAMES = tuple(item.name for item in fields(Counts))


def count(reference: str, prediction: str) -> Counts:
    """Compare one prediction with its reference, both as raw text; normaliser ko-v1."""
    ref, pred = normalize_ko_v1(reference), normalize_ko_v1(prediction)
    ref_solid, pred_solid = ref.replace(" ", ""), pred.replace(" ", "")
    ref_units, pred_units = rouge_units(ref), rouge_units(pred)
    return Counts(
        char_edits=Levenshtein.distance(ref, pred),
        char_ref=len(ref),
        solid_edits=Levenshtein.distance(ref_solid, pred_solid),
        solid_ref=len(ref_solid),
        word_edits=Levenshtein.distance(ref.split(), pred.split()),
        word_ref=len(ref.split()),
        lcs_units=LCSseq.similarity(ref_units, pred_units),
        pred_units=len(pred_units),
        ref_units=len(ref_units),
        exact=int(ref == pred),
    )


def rouge_units(normalized: str) -> list[str]:
    """Units of ROUGE-L: words and numbers of Latin text whole, everything else (Hangul) by character.

    Korean words carry their particles, so whole words would call nearly right answers wrong.
    """
    return _UNITS.findall(normalized)


def metrics_of(task: str, rows: Iterable[Mapping[str, int]]) -> dict[str, dict[str, float | int]]:
    """Metrics of one task from the counts of its utterances.

    Utterances whose reference is empty have no error rate and are left out of ``cer``, ``cer_nospace`` and ``wer``;
    ``n`` is the number of utterances that went into a value.

    Returns:
        {metric: {"value", "n"}}; a metric without any utterance is absent.
    """
    rows = list(rows)
    found = {}
    for name in TASKS[task].metrics:
        if name in _RATES:
            edits, length = _RATES[name]
            scored = [row for row in rows if row[length]]
            if scored:
                value = sum(row[edits] for row in scored) / sum(row[length] for row in scored)
                found[name] = {"value": value, "n": len(scored)}
        elif rows:
            values = [_MEANS[name](row) for row in rows]
            found[name] = {"value": sum(values) / len(values), "n": len(values)}
    return found


def _rouge_l_f1(row: Mapping[str, int]) -> float:
    total = row["pred_units"] + row["ref_units"]
    return 2 * row["lcs_units"] / total if total else 1.0


_RATES = {
    "cer": ("char_edits", "char_ref"),
    "cer_nospace": ("solid_edits", "solid_ref"),
    "wer": ("word_edits", "word_ref"),
}
_MEANS = {"rouge_l": _rouge_l_f1, "exact_match": lambda row: float(row["exact"])}


def as_row(counts: Counts) -> dict[str, int]:
    """The counts as columns of a prediction row."""
    return asdict(counts)
