"""Damage files as disks, transfers, editors and attackers do, from a seed."""

import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

WAITING_SHARE = 6
"""Seconds by the clock for one second of the processor, above which a reader waits instead of computing."""
STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 2, 1e308, -0.5, float("nan"), float("inf"), 2**63, 10**40),
    *("", "x", "../../x", "a\x00b", "열" * 2000, "\ud800", "1e999", "0x10", "-1"),
    *([], [[]], [1, "a"], {}, {"a": {"b": []}}),
)
"""Values that hardly any reader expects."""


def stopwatch() -> Callable[[], float]:
    """A function that returns the seconds since this call.

    It counts processor time, which other work on the machine does not lengthen, or a sixth of the elapsed time if that
    is more.
    """
    cpu, clock = time.process_time(), time.monotonic()
    return lambda: max(time.process_time() - cpu, (time.monotonic() - clock) / WAITING_SHARE)


def mutate(data: bytes, seed: int) -> bytes:
    """A damaged copy of a file: JSON by its values in half of the cases, else by its bytes."""
    chooser = random.Random(seed)
    if chooser.random() < 0.5:
        mutated = _mutate_json(data, chooser)
        if mutated is not None:
            return mutated
    operations: list[Callable[[bytearray, random.Random], None]] = [_flip, _cut, _insert, _repeat, _overwrite]
    damaged = bytearray(data)
    for _ in range(chooser.choice((1, 1, 1, 4, 30))):
        chooser.choice(operations)(damaged, chooser)
    return bytes(damaged)


def strange_value(chooser: random.Random) -> Any:
    return copy.deepcopy(chooser.choice(STRANGE))


def _mutate_json(data: bytes, chooser: random.Random) -> bytes | None:
    """Replace, remove or add a value in a JSON document, or in one line of JSON Lines; None for other files."""
    lines = data.splitlines(keepends=True)
    for parts, number in (([data], 0), (lines, chooser.randrange(len(lines) or 1))):
        try:
            value = json.loads(parts[number])
        except (ValueError, IndexError, RecursionError):
            continue
        for _ in range(chooser.choice((1, 1, 3))):
            value = _changed(value, chooser)
        end = b"\n" if parts[number].endswith(b"\n") else b""
        parts[number] = json.dumps(value).encode("utf-8", "surrogatepass") + end
        return b"".join(parts)
    return None


def _changed(value: Any, chooser: random.Random) -> Any:
    if isinstance(value, dict) and value and chooser.random() < 0.9:
        key = chooser.choice(sorted(value))
        if chooser.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _changed(value[key], chooser)}
    if isinstance(value, list) and value and chooser.random() < 0.9:
        index = chooser.randrange(len(value))
        if chooser.random() < 0.15:
            return value[:index] + value[index + 1 :]
        return [*value[:index], _changed(value[index], chooser), *value[index + 1 :]]
    return strange_value(chooser)


def _flip(data: bytearray, chooser: random.Random) -> None:
    if data:
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)


def _cut(data: bytearray, chooser: random.Random) -> None:
    start = chooser.randrange(len(data) + 1)
    del data[start : len(data) if chooser.random() < 0.5 else start + chooser.randrange(64)]


def _insert(data: bytearray, chooser: random.Random) -> None:
    start = chooser.randrange(len(data) + 1)
    data[start:start] = chooser.randbytes(chooser.choice((1, 4, 100)))


def _repeat(data: bytearray, chooser: random.Random) -> None:
    start = chooser.randrange(len(data) + 1)
    data[start:start] = data[start : start + chooser.choice((8, 200))] * chooser.choice((1, 50))


def _overwrite(data: bytearray, chooser: random.Random) -> None:
    start = chooser.randrange(len(data) + 1)
    piece = chooser.choice((b"\x00" * 64, b"\xff" * 8, b'"', b"{", b"]", b"\n", b"9" * 30, b"-"))
    data[start : start + len(piece)] = piece
