"""lhotse cuts: JSON Lines or a JSON list, plain or gzipped, of cuts that contain their recording and supervisions; and
Shar folders, whose clips are in tar files.

A cut with one supervision is one row with the cut's times, as in lhotse's own ASR data sets. A cut with several is one
row per supervision, with the supervision's times. A ``MultiCut`` is one row per supervision if each names one channel.
Cuts that lhotse would change on loading (mixes, speed changes, commands, sources other than files) are faults.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.core.source import check_number
from voxray.corpora.importers.embedded import TarIndex
from voxray.corpora.importers.lines import array_objects, json_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys

SHAR_CUTS, SHAR_RECORDINGS = "cuts.*.jsonl*", "recording"
_HARMLESS_TRANSFORMS = {"Resample"}
_TOLERANCE_SEC = 1e-3


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a cut set or a Shar folder. Every cut gives one row or fault per supervision, and one fault if it has none.

    Raises:
        RunError: A folder is not a Shar folder, or a file of it is missing or cannot be read.
    """
    if path.is_dir():
        yield from _shar_rows(path)
    else:
        yield from import_records(_supervised(_cuts(path)), _convert)


def _cuts(path: Path) -> Iterator[Record | ImportFault]:
    is_list = path.name.removesuffix(".gz").endswith(".json")
    return array_objects(path) if is_list else json_lines(path)


def _shar_rows(folder: Path) -> Iterator[ImportedRow | ImportFault]:
    """Each ``cuts.N.jsonl.gz`` has a ``recording.N.tar``, whose clips are the cuts' audio and have the cuts' names."""
    files = sorted(folder.glob(SHAR_CUTS))
    if not files:
        raise RunError(f"{folder}: no {SHAR_CUTS} in it, so it is not a Shar folder of lhotse")
    for file in files:
        archive = folder / f"{SHAR_RECORDINGS}.{file.name.split('.')[1]}.tar"
        if not any(folder.glob(f"{SHAR_RECORDINGS}.*.tar")):  # parts of a cut set, as ``lhotse split`` writes them
            yield from import_records(_supervised(_cuts(file)), _convert)
            continue
        clips = TarIndex(archive)

        def convert(record: Record, clips: TarIndex = clips) -> dict[str, Any]:
            return _convert(record, clips.find(str(record.values["cut"].get("id"))))

        yield from import_records(_supervised(_cuts(file)), convert)


def _supervised(cuts: Iterator[Record | ImportFault]) -> Iterator[Record | ImportFault]:
    """One record per supervision. Its ``id`` is the cut's, or the supervision's if the cut has several."""
    for record in cuts:
        if isinstance(record, ImportFault):
            yield record
            continue
        cut, cut_id = record.values, record.record_id()
        supervisions = cut.get("supervisions")
        is_multi = cut.get("type", "MonoCut") == "MultiCut"
        if not is_multi and cut.get("type", "MonoCut") != "MonoCut":
            message = f"a {cut['type']}; only MonoCut and MultiCut are one stretch of one file"
            yield ImportFault(record.file, record.line, cut_id, "unsupported_cut", message)
        elif not isinstance(supervisions, list) or not supervisions:
            yield ImportFault(record.file, record.line, cut_id, "missing_text", "a cut without supervisions")
        else:
            for number, supervision in enumerate(supervisions):
                if not isinstance(supervision, dict):
                    message = f"supervision {number} is no object"
                    yield ImportFault(record.file, record.line, cut_id, "bad_type", message)
                    continue
                own_id = supervision.get("id") or f"{cut_id}-{number}"
                row_id = cut_id if len(supervisions) == 1 else own_id
                yield Record(record.file, record.line, {"id": row_id, "cut": cut, "supervision": supervision})


def _convert(record: Record, clip: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row of one supervision.

    Args:
        clip: Keys of a clip in an archive; None for the recording's file.
    """
    cut, supervision = record.values["cut"], Record(record.file, record.line, record.values["supervision"])
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise BadRow("missing_audio_entry", "the cut has no recording")
    is_multi = cut.get("type") == "MultiCut"
    channel = supervision.values.get("channel") if is_multi else cut.get("channel", 0)
    if clip is None:
        audio_path, channel = _source(recording, channel, record.folder)
        clip = {"audio_path": audio_path}
    elif is_multi:
        clip = {**clip, "channel": _channel_index(channel, cut.get("channel"))}
    start, duration = check_number(cut.get("start"), "start"), check_number(cut.get("duration"), "duration")
    if len(cut["supervisions"]) > 1 or is_multi:
        start, duration = _times(start, duration, supervision.values)
    values: dict[str, Any] = {**clip, "transcript": supervision.text("text"), "duration": duration}
    whole = recording.get("duration")
    if start > 0 or not isinstance(whole, int | float) or abs(whole - duration) > _TOLERANCE_SEC:
        values["start"] = start
    if clip["audio_path"] and len(recording["sources"][0].get("channels") or []) > 1:
        values["channel"] = channel
    if recording.get("id"):
        values["session"] = str(recording["id"])
    if isinstance(recording.get("sampling_rate"), int):
        values["sample_rate"] = recording["sampling_rate"]
    return values | keep_keys(supervision, {key: key for key in ("speaker", "language", "gender")})


def _source(recording: dict[str, Any], channel: Any, folder: Path) -> tuple[str, int]:
    """The recording's file, and the index of the channel in it."""
    for transform in recording.get("transforms") or []:
        name = transform.get("name") if isinstance(transform, dict) else transform
        if name not in _HARMLESS_TRANSFORMS:
            raise BadRow("unsupported_cut", f"the recording is to be transformed when it is loaded: {name}"[:300])
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise BadRow("unsupported_source", "the recording is not one file")
    source = sources[0]
    if source.get("type") != "file":
        raise BadRow(
            "unsupported_source", f"a source of type {source.get('type')!r}: only files are read, nothing is run"
        )
    index = _channel_index(channel, source.get("channels") or [0])
    return find_audio(source.get("source"), folder), index


def _channel_index(channel: Any, channels: Any) -> int:
    """Position of a channel, a number or a list of one, among the channels of a clip."""
    if isinstance(channel, list) and len(channel) == 1:
        channel = channel[0]
    if not isinstance(channel, int) or not isinstance(channels, list) or channel not in channels:
        raise BadRow("audio_channel", f"channel {channel} is none of the clip's, {channels}"[:300])
    return channels.index(channel)


def _times(cut_start: float, cut_duration: float, supervision: dict[str, Any]) -> tuple[float, float]:
    """Start and duration of a supervision in the file. Its own start is relative to the cut's."""
    start, duration = supervision.get("start"), check_number(supervision.get("duration"), "supervision duration")
    if isinstance(start, bool) or not isinstance(start, int | float) or not math.isfinite(start):
        raise BadRow("bad_type", "supervision start is not a number")
    if start < -_TOLERANCE_SEC or start + duration > cut_duration + _TOLERANCE_SEC or duration == 0:
        raise BadRow("bad_segment", f"supervision from {start} for {duration} s in a cut of {cut_duration} s")
    return round(cut_start + max(start, 0.0), 6), duration
