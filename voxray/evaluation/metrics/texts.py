"""Metrics of free-text answers that need the whole set of texts: BLEU, chrF, distinct-n, and those of captions.

Texts are normalised by ko-v1 first. These metrics belong to a whole set of answers: they are never means over parts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from voxray.evaluation.metrics import captions
from voxray.evaluation.metrics.counts import rouge_units
from voxray.evaluation.metrics.names import CAPTION_METRICS, is_caption, is_transcript
from voxray.text.normalize import KO_V1, normalize_ko_v1

BLEU_TOKENIZER = "char"
"""Of sacrebleu. Korean words carry their particles, so BLEU over whole words calls nearly right answers wrong."""
UNITS = "hangul by character, latin words and numbers whole"

Pair = tuple[str | Sequence[str], str]
"""References, or the only one, and prediction, as raw text."""
Found = dict[str, dict[str, float | int]]


def text_metrics(task: str, pairs: Sequence[Pair]) -> Found:
    """Metrics of all answers to a task's rows, see ``scored_texts``."""
    return scored_texts(task, pairs)[0]


def scored_texts(task: str, pairs: Sequence[Pair]) -> tuple[Found, dict[str, str]]:
    """Metrics of all answers to a task's rows, and what exactly made each figure.

    bleu                    sacrebleu's corpus BLEU on characters (spaces do not count), from 0 to 100
    chrf                    sacrebleu's chrF2, from 0 to 100
    distinct_1, distinct_2  different n-grams over all n-grams of all answers, 0 to 1, in ROUGE units (Hangul by
                            character, Latin words and numbers whole); it falls with the amount of text
    bleu_1 .. bleu_4        of captions: COCO's BLEU in words, from 0 to 1
    cider_d                 of captions: CIDEr-D, from 0 to 10

    Args:
        pairs: References, one or more, and prediction of every row.
    Returns:
        {metric: {"value", "n"}}, ``n`` being rows, for distinct-n n-grams; without any of them the metric is absent.
        {metric: signature}, sacrebleu's own, and what the others cut texts into.
        Both are empty for a task that is not answered in free text.
    """
    if is_transcript(task) or not pairs:
        return {}, {}
    several = [((texts,) if isinstance(texts, str) else tuple(texts), prediction) for texts, prediction in pairs]
    found: Found = {}
    signatures: dict[str, str] = {}
    for name, metric in _sacrebleu_metrics().items():
        found[name] = {"value": _corpus_score(metric, several), "n": len(pairs)}
        signatures[name] = f"{metric.get_signature().format()}|norm:{KO_V1}"
    signatures |= {name: f"tok:{UNITS}|norm:{KO_V1}" for name in ("rouge_l", "distinct_1", "distinct_2")}
    answers = [rouge_units(normalize_ko_v1(prediction)) for _, prediction in several]
    for size in (1, 2):
        ngrams = Counter(tuple(units[at : at + size]) for units in answers for at in range(len(units) - size + 1))
        if total := ngrams.total():
            found[f"distinct_{size}"] = {"value": len(ngrams) / total, "n": total}
    if is_caption(task):
        scores = captions.coco_bleu(several)
        found |= {f"bleu_{order}": {"value": score, "n": len(pairs)} for order, score in enumerate(scores, 1)}
        found["cider_d"] = {"value": sum(captions.cider_d(several)) / len(pairs), "n": len(pairs)}
        signatures |= {name: f"tok:words|norm:{KO_V1}" for name in ("rouge_l", "cider_d", *CAPTION_METRICS)}
    return found, signatures


def _sacrebleu_metrics() -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(tokenize=BLEU_TOKENIZER), "chrf": CHRF()}


def _corpus_score(metric: Any, pairs: Sequence[captions.Caption]) -> float:
    """Rows may have different numbers of references; None fills up, which sacrebleu passes over."""
    most = max(len(references) for references, _ in pairs)
    streams = [
        [normalize_ko_v1(references[at]) if at < len(references) else None for references, _ in pairs]
        for at in range(most)
    ]
    return float(metric.corpus_score([normalize_ko_v1(prediction) for _, prediction in pairs], streams).score)
