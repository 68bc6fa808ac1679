"""``--score_only``: metrics of predictions that are there already, ours or another system's, without model or Ray."""

import sys
from pathlib import Path
from typing import Any

from voxray.config.evaluate import EvaluateSettings
from voxray.errors import RunError
from voxray.evaluation.predictions import part_bytes, part_path, read_any, scored
from voxray.evaluation.report import write_report
from voxray.run_folder import anchor, make_folder, refuse_training_folder
from voxray.storage import to_jsonl, write_atomically, write_json
from voxray.terminal import console, metrics_table


def evaluate_or_score(settings: EvaluateSettings) -> None:
    """The evaluate job; only where answers are to be generated is anything of the model or of Ray loaded."""
    if settings.score_only:
        score_only(settings)
        return
    from voxray.evaluation.job import run_evaluation

    run_evaluation(settings)


def score_only(settings: EvaluateSettings) -> dict[str, Any]:
    """Score ``--score_only`` and write metrics.json; bad lines are named, and listed in quarantine.jsonl.

    Raises:
        RunError: No line is a prediction.
    """
    output_dir = anchor(settings.output_dir, settings.storage_path)
    refuse_training_folder(output_dir)
    rows, bad = read_any(settings.score_only, "--score_only")
    task = settings.mode.partition("_")[2]
    rows = [row for row in rows if not task or row["task"] == task]
    for path, line, error in bad:
        print(f"{path}:{line}: left out: {error}", file=sys.stderr, flush=True)
    if not rows:
        first = f"; {bad[0][0]}:{bad[0][1]}: {bad[0][2]}" if bad else ""
        raise RunError(f"--score_only {settings.score_only}: no {task + ' ' if task else ''}row to score{first}")
    make_folder(output_dir)
    write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
    ledger = [
        {"manifest": path, "line": line, "id": "", "reason": error.reason, "message": error.message}
        for path, line, error in bad
    ]
    write_atomically(output_dir / "quarantine.jsonl", to_jsonl(ledger))
    metrics = scored(rows, settings)
    predictions = output_dir / "predictions"
    if Path(settings.score_only).resolve() not in {output_dir.resolve(), predictions.resolve()}:
        for older in predictions.glob("part-*"):
            older.unlink()
        write_atomically(part_path(predictions, 0), part_bytes(rows))  # for jobs/compare.py
    write_json(output_dir / "metrics.json", metrics)
    write_report(output_dir)
    console.print(metrics_table(settings.score_only, metrics))
    left_out = f", {len(bad)} bad line(s) left out" if bad else ""
    console.print(f"{len(rows)} rows scored{left_out}; metrics.json and report.html in {output_dir}", markup=False)
    return metrics
