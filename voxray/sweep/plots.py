"""Charts of a sweep's report."""

import math
from collections.abc import Sequence
from typing import Any

from voxray.config.search_space import Domain, choice_key, format_value
from voxray.html.charts import NUM_TICKS, Axis, Chart, IntervalRow, Value, interval_chart
from voxray.metrics.names import higher_is_better
from voxray.sweep.results import Repeated
from voxray.sweep.trials import Trial

NUM_SHADES = 5
PLOT_HEIGHT = 210
LABEL_CHARS = 22
MAX_NAMED_POINTS = 12


def flag_axis(domain: Domain, trials: Sequence[Trial]) -> Axis:
    """The axis of a swept flag: choices at equal distances, ranges on the scale they are drawn from."""
    values = [trial.choice.get(domain.name) for trial in trials]
    if domain.kind != "choice":
        low, high = domain.values
        return _number_axis(domain.name, values, low, high, log=domain.kind == "log")
    keys = [choice_key({domain.name: choice}) for choice in domain.values]
    positions = {key: (index + 0.5) / len(keys) for index, key in enumerate(keys)}
    shares = [positions[choice_key({domain.name: value})] for value in values]
    return Axis(domain.name, list(zip(positions.values(), map(format_value, domain.values), strict=True)), shares, True)


def metric_axis(metric: str, trials: Sequence[Trial]) -> Axis:
    """The axis of a metric, from the smallest to the largest value."""
    values = [trial.value(metric) or 0.0 for trial in trials]
    return _number_axis(metric, values, min(values), max(values))


def _number_axis(title: str, values: Sequence[Any], low: float, high: float, *, log: bool = False) -> Axis:
    """An axis of numbers from ``low`` to ``high``."""
    if not low < high:
        return Axis(title, [(0.5, f"{low:.3g}")], [0.5] * len(values))
    scale, inverse = (math.log, math.exp) if log else (float, float)
    first, length = scale(low), scale(high) - scale(low)
    parts = [tick / (NUM_TICKS - 1) for tick in range(NUM_TICKS)]
    ticks = [(part, f"{inverse(first + length * part):.3g}") for part in parts]
    return Axis(title, ticks, [(scale(value) - first) / length for value in values])


def shades(trials: Sequence[Trial], metric: str, mode: str) -> list[int]:
    """The rank of every trial among all, from 0 for the best fifth to 4 for the worst."""
    order = sorted((trial.value(metric) or 0.0 for trial in trials), reverse=mode == "max")
    return [order.index(trial.value(metric) or 0.0) * NUM_SHADES // len(order) for trial in trials]


def parallel(axes: Sequence[Axis], trials: Sequence[Trial], trial_shades: Sequence[int], winner: int) -> Chart:
    """Parallel coordinates: a line for every trial across its values. The page's script selects parts of the axes.

    Args:
        winner: Number of the best trial.
    """
    chart = Chart(
        "parallel coordinates", PLOT_HEIGHT, width=1080, left=160, right=100, top=34, bottom=14, id="parallel"
    )
    xs = [chart.x(index / max(1, len(axes) - 1)) for index in range(len(axes))]
    # Lines through the same choice are drawn a little apart, so that each can be seen and pointed at.
    spread = [0.6 / len(axis.ticks) if axis.is_choice else 0.0 for axis in axes]
    for index in _worst_first(trial_shades):
        trial, offset = trials[index], index / (len(trials) - 1) - 0.5 if len(trials) > 1 else 0.0
        ys = [chart.y(axis.shares[index] + offset * width) for axis, width in zip(axes, spread, strict=True)]
        path = f"M{xs[0]:.1f},{ys[0]:.1f}"
        for x, y, before_x, before_y in zip(xs[1:], ys[1:], xs, ys, strict=False):
            middle = (x + before_x) / 2
            path += f"C{middle:.1f},{before_y:.1f} {middle:.1f},{y:.1f} {x:.1f},{y:.1f}"
        kind = f"trial q{trial_shades[index]}" + (" winner" if trial.number == winner else "")
        chart.add("path", kind, data_trial=trial.number, data_ys=" ".join(f"{y:.1f}" for y in ys), d=path)
    for x, axis in zip(xs, axes, strict=True):
        chart.vertical("zero", x)
        for share, label in axis.ticks:
            label_x, anchor = (x + 8, "start") if axis is axes[-1] else (x - 8, "end")
            chart.text(label_x, chart.y(share) + 4, label, "axis halo", anchor, LABEL_CHARS)
        chart.text(x, 16, axis.title, "name", "middle", LABEL_CHARS)
        chart.add("rect", "brush", x=x - 9, width=18, y=0, height=0)
        area = {"x": x - 14, "y": chart.y(1) - 4, "width": 28, "height": PLOT_HEIGHT + 8}
        chart.add("rect", "axis-area", title="drag to choose, click to clear", **area)
    return chart


def scatter(
    x: Axis, y: Axis, trials: Sequence[Trial], kinds: Sequence[str], *, title: str, line: Sequence[int] = ()
) -> Chart:
    """A point for every trial.

    Args:
        kinds: CSS class of every trial.
        line: Indices of the trials that a line joins, in this order.
    """
    chart = _plot(title, x, y)
    points = _points(chart, x, y)
    if len(line) > 1:
        chart.points("front", [points[index] for index in line])
    for trial, kind, (cx, cy) in zip(trials, kinds, points, strict=True):
        chart.add("circle", kind, title=f"trial {trial.number}", data_trial=trial.number, cx=cx, cy=cy, r=5)
    if len(trials) <= MAX_NAMED_POINTS and not x.is_choice:
        for point in dict.fromkeys(points):
            numbers = [str(trial.number) for trial, other in zip(trials, points, strict=True) if other == point]
            chart.text(point[0] + 8, point[1] - 6, ", ".join(numbers), "axis", max_chars=LABEL_CHARS)
    return chart


def curves(metric: str, trials: Sequence[Trial], trial_shades: Sequence[int]) -> Chart | None:
    """The metric at every validation; a line that ends early was stopped there. None without a validation."""
    records = [
        (index, record["step"], float(record[metric]))
        for index, trial in enumerate(trials)
        for record in trial.history
        if isinstance(record.get(metric), int | float)
    ]
    if not records:
        return None
    steps, values = [step for _, step, _ in records], [value for *_, value in records]
    x = _number_axis("step", steps, min(steps), max(steps))
    y = _number_axis(metric, values, min(values), max(values))
    chart = _plot(f"{metric} by step", x, y)
    points = _points(chart, x, y)
    for index in _worst_first(trial_shades):
        line = [point for (owner, *_), point in zip(records, points, strict=True) if owner == index]
        if line:
            trial, shade = trials[index], trial_shades[index]
            chart.points(f"trial q{shade}", line, data_trial=trial.number)
            end, (cx, cy) = "stopped" if trial.state == "stopped" else "end", line[-1]
            chart.add("circle", f"{end} p{shade}", data_trial=trial.number, cx=cx, cy=cy, r=4)
    return chart


def intervals(metric: str, repeated: Sequence[Repeated]) -> Chart | None:
    """Mean and interval of every choice that was trained with several seeds, a small dot for each run."""
    ends = [end for entry in repeated for end in (entry.low, entry.high, *entry.values.values()) if end is not None]
    low, high = min(ends), max(ends)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    values = [low + (high - low) * tick / (NUM_TICKS - 1) for tick in range(NUM_TICKS)]
    rows = [
        IntervalRow(
            f"trial {entry.first.number}",
            Value(entry.mean, entry.low, entry.high),
            "better" if entry is repeated[0] else "unsure",
            list(entry.values.values()),
        )
        for entry in repeated
    ]
    return interval_chart(
        "Mean and 95 % interval over seeds", rows, [(value, f"{value:.3g}") for value in values], metric
    )


def _plot(title: str, x: Axis, y: Axis) -> Chart:
    """An empty plot with grid lines, labels and names of two axes."""
    chart = Chart(title, PLOT_HEIGHT, top=34, right=16)
    chart.y_axis(Axis(f"{y.title}{_direction(y.title)}", y.ticks))
    for share, label in x.ticks:
        chart.vertical("grid", _across(chart, share))
        chart.text(_across(chart, share), chart.y(0) + 18, label, "axis", "middle", LABEL_CHARS)
    chart.text(chart.x(0.5), chart.y(0) + 36, f"{x.title}{_direction(x.title)}", "axis", "middle")
    return chart


def _points(chart: Chart, x: Axis, y: Axis) -> list[tuple[float, float]]:
    return [(_across(chart, share), chart.y(other)) for share, other in zip(x.shares, y.shares, strict=True)]


def _across(chart: Chart, share: float) -> float:
    """Like ``chart.x``, with some space at both ends, so that no point is on the vertical axis."""
    return chart.x(0.027 + 0.946 * share)


def _worst_first(trial_shades: Sequence[int]) -> list[int]:
    """Indices of the trials, so that the best are drawn above the others."""
    return sorted(range(len(trial_shades)), key=lambda index: -trial_shades[index])


def _direction(metric: str) -> str:
    if "/" not in metric:
        return ""
    return " (more is better)" if higher_is_better(metric) else " (less is better)"
