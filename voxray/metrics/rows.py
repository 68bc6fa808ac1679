"""Prediction rows as the metrics see them: which references, which normaliser, which counts.

A row is a mapping with ``task``, ``prediction`` and ``reference`` or ``references`` as raw text, and as far as known
``id``, ``language``, ``source``, ``dataset``, ``speaker``, ``domain``, ``num_samples`` or ``duration``, ``snr_db``,
``reference_phonetic`` (manifests: ``transcript_phonetic``), and ``nll`` with ``num_tokens`` of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import language_code
from voxray.core.tasks import TASKS
from voxray.metrics.counts import Counts, count
from voxray.metrics.names import is_caption, is_transcript
from voxray.text.korean import clean_transcript
from voxray.text.normalize import ENGLISH, KOREAN, Normalizer, get_normalizer

PredictionRow = Mapping[str, Any]
PHONETIC_KEYS = ("reference_phonetic", "transcript_phonetic")


def check_row(row: PredictionRow, place: str) -> None:
    """Make sure that a row can be scored.

    Args:
        place: How to name the row in the message.
    Raises:
        RunError: It has no known task, no reference, or a text that is none.
    """
    if row.get("task") not in TASKS:
        raise RunError(f"{place}: task is {row.get('task')!r}, not one of {', '.join(TASKS)}")
    several = row.get("references")
    if several is not None and not isinstance(several, list | tuple):
        raise RunError(f"{place}: references is {type(several).__name__}, not a list of texts")
    texts = [("references", text) for text in several or ()]
    if not several:
        texts.append(("reference", row.get("reference")))
    texts += [("prediction", row.get("prediction"))]
    texts += [(name, row[name]) for name in (*PHONETIC_KEYS, "language") if row.get(name) is not None]
    for name, text in texts:
        if not isinstance(text, str):
            raise RunError(f"{place}: {name} is {'missing' if text is None else type(text).__name__}, not text")


def row_references(row: PredictionRow) -> tuple[str, ...]:
    """The references of a row: ``references`` if it has some, else its one ``reference``."""
    return tuple(row.get("references") or (row["reference"],))


def row_readings(row: PredictionRow) -> tuple[str, str]:
    """A transcript's reference, and its second reading or "": from the row's own key, or from ``(A)/(B)`` in it."""
    [reference] = row_references(row)
    second = next((row[key] for key in PHONETIC_KEYS if row.get(key)), "")
    if not second and ")/(" in reference.replace(" ", ""):
        cleaned = clean_transcript(reference)
        return cleaned.spelling, cleaned.phonetic
    return reference, second


def row_normalizer(row: PredictionRow, english: Normalizer = ENGLISH) -> Normalizer:
    """The normaliser of a row: transcripts go by their language, answers and captions by ko-v1."""
    if not is_transcript(row["task"]):
        return KOREAN
    try:
        language = language_code(row.get("language"))
    except BadRow:  # no two-letter code, so neither Korean nor English
        language = str(row["language"])
    return get_normalizer(language, english)


def count_row(row: PredictionRow, english: Normalizer = ENGLISH) -> Counts:
    """Counts of a prediction row.

    Of several references the closest counts: for transcripts that with the lowest rate of character errors, for answers
    that with the best F of ROUGE-L; for captions see ``counts.Counts``.

    Args:
        english: Normaliser of English transcripts.
    """
    references, prediction, normalizer = row_references(row), row["prediction"], row_normalizer(row, english)
    if is_caption(row["task"]):
        return _closest_captions([count(text, prediction, normalizer, units=str.split) for text in references])
    if len(references) == 1 and is_transcript(row["task"]):
        reference, second = row_readings(row)
        return count(reference, prediction, normalizer, phonetic=second)
    found = [count(text, prediction, normalizer) for text in references]
    return min(found, key=_error_rate if is_transcript(row["task"]) else _distance)


def _closest_captions(found: Sequence[Counts]) -> Counts:
    best = max(found, key=lambda counts: counts.lcs_units / max(counts.ref_units, 1))
    top, exact = max(counts.top_lcs_units for counts in found), max(counts.exact for counts in found)
    return replace(best, top_lcs_units=top, exact=exact, looped=min(counts.looped for counts in found))


def _error_rate(counts: Counts) -> float:
    return counts.solid_edits / max(counts.solid_ref, 1)


def _distance(counts: Counts) -> tuple[float, ...]:
    total = counts.pred_units + counts.ref_units
    return 1 - counts.exact, -2 * counts.lcs_units / total if total else -1.0
