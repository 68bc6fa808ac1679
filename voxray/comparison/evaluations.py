"""Reading finished evaluations from disk: their rows are scored again, and matched between runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from voxray.comparison.alignments import length_slices, row_errors
from voxray.core.errors import RunError, one_line
from voxray.core.tasks import TASKS
from voxray.evaluation.predictions import labelled_rows, read_predictions
from voxray.evaluation.score import count_rows
from voxray.evaluation.slices import slice_rows
from voxray.metrics.counts import as_columns, as_row
from voxray.metrics.names import evaluation_metrics, is_transcript, is_translation
from voxray.metrics.ngrams import SummedMetric
from voxray.metrics.rows import check_row, count_row, row_normalizer, row_readings, row_references
from voxray.metrics.terms import read_terms
from voxray.text.normalize import BASIC_V2, DEFAULT_NORMALIZERS, Normalizers, normalize_ko_v1, normalizers_from

IGNORED_SETTINGS = {
    *("model_id", "lora_dir", "output_dir", "storage_path", "features_dir", "features_cache_dir", "score_only"),
    *("features_cache_gib", "cache_budget_gib", "num_actors", "num_models", "per_device_bsz", "rows_per_shard"),
    *("cuda_visible_devices", "strict", "seed", "gpus_per_model", "check_batch_invariance", "mode", "tasks_file"),
    *("server", "served_model", "server_key", "server_timeout_sec", "server_retries"),
}
"""Settings that are the subject of a comparison, or that do not change the answers."""


@dataclass(frozen=True)
class ScoringRules:
    """How answers are scored: ``--normalizer``, ``--english_spelling`` and ``--terms`` of the evaluation."""

    normalizers: Normalizers = DEFAULT_NORMALIZERS
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredRow:
    """One answer and its scores.

    Attributes:
        values: The stored prediction row.
        reference, prediction: Normalised texts.
        counts: {count: number}, see ``metrics.counts``.
        error: See ``alignments.row_errors``.
        exact: Whether prediction and reference are equal after normalising.
        slices: {slice: value}, without slices of unknown value.
    """

    values: Mapping[str, Any]
    reference: str
    prediction: str
    counts: Mapping[str, int]
    error: float
    exact: bool
    slices: Mapping[str, str]

    @property
    def task(self) -> str:
        return self.values["task"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        folder: Folder of the evaluation.
        label: Short name in reports.
        rows: All its answers.
        metrics: Content of metrics.json.
        settings: Content of settings.json; empty if there is none.
        rules: How its rows are scored.
    """

    folder: Path
    label: str
    rows: tuple[ScoredRow, ...]
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    rules: ScoringRules = ScoringRules()

    @property
    def normalizer(self) -> str:
        """Names of the normalisers by which its rows are scored."""
        return ", ".join(sorted({row_normalizer(row.values, self.rules.normalizers).name for row in self.rows}))


@dataclass(frozen=True)
class MatchedEvaluations:
    """The rows that all runs have.

    Attributes:
        rows: The same rows in the same order, for every run.
        key: The field that matches them, ``source`` or ``id``.
        warnings: Sentences on what makes the comparison less than fair.
        rules: How the rows of all runs are scored.
    """

    rows: tuple[tuple[ScoredRow, ...], ...]
    key: str
    warnings: tuple[str, ...]
    rules: ScoringRules = ScoringRules()


def read_evaluations(folders: Sequence[str]) -> list[Evaluation]:
    """Read evaluations and score their answers, all by the rules of the first.

    Raises:
        RunError: A folder has no evaluation, or an unfinished or damaged one.
    """
    labels = short_labels(folders)
    first = read_evaluation(Path(folders[0]), labels[0])
    others = zip(folders[1:], labels[1:], strict=True)
    return [first, *(read_evaluation(Path(folder), label, first.rules) for folder, label in others)]


def read_evaluation(folder: Path, label: str = "", rules: ScoringRules | None = None) -> Evaluation:
    """Read one evaluation and score its answers.

    Args:
        label: Short name in reports; by default the name of the folder.
        rules: Score by these rules instead of its own.
    Raises:
        RunError: The folder has no evaluation, or an unfinished or damaged one.
    """
    if not _has_answers(folder):
        raise RunError(f"{folder}: no evaluation there (no predictions/part-*.parquet){_advice(folder)}")
    if not (folder / "metrics.json").is_file():
        raise RunError(f"{folder}: this evaluation has not finished (no metrics.json); start it again to go on")
    metrics, settings = (_read_json(folder / f"{name}.json") for name in ("metrics", "settings"))
    try:
        stored = labelled_rows(read_predictions(folder))
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder / 'predictions'}: damaged: {one_line(error, 200)}") from None
    if not stored:
        raise RunError(f"{folder}: this evaluation answered no row that has a text to compare with")
    for number, row in enumerate(stored, start=1):
        check_row(row, f"{folder}: row {number} ({row.get('id') or row.get('source') or 'no id'})")
    for task in TASKS:
        # Other versions left an earlier evaluation's metrics.json beside new answers until these were finished.
        expected = metrics.get(task, {}).get("chrf" if is_translation(task) else "exact_match", {}).get("n")
        num_stored = sum(row["task"] == task for row in stored)
        if expected not in (None, num_stored):
            raise RunError(
                f"{folder}: metrics.json is of {expected} {task} rows, but {num_stored} are in predictions/: the "
                "evaluation has not finished; start it again to go on"
            )
    rules = rules or scoring_rules(settings)
    return Evaluation(folder, label or folder.name, tuple(score_rows(stored, rules)), metrics, settings, rules)


def _has_answers(folder: Path) -> bool:
    return any((folder / "predictions").glob("part-*.parquet"))


def _advice(folder: Path) -> str:
    """What to do about a path that is not an evaluation."""
    if folder.is_file():
        return f"; answers in a file are scored first: jobs/evaluate.py --score_only {folder} --output_dir FOLDER"
    near = [folder.parent] if folder.name == "predictions" else sorted(folder.iterdir()) if folder.is_dir() else []
    if candidates := [str(path) for path in near if _has_answers(path)]:
        return f"; give {' or '.join(candidates[:5])}"
    if folder.exists():
        return ""
    return (
        "; `make demo` makes runs/demo/base and runs/demo/tuned" if folder.parent.name == "demo" else "; no such folder"
    )


def scoring_rules(settings: Mapping[str, Any]) -> ScoringRules:
    """The scoring rules of an evaluation. Files that no longer exist are ignored; the values then differ."""
    name = settings.get("normalizer") or BASIC_V2
    rules = ScoringRules(normalizers_from(name))
    with suppress(RunError):
        rules = replace(rules, normalizers=normalizers_from(name, settings.get("english_spelling") or ""))
    with suppress(RunError):
        if settings.get("terms"):
            rules = replace(rules, terms=read_terms(settings["terms"]))
    return rules


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds a {type(content).__name__}, not keys and values")
    return content


def short_labels(folders: Sequence[str]) -> list[str]:
    """Short names that tell folders apart: as many of the last parts of their paths as are needed."""
    paths = [Path(folder).parts for folder in folders]
    for size in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-size:]) for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(Path(folder)) for folder in folders]


def score_rows(stored: Sequence[Mapping[str, Any]], rules: ScoringRules) -> list[ScoredRow]:
    """Score prediction rows from their raw texts, whatever version of the counts is stored with them."""
    rows: list[ScoredRow] = []
    for task in TASKS:
        of_task = [values for values in stored if values["task"] == task]
        if not of_task:
            continue
        texts = [_normal_texts(values, rules.normalizers) for values in of_task]
        slices: list[dict[str, str]] = [{} for _ in of_task]
        for name, parts in {**slice_rows(of_task), **length_slices([reference for reference, _ in texts])}.items():
            for label, indices in parts.items():
                for index in indices:
                    slices[index][name] = label
        counts = [as_row(count_row(values, rules.normalizers)) for values in of_task]
        errors = row_errors(task, of_task, as_columns(counts))
        for values, (reference, prediction), numbers, error, labels in zip(
            of_task, texts, counts, errors, slices, strict=True
        ):
            rows.append(ScoredRow(values, reference, prediction, numbers, float(error), bool(numbers["exact"]), labels))
    return rows


def _normal_texts(values: Mapping[str, Any], normalizers: Normalizers) -> tuple[str, str]:
    """Normalised reference and prediction for display; of several references, the closest one."""
    normalize = row_normalizer(values, normalizers).normalize
    references = row_references(values)
    if len(references) == 1 and is_transcript(values["task"]):
        references = row_readings(values)[:1]
    prediction = normalize(values["prediction"])
    return min(map(normalize, references), key=lambda text: Levenshtein.distance(text, prediction)), prediction


def match_rows(runs: Sequence[Evaluation]) -> MatchedEvaluations:
    """Find the rows that all runs have: by manifest and line, or by id if the manifests have moved.

    Rows whose reference differs between runs are left out, because the runs did not do the same task there.

    Raises:
        RunError: There is no such row.
    """
    tables, key = max(((_keyed(runs, key), key) for key in ("source", "id")), key=lambda entry: len(_common(entry[0])))
    common = _common(tables)
    matched = [entry for entry in common if len({_references(table[entry]) for table in tables}) == 1]
    if not matched:
        names = ", ".join(run.label for run in runs)
        tasks = "; ".join(f"{run.label} has {' and '.join(_tasks(run))}" for run in runs)
        none = f"no row has the same task and source, or id, in all of them ({tasks})"
        raise RunError(f"{names}: nothing to compare: {'their references differ' if common else none}")
    warnings = list(_row_warnings(runs, tables, len(common), matched))
    prompts = sum(len({table[entry].values.get("prompt") or "" for table in tables}) > 1 for entry in matched)
    if prompts:
        warnings.append(f"{prompts} of {len(matched)} matched rows were asked with other prompts")
    return MatchedEvaluations(
        tuple(tuple(table[entry] for entry in matched) for table in tables),
        key,
        (*warnings, *_setting_warnings(runs)),
        runs[0].rules,
    )


def _references(row: ScoredRow) -> frozenset[str]:
    """All references of a row, normalised; ``ScoredRow.reference`` is only the closest one to this run's answer.

    All rows by ko-v1: two runs may have detected other languages in the same clip.
    """
    return frozenset(map(normalize_ko_v1, row_references(row.values)))


def _tasks(run: Evaluation) -> list[str]:
    return [task for task in TASKS if any(row.task == task for row in run.rows)]


def _keyed(runs: Sequence[Evaluation], key: str) -> list[dict[tuple[str, str], ScoredRow]]:
    """Rows by task and source or id; of rows with the same key, the first."""
    tables: list[dict[tuple[str, str], ScoredRow]] = []
    for run in runs:
        table: dict[tuple[str, str], ScoredRow] = {}
        for row in run.rows:
            if row.values.get(key):
                table.setdefault((row.task, row.values[key]), row)
        tables.append(table)
    return tables


def _common(tables: Sequence[Mapping[tuple[str, str], ScoredRow]]) -> list[tuple[str, str]]:
    return [entry for entry in tables[0] if all(entry in table for table in tables[1:])]


def _row_warnings(
    runs: Sequence[Evaluation],
    tables: Sequence[Mapping[Any, ScoredRow]],
    num_common: int,
    matched: Sequence[tuple[str, str]],
) -> Iterator[str]:
    if any(len(run.rows) != len(matched) for run in runs):
        sizes = ", ".join(f"{run.label} {len(run.rows)}" for run in runs)
        lost = {task for run in runs for task in _tasks(run)} - {task for task, _ in matched}
        also = f"; no row of {' and '.join(task for task in TASKS if task in lost)} is in all of them" if lost else ""
        yield f"the data differ: {len(matched)} rows matched ({sizes}); all figures here are of the matched rows{also}"
    for run, table in zip(runs, tables, strict=True):
        if len(table) < len(run.rows):
            yield f"{run.label}: {len(run.rows) - len(table)} rows have no name of their own and are left out"
    if len(matched) < num_common:
        yield f"{num_common - len(matched)} rows are left out, for their references differ between the runs"
    for run, table in zip(runs[1:], tables[1:], strict=True):
        if all(table[entry].values["prediction"] == tables[0][entry].values["prediction"] for entry in matched):
            yield f"{run.label} gave the same answer as {runs[0].label} to every row: are they the same model?"


def _setting_warnings(runs: Sequence[Evaluation]) -> Iterator[str]:
    """Differences between runs in anything but the model."""
    for run in runs:
        stored = run.metrics.get("normalizer")
        if stored and isinstance(stored, dict) and ", ".join(sorted(stored)) != run.normalizer:
            used = f"normalised by {', '.join(sorted(stored))}, here by {run.normalizer}"
            yield f"{run.label}: its metrics.json was {used}; all figures here are counted anew"
    for name, values in differing_settings(runs).items():
        shown = ", ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))
        yield f"--{name} differs: {shown}"


def differing_settings(runs: Sequence[Evaluation]) -> dict[str, list[str]]:
    """{flag: value per run} of the settings that affect the answers and differ between the runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in IGNORED_SETTINGS)
    values = {name: [_format(run.settings.get(name)) for run in runs] for name in names}
    # A run that is older than a flag, or whose answers come from elsewhere, does not have the flag.
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs) - {_format(None)}) > 1}


def training_differences(runs: Sequence[Evaluation]) -> dict[str, list[str]]:
    """{flag: value per run} of the training settings of the adapters that differ; "" for a run without an adapter."""
    trainings = [_training_settings(run) for run in runs]
    names = dict.fromkeys(
        name for settings in trainings for name in settings if name not in IGNORED_SETTINGS - {"seed"}
    )
    values = {name: [_format(settings.get(name)) if settings else "" for settings in trainings] for name in names}
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs) - {""}) > 1}


def _training_settings(run: Evaluation) -> Mapping[str, Any]:
    """Settings of the training that made a run's adapter: in the adapter's folder, or up to two folders above."""
    adapter = Path(run.settings.get("lora_dir") or "")
    for folder in (adapter, *adapter.parents)[:3] if adapter.name else ():
        with suppress(RunError):
            settings = _read_json(folder / "settings.json")
            if "train_jsonl" in settings:
                return settings
    return {}


def _format(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(Path(str(part)).name for part in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items()) or "none"
    return "none" if value in (None, "") else str(value)


def metric_contributions(
    task: str, runs: Sequence[Sequence[ScoredRow]], rules: ScoringRules
) -> tuple[list[str], list[list[SummedMetric]]]:
    """The metrics of a task that are computed from sums over rows, such as error rates and BLEU of translations.

    Returns:
        Names of the metrics that have a value in every run, the headline first; and these metrics of every run.
    """
    metrics = []
    for rows in runs:
        values, counts = [row.values for row in rows], [row.counts for row in rows]
        scored = {"terms": rules.terms, "normalizers": rules.normalizers, "counts": counts, "needs_texts": False}
        metrics.append(count_rows(task, values, **scored).metrics)
    names = [name for name in evaluation_metrics(task) if all(name in of_run for of_run in metrics)]
    return names, [[of_run[name] for name in names] for of_run in metrics]
