"""Charts of the reports as SVG, coloured by CSS classes so that they follow light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ROW_HEIGHT = 26
NAMES_WIDTH = 210
LABEL_CHARS = 14
NUM_COLOURS = 6
NUM_TICKS = 5


@dataclass(frozen=True)
class Value:
    """A number with its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """An axis, and positions on it.

    Attributes:
        title: Name of what it shows.
        ticks: (share of the axis from 0 to 1, label).
        shares: Share of every point that is plotted.
        is_choice: Whether points are at the ticks only.
    """

    title: str
    ticks: Sequence[tuple[float, str]]
    shares: Sequence[float] = ()
    is_choice: bool = False


@dataclass(frozen=True)
class Element:
    """One SVG element; ``title`` is its tooltip."""

    tag: str
    attributes: dict[str, Any]
    text: str = ""
    title: str = ""


@dataclass
class Chart:
    """An SVG drawing, made element by element and rendered by the templates. Sizes are in SVG units.

    Attributes:
        title: Caption of the figure.
        height, width: Of the plot area, and of the whole drawing.
        left, right, top, bottom: Margins around the plot area.
        legend: (CSS class, name) of each series.
        note: Text below the drawing.
        id: HTML id of the drawing.
    """

    title: str
    height: float
    width: float = 520
    left: float = 64
    right: float = 20
    top: float = 30
    bottom: float = 44
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    id: str = ""
    elements: list[Element] = field(default_factory=list)

    @property
    def total_height(self) -> float:
        return self.top + self.height + self.bottom

    def x(self, share: float) -> float:
        return self.left + (self.width - self.left - self.right) * share

    def y(self, share: float) -> float:
        return self.top + self.height * (1 - share)

    def add(self, tag: str, kind: str = "", *, text: str = "", title: str = "", **attributes: Any) -> None:
        """Add an element of a CSS class; underscores in names of attributes become hyphens."""
        rounded = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
            for name, value in attributes.items()
        }
        self.elements.append(Element(tag, {"class": kind or None, **rounded}, text, title))

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", max_chars: int = 60) -> None:
        """Add a text; one that is too long is cut, and its tooltip shows all of it."""
        short = text if len(text) <= max_chars else f"{text[: max_chars - 1]}\u2026"
        self.add("text", kind, text=short, title="" if short == text else text, x=x, y=y, text_anchor=anchor)

    def points(self, kind: str, points: Sequence[tuple[float, float]], **attributes: Any) -> None:
        """Add a line through points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", kind, points=joined, **attributes)

    def vertical(self, kind: str, x: float) -> None:
        """Add a line from the top to the bottom of the plot area."""
        self.add("line", kind, x1=x, x2=x, y1=self.y(1), y2=self.y(0))

    def y_axis(self, axis: Axis) -> None:
        """Add the name, the tick labels and the grid lines of a vertical axis."""
        self.text(self.left - 40, 16, axis.title, "axis")
        for share, label in axis.ticks:
            y = self.y(share)
            self.add("line", "grid", x1=self.left, x2=self.width - self.right, y1=y, y2=y)
            self.text(self.left - 6, y + 4, label, "axis", "end")


def bars(
    title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[Value | None]]], unit: str
) -> Chart | None:
    """Bars side by side in groups, with whiskers where there are intervals; None if there is no value.

    Args:
        groups: Names below the bars.
        series: (name, one value per group); None leaves a gap.
        unit: Unit of the vertical axis.
    """
    values = [value for _, row in series for value in row if value]
    if not values:
        return None
    top = _round_up(max(max(value.value, value.high or 0.0) for value in values) or 1.0)
    colours = [f"c{number % NUM_COLOURS}" for number in range(len(series))]
    legend = [(colour, name) for colour, (name, _) in zip(colours, series, strict=True)]
    chart = Chart(title, 150, left=46, bottom=26, legend=legend if len(series) > 1 else ())
    chart.y_axis(Axis(unit, [(tick / 4, f"{top * tick / 4:g}") for tick in range(NUM_TICKS)]))
    bar_width = min(38.0, 0.76 * (chart.x(1) - chart.x(0)) / len(groups) / len(series))
    for index, group in enumerate(groups):
        middle = chart.x((index + 0.5) / len(groups))
        chart.text(middle, chart.y(0) + 16, group, "axis", "middle", LABEL_CHARS)
        for number, (name, row) in enumerate(series):
            if value := row[index]:
                x, y = middle + (number - len(series) / 2) * bar_width, chart.y(value.value / top)
                size: dict[str, Any] = {"width": max(1.0, bar_width - 2), "height": max(0.6, chart.y(0) - y)}
                tooltip = f"{group}, {name}: {value.value:.3f}"
                chart.add("rect", colours[number], title=tooltip, x=x, y=y, **size, rx=1.5)
                if value.low is not None and value.high is not None:
                    ends: dict[str, Any] = {"y1": chart.y(value.low / top), "y2": chart.y(value.high / top)}
                    x += bar_width / 2 - 1
                    chart.add("line", "whisker", title=tooltip, x1=x, x2=x, **ends)
    return chart


@dataclass(frozen=True)
class IntervalRow:
    """One line of an interval chart.

    Attributes:
        kind: CSS class: better, worse or unsure.
        runs: Single values, shown as small dots.
    """

    name: str
    value: Value
    kind: str
    runs: Sequence[float] = ()


def interval_chart(
    title: str, rows: Sequence[IntervalRow], ticks: Sequence[tuple[float, str]], note: str
) -> Chart | None:
    """Values with their intervals, one below the other; None if there is no row.

    Args:
        ticks: (value, label), from the left end of the axis to its right end.
        note: Name of the axis.
    """
    if not rows:
        return None
    chart = Chart(title, ROW_HEIGHT * len(rows), left=NAMES_WIDTH, bottom=42)
    first, last = ticks[0][0], ticks[-1][0]

    def across(value: float) -> float:
        return chart.x((value - first) / (last - first))

    for value, label in ticks:
        chart.vertical("zero" if label == "0" else "grid", across(value))
        chart.text(across(value), chart.y(0) + 16, label, "axis", "middle")
    for index, row in enumerate(rows):
        y, value = chart.top + ROW_HEIGHT * (index + 0.5), row.value.value
        low, high = (value if end is None else end for end in (row.value.low, row.value.high))
        tooltip = f"{row.name}: {value:+.3f} [{low:+.3f}, {high:+.3f}]"
        chart.add("line", row.kind, title=tooltip, x1=across(low), x2=across(high), y1=y, y2=y)
        chart.add("circle", row.kind, title=tooltip, cx=across(value), cy=y, r=4.5)
        for run in row.runs:
            chart.add("circle", "run", cx=across(run), cy=y, r=3)
        chart.text(chart.left - 8, y + 4, row.name, anchor="end")
    chart.text(chart.x(0.5), chart.y(0) + 34, note, "axis", "middle")
    return chart


def differences(title: str, rows: Sequence[IntervalRow], note: str) -> Chart | None:
    """Differences with their intervals around 0."""
    values = [row.value for row in rows]
    ends = [abs(end) for value in values for end in (value.value, value.low or 0.0, value.high or 0.0)]
    reach = _round_up(max(ends, default=0.0) or 1.0)
    ticks = [(part * reach, f"{part * reach:+g}" if part else "0") for part in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    return interval_chart(title, rows, ticks, note)


def _round_up(value: float) -> float:
    """The next number of the form 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6 or 8 times a power of ten, for the end of an axis."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if power * step >= value * 0.999)
