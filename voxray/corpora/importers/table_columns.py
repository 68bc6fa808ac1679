"""Guess which column of a table holds what, from English and Korean headings and from what is in the cells."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from voxray.core.errors import RunError
from voxray.corpora.splits import find_split

HEADINGS: Mapping[str, tuple[str, ...]] = {
    kind: tuple(headings.split())
    for kind, headings in {
        "audio": (
            "audio_path audio_filepath audio audio_file file_name file path file_path wav wav_path wav_filename "
            "wav_file clip clip_path sound recording utterance_path 음성파일명 음성파일 오디오파일 녹음파일 파일명 "
            "파일이름 파일경로 파일 음성 오디오 녹음 음원 경로"
        ),
        "text": (
            "transcript transcription text sentence utterance normalized_text content 전사 전사문 "
            "전사텍스트 전사내용 텍스트 문장 발화 발화문 발화내용 정답 대사 내용 받아쓰기 label script 대본 스크립트"
        ),
        "speaker": (
            "speaker speaker_id spk spk_id client_id talker speaker_name 화자 화자id 화자번호 화자명 발화자 발화자id "
            "녹음자"
        ),
        "language": "language lang locale 언어",
        "start": "start start_time begin onset from 시작 시작시간 시작시각 시작점",
        "end": "end end_time stop to until 끝 종료 종료시간 종료시각 끝시간 끝점",
        "duration": "duration dur 길이 재생시간 녹음시간 발화길이",
        "channel": "channel 채널",
        "split": "split subset partition 구분 분할",
    }.items()
}
"""Headings of each kind of column, the likeliest first. Case, spaces, ``_``, ``-`` and units do not count."""
UNITS = {"ms": 1e-3, "밀리초": 1e-3, "milliseconds": 1e-3, "min": 60.0, "분": 60.0}
TIMES = ("start", "end", "duration")
_UNIT = re.compile(r"[(\[_ ](ms|밀리초|milliseconds|min|분|sec|seconds|secs|s|초)[)\]]?$")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # startMs -> start Ms
_SCRIPTS = {"ko": re.compile("[가-힣]"), "ja": re.compile("[ぁ-ヿ]"), "th": re.compile("[\u0e01-\u0e5b]")}
_LETTER = re.compile(r"[^\W\d_]")
MIN_LETTERS = 2  # on average, of a column of transcripts
MIN_SHARE = 0.5  # of the cells of a column of clips that must be clips, if its heading does not say so


@dataclass(frozen=True)
class TableColumns:
    """Positions of a table's columns.

    Attributes:
        names: All headings.
        positions: {kind of ``HEADINGS``: position}.
        scales: {kind of ``TIMES``: seconds per unit}.
        language: Language of all rows, if there is no such column and the script of the texts tells.
    """

    names: tuple[str, ...]
    positions: Mapping[str, int]
    scales: Mapping[str, float]
    language: str = ""

    def __str__(self) -> str:
        named = ", ".join(f"{kind} = {self.names[position]}" for kind, position in self.positions.items())
        others = [name for position, name in enumerate(self.names) if position not in self.positions.values()]
        unused = f"; not used: {', '.join(others)}" if others else ""
        return named + (f", language {self.language} (by the script of the texts)" if self.language else "") + unused


def guess_columns(
    names: Sequence[str], rows: Sequence[Sequence[str]], is_clip: Callable[[str], bool], chosen: Mapping[str, str]
) -> TableColumns:
    """Choose the columns of a table.

    Args:
        names: The headings, or column numbers from 1 of a table without headings.
        rows: The first rows.
        is_clip: Whether a cell names an audio file.
        chosen: {kind: heading} that the user chose.
    Raises:
        RunError: A heading of the user's is not in the table, or no column holds clips or texts. The message lists the
            headings and the flags to give.
    """
    positions = {kind: _position(names, heading, kind) for kind, heading in chosen.items() if heading}
    if "audio" in positions and positions["audio"] == positions.get("text"):
        raise RunError(f"{flag('audio')} and {flag('text')} name the same column, {names[positions['audio']]}")
    for kind in HEADINGS:
        if kind not in ("audio", "text", *positions):
            named = _named(names, kind, positions)
            if kind == "split":  # a column 구분 or subset often holds something else
                named = [at for at in named if names[at] == kind or any(find_split(row[at]) for row in rows)]
            positions |= {kind: named[0]} if named else {}
    if "audio" not in positions:
        positions["audio"] = _audio_column(names, rows, is_clip, positions)
    if "text" not in positions:
        positions["text"] = _text_column(names, rows, positions)
    scales = {kind: _scale(names[position]) for kind, position in positions.items() if kind in TIMES}
    texts = " ".join(row[positions["text"]] for row in rows)
    language = "" if "language" in positions else _language(texts)
    ordered = {kind: positions[kind] for kind in HEADINGS if kind in positions}
    return TableColumns(tuple(names), ordered, scales, language)


def is_heading(cell: str) -> bool:
    """Whether a cell is one of the known headings."""
    return any(_plain(cell) in map(_plain, headings) for headings in HEADINGS.values())


def flag(kind: str) -> str:
    return f"--{kind}_column"


def _readable(name: str) -> str:
    return _CAMEL.sub(" ", unicodedata.normalize("NFC", name).strip()).casefold()


def _plain(name: str) -> str:
    """A heading without case, unit, spaces and punctuation."""
    text = _readable(name)
    return re.sub(r"[\W_]", "", _UNIT.sub("", text))


def _scale(name: str) -> float:
    unit = _UNIT.search(_readable(name))
    return UNITS.get(unit[1], 1.0) if unit else 1.0


def _position(names: Sequence[str], heading: str, kind: str) -> int:
    for form in (str.strip, _plain):
        matching = [position for position, name in enumerate(names) if form(name) == form(heading)]
        if matching and form(heading) and not (heading.startswith("-") and form is _plain):
            return matching[0]
    raise RunError(f"{flag(kind)} {heading}: the table has the columns {', '.join(names)}")


def _named(names: Sequence[str], kind: str, taken: Mapping[str, int]) -> list[int]:
    """Positions of the columns with a heading of this kind, the likeliest first."""
    headings = list(map(_plain, HEADINGS[kind]))
    ranked = [
        (headings.index(_plain(name)), position)
        for position, name in enumerate(names)
        if _plain(name) in headings and position not in taken.values()
    ]
    return [position for _, position in sorted(ranked)]


def _audio_column(
    names: Sequence[str], rows: Sequence[Sequence[str]], is_clip: Callable[[str], bool], taken: Mapping[str, int]
) -> int:
    named = _named(names, "audio", taken)
    free = [position for position in range(len(names)) if position not in (*named, *taken.values())]
    shares = {}
    for position in (*named, *free):
        cells = [row[position] for row in rows if row[position].strip()]
        shares[position] = sum(map(is_clip, cells)) / len(cells) if cells else 0.0
    best = max(shares, key=lambda position: shares[position], default=-1)  # of equal ones the first
    if best >= 0 and shares[best] >= (MIN_SHARE if best not in named else 1e-9):
        return best
    if named:
        return named[0]
    raise RunError(
        f"no column names audio files. The columns are {', '.join(names)}. Name it with {flag('audio')}, and the "
        "folder of the clips with --audio_dir"
    )


def _text_column(names: Sequence[str], rows: Sequence[Sequence[str]], taken: Mapping[str, int]) -> int:
    def letters(position: int) -> float:
        cells = [row[position] for row in rows if row[position].strip()]
        return sum(len(_LETTER.findall(cell)) for cell in cells) / max(1, len(cells))

    named = _named(names, "text", taken)
    if named:
        return next((position for position in named if letters(position) >= MIN_LETTERS), named[0])
    free = [position for position in range(len(names)) if position not in taken.values()]
    best = max(free, key=letters, default=-1)
    if best < 0 or letters(best) < MIN_LETTERS:
        raise RunError(f"no column holds texts. The columns are {', '.join(names)}. Name it with {flag('text')}")
    return best


def _language(texts: str) -> str:
    """Language of texts in a script of one language; "" for other scripts."""
    num_letters = len(_LETTER.findall(texts))
    shares = {code: len(script.findall(texts)) / max(1, num_letters) for code, script in _SCRIPTS.items()}
    best = max(shares, key=lambda code: shares[code])
    return best if shares[best] > 0.3 else ""
