"""``--score_only``: scores existing predictions, of voxray or another system, without loading a model or Ray."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxray.commands.next_steps import after_evaluation
from voxray.comparison.report import write_report
from voxray.config.evaluate import EvaluateSettings
from voxray.config.flag_groups import ScoreFlags
from voxray.core.console import console, metrics_table
from voxray.core.errors import RunError
from voxray.core.storage import to_jsonl, write_atomically, write_json
from voxray.evaluation.predictions import (
    BadPrediction,
    part_bytes,
    part_path,
    read_folder_or_jsonl,
    score_predictions,
    set_aside_predictions,
)
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import record_tasks, refuse_training_folder, resolve_output_dir

BAD_LINES_SHOWN = 20


def evaluate_or_score(settings: EvaluateSettings) -> None:
    """Run the evaluate job. PyTorch models and Ray are imported only if answers have to be generated."""
    if settings.score_only:
        score_only(settings)
        return
    from voxray.commands.evaluate import run_evaluation

    run_evaluation(settings)


def score_only(settings: EvaluateSettings) -> dict[str, Any]:
    """Score the predictions of ``--score_only`` and write metrics.json and report.html.

    Bad lines are printed and listed in quarantine.jsonl. If an evaluation is scored again in its own folder, its
    predictions and ledger stay, and only the scoring settings change.

    Returns:
        The content of metrics.json.
    Raises:
        RunError: There is no prediction to score.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    refuse_training_folder(output_dir)
    rows, bad = read_folder_or_jsonl(settings.score_only, "--score_only", settings.language)
    task = settings.mode.partition("_")[2]
    rows = [row for row in rows if not task or row["task"] == task]
    for path, line, error in bad[:BAD_LINES_SHOWN]:
        print(f"{path}:{line}: left out: {error}", file=sys.stderr, flush=True)
    if len(bad) > BAD_LINES_SHOWN:
        print(f"{len(bad) - BAD_LINES_SHOWN} more bad lines left out", file=sys.stderr, flush=True)
    if not rows:
        first = f"; {bad[0][0]}:{bad[0][1]}: {bad[0][2]}" if bad else ""
        raise RunError(f"--score_only {settings.score_only}: no {task + ' ' if task else ''}row to score{first}")
    metrics = score_predictions(rows, settings)
    with folder_lease(output_dir):
        if Path(settings.score_only).resolve() in {output_dir.resolve(), (output_dir / "predictions").resolve()}:
            _update_scoring_settings(output_dir / "settings.json", settings)
        else:
            _write_rows(output_dir, rows, bad, settings)
        record_tasks(output_dir)
        write_json(output_dir / "metrics.json", metrics)
        write_report(output_dir)
        console.print(metrics_table(settings.score_only, metrics))
        left_out = f", {len(bad)} bad line(s) left out, listed in quarantine.jsonl" if bad else ""
        console.print(f"{len(rows)} rows scored{left_out}; metrics.json and report.html in {output_dir}", markup=False)
        for line in after_evaluation(output_dir):
            console.print(line, markup=False, soft_wrap=True)
        return metrics


def _update_scoring_settings(path: Path, settings: EvaluateSettings) -> None:
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        previous = {}
    current = settings.model_dump(mode="json")
    names = [*ScoreFlags.model_fields, *(["language"] if settings.language else [])]
    write_json(path, {**current, **previous, **{name: current[name] for name in names}})


def _has_other_rows(predictions: Path, source: str) -> bool:
    """Whether a folder holds answers that do not come from the file that is scored."""
    try:
        previous = json.loads((predictions.parent / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(previous, dict) or previous.get("score_only") != source


def _write_rows(
    output_dir: Path, rows: Sequence[Mapping[str, Any]], bad: Sequence[BadPrediction], settings: EvaluateSettings
) -> None:
    """Write the rows as an evaluation that jobs/compare.py can read. Another one in the folder is moved aside."""
    predictions = output_dir / "predictions"
    if _has_other_rows(predictions, settings.score_only):
        set_aside_predictions(predictions)
    for pattern in ("part-*.parquet", "part-*.failed.json", "made_by.json", ".attempts-*"):
        for path in predictions.glob(pattern):  # else the earlier evaluation, run again, would count these as its own
            path.unlink()
    write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
    ledger = [
        {"manifest": path, "line": line, "id": "", "reason": error.reason, "message": error.message}
        for path, line, error in bad
    ]
    write_atomically(output_dir / "quarantine.jsonl", to_jsonl(ledger))
    write_atomically(part_path(predictions, 0), part_bytes(rows))
