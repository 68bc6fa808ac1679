"""Kaldi and ESPnet data folders: wav.scp, text, and optionally segments, utt2spk, spk2gender and utt2lang.

``text`` and ``wav.scp`` are joined in memory as tables of short strings. Audio is not read. Commands in ``wav.scp`` are
never run: if a pipe only converts a file, that file is used (``pipe_file``).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from voxray.core.errors import BadRow, RunError
from voxray.corpora.importers.kaldi_pipe import pipe_file
from voxray.corpora.importers.lines import text_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, find_audio


class _Entry(NamedTuple):
    line: int
    value: str


_Table = dict[str, _Entry | ImportFault]


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a data folder (or the folder of one of its files), in the order of ``segments``, else of ``wav.scp``.

    Each utterance gives one row or fault. An utterance is a line of ``segments`` (else of ``wav.scp``) and its line of
    ``text``. Lines of ``text`` without audio, recordings without segments and repeated ids are faults, too.

    Raises:
        RunError: ``wav.scp`` or ``text`` is missing.
    """
    folder = (path if path.is_dir() else path.parent).absolute()
    for name in ("wav.scp", "text"):
        if not (folder / name).is_file():
            raise RunError(f"{folder}: no {name}, which every Kaldi data folder has")
    texts, repeated = _table(folder / "text")
    yield from repeated
    speakers = _Speakers(folder)
    yield from speakers.faults
    utterances = _segments(folder) if (folder / "segments").is_file() else _recordings(folder)
    seen: set[str] = set()
    for row in utterances:
        if isinstance(row, ImportFault) and row.reason == "unused_recording":
            yield row
            continue
        if row.id and row.id in seen:
            yield ImportFault(row.source_file, row.line, row.id, "duplicate_id", f"a second line for {row.id}")
            continue
        seen.add(row.id)
        text = texts.pop(row.id, None)
        if isinstance(row, ImportFault):
            yield row
        elif text is None:
            yield ImportFault(row.source_file, row.line, row.id, "missing_text", f"{row.id} is not in text")
        elif isinstance(text, ImportFault):
            yield text
        else:
            yield replace(row, values=row.values | {"transcript": text.value} | speakers.of(row.id))
    list_name = "segments" if (folder / "segments").is_file() else "wav.scp"
    for utterance, text in texts.items():
        if isinstance(text, ImportFault):
            yield text
        else:
            message = f"{utterance} is not in {list_name}"
            yield ImportFault(str(folder / "text"), text.line, utterance, "missing_audio_entry", message)


def _split_first(text: str) -> tuple[str, str]:
    """The first word of a line, and the rest."""
    key, _, value = text.strip().replace("\t", " ", 1).partition(" ")
    return key, value.strip()


def _table(file: Path) -> tuple[_Table, list[ImportFault]]:
    """Read lines of ``id value``. Returns {id: entry or fault}, and the faults of lines without a new id."""
    table: _Table = {}
    faults = []
    for line in text_lines(file):
        if isinstance(line, ImportFault):
            if not line.id or line.id in table:
                faults.append(line)
            else:
                table[line.id] = line
            continue
        key, value = _split_first(line.text)
        if key in table:
            faults.append(ImportFault(str(file), line.number, key, "duplicate_id", f"a second line for {key}"))
        else:
            table[key] = _Entry(line.number, value)
    return table, faults


class _Speakers:
    """Speaker, gender and language of utterances, from those of the three files that exist."""

    def __init__(self, folder: Path) -> None:
        self.tables: dict[str, _Table] = {}
        self.faults: list[ImportFault] = []
        for name in ("utt2spk", "spk2gender", "utt2lang"):
            if (folder / name).is_file():
                self.tables[name], faults = _table(folder / name)
                self.faults += faults + [
                    fault for fault in self.tables[name].values() if isinstance(fault, ImportFault)
                ]

    def of(self, utterance: str) -> dict[str, Any]:
        speaker = self._find("utt2spk", utterance)
        values = {
            "speaker": speaker,
            "gender": self._find("spk2gender", speaker),
            "language": self._find("utt2lang", utterance),
        }
        return {key: value for key, value in values.items() if value}

    def _find(self, name: str, key: str) -> str:
        entry = self.tables.get(name, {}).get(key)
        return entry.value if isinstance(entry, _Entry) else ""


def _recordings(folder: Path) -> Iterator[ImportedRow | ImportFault]:
    """The recordings of wav.scp, in order."""
    name = str(folder / "wav.scp")
    for line in text_lines(folder / "wav.scp"):
        if isinstance(line, ImportFault):
            yield line
            continue
        yield _recording(name, line.number, *_split_first(line.text), folder)


def _recording(name: str, line: int, key: str, value: str, folder: Path) -> ImportedRow | ImportFault:
    """One recording. Paths are relative to the recipe's root (two levels above data/train), else to the folder."""
    bases = (folder.parent.parent, folder.parent, folder)
    try:
        if value.endswith("|"):
            audio_path, channel = pipe_file(value, *bases)
            channels = {} if channel is None else {"channel": channel}
            return ImportedRow(name, line, key, {"audio_path": audio_path} | channels)
        if value.startswith("|"):
            raise BadRow("kaldi_pipe", "a pipe to write to, not to read from")
        return ImportedRow(name, line, key, {"audio_path": find_audio(value, *bases)})
    except BadRow as error:
        message = error.message
        if error.reason == "audio_missing" and ".ark:" in value:
            message += " (audio inside a Kaldi archive is not read)"
        return ImportFault(name, line, key, error.reason, message)


def _segments(folder: Path) -> Iterator[ImportedRow | ImportFault]:
    """The utterances of segments, in order. Lines are utterance, recording, start, end; -1 is the recording's end."""
    name = str(folder / "segments")
    recordings, repeated = _table(folder / "wav.scp")
    for fault in repeated:  # faults of recordings, not of utterances
        yield replace(fault, reason="unused_recording") if fault.reason == "duplicate_id" else fault
    used: set[str] = set()
    last: tuple[str, ImportedRow | ImportFault] | None = None
    for line in text_lines(folder / "segments"):
        if isinstance(line, ImportFault):
            yield line
            continue
        utterance, *fields = line.text.split()
        try:
            recording, start, duration = _times(fields)
            used.add(recording)
            if last is None or last[0] != recording:
                last = (recording, _find(recordings, recording, folder))
            if isinstance(last[1], ImportFault):
                raise BadRow(last[1].reason, f"recording {recording}: {last[1].message}")
            values = {**last[1].values, "start": start, "session": recording}
            yield ImportedRow(name, line.number, utterance, values | ({"duration": duration} if duration else {}))
        except BadRow as error:
            yield ImportFault(name, line.number, utterance, error.reason, error.message)
    for recording, entry in recordings.items():
        if recording not in used:
            message = f"no segment of recording {recording}"
            yield ImportFault(str(folder / "wav.scp"), entry.line, recording, "unused_recording", message)


def _find(recordings: _Table, recording: str, folder: Path) -> ImportedRow | ImportFault:
    entry = recordings.get(recording)
    if isinstance(entry, _Entry):
        return _recording(str(folder / "wav.scp"), entry.line, recording, entry.value, folder)
    return entry or ImportFault("", 0, recording, "missing_audio_entry", "not in wav.scp")


def _times(fields: list[str]) -> tuple[str, float, float]:
    """Recording, start and duration (0: to the end) from the fields of a line of segments after the utterance.

    Raises:
        BadRow: ``bad_segment``: not three fields, times that are not numbers, or an end not after the start.
    """
    if len(fields) != 3:
        raise BadRow("bad_segment", f"{len(fields) + 1} fields, not utterance, recording, start, end")
    try:
        start, end = float(fields[1]), float(fields[2])
    except ValueError:
        raise BadRow("bad_segment", f"start {fields[1]!r} and end {fields[2]!r} are no numbers") from None
    if not 0 <= start < 1e9 or not (end == -1 or start < end < 1e9):
        raise BadRow("bad_segment", f"from {fields[1]} to {fields[2]} s")
    return fields[0], start, 0.0 if end == -1 else round(end - start, 6)
