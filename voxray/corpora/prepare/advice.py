"""Say which flags of prepare keep the rows that it left out."""

from collections.abc import Mapping, Sequence
from typing import Any

KEEP = {
    "duplicate": "--duplicates keep",
    "leak_audio": "--leaks allow",
    "leak_text": "--leaks allow",
    "leak_speaker": "--leaks allow",
}
"""{reason: flag with which these rows stay}."""
LIMITS = {
    "too_long": "--max_sec",
    "text_too_short": "--min_chars",
    "text_too_long": "--max_chars",
    "speaking_rate": "--min_chars_per_sec, --max_chars_per_sec",
    "too_quiet": "--min_peak_db",
    "near_silence": "--min_rms_db",
    "clipping": "--max_clip_share",
    "dc_offset": "--max_dc",
    "zero_tail": "--max_zero_tail_sec",
    "narrow_band": "--min_high_band_db",
    "duration_mismatch": "--max_duration_error_sec",
}
"""{reason: flags of the limits}."""
SHORTER_LIMITS_SEC = (2.0, 1.0, 0.5, 0.3, 0.1)
NAMES_SHOWN = 5  # of other splits
GOOD_SHARE = 0.9  # of the short rows that a lower limit should keep


def advice(
    left_out: dict[str, dict[str, Any]], num_rows: int, short_secs: Sequence[float], min_sec: float
) -> list[str]:
    """A sentence for each reason that a flag changes, the most frequent first.

    Args:
        left_out: {reason: {"rows"}}.
        num_rows: All rows of the input.
        short_secs: Durations of the rows that are ``too_short``, in seconds.
        min_sec: The limit that they miss.
    """
    sentences = []
    for reason, entry in sorted(left_out.items(), key=lambda item: -item[1]["rows"]):
        start = f"{entry['rows']} of {num_rows} rows"
        if reason == "too_short":
            sentences.append(f"{start} are shorter than {min_sec:g} s{_shorter_limit(short_secs, min_sec)}")
        elif reason in KEEP:
            sentences.append(f"{start} are left out as {reason}: {KEEP[reason]} keeps them")
        elif reason in LIMITS:
            sentences.append(f"{start} are left out as {reason}: {LIMITS[reason]} sets the limit")
    return sentences


def split_advice(other_splits: Mapping[str, int]) -> list[str]:
    """A sentence for each split of the corpus whose rows are left out; those of other names share one.

    Args:
        other_splits: {``validation``, ``test`` or another name: rows}.
    """
    sentences = [
        f"{other_splits[name]} rows of the corpus's {name} split are left out; {flag} FILE writes them"
        for name, flag in (("validation", "--val_output"), ("test", "--test_output"))
        if name in other_splits
    ]
    names = sorted(other_splits.keys() - {"validation", "test"})
    if names:
        shown = ", ".join(names[:NAMES_SHOWN]) + (" and others" if len(names) > NAMES_SHOWN else "")
        num_rows = sum(other_splits[name] for name in names)
        sentences.append(f"{num_rows} rows are left out because the corpus puts them into other splits: {shown}")
    return sentences


def _shorter_limit(short_secs: Sequence[float], min_sec: float) -> str:
    """``: --min_sec 0.5 keeps 51 of them``: the highest limit that keeps most of them, else the lowest one."""
    limits = [limit for limit in SHORTER_LIMITS_SEC if limit < min_sec]
    counts = [sum(sec >= limit for sec in short_secs) for limit in limits]
    chosen = next((n for n, count in enumerate(counts) if count >= GOOD_SHARE * len(short_secs)), len(limits) - 1)
    return f": --min_sec {limits[chosen]:g} keeps {counts[chosen]} of them" if limits and counts[chosen] else ""
