"""Pictures of a sweep's report as SVG, coloured by the page's style so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from voxray.config.search_space import Domain, choice_key, shown
from voxray.html.page import escaped
from voxray.metrics.names import higher_is_better
from voxray.sweep.results import Repeated
from voxray.sweep.trials import Trial

NUM_SHADES = 5
WIDE, NARROW = 1080, 520
LEFT, RIGHT, TOP, HEIGHT = 64, 16, 34, 210
LABEL_CHARS = 22


@dataclass(frozen=True)
class Axis:
    """Where values stand on an axis.

    Attributes:
        title: Name of the flag or metric.
        ticks: (share of the axis from 0 to 1, label).
        shares: Share of every trial, in their order.
        steps: Whether there are only the places of the ticks.
    """

    title: str
    ticks: Sequence[tuple[float, str]]
    shares: Sequence[float]
    steps: bool = False


def flag_axis(domain: Domain, trials: Sequence[Trial]) -> Axis:
    """The axis of a swept flag: choices in equal distances, ranges as they were drawn."""
    values = [trial.choice.get(domain.name) for trial in trials]
    if domain.kind == "choice":
        keys = [choice_key({domain.name: choice}) for choice in domain.values]
        places = [(at + 0.5) / len(keys) for at in range(len(keys))]
        ticks = list(zip(places, map(shown, domain.values), strict=True))
        return Axis(
            domain.name, ticks, [places[keys.index(choice_key({domain.name: value}))] for value in values], True
        )
    low, high = domain.values
    return Axis(domain.name, *_scale(low, high, values, log=domain.kind == "log"))


def metric_axis(metric: str, trials: Sequence[Trial]) -> Axis:
    """The axis of a metric, from the smallest to the largest value."""
    values = [trial.value(metric) or 0.0 for trial in trials]
    return Axis(metric, *_scale(min(values), max(values), values))


def _scale(low: float, high: float, values: Sequence[Any], *, log: bool = False) -> tuple[Any, Any]:
    """Ticks and shares of numbers between two ends."""
    if not low < high:
        return [(0.5, f"{low:.3g}")], [0.5 for _ in values]
    turn = math.log if log else float
    first, reach = turn(low), turn(high) - turn(low)
    places = [low + (high - low) * part / 4 for part in range(5)]
    if log:
        places = [math.exp(first + reach * part / 4) for part in range(5)]
    return [((turn(at) - first) / reach, f"{at:.3g}") for at in places], [
        (turn(each) - first) / reach for each in values
    ]


def shades(trials: Sequence[Trial], metric: str, mode: str) -> list[int]:
    """How good every trial is among all, from 0 for the best fifth to 4 for the worst."""
    order = sorted((trial.value(metric) or 0.0 for trial in trials), reverse=mode == "max")
    return [order.index(trial.value(metric) or 0.0) * NUM_SHADES // len(order) for trial in trials]


def parallel(axes: Sequence[Axis], trials: Sequence[Trial], kinds: Sequence[int], winner: int) -> str:
    """A line for every trial across its values; the page's script lets one choose parts of the axes.

    Args:
        kinds: Shade of every trial.
        winner: Number of the best trial.
    """
    parts, gap = [], (WIDE - 260) / max(1, len(axes) - 1)
    xs = [160 + gap * at for at in range(len(axes))]
    # lines through the same place stand a little apart, so that each can be seen and pointed at
    spread = [0.0 if len(trials) < 2 else (at / (len(trials) - 1) - 0.5) for at in range(len(trials))]
    for at in sorted(range(len(trials)), key=lambda at: -kinds[at]):
        room = [0.6 / len(axis.ticks) if axis.steps else 0.0 for axis in axes]
        ys = [_down(axis.shares[at] + spread[at] * space) for axis, space in zip(axes, room, strict=True)]
        path = f"M{xs[0]:.1f},{ys[0]:.1f}"
        for x, y, before_x, before_y in zip(xs[1:], ys[1:], xs, ys, strict=False):
            middle = (x + before_x) / 2
            path += f"C{middle:.1f},{before_y:.1f} {middle:.1f},{y:.1f} {x:.1f},{y:.1f}"
        kind = f"trial q{kinds[at]}" + (" winner" if trials[at].number == winner else "")
        shares = " ".join(f"{y:.1f}" for y in ys)
        parts.append(f'<path class="{kind}" data-trial="{trials[at].number}" data-ys="{shares}" d="{path}"/>')
    for x, axis in zip(xs, axes, strict=True):
        last = axis is axes[-1]
        parts.append(f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="{_down(1):.1f}" y2="{_down(0):.1f}"/>')
        for share, label in axis.ticks:
            side, anchor = (x + 8, "start") if last else (x - 8, "end")
            parts.append(_text(side, _down(share) + 4, label, "axis halo", anchor))
        parts.append(_text(x, 16, axis.title, "name", "middle"))
        place = f'x="{x - 14:.1f}" y="{_down(1) - 4:.1f}" width="28" height="{HEIGHT + 8}"'
        parts.append(f'<rect class="brush" x="{x - 9:.1f}" width="18" y="0" height="0"/>')
        parts.append(f'<rect class="axis-area" {place}><title>drag to choose, click to clear</title></rect>')
    svg = f'<svg id="parallel" viewBox="0 0 {WIDE} {TOP + HEIGHT + 14}" role="img" aria-label="parallel coordinates">'
    said = '<p class="note" id="pointed">Point at a line; drag along an axis to see only what passes there.</p>'
    return f"<figure class='wide'>{svg}{''.join(parts)}</svg>{said}</figure>"


def ranks(title: str, shares: Sequence[tuple[str, float | None]]) -> str:
    """One bar for every name, from 0 to 100 %."""
    parts, left, height = [], 170, 28 * len(shares) + 12
    room = NARROW - left - 60
    for at, (name, share) in enumerate(shares):
        y = 10 + 28 * at
        parts.append(_text(left - 8, y + 14, name, "", "end"))
        parts.append(f'<rect class="track" x="{left}" y="{y}" width="{room}" height="18" rx="2"/>')
        if share is None:
            parts.append(_text(left + 6, y + 13, "too few trials to say", "axis"))
            continue
        parts.append(f'<rect class="c0" x="{left}" y="{y}" width="{max(1.0, room * share):.1f}" height="18" rx="2"/>')
        parts.append(_text(left + room + 8, y + 13, f"{share:.0%}", ""))
    return _figure(title, height, parts)


def scatter(
    x: Axis, y: Axis, trials: Sequence[Trial], kinds: Sequence[str], *, title: str, line: Sequence[int] = ()
) -> str:
    """A point for every trial.

    Args:
        kinds: CSS class of every trial.
        line: Places of the trials that are joined, in this order.
    """
    parts = _frame(x, y)
    places = [(_across(a), _down(b)) for a, b in zip(x.shares, y.shares, strict=True)]
    if len(line) > 1:
        joined = " ".join(f"{places[at][0]:.1f},{places[at][1]:.1f}" for at in line)
        parts.append(f'<polyline class="front" points="{joined}"/>')
    for trial, kind, (a, b) in zip(trials, kinds, places, strict=True):
        said = escaped(f"trial {trial.number}")
        place = f'data-trial="{trial.number}" cx="{a:.1f}" cy="{b:.1f}" r="5"'
        parts.append(f'<circle class="{kind}" {place}><title>{said}</title></circle>')
    if len(trials) <= 12 and not x.steps:
        for a, b in dict.fromkeys(places):
            here = [str(trial.number) for trial, place in zip(trials, places, strict=True) if place == (a, b)]
            parts.append(_text(a + 8, b - 6, ", ".join(here), "axis"))
    return _figure(title, TOP + HEIGHT + 44, parts)


def curves(metric: str, trials: Sequence[Trial], kinds: Sequence[int]) -> str:
    """The metric at every validation; a line that ends early was stopped there."""
    points = [
        (at, record["step"], float(record[metric]))
        for at, trial in enumerate(trials)
        for record in trial.history
        if isinstance(record.get(metric), int | float)
    ]
    if not points:
        return ""
    steps, values = [step for _, step, _ in points], [value for *_, value in points]
    x = Axis("step", *_scale(min(steps), max(steps), steps))
    y = Axis(metric, *_scale(min(values), max(values), values))
    parts = _frame(x, y)
    for at in sorted(range(len(trials)), key=lambda at: -kinds[at]):
        mine = [(_across(a), _down(b)) for (of, *_), a, b in zip(points, x.shares, y.shares, strict=True) if of == at]
        if not mine:
            continue
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in mine)
        number, kind = trials[at].number, kinds[at]
        parts.append(f'<polyline class="trial q{kind}" data-trial="{number}" points="{joined}"/>')
        mark = "stopped" if trials[at].state == "stopped" else "end"
        (a, b), place = mine[-1], f'data-trial="{number}"'
        parts.append(f'<circle class="{mark} p{kind}" {place} cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
    return _figure(f"{metric} by step", TOP + HEIGHT + 44, parts)


def intervals(metric: str, repeated: Sequence[Repeated], names: Sequence[str]) -> str:
    """Mean and interval of every choice that was trained with several seeds, a small dot for each run."""
    ends = [end for entry in repeated for end in (entry.low, entry.high, *entry.values.values()) if end is not None]
    low, high = min(ends), max(ends)
    ticks, _ = _scale(low, high, [])
    reach = (high - low) or 1.0
    low = low if high > low else low - 0.5
    parts, left, height = [], 110, 30 * len(repeated) + 20

    def across(value: float) -> float:
        return left + (NARROW - left - 30) * (value - low) / reach

    for share, label in ticks:
        x = left + (NARROW - left - 30) * share
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 6}"/>')
        parts.append(_text(x, height + 10, label, "axis", "middle"))
    for at, (entry, name) in enumerate(zip(repeated, names, strict=True)):
        y, kind = 26 + 30 * at, "better" if at == 0 else "unsure"
        ends_of = (entry.mean if end is None else end for end in (entry.low, entry.high))
        first, last = map(across, ends_of)
        line = f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{y}" y2="{y}"/>'
        dots = "".join(
            f'<circle class="run" cx="{across(value):.1f}" cy="{y}" r="3"/>' for value in entry.values.values()
        )
        mean = f'<circle cx="{across(entry.mean):.1f}" cy="{y}" r="5.5"/>'
        parts.append(f'<g class="{kind}">{line}{mean}</g>{dots}')
        parts.append(_text(left - 12, y + 4, name, "", "end"))
    parts.append(_text((left + NARROW) / 2, height + 28, metric, "axis", "middle"))
    return _figure("Mean and 95 % interval over seeds", height + 36, parts)


def _frame(x: Axis, y: Axis) -> list[str]:
    """Grid, labels and names of two axes."""
    parts = []
    for share, label in y.ticks:
        at = _down(share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{NARROW - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 6, at + 4, label, "axis", "end"))
    for share, label in x.ticks:
        at = _across(share)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_down(1):.1f}" y2="{_down(0):.1f}"/>')
        parts.append(_text(at, _down(0) + 18, label, "axis", "middle"))
    better = f"{y.title}{_way(y.title)}"
    parts.append(_text(LEFT - 40, 16, better, "axis"))
    parts.append(_text((LEFT + NARROW - RIGHT) / 2, _down(0) + 36, f"{x.title}{_way(x.title)}", "axis", "middle"))
    return parts


def _way(metric: str) -> str:
    if "/" not in metric:
        return ""
    return " (more is better)" if higher_is_better(metric) else " (less is better)"


def _across(share: float) -> float:
    return LEFT + 12 + (NARROW - RIGHT - LEFT - 24) * share


def _down(share: float) -> float:
    return TOP + HEIGHT * (1 - share)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    short = text if len(text) <= LABEL_CHARS or "(" in text else text[: LABEL_CHARS - 1] + "\u2026"
    mark = f' class="{kind}"' if kind else ""
    hint = f"<title>{escaped(text)}</title>" if short != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escaped(short)}{hint}</text>'


def _figure(title: str, height: float, parts: Sequence[str]) -> str:
    svg = f'<svg viewBox="0 0 {NARROW} {height:.0f}" role="img" aria-label="{escaped(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escaped(title)}</figcaption>{svg}</figure>"
