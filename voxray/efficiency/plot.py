"""The picture of an efficiency report: one panel a figure, bars by batch size and variant."""

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
WIDTH = 0.8  # of all bars of one batch size together


def plot(variants: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Medians with quartiles, as PNG.

    Args:
        variants: {name: content of its efficiency.json}.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(12, 3.2), dpi=110, layout="constrained")
    for place, (name, title, scale) in enumerate(PANELS):
        axes = figure.add_subplot(1, len(PANELS), place + 1)
        sizes = [found["batch_size"] for found in next(iter(variants.values()))["results"]]
        width = WIDTH / len(variants)
        for number, (variant, report) in enumerate(variants.items()):
            at = [index + (number - (len(variants) - 1) / 2) * width for index in range(len(sizes))]
            heights, errors = zip(*(_bar(found[name], scale) for found in report["results"]), strict=True)
            low, high = zip(*errors, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axes.bar(at, heights, width, yerr=(low, high), label=variant, color=colour, error_kw={"linewidth": 1})
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlabel("batch size")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bar(found: Any, scale: float) -> tuple[float, tuple[float, float]]:
    """Height, and how far its whiskers reach down and up; a single number has none."""
    if not isinstance(found, dict):
        return found * scale, (0.0, 0.0)
    median, low, high = (found[name] * scale for name in ("median", "low", "high"))
    return median, (median - low, high - median)
