"""Prediction rows as input of the metrics: their references, normaliser and counts.

A row is a mapping with ``task``, ``prediction`` and ``reference`` or ``references`` as raw text. Optional keys are
``id``, ``language``, ``source``, ``dataset``, ``speaker``, ``domain``, ``num_samples`` or ``duration``, ``snr_db``,
``reference_phonetic`` (manifests: ``transcript_phonetic``), and ``nll`` with ``num_tokens`` of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.core.languages import language_code
from voxray.core.tasks import TASKS
from voxray.metrics.counts import Counts, count, rouge_units
from voxray.metrics.names import is_caption, is_transcript, is_translation
from voxray.text.korean import clean_transcript, has_notation
from voxray.text.normalize import DEFAULT_NORMALIZERS, KOREAN, RAW, Normalizer, Normalizers

PredictionRow = Mapping[str, Any]
PHONETIC_KEYS = ("reference_phonetic", "transcript_phonetic")


def check_row(row: PredictionRow, row_name: str) -> None:
    """Check that a row can be scored.

    Args:
        row_name: Name of the row in error messages.
    Raises:
        RunError: The task is unknown, the reference is missing, or a value that must be text is not.
    """
    if row.get("task") not in TASKS:
        raise RunError(f"{row_name}: task is {row.get('task')!r}, not one of {', '.join(TASKS)}")
    references = row.get("references")
    if references is not None and not isinstance(references, list | tuple):
        raise RunError(f"{row_name}: references is {type(references).__name__}, not a list of texts")
    texts = [("references", text) for text in references or ()] or [("reference", row.get("reference"))]
    texts.append(("prediction", row.get("prediction")))
    texts += [(name, row[name]) for name in (*PHONETIC_KEYS, "language") if row.get(name) is not None]
    for name, text in texts:
        if not isinstance(text, str):
            raise RunError(f"{row_name}: {name} is {'missing' if text is None else type(text).__name__}, not text")


def row_references(row: PredictionRow) -> tuple[str, ...]:
    """The references of a row: ``references`` if there are any, else the single ``reference``."""
    return tuple(row.get("references") or (row["reference"],))


def row_readings(row: PredictionRow) -> tuple[str, str]:
    """A transcript's reference and its second reading or "", from a key of the row or from ``(A)/(B)`` in the text."""
    [reference] = row_references(row)
    second = next((row[key] for key in PHONETIC_KEYS if row.get(key)), "")
    if not second and ")/(" in reference.replace(" ", "") and has_notation(reference, _language(row)):
        cleaned = clean_transcript(reference)
        return cleaned.spelling, cleaned.phonetic
    return reference, second


def row_normalizer(row: PredictionRow, normalizers: Normalizers = DEFAULT_NORMALIZERS) -> Normalizer:
    """The normaliser of a row: that of the language for transcripts, none for translations, ko-v1 for other answers."""
    if is_translation(row["task"]):
        return RAW
    if not is_transcript(row["task"]):
        return KOREAN
    return normalizers.select(_language(row))


def _language(row: PredictionRow) -> str:
    try:
        return language_code(row.get("language"))
    except BadRow:  # an unknown language, so neither Korean nor English
        return str(row["language"])


def count_row(row: PredictionRow, normalizers: Normalizers = DEFAULT_NORMALIZERS) -> Counts:
    """Counts of a prediction row.

    With several references, the counts are those of the closest one: the lowest character error rate for transcripts,
    the highest ROUGE-L for answers. For captions see ``counts.Counts``.

    Args:
        normalizers: Of transcripts, by language.
    """
    references, prediction, normalizer = row_references(row), row["prediction"], row_normalizer(row, normalizers)
    if is_caption(row["task"]):
        return _merge_caption_counts([count(text, prediction, normalizer, units=str.split) for text in references])
    if len(references) == 1 and is_transcript(row["task"]):
        reference, second = row_readings(row)
        return count(reference, prediction, normalizer, phonetic=second)
    units = _lower_case_units if is_translation(row["task"]) else None
    candidates = [count(text, prediction, normalizer, units=units) for text in references]
    return min(candidates, key=_error_rate if is_transcript(row["task"]) else _answer_distance)


def _lower_case_units(text: str) -> list[str]:
    return rouge_units(text.lower())


def _merge_caption_counts(candidates: Sequence[Counts]) -> Counts:
    """Counts against the reference with the highest recall; LCS, ``exact`` and ``looped`` are the best of all."""
    best_recall = max(candidates, key=lambda counts: counts.lcs_units / max(counts.ref_units, 1))
    return replace(
        best_recall,
        top_lcs_units=max(counts.top_lcs_units for counts in candidates),
        exact=max(counts.exact for counts in candidates),
        looped=min(counts.looped for counts in candidates),
    )


def _error_rate(counts: Counts) -> float:
    return counts.solid_edits / max(counts.solid_ref, 1)


def _answer_distance(counts: Counts) -> tuple[float, ...]:
    total = counts.pred_units + counts.ref_units
    return 1 - counts.exact, -2 * counts.lcs_units / total if total else -1.0
