"""A sweep as one HTML page that opens from disk and fetches nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from voxray.config.search_space import Domain, described, shown
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.html.page import Cell, asset, escaped, page, table
from voxray.metrics.names import headline, higher_is_better
from voxray.sweep.importance import importance
from voxray.sweep.plots import curves, flag_axis, intervals, metric_axis, parallel, ranks, scatter, shades
from voxray.sweep.results import SweepOutcome, front
from voxray.sweep.trials import Trial

PAGES = ("report", "sweep")
"""Assets that all reports share, then those of this one."""
LAST = 1e308  # to sort by


def write_report(path: Path, settings: Any, outcome: SweepOutcome) -> None:
    """Write report.html, whatever became of the trials."""
    domains = {name: domain for name, domain in settings.domains.items() if domain.size > 1}
    scored = [trial for trial in outcome.trials if trial.value(outcome.metric) is not None]
    title = f"Sweep of train_{settings.recipe}"
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="note">By {escaped(outcome.metric)} on the validation rows, of which '
        f"{'less' if outcome.mode == 'min' else 'more'} is better; {escaped(_how(settings))}.</p>",
        _list(lead(outcome)),
        _cards(outcome),
    ]
    if scored:
        parts += [
            _parallel(outcome, scored, domains),
            _influence(outcome, scored, domains),
            *_trade_offs(outcome, scored),
            _seeds(outcome),
        ]
    parts.append("<h2>Trials</h2>" + _trials(outcome, list(settings.domains)))
    if outcome.repeats:
        parts.append("<h2>Runs with other seeds</h2>" + _repeats(outcome))
    style, script = ("".join(asset(f"{name}.{kind}") for name in PAGES) for kind in ("css", "js"))
    write_atomically(path, page(f"voxray: {title}", "".join(parts), style=style, script=script))


def lead(outcome: SweepOutcome) -> list[str]:
    """What there is to know, in sentences."""
    best, value = outcome.winner, outcome.winning_value
    lines = []
    if best is None or value is None:
        lines.append(f"No trial has {outcome.metric}: there is no winner.")
    else:
        mean = f", the mean of {len(outcome.repeated[0].values)} other seeds" if outcome.repeated else ""
        lines.append(f"Best: {described(best.choice)} (trial {best.number}): {outcome.metric} {value:.4f}{mean}.")
        if outcome.verdict():
            lines.append(f"Of the choices trained again, {outcome.verdict()}.")
        elif len(outcome.trials) > 1 and not outcome.repeated:
            lines.append("Every choice was trained once: a small lead may be chance (--top_k trains the best again).")
    ended_better = [
        str(trial.number)
        for trial in outcome.trials
        if trial.state == "stopped" and best and outcome.is_better(trial, best)
    ]
    if ended_better:
        lines.append(
            f"When they were stopped, trials {', '.join(ended_better)} stood better than the best stands at its end; "
            "they do not count, as they were not trained to theirs. A larger --grace_steps would let them."
        )
    for state, what in (("stopped", "stopped early, as weaker than others"), ("failed", "failed; the table says why")):
        if numbers := sorted(trial.number for trial in outcome.trials if trial.state == state):
            lines.append(f"{len(numbers)} of {len(outcome.trials)} trials {what}: {', '.join(map(str, numbers))}.")
    return lines


def _how(settings: Any) -> str:
    stops = {
        "asha": "ASHA stops weak trials",
        "median": "the median rule stops weak trials",
        "none": "no trial is stopped",
    }
    ways = {"grid": "every combination", "random": "drawn at random", "optuna": "proposed by Optuna's TPE"}
    after = f" from step {settings.grace_steps} on" if settings.scheduler != "none" else ""
    return f"{ways[settings.method]}; {stops[settings.scheduler]}{after}"


def _cards(outcome: SweepOutcome) -> str:
    value, trials = outcome.winning_value, (*outcome.trials, *outcome.repeats)
    cards = {"trials": str(len(outcome.trials))}
    cards |= {"runs with other seeds": str(len(outcome.repeats))} if outcome.repeats else {}
    cards |= {f"best {outcome.metric}": f"{value:.4f}"} if value is not None else {}
    cards["hours of trials"] = f"{sum(trial.sec for trial in trials) / 3600:.2f}"
    shown_cards = "".join(
        f'<div class="card"><b>{escaped(v)}</b><span>{escaped(k)}</span></div>' for k, v in cards.items()
    )
    return f'<div class="cards">{shown_cards}</div>'


def _parallel(outcome: SweepOutcome, scored: Sequence[Trial], domains: dict[str, Domain]) -> str:
    kinds = shades(scored, outcome.metric, outcome.mode)
    axes = [*(flag_axis(domain, scored) for domain in domains.values()), metric_axis(outcome.metric, scored)]
    winner = outcome.winner.number if outcome.winner else 0
    key = "".join(
        f'<span><svg viewBox="0 0 14 4"><rect class="p{at}" width="14" height="4"/></svg></span>' for at in range(5)
    )
    legend = f'<div class="legend"><span>best fifth</span>{key}<span>worst fifth</span></div>'
    return f"<h2>Choices and what came of them</h2>{parallel(axes, scored, kinds, winner)}{legend}"


def _influence(outcome: SweepOutcome, scored: Sequence[Trial], domains: dict[str, Domain]) -> str:
    figures = [trial.value(outcome.metric) or 0.0 for trial in scored]
    kinds = shades(scored, outcome.metric, outcome.mode)
    charts = []
    if domains:
        found = [
            (name, importance(domain, [trial.choice[name] for trial in scored], figures))
            for name, domain in domains.items()
        ]
        found.sort(key=lambda entry: -1.0 if entry[1] is None else entry[1], reverse=True)
        charts.append(ranks("Importance of each flag", found))
    charts.append(curves(outcome.metric, scored, kinds))
    y, dots = metric_axis(outcome.metric, scored), [f"p{kind}" for kind in kinds]
    charts += [
        scatter(flag_axis(domain, scored), y, scored, dots, title=f"{outcome.metric} by {name}")
        for name, domain in domains.items()
    ]
    note = (
        "Importance is the share of the metric's variance between trials that goes with a flag's values, less what "
        "chance would give (epsilon squared); drawn numbers are cut into up to four groups of equal size. Flags are "
        "looked at one by one. A trial that was stopped counts with its last validation."
    )
    return f'<h2>What matters</h2><div class="charts">{"".join(charts)}</div><p class="note">{note}</p>'


def _trade_offs(outcome: SweepOutcome, scored: Sequence[Trial]) -> Iterable[str]:
    """The front of transcription against every other task, where trials have both."""
    charts = []
    first, *others = [f"{task}/{headline(task)}" for task in TASKS]
    for other in others:
        both = [trial for trial in scored if None not in (trial.value(first), trial.value(other))]
        if not both:
            continue
        points = [(trial.value(first) or 0.0, trial.value(other) or 0.0) for trial in both]
        line = front(points, first_up=higher_is_better(first), second_up=higher_is_better(other))
        kinds = ["on-front" if at in line else "behind" for at in range(len(both))]
        x, y = metric_axis(first, both), metric_axis(other, both)
        chart = scatter(x, y, both, kinds, title=f"{first} against {other}", line=line)
        names = [f"trial {both[at].number}: {points[at][0]:.3f}, {points[at][1]:.3f}" for at in line]
        charts.append(chart.replace("</figure>", f'<p class="note">front: {escaped("; ".join(names))}</p></figure>'))
    if charts:
        yield "<h2>What one task costs another</h2>"
        yield f'<div class="charts">{"".join(charts)}</div>'
        yield '<p class="note">On the front are the trials that no other trial beats in both.</p>'


def _seeds(outcome: SweepOutcome) -> str:
    if not outcome.repeated:
        return ""
    names = [f"trial {entry.first.number}" for entry in outcome.repeated]
    rows = []
    for entry in outcome.repeated:
        between = "" if entry.low is None or entry.high is None else f"{entry.low:.4f} - {entry.high:.4f}"
        runs = ", ".join(f"{value:.4f}" for value in entry.values.values())
        own = entry.first.value(outcome.metric)
        head = (entry.first.number, described(entry.first.choice), f"{entry.mean:.4f}", between)
        rows.append((*head, runs, "" if own is None else f"{own:.4f}", entry.missing))
    heads = ("trial", "choice", "mean", "95 %", "runs", "in the search", "runs without")
    note = (
        "The interval is Student's t over seeds. The run of the search does not count: it was picked for being good, "
        "and so for its luck as well."
    )
    chart = f'<div class="charts">{intervals(outcome.metric, outcome.repeated, names)}</div>'
    return f'<h2>The best again, with other seeds</h2>{chart}{table(heads, rows)}<p class="note">{note}</p>'


def _trials(outcome: SweepOutcome, names: Sequence[str]) -> str:
    figures = list(dict.fromkeys([outcome.metric, *_headlines(outcome.trials)]))
    best = outcome.winner.number if outcome.winner else 0
    rows = [
        (
            Cell(str(trial.number), float(trial.number), "best" if trial.number == best else ""),
            *_choice(trial, names),
            *_figures(trial, figures),
            _state(trial),
        )
        for trial in outcome.trials
    ]
    return table(("trial", *names, "step", *figures, "state"), rows, "sortable", "trials")


def _state(trial: Trial) -> Cell:
    return Cell(trial.fate, kind="down" if trial.state == "failed" else "")


def _repeats(outcome: SweepOutcome) -> str:
    figures = list(dict.fromkeys([outcome.metric, *_headlines(outcome.repeats)]))
    rows = [
        (trial.number, trial.repeats, trial.choice["seed"], *_figures(trial, figures), _state(trial))
        for trial in outcome.repeats
    ]
    return table(("run", "of trial", "seed", "step", *figures, "state"), rows, "sortable")


def _headlines(trials: Sequence[Trial]) -> list[str]:
    """The headline metric of every task that any trial has."""
    names = [f"{task}/{headline(task)}" for task in TASKS]
    return [name for name in names if any(trial.value(name) is not None for trial in trials)]


def _choice(trial: Trial, names: Sequence[str]) -> Iterable[Any]:
    for name in names:
        value = trial.choice.get(name)
        yield Cell(
            shown(value), None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        )


def _figures(trial: Trial, figures: Sequence[str]) -> Iterable[Cell]:
    """The step of a trial and its figures; one that is missing is sorted behind all others."""
    for name, value in (("step", trial.metrics.get("step")), *((name, trial.value(name)) for name in figures)):
        text = "" if value is None else str(value) if name == "step" else f"{value:.4f}"
        yield Cell(text, LAST if value is None else float(value))


def _list(lines: Sequence[str]) -> str:
    return '<ul class="lead">' + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>"
