"""The plot of an efficiency report: one panel per metric, bars by batch size and variant."""

import io
from collections.abc import Mapping
from typing import Any

PANELS = (
    ("ttft_sec", "time to first token, ms", 1e3),
    ("tpot_sec", "time per token, ms", 1e3),
    ("rtfx", "seconds of audio per second", 1.0),
    ("peak_memory_gib", "peak memory, GiB", 1.0),
)
COLOURS = ("#2f6fb3", "#d98b2b", "#3d9a6b", "#8a5fb0")
WIDTH = 0.8  # of all bars of one batch size


def plot(variants: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Plot medians with quartiles; returns a PNG.

    Args:
        variants: {name: content of its efficiency.json}.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(12, 3.2), dpi=110, layout="constrained")
    for panel, (name, title, scale) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(1, len(PANELS), panel)
        sizes = [result["batch_size"] for result in next(iter(variants.values()))["results"]]
        width = WIDTH / len(variants)
        for number, (variant, report) in enumerate(variants.items()):
            positions = [index + (number - (len(variants) - 1) / 2) * width for index in range(len(sizes))]
            heights, errors = zip(*(_bar(result[name], scale) for result in report["results"]), strict=True)
            colour = COLOURS[number % len(COLOURS)]
            options = {"yerr": tuple(zip(*errors, strict=True)), "color": colour, "error_kw": {"linewidth": 1}}
            axes.bar(positions, heights, width, label=variant, **options)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlabel("batch size")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bar(value: Any, scale: float) -> tuple[float, tuple[float, float]]:
    """Height of a bar, and the lengths of its error bar downwards and upwards; a single number has no error bar."""
    if not isinstance(value, dict):
        return value * scale, (0.0, 0.0)
    median, low, high = (value[name] * scale for name in ("median", "low", "high"))
    return median, (median - low, high - median)
