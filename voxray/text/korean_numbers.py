"""How Korean reads a number aloud, to recognise the reading of a number in a transcript."""

import re

_DIGITS = "영일이삼사오육칠팔구"
_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")
_ONES = (
    *((), ("하나", "한"), ("둘", "두"), ("셋", "세", "서", "석"), ("넷", "네", "너", "넉")),
    *(("다섯",), ("여섯",), ("일곱",), ("여덟",), ("아홉",)),
)
_NUMBER = re.compile(r"\d[\d,]*")
_LARGEST = 10**8 - 1


def is_reading(written: str, spoken: str) -> bool:
    """Whether ``spoken`` is the reading of ``written``, which begins with a number: ``70%`` and ``칠십 퍼센트``.

    After a number alone nothing else may follow: ``5`` does not match ``오늘``.
    """
    number = _NUMBER.match(written)
    if number is None:
        return False
    spoken = "".join(spoken.split()).replace("륙", "육")
    if number.end() == len(written):
        return spoken in _readings(number[0].replace(",", ""))
    return any(spoken.startswith(text) and spoken != text for text in _readings(number[0].replace(",", "")))


def _readings(digits: str) -> set[str]:
    """All readings of a whole number: digit by digit, Sino-Korean up to 99,999,999 and native Korean up to 99."""
    one_by_one = "".join(_DIGITS[int(digit)] for digit in digits)
    readings = {one_by_one, one_by_one.replace("영", "공")}
    number = int(digits[:9])
    if number <= _LARGEST:
        high, low = divmod(number, 10_000)
        readings.add(_sino(high).removeprefix("일" if high == 1 else "") + "만" + _sino(low) if high else _sino(low))
    if number < 100:
        tens, ones = divmod(number, 10)
        readings |= {_TENS[tens] + text for text in _ONES[ones] or ("",)}
        readings |= {"스무"} if number == 20 else set()
    return readings - {""}


def _sino(number: int) -> str:
    """The Sino-Korean reading of a number below 10,000; "" for 0."""
    text = ""
    for unit, digit in zip(("천", "백", "십", ""), map(int, f"{number:04}"), strict=True):
        text += ("" if digit == 1 and unit else _DIGITS[digit]) + unit if digit else ""
    return text
