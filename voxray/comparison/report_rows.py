"""The rows that a report holds, with their alignments and clips, as the JSON that the page's script reads."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.comparison.alignments import pieces
from voxray.comparison.evaluations import ScoredRow
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import Sample, parse_row
from voxray.core.units import MIB
from voxray.evaluation.slices import clip_seconds
from voxray.html.page import data_uri
from voxray.metrics.names import is_transcript

MEDIA_TYPES = {
    **{"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg", "opus": "audio/ogg"},
    **{"m4a": "audio/mp4", "mp4": "audio/mp4", "aac": "audio/aac", "webm": "audio/webm"},
}
"""Formats that browsers play; all others are decoded and embedded as WAV."""
EMBEDDABLE_SECONDS_PER_MIB = 32.0  # of WAV at 16 kHz


def page_rows(
    rows: Sequence[Sequence[ScoredRow]], *, max_rows: int, embed_audio_mib: int
) -> tuple[list[dict[str, Any]], int, str]:
    """The rows as the page's script takes them, those with most errors or the largest changes first.

    Args:
        rows: The same rows of every run.
        max_rows: Maximum number of rows; the others are left out.
        embed_audio_mib: Embed the clips if their total size is at most this.
    Returns:
        The rows, how many were left out, and a sentence on the clips.
    """
    answers = sorted(zip(*rows, strict=True), key=_interest, reverse=True)
    shown = answers[:max_rows]
    clips, note = _clips([first for first, *_ in shown], embed_audio_mib * MIB)
    entries = [_page_row(row) | ({"u": clip} if clip else {}) for row, clip in zip(shown, clips, strict=True)]
    return entries, len(answers) - len(shown), note


def _interest(answers: Sequence[ScoredRow]) -> float:
    first = answers[0].error
    return max((abs(answer.error - first) for answer in answers[1:]), default=first)


def _page_row(answers: Sequence[ScoredRow]) -> dict[str, Any]:
    """One row; the keys are short because there may be thousands of rows (see ``report.js``)."""
    first = answers[0]
    values = first.values
    row: dict[str, Any] = {"t": first.task, "i": values.get("id") or "", "r": values["reference"] or ""}
    row |= {"n": first.reference, "w": values.get("source") or "", "d": dict(first.slices)}
    row["a"] = [
        {
            **{"e": round(answer.error, 4), "x": answer.exact, "p": answer.values["prediction"] or ""},
            **({} if answer.exact else {"g": _marked(answer)}),
            **({"n": answer.prediction} if answer.exact and answer.prediction != first.reference else {}),
        }
        for answer in answers
    ]
    if seconds := clip_seconds(values):
        row["s"] = round(seconds, 2)
    if not is_transcript(first.task):
        row["b"] = 1
    if values.get("prompt"):
        row["q"] = values["prompt"]
    return row


def _marked(row: ScoredRow) -> list[tuple[str, str, str]]:
    """Pieces of both texts, marked e, s, i or d; transcripts by character, answers by word."""
    by_word = not is_transcript(row.task)
    edits = pieces(row.reference, row.prediction, by_word=by_word)
    return [(kind[0], reference, prediction) for kind, reference, prediction in edits]


def _clips(rows: Sequence[ScoredRow], max_bytes: int) -> tuple[list[str], str]:
    """The URL of each row's clip, "" without one, and a sentence on them. Small clips are embedded as data URLs."""
    by_source = read_samples([row.values.get("source") or "" for row in rows if clip_seconds(row.values)])
    samples = [by_source.get(row.values.get("source") or "") for row in rows]
    total = sum(_num_bytes(sample) for sample in samples if sample)
    if total > max_bytes:
        note = f"The clips are links to their files ({total / MIB:,.0f} MiB, more than --embed_audio_mib)."
        return [_file_url(sample) if sample else "" for sample in samples], note
    return [_embedded(sample) if sample else "" for sample in samples], "The clips are in this page." if any(
        samples
    ) else ""


def read_samples(sources: Sequence[str]) -> dict[str, Sample]:
    """Manifest rows by ``manifest:line``; rows that cannot be read any more are absent."""
    lines: dict[str, set[int]] = {}
    for source in sources:
        manifest, _, line = source.rpartition(":")
        if manifest and line.isdecimal():
            lines.setdefault(manifest, set()).add(int(line))
    samples = {}
    for manifest, numbers in lines.items():
        try:
            with open(manifest, "rb") as file:
                for number, raw in enumerate(file, 1):
                    if number in numbers:
                        samples |= _read_sample(raw, manifest, number)
        except OSError:
            continue  # the manifest has moved: the report then shows no clips
    return samples


def _read_sample(raw: bytes, manifest: str, number: int) -> dict[str, Sample]:
    try:
        sample = parse_row(raw.removeprefix(b"\xef\xbb\xbf"), manifest, number)
    except (BadRow, RunError):
        return {}
    return {f"{manifest}:{number}": sample} if sample.audio_path and Path(sample.audio_path).is_file() else {}


def _is_whole(sample: Sample) -> bool:
    return not (sample.start_sec or sample.duration_sec or sample.channel >= 0)


def _num_bytes(sample: Sample) -> int:
    if _is_whole(sample) or not sample.duration_sec:
        return Path(sample.audio_path).stat().st_size
    return round(sample.duration_sec / EMBEDDABLE_SECONDS_PER_MIB * MIB)


def _file_url(sample: Sample) -> str:
    part = ""
    if sample.start_sec or sample.duration_sec:
        end = f",{sample.start_sec + sample.duration_sec:g}" if sample.duration_sec else ""
        part = f"#t={sample.start_sec:g}{end}"
    return Path(sample.audio_path).absolute().as_uri() + part


def _embedded(sample: Sample) -> str:
    kind = MEDIA_TYPES.get(Path(sample.audio_path).suffix.lower().lstrip("."))
    try:
        if kind and _is_whole(sample):
            return data_uri(Path(sample.audio_path).read_bytes(), kind)
        return data_uri(_as_wav(sample), "audio/wav")
    except (OSError, BadRow):
        return ""


def _as_wav(sample: Sample) -> bytes:
    import soundfile

    from voxray.audio.decode import Part, decode, to_pcm16

    part = Part(sample.start_sec, sample.duration_sec, sample.channel)
    file = io.BytesIO()
    soundfile.write(file, to_pcm16(decode(sample.audio_path, 16_000, part=part)), 16_000, format="WAV")
    return file.getvalue()
