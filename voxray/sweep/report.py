"""A sweep as one HTML page that opens from disk and fetches nothing."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxray.config.search_space import Domain, format_choice, format_value
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.html.charts import Chart
from voxray.html.page import Cell, Table, render_page
from voxray.metrics.names import headline, higher_is_better
from voxray.sweep.importance import importance
from voxray.sweep.plots import curves, flag_axis, intervals, metric_axis, parallel, scatter, shades
from voxray.sweep.results import SweepOutcome, front
from voxray.sweep.trials import Trial

ASSETS = ("report.css", "sweep.css", "report.js", "sweep.js")
LAST = 1e308  # sorts a missing value behind all others


def write_report(path: Path, settings: Any, outcome: SweepOutcome) -> None:
    """Write report.html, also of a sweep without a finished trial."""
    domains = {name: domain for name, domain in settings.domains.items() if domain.size > 1}
    scored = [trial for trial in outcome.trials if trial.value(outcome.metric) is not None]
    heading = f"Sweep of train_{settings.recipe}"
    page = render_page(
        "sweep.html",
        f"voxray: {heading}",
        ASSETS,
        heading=heading,
        metric=outcome.metric,
        mode=outcome.mode,
        method=_method(settings, outcome),
        lead=lead(outcome),
        figures=_figures(outcome),
        parallel=_parallel(outcome, scored, domains) if scored else None,
        importances=_importances(outcome.metric, scored, domains) if scored else [],
        metric_charts=_metric_charts(outcome, scored, domains) if scored else [],
        trade_offs=_trade_offs(scored) if scored else [],
        seed_intervals=intervals(outcome.metric, outcome.repeated) if outcome.repeated else None,
        seeds=_seeds_table(outcome) if outcome.repeated else None,
        trials=_trials_table(outcome, list(settings.domains)),
        repeats=_repeats_table(outcome) if outcome.repeats else None,
    )
    write_atomically(path, page)


def lead(outcome: SweepOutcome) -> list[str]:
    """The results in sentences."""
    best, value = outcome.winner, outcome.winning_value
    lines = []
    if best is None or value is None:
        lines.append(f"No trial has {outcome.metric}: there is no winner.")
    else:
        mean = f", the mean of {len(outcome.repeated[0].values)} other seeds" if outcome.repeated else ""
        lines.append(f"Best: {format_choice(best.choice)} (trial {best.number}): {outcome.metric} {value:.4f}{mean}.")
        if outcome.verdict():
            lines.append(f"Of the choices trained again, {outcome.verdict()}.")
        elif len(outcome.trials) > 1 and not outcome.repeated:
            lines.append("Every choice was trained once: a small lead may be chance (--top_k trains the best again).")
    if ties := [str(trial.number) for trial in outcome.ties]:
        lines.append(f"Trials {', '.join(ties)} have the same value: the figures do not tell them apart.")
    ended_better = [
        str(trial.number)
        for trial in outcome.trials
        if trial.state == "stopped" and best and outcome.is_better(trial, best)
    ]
    if ended_better:
        lines.append(
            f"When they were stopped, trials {', '.join(ended_better)} were better than the best is at its end; "
            "they do not count, as they were not trained to theirs. A larger --grace_steps would let them."
        )
    for state, text in (("stopped", "stopped early, as weaker than others"), ("failed", "failed; the table says why")):
        if numbers := sorted(trial.number for trial in outcome.trials if trial.state == state):
            lines.append(f"{len(numbers)} of {len(outcome.trials)} trials {text}: {', '.join(map(str, numbers))}.")
    return lines


def _method(settings: Any, outcome: SweepOutcome) -> str:
    """How the choices were made, and by which rule trials were stopped, if any was."""
    rules = {"asha": "ASHA", "median": "the median rule"}
    methods = {"grid": "every combination", "random": "drawn at random", "optuna": "proposed by Optuna's TPE"}
    stopped = any(trial.state == "stopped" for trial in outcome.trials)
    stops = f"{rules[settings.scheduler]} stopped weak trials from step {settings.grace_steps} on" if stopped else ""
    return f"{methods[settings.method]}; {stops or 'no trial was stopped'}"


def _figures(outcome: SweepOutcome) -> dict[str, str]:
    """The figures at the top of the page."""
    value, trials = outcome.winning_value, (*outcome.trials, *outcome.repeats)
    figures = {"trials": str(len(outcome.trials))}
    figures |= {"runs with other seeds": str(len(outcome.repeats))} if outcome.repeats else {}
    figures |= {f"best {outcome.metric}": f"{value:.4f}"} if value is not None else {}
    return figures | {"hours of trials": f"{sum(trial.sec for trial in trials) / 3600:.2f}"}


def _parallel(outcome: SweepOutcome, scored: Sequence[Trial], domains: Mapping[str, Domain]) -> Chart:
    axes = [*(flag_axis(domain, scored) for domain in domains.values()), metric_axis(outcome.metric, scored)]
    winner = outcome.winner.number if outcome.winner else 0
    return parallel(axes, scored, shades(scored, outcome.metric, outcome.mode), winner)


def _importances(metric: str, scored: Sequence[Trial], domains: Mapping[str, Domain]) -> list[tuple[str, float | None]]:
    """(flag, its importance or None), the most important first."""
    values = [trial.value(metric) or 0.0 for trial in scored]
    shares = [
        (name, importance(domain, [trial.choice[name] for trial in scored], values)) for name, domain in domains.items()
    ]
    return sorted(shares, key=lambda entry: -1.0 if entry[1] is None else entry[1], reverse=True)


def _metric_charts(outcome: SweepOutcome, scored: Sequence[Trial], domains: Mapping[str, Domain]) -> list[Chart]:
    """The metric by step and by each flag."""
    trial_shades = shades(scored, outcome.metric, outcome.mode)
    y, kinds = metric_axis(outcome.metric, scored), [f"p{shade}" for shade in trial_shades]
    by_step = curves(outcome.metric, scored, trial_shades)
    by_flag = [
        scatter(flag_axis(domain, scored), y, scored, kinds, title=f"{outcome.metric} by {name}")
        for name, domain in domains.items()
    ]
    return [by_step, *by_flag] if by_step else by_flag


def _trade_offs(scored: Sequence[Trial]) -> list[Chart]:
    """The Pareto front of transcription against every other task, for the trials that have both metrics."""
    charts = []
    first, *others = [f"{task}/{headline(task)}" for task in TASKS]
    for other in others:
        trials = [trial for trial in scored if None not in (trial.value(first), trial.value(other))]
        if not trials:
            continue
        points = [(trial.value(first) or 0.0, trial.value(other) or 0.0) for trial in trials]
        line = front(points, first_up=higher_is_better(first), second_up=higher_is_better(other))
        kinds = ["on-front" if index in line else "behind" for index in range(len(trials))]
        x, y = metric_axis(first, trials), metric_axis(other, trials)
        chart = scatter(x, y, trials, kinds, title=f"{first} against {other}", line=line)
        names = [f"trial {trials[index].number}: {points[index][0]:.3f}, {points[index][1]:.3f}" for index in line]
        chart.note = f"front: {'; '.join(names)}"
        charts.append(chart)
    return charts


def _seeds_table(outcome: SweepOutcome) -> Table:
    rows = []
    for entry in outcome.repeated:
        interval = "" if entry.low is None or entry.high is None else f"{entry.low:.4f} - {entry.high:.4f}"
        runs = ", ".join(f"{value:.4f}" for value in entry.values.values())
        value = entry.first.value(outcome.metric)
        row = (entry.first.number, format_choice(entry.first.choice), f"{entry.mean:.4f}", interval, runs)
        rows.append((*row, "" if value is None else f"{value:.4f}", entry.missing))
    return Table(("trial", "choice", "mean", "95 %", "runs", "in the search", "runs without"), rows)


def _trials_table(outcome: SweepOutcome, names: Sequence[str]) -> Table:
    metrics = _shown_metrics(outcome.metric, outcome.trials)
    best = outcome.winner.number if outcome.winner else 0
    rows = [
        (
            Cell(str(trial.number), float(trial.number), "best" if trial.number == best else ""),
            *(_choice_cell(trial.choice.get(name)) for name in names),
            *_metric_cells(trial, metrics),
            _state_cell(trial),
        )
        for trial in outcome.trials
    ]
    return Table(("trial", *names, "step", *metrics, "state"), rows, "sortable", "trials")


def _repeats_table(outcome: SweepOutcome) -> Table:
    metrics = _shown_metrics(outcome.metric, outcome.repeats)
    rows = [
        (trial.number, trial.repeats, trial.choice["seed"], *_metric_cells(trial, metrics), _state_cell(trial))
        for trial in outcome.repeats
    ]
    return Table(("run", "of trial", "seed", "step", *metrics, "state"), rows, "sortable")


def _shown_metrics(metric: str, trials: Sequence[Trial]) -> list[str]:
    """The metric of the sweep, and the headline metric of every task that any trial has."""
    headlines = [f"{task}/{headline(task)}" for task in TASKS]
    return list(dict.fromkeys([metric, *(n for n in headlines if any(t.value(n) is not None for t in trials))]))


def _choice_cell(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(format_value(value), float(value) if is_number else None)


def _metric_cells(trial: Trial, metrics: Sequence[str]) -> Iterable[Cell]:
    """The step of a trial and its metrics; a missing one is sorted behind all others."""
    step = trial.metrics.get("step")
    yield Cell("" if step is None else str(step), LAST if step is None else float(step))
    for value in map(trial.value, metrics):
        yield Cell("" if value is None else f"{value:.4f}", LAST if value is None else float(value))


def _state_cell(trial: Trial) -> Cell:
    return Cell(trial.status, kind="down" if trial.state == "failed" else "")
