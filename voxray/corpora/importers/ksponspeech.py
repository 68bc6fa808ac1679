"""KsponSpeech and corpora with its layout: ``.trn`` lists of ``path :: text``, or a ``.txt`` file beside each clip.

Texts without Hangul, of corpora in other languages, get no language and stay as they are.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import open_regular
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES
from voxray.corpora.importers.lines import HANGUL, decode_text, text_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, find_audio, split_by_path
from voxray.corpora.splits import find_split
from voxray.text.korean import clean_transcript

PCM_RATE_HZ = 16_000
MAX_TEXT_BYTES = 1 << 20


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a ``.trn`` file, all ``.trn`` files of a folder, or, if it has none, its clips and texts at any depth.

    The transcript is the spelling. ``transcript_phonetic`` has the phonetic reading if that differs,
    ``transcript_raw`` the original line, and ``transcript_notes`` the cleaner's notes (``unk``: do not score).

    Raises:
        RunError: The path cannot be read.
    """
    if not path.is_dir():
        yield from _list_rows(path)
    elif lists := sorted(path.glob("*.trn")):
        for file in lists:
            yield from _list_rows(file)
    else:
        yield from _folder_rows(path)


def _list_rows(file: Path) -> Iterator[ImportedRow | ImportFault]:
    """Paths in a list are relative to the root of the corpus, which is the list's folder or its parent."""
    name, folder = str(file.absolute()), file.absolute().parent
    split = "test" if file.stem.startswith("eval") else find_split(file.stem)  # eval_clean.trn and eval_other.trn
    own_split = {"split": split} if split else {}
    for line in text_lines(file, korean_code_page=True):
        if isinstance(line, ImportFault):
            yield line
            continue
        clip, separator, text = (part.strip() for part in line.text.partition("::"))
        clip_id = Path(clip.replace("\\", "/")).stem
        try:
            if not separator:
                raise BadRow("bad_row", "no '::' between path and text")
            audio_path = find_audio(clip, folder, folder.parent)
            yield ImportedRow(name, line.number, clip_id, _values(audio_path, text) | own_split)
        except BadRow as error:
            yield ImportFault(name, line.number, clip_id, error.reason, error.message)


def _folder_rows(root: Path) -> Iterator[ImportedRow | ImportFault]:
    """A row or fault for each clip and each text without a clip. Holds the names of one folder at a time in memory."""

    def refuse(error: OSError) -> None:
        raise RunError(f"{error.filename}: cannot read it: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root.absolute(), onerror=refuse):
        subfolders.sort()
        own_split = split_by_path(Path(folder), root)
        for path in filter(os.path.islink, (os.path.join(folder, name) for name in subfolders)):
            yield ImportFault(path, 1, "", "linked_folder", "a link to a folder is not followed: name it with --input")
        texts = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            if suffix.lower() in AUDIO_SUFFIXES:
                if stem in texts:
                    yield _pair(Path(path), Path(folder, texts.pop(stem)), own_split)
                else:
                    yield ImportFault(path, 1, stem, "missing_text", f"no {stem}.txt beside the clip")
        for stem in sorted(texts):
            path = os.path.join(folder, texts[stem])
            yield ImportFault(path, 1, stem, "missing_audio_entry", "no clip beside the text")


def _pair(clip: Path, text: Path, own_split: dict[str, str]) -> ImportedRow | ImportFault:
    try:
        try:
            with open_regular(text) as file:
                raw = file.read(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise BadRow("text_unreadable", f"cannot read {text}: {error.strerror}") from None
        if len(raw) > MAX_TEXT_BYTES:
            raise BadRow("line_too_long", f"a transcript of over {MAX_TEXT_BYTES >> 20} MiB")
        transcript = " ".join(decode_text(raw.removeprefix(b"\xef\xbb\xbf"), korean_code_page=True).split())
        return ImportedRow(str(text), 1, clip.stem, _values(find_audio(str(clip)), transcript) | own_split)
    except BadRow as error:
        return ImportFault(str(text), 1, clip.stem, error.reason, error.message)


def _values(audio_path: str, raw: str) -> dict[str, Any]:
    if not HANGUL.search(raw) and not audio_path.lower().endswith(".pcm"):
        return {"audio_path": audio_path, "transcript": raw}
    cleaned = clean_transcript(raw)
    values: dict[str, Any] = {"audio_path": audio_path, "transcript": cleaned.text, "language": "ko"}
    values["transcript_raw"] = raw
    if cleaned.phonetic != cleaned.text:
        values["transcript_phonetic"] = cleaned.phonetic
    if cleaned.notes:
        values["transcript_notes"] = list(cleaned.notes)
    if audio_path.lower().endswith(".pcm"):
        values["sample_rate"] = PCM_RATE_HZ
    return values
