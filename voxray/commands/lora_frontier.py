"""evaluate with several values of --lora_scale: what an adapter gains on new data and loses on old."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from voxray.config.evaluate import EvaluateSettings
from voxray.core.console import console
from voxray.core.source import Source
from voxray.core.storage import write_json
from voxray.evaluation.predictions import labelled_rows, read_predictions, score_predictions
from voxray.evaluation.result import EvaluationResult
from voxray.evaluation.score import by_task
from voxray.metrics.names import headline
from voxray.runs.remote_sync import RemoteSync


@dataclass(frozen=True)
class FrontierPoint:
    """The headline metric of one task, manifest and scale, with its 95 % interval if there is one."""

    scale: float
    manifest: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int


def evaluate_scales(
    settings: EvaluateSettings, evaluate: Callable[[EvaluateSettings], EvaluationResult]
) -> EvaluationResult:
    """Evaluate the adapter at every scale, each in a folder of its own, and print a table of scales by manifests.

    Args:
        evaluate: Runs one evaluation.
    Returns:
        The metrics at the last scale, and the folder that holds all evaluations and frontier.json.
    Raises:
        RunError, SettingsError: As ``evaluate``.
    """
    features_dir = settings.features_dir or f"{settings.output_dir}/features"
    points: list[FrontierPoint] = []
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for scale in settings.lora_scale:
        folder = f"{settings.output_dir}/scale-{scale:g}"
        console.print(f"--lora_scale {scale:g}", markup=False)
        values = {"lora_scale": (scale,), "output_dir": folder, "features_dir": features_dir}
        result = evaluate(settings.model_copy(update=values))
        metrics = result.metrics
        points += _points(scale, result.output_dir, settings)
    remote = RemoteSync.from_settings(settings)
    write_json(remote.folder / "frontier.json", [asdict(point) for point in points])
    remote.push_files([remote.folder / "frontier.json"])
    console.print(frontier_table(points))
    console.print(f"frontier.json and an evaluation per scale in {remote.folder}", markup=False)
    return EvaluationResult(metrics, remote.folder)


def _points(scale: float, folder: Path, settings: EvaluateSettings) -> list[FrontierPoint]:
    rows_by_manifest: dict[str, list[dict[str, Any]]] = {}
    for row in labelled_rows(read_predictions(folder)):
        rows_by_manifest.setdefault(Source.parse(row["source"]).file, []).append(row)
    names = {path: Path(path).name for path in rows_by_manifest}
    points = []
    for path, rows in sorted(rows_by_manifest.items()):
        name = names[path] if list(names.values()).count(names[path]) == 1 else path
        for task, entries in by_task(score_predictions(rows, settings)).items():
            metric = headline(task)
            numbers: dict[str, Any] = {key: entries[metric][key] for key in ("value", "low", "high", "n")}
            points.append(FrontierPoint(scale, name, task, metric, **numbers))
    return points


def frontier_table(points: Sequence[FrontierPoint]) -> Table:
    """A row per scale and a column per manifest and task."""
    table = Table(title="headline metrics by scale of the adapter, with 95 % intervals", title_justify="left")
    table.add_column("scale", justify="right")
    columns = list(dict.fromkeys((point.manifest, point.task, point.metric) for point in points))
    for manifest, task, metric in columns:
        table.add_column(f"{manifest}\n{task} {metric}", justify="right")
    for scale in dict.fromkeys(point.scale for point in points):
        cells = {(point.manifest, point.task, point.metric): point for point in points if point.scale == scale}
        table.add_row(f"{scale:g}", *(_cell(cells.get(column)) for column in columns))
    return table


def _cell(point: FrontierPoint | None) -> str:
    if point is None:
        return ""
    interval = "" if point.low is None or point.high is None else f" ({point.low:.3f} - {point.high:.3f})"
    return f"{point.value:.3f}{interval}"
