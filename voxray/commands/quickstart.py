"""The quickstart job: computes features, evaluates the base, trains, evaluates again and prints what changed."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from voxray.cards.card import read_card_facts, write_card
from voxray.cluster.session import ray_session
from voxray.commands.evaluate import run_evaluation
from voxray.commands.train import run_training
from voxray.config.evaluate import EvaluateSettings
from voxray.config.flag_groups import FeatureFlags
from voxray.config.quickstart import QuickstartSettings
from voxray.config.train import MultitaskSettings
from voxray.core.console import console
from voxray.core.source import Source
from voxray.core.storage import AnyPath, write_json
from voxray.core.tasks import TASKS
from voxray.evaluation.predictions import metrics_by_task, read_predictions
from voxray.features.from_settings import make_features, open_features_dir
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.metrics.counts import as_row, compute_metrics, count
from voxray.models.adapters.lora import find_adapter
from voxray.models.parts.arithmetic import with_default_dtype
from voxray.runs.run_folder import make_folder, resolve_output_dir

Values = dict[str, dict[str, float]]
SHARED = ("model_id", "bf16", "fp16", "fp32", "quantize", "max_len", *FeatureFlags.model_fields)
"""Settings shared by the training and the two evaluations."""


def run_quickstart(settings: QuickstartSettings) -> dict[str, Any]:
    """Run all steps and write ``summary.json``.

    Returns:
        The content of summary.json: "base" and "tuned" as {task: {metric: value}}, the comparison values "own_voices"
        and "most_frequent_answer", "seconds" as {step: value}, and "run_dir".
    """
    settings = with_default_dtype(settings, settings.model_id, on_ray=True)
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    make_folder(output_dir)
    features_path = settings.features_dir or str(output_dir / "features")
    features_dir = open_features_dir(settings, features_path, settings.storage_path, flag="--features_dir")
    shared: dict[str, Any] = {"features_dir": features_path if "://" in features_path else str(features_dir)}
    shared |= {name: getattr(settings, name) for name in SHARED}
    seconds: dict[str, float] = {}
    train = _train_settings(settings, output_dir, shared)
    evaluation = {
        **shared,
        **{name: True for name in ("tf32", "trim_audio_tokens") if getattr(settings, name)},
        "val_jsonl": (*settings.val_jsonl, *settings.base_val_jsonl),
        "per_device_bsz": settings.eval_bsz,
        "gen_max_new_tokens": settings.eval_max_new_tokens,
    }
    with ray_session(output_dir / "ray.log", settings.num_workers):
        with _timed(seconds, "featurize"):
            manifests = tuple(dict.fromkeys(settings.train_jsonl)), tuple(dict.fromkeys(evaluation["val_jsonl"]))
            report = make_features(
                settings,
                settings.model_id,
                manifests[0],
                features_dir,
                bf16=settings.bf16,
                plain_manifests=manifests[1],
            )
        with _timed(seconds, "evaluate base"):
            run_evaluation(EvaluateSettings(**evaluation, output_dir=str(output_dir / "base")))
        with _timed(seconds, "train"):
            run_training(train, show_next=False)
        with _timed(seconds, "evaluate tuned"):
            adapter = str(output_dir / "train")
            run_evaluation(EvaluateSettings(**evaluation, output_dir=str(output_dir / "tuned"), lora_dir=adapter))
    _write_card(output_dir, settings.model_id)
    folders = dict(zip(chain(*manifests), report.folders, strict=True))
    base, own_voices = _split(read_predictions(output_dir / "base"), settings.base_val_jsonl)
    tuned, own_voices_tuned = _split(read_predictions(output_dir / "tuned"), settings.base_val_jsonl)
    summary = {
        "base": base,
        "tuned": tuned,
        "own_voices": {"base": own_voices, "tuned": own_voices_tuned},
        "most_frequent_answer": _most_frequent_answer(folders, settings),
        "seconds": seconds | {"total": sum(seconds.values())},
        "run_dir": str(output_dir / "train"),
    }
    write_json(output_dir / "summary.json", summary)
    show(summary)
    console.print(f"run folder: {output_dir / 'train'}    summary: {output_dir / 'summary.json'}", markup=False)
    return summary


def _train_settings(settings: QuickstartSettings, output_dir: Path, shared: dict[str, Any]) -> MultitaskSettings:
    names = set(MultitaskSettings.model_fields) & set(QuickstartSettings.model_fields)
    values = {name: getattr(settings, name) for name in names & settings.model_fields_set}
    values |= {**shared, "num_workers": settings.num_workers, "output_dir": str(output_dir / "train")}
    return MultitaskSettings(**{**values, "overwrite": True})


def _write_card(output_dir: Path, model_id: str) -> None:
    """Write the adapter's card again, with the results of both evaluations."""
    adapter = find_adapter(str(output_dir / "train"))
    evaluations = [str(output_dir / name) for name in ("base", "tuned")]
    write_card(adapter, read_card_facts(adapter, model_id, evaluations=evaluations))


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    console.rule(step)
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 1)


def _split(rows: list[dict[str, Any]], own_manifests: tuple[str, ...]) -> tuple[Values, Values]:
    """Metrics of the held-out rows in new voices, and of those in the base's own voices."""
    own = [row for row in rows if Source.parse(row["source"]).file in own_manifests]
    other = [row for row in rows if Source.parse(row["source"]).file not in own_manifests]
    return _values(metrics_by_task(other)), _values(metrics_by_task(own))


def _values(metrics: dict[str, dict[str, dict[str, Any]]]) -> Values:
    return {task: {name: entry["value"] for name, entry in entries.items()} for task, entries in metrics.items()}


def _most_frequent_answer(folders: dict[str, AnyPath], settings: QuickstartSettings) -> Values:
    """Scores of always answering with the training data's most frequent answer: the baseline to beat."""
    train = Features(folders[name] for name in settings.train_jsonl)
    held_out = Features(folders[name] for name in settings.val_jsonl)
    scores: Values = {}
    for task in (task.name for task in TASKS.values() if task.template == "chat"):
        answers = Counter(train.row(row).answer for row in (train.task == TASK_CODES[task]).nonzero()[0])
        rows = (held_out.task == TASK_CODES[task]).nonzero()[0]
        if answers and len(rows):
            guess = answers.most_common(1)[0][0]
            metrics = compute_metrics(task, [as_row(count(held_out.row(row).answer, guess)) for row in rows])
            scores[task] = {name: float(entry["value"]) for name, entry in metrics.items()}
    return scores


def show(summary: dict[str, Any]) -> None:
    """Print the metrics before and after training."""
    table = Table(title="held-out rows, before and after", title_justify="left")
    for name in ("task", "metric", "base", "tuned", "most frequent answer"):
        table.add_column(name, justify="left" if name in {"task", "metric"} else "right")
    for task, metrics in summary["base"].items():
        for name, before in metrics.items():
            guess = summary["most_frequent_answer"].get(task, {}).get(name)
            after = summary["tuned"][task][name]
            table.add_row(task, name, f"{before:.3f}", f"{after:.3f}", "" if guess is None else f"{guess:.3f}")
    own = summary["own_voices"]
    for name, before in own["base"].get("asr", {}).items():
        table.add_row("asr, base's own voices", name, f"{before:.3f}", f"{own['tuned']['asr'][name]:.3f}", "")
    console.print(table)
    console.print("seconds: " + ", ".join(f"{step} {value:.0f}" for step, value in summary["seconds"].items()))
