"""Metrics of free-text answers that need the texts themselves: BLEU, character F1, distinct-n.

Texts are normalised by ko-v1 first, as everywhere. BLEU and distinct-n belong to a whole set of answers: they are never
means over parts of it.
"""

from collections import Counter
from collections.abc import Sequence

from voxray.evaluation.metrics.counts import rouge_units
from voxray.evaluation.metrics.names import text_metrics_of
from voxray.text.normalize import normalize_ko_v1

BLEU_TOKENIZER = "char"
"""Of sacrebleu. Korean words carry their particles, so BLEU over whole words calls nearly right answers wrong."""


def text_metrics(task: str, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float | int]]:
    """Metrics of all answers to a task's rows.

    bleu                    sacrebleu's corpus BLEU on characters (spaces do not count), from 0 to 100
    char_f1                 KorQuAD's F1 of the two bags of characters, spaces left out, the mean over rows, 0 to 1
    distinct_1, distinct_2  different n-grams over all n-grams of all answers, 0 to 1, in ROUGE units (Hangul by
                            character, Latin words and numbers whole); it falls with the amount of text

    Args:
        pairs: (reference, prediction) as raw text.
    Returns:
        {metric: {"value", "n"}}, ``n`` being rows, for distinct-n n-grams; without any of them the metric is absent.
        Empty for a task that is not answered in free text.
    """
    if not text_metrics_of(task) or not pairs:
        return {}
    normal = [(normalize_ko_v1(reference), normalize_ko_v1(prediction)) for reference, prediction in pairs]
    found: dict[str, dict[str, float | int]] = {"bleu": {"value": bleu(normal), "n": len(pairs)}}
    found["char_f1"] = {"value": sum(char_f1(*pair) for pair in normal) / len(pairs), "n": len(pairs)}
    answers = [rouge_units(prediction) for _, prediction in normal]
    for size in (1, 2):
        ngrams = Counter(tuple(units[at : at + size]) for units in answers for at in range(len(units) - size + 1))
        if total := ngrams.total():
            found[f"distinct_{size}"] = {"value": len(ngrams) / total, "n": total}
    return found


def bleu(normal: Sequence[tuple[str, str]]) -> float:
    """Corpus BLEU of (reference, prediction) pairs.

    Source: sacrebleu with its defaults (4-grams, exponential smoothing) but for the tokenizer.
    """
    from sacrebleu.metrics.bleu import BLEU

    references, predictions = zip(*normal, strict=True)
    return float(BLEU(tokenize=BLEU_TOKENIZER).corpus_score(list(predictions), [list(references)]).score)


def char_f1(reference: str, prediction: str) -> float:
    """Harmonic mean of precision and recall between two bags of characters; 1 if both are empty.

    Source: KorQuAD 1.0's evaluation script, which scores characters because Korean words are not reliably divided.
    """
    wanted, given = (Counter(text.replace(" ", "")) for text in (reference, prediction))
    total = wanted.total() + given.total()
    return 2 * (wanted & given).total() / total if total else 1.0
