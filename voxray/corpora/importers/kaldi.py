"""Kaldi and ESPnet data folders: wav.scp, text, and where there are any segments, utt2spk, spk2gender and utt2lang.

``text`` and ``wav.scp`` are joined through tables of short strings; audio is never touched. Nothing in ``wav.scp`` is
run: of a pipe that only converts a file, the file is taken (``pipe_file``).
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
    """Read a data folder (or one of its files), in the order of ``segments``, else of ``wav.scp``.

    Each utterance gives one row or fault: a line of ``segments`` (``wav.scp`` without it) together with its line of
    ``text``. Lines of ``text`` that no audio has, recordings that no segment uses and ids met twice are faults as well.

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
    for found in utterances:
        if isinstance(found, ImportFault) and found.reason == "unused_recording":
            yield found
            continue
        if found.id and found.id in seen:
            yield ImportFault(found.source_file, found.line, found.id, "duplicate_id", f"a second line for {found.id}")
            continue
        seen.add(found.id)
        text = texts.pop(found.id, None)
        if isinstance(found, ImportFault):
            yield found
        elif text is None:
            yield ImportFault(found.source_file, found.line, found.id, "missing_text", f"{found.id} is not in text")
        elif isinstance(text, ImportFault):
            yield text
        else:
            values = found.values | {"transcript": text.value} | speakers.of(found.id)
            yield replace(found, values=values)
    wanted = "segments" if (folder / "segments").is_file() else "wav.scp"
    for utterance, text in texts.items():
        if isinstance(text, ImportFault):
            yield text
        else:
            message = f"{utterance} is not in {wanted}"
            yield ImportFault(str(folder / "text"), text.line, utterance, "missing_audio_entry", message)


def _table(file: Path) -> tuple[_Table, list[ImportFault]]:
    """``id rest of the line`` -> {id: entry or the line's own fault}, and the faults that no id leads to."""
    table: _Table = {}
    faults = []
    for line in text_lines(file):
        if isinstance(line, ImportFault):
            if not line.id or line.id in table:
                faults.append(line)
            else:
                table[line.id] = line
            continue
        key, _, value = line.text.strip().replace("\t", " ", 1).partition(" ")
        if key in table:
            faults.append(ImportFault(str(file), line.number, key, "duplicate_id", f"a second line for {key}"))
        else:
            table[key] = _Entry(line.number, value.strip())
    return table, faults


class _Speakers:
    """Who speaks in an utterance, and in which language, from the files that are there."""

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
        found = {
            "speaker": speaker,
            "gender": self._find("spk2gender", speaker),
            "language": self._find("utt2lang", utterance),
        }
        return {key: value for key, value in found.items() if value}

    def _find(self, name: str, key: str) -> str:
        entry = self.tables.get(name, {}).get(key)
        return entry.value if isinstance(entry, _Entry) else ""


def _recordings(folder: Path) -> Iterator[ImportedRow | ImportFault]:
    """wav.scp line by line, each with its audio."""
    name = str(folder / "wav.scp")
    for line in text_lines(folder / "wav.scp"):
        if isinstance(line, ImportFault):
            yield line
            continue
        key, _, value = line.text.strip().replace("\t", " ", 1).partition(" ")
        yield _recording(name, line.number, key, value.strip(), folder)


def _recording(name: str, line: int, key: str, value: str, folder: Path) -> ImportedRow | ImportFault:
    """Paths begin at the recipe's root, from where the folder is data/train; else at the folder itself."""
    bases = (folder.parent.parent, folder.parent, folder)
    try:
        if value.endswith("|"):
            audio_path, channel = pipe_file(value, *bases)
            return ImportedRow(
                name, line, key, {"audio_path": audio_path} | ({} if channel is None else {"channel": channel})
            )
        if value.startswith("|"):
            raise BadRow("kaldi_pipe", "a pipe to write to, not to read from")
        return ImportedRow(name, line, key, {"audio_path": find_audio(value, *bases)})
    except BadRow as error:
        message = error.message
        if error.reason == "audio_missing" and ".ark:" in value:
            message += " (audio inside a Kaldi archive is not read)"
        return ImportFault(name, line, key, error.reason, message)


def _segments(folder: Path) -> Iterator[ImportedRow | ImportFault]:
    """segments line by line: utterance, recording, start, end; an end of -1 is the recording's."""
    name = str(folder / "segments")
    recordings, repeated = _table(folder / "wav.scp")
    for fault in repeated:  # not of an utterance: they are reported under the recording
        yield replace(fault, reason="unused_recording") if fault.reason == "duplicate_id" else fault
    used: dict[str, None] = {}
    last: tuple[str, ImportedRow | ImportFault] | None = None
    for line in text_lines(folder / "segments"):
        if isinstance(line, ImportFault):
            yield line
            continue
        utterance, *fields = line.text.split()
        try:
            recording, start, duration = _times(fields)
            used[recording] = None
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
            line_number = entry.line
            message = f"no segment of recording {recording}"
            yield ImportFault(str(folder / "wav.scp"), line_number, recording, "unused_recording", message)


def _find(recordings: _Table, recording: str, folder: Path) -> ImportedRow | ImportFault:
    entry = recordings.get(recording)
    if isinstance(entry, _Entry):
        return _recording(str(folder / "wav.scp"), entry.line, recording, entry.value, folder)
    return entry or ImportFault("", 0, recording, "missing_audio_entry", "not in wav.scp")


def _times(fields: list[str]) -> tuple[str, float, float]:
    """Recording, start and duration (0: to the end) of a line of segments without its first word.

    Raises:
        BadRow: Not three fields, no numbers, or no time between start and end (``bad_segment``).
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
