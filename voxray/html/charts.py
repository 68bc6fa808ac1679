"""Pictures of the evaluation reports as SVG, coloured by the page's style so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxray.html.page import escaped

WIDTH, LEFT, TOP = 520, 46, 30
PLOT_HEIGHT = 150
ROW_HEIGHT = 26
NAMES_WIDTH = 210
LABEL_CHARS = 14
NUM_COLOURS = 6


@dataclass(frozen=True)
class Value:
    """A number with its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def bars(title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[Value | None]]], unit: str) -> str:
    """Bars side by side in groups, with whiskers where there are intervals.

    Args:
        groups: Names below the bars.
        series: (name, one value per group); None leaves its place empty.
        unit: What the axis counts.
    """
    values = [value for _, row in series for value in row if value]
    if not values:
        return ""
    top = _nice(max(max(value.value, value.high or 0.0) for value in values) or 1.0)
    room = WIDTH - LEFT - 8
    step = room / len(groups)
    size = min(38.0, 0.76 * step / len(series))
    parts = [_text(LEFT - 38, 14, unit, "axis")]
    for tick in range(5):
        at = top * tick / 4
        y = _down(at, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{at:g}", "axis", "end"))
    for place, group in enumerate(groups):
        middle = LEFT + step * (place + 0.5)
        for number, (name, row) in enumerate(series):
            if value := row[place]:
                x = middle + (number - len(series) / 2) * size
                parts.append(_bar(x, size, value, top, number, f"{group}, {name}: {value.value:.3f}"))
        parts.append(_text(middle, TOP + PLOT_HEIGHT + 16, group[:LABEL_CHARS], "axis", "middle"))
    legend = _legend([name for name, _ in series]) if len(series) > 1 else ""
    return _figure(title, TOP + PLOT_HEIGHT + 26, parts, legend)


def forest(title: str, rows: Sequence[tuple[str, Value, int]], unit: str, note: str = "") -> str:
    """Differences with their intervals around 0, one below the other.

    Args:
        rows: (name, difference, 1 for better, -1 for worse, 0 for not shown).
        unit: What the axis counts.
        note: Beside the axis: which way is better.
    """
    if not rows:
        return ""
    ends = [abs(end) for _, value, _ in rows for end in (value.value, value.low or 0.0, value.high or 0.0)]
    reach = _nice(max(ends) or 1.0)
    height = TOP + ROW_HEIGHT * len(rows)

    def across(value: float) -> float:
        return NAMES_WIDTH + (WIDTH - NAMES_WIDTH - 20) * (value + reach) / (2 * reach)

    parts = []
    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x = across(tick * reach)
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height}"/>')
        parts.append(_text(x, height + 16, f"{tick * reach:+g}" if tick else "0", "axis", "middle"))
    for number, (name, value, way) in enumerate(rows):
        y = TOP + ROW_HEIGHT * (number + 0.5)
        kind = {1: "better", -1: "worse", 0: "unsure"}[way]
        low, high = (value.value if end is None else end for end in (value.low, value.high))
        said = f"{name}: {value.value:+.3f} [{low:+.3f}, {high:+.3f}]"
        line = f'<line x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        dot = f'<circle cx="{across(value.value):.1f}" cy="{y:.1f}" r="4.5"/>'
        parts.append(f'<g class="{kind}"><title>{escaped(said)}</title>{line}{dot}</g>')
        parts.append(_text(NAMES_WIDTH - 8, y + 4, name, "", "end"))
    parts.append(_text(across(0), height + 34, " ".join(filter(None, [unit, note])), "axis", "middle"))
    return _figure(title, height + 42, parts)


def _bar(x: float, size: float, value: Value, top: float, number: int, said: str) -> str:
    y, base = _down(value.value, top), _down(0, top)
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, size - 2):.1f}" height="{max(0.6, base - y):.1f}" rx="1.5"/>'
    )
    whisker = ""
    if value.low is not None and value.high is not None:
        middle = x + size / 2 - 1
        ends = f'y1="{_down(value.low, top):.1f}" y2="{_down(value.high, top):.1f}"'
        whisker = f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" {ends}/>'
    return f'<g class="c{number % NUM_COLOURS}"><title>{escaped(said)}</title>{shape}{whisker}</g>'


def _legend(names: Sequence[str]) -> str:
    """Below the picture, as text that wraps: names of runs may be long, and many."""
    shape = '<svg viewBox="0 0 10 10"><rect class="c{}" width="10" height="10" rx="2"/></svg>'
    keys = [f"<span>{shape.format(at % NUM_COLOURS)}{escaped(name)}</span>" for at, name in enumerate(names)]
    return f'<div class="legend">{"".join(keys)}</div>'


def _down(value: float, top: float) -> float:
    return TOP + PLOT_HEIGHT * (1 - value / top)


def _nice(largest: float) -> float:
    """The next number of the form 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6 or 8 times a power of ten, for an axis."""
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if power * step >= largest * 0.999)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escaped(text)}</text>'


def _figure(title: str, height: float, parts: Sequence[str], legend: str = "") -> str:
    picture = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escaped(title)}</figcaption>{picture}{legend}</figure>"
