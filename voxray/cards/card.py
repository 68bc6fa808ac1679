"""Writes the model card of an adapter or of an exported model, from what its folders record.

A card is for others: it names no path, no user and no machine.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from voxray.cards.facts import (
    METHODS,
    AdapterFacts,
    BaseFacts,
    RunFacts,
    find_run,
    plain_name,
    read_adapter,
    read_base,
    read_run,
)
from voxray.cards.results import (
    ANY_AUDIO,
    TASK_TYPES,
    CardEvaluation,
    MetricResult,
    dataset_differences,
    eval_results,
    metric_results,
    read_card_evaluations,
)
from voxray.cards.usage import ADAPTER, usage
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.core.units import format_duration
from voxray.metrics.names import higher_is_better, validation_metrics
from voxray.models.adapters.audio_trim_record import read_trim_record
from voxray.models.adapters.read_files import FULL
from voxray.models.hf_files import HUB_ID
from voxray.runs.layout import CARD
from voxray.training.records import escape_cell

LIBRARIES = {ADAPTER: "peft", "hf": "transformers", "mistral": "mistral-common", "ct2": "ctranslate2"}
SHORT_HASH = 16
PACKAGES = ("voxray", "torch", "transformers", "peft")
SETTINGS_SHOWN = {
    "learning rate": "lr",
    "schedule of the learning rate:": "lr_schedule",
    "warm-up steps:": "warmup_steps",
    "seed": "seed",
}
"""{words of the card: setting}."""
NOTHING_MEASURED = "What the adapter loses on other data than its own was not measured."


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        kind: See ``usage.usage``.
        scale: Share of the LoRA that an export merged.
        part: Role whose weights an export merged, "" for all.
        trimmed: Whether the adapter was trained without the audio tokens of padding.
    """

    base: BaseFacts
    adapter: AdapterFacts
    run: RunFacts
    evaluations: Sequence[CardEvaluation]
    kind: str = ADAPTER
    scale: float = 1.0
    part: str = ""
    trimmed: bool = False

    @property
    def known_tasks(self) -> tuple[str, ...]:
        """Tasks that it was trained for, or else those of its evaluations."""
        evaluated = {task for each in self.evaluations for task in TASKS if task in each.evaluation.metrics}
        return self.run.tasks or tuple(task for task in TASKS if task in evaluated)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``known_tasks``, or if there are none those of the family."""
        return self.known_tasks or self.base.tasks


def read_card_facts(
    adapter: Path,
    model_id: str,
    *,
    evaluations: Sequence[str] = (),
    run: RunFacts | None = None,
    **options: Any,
) -> CardFacts:
    """Read what the card of an adapter, or of an export of it, says.

    Args:
        adapter: Folder of the adapter.
        model_id: Folder or hub id of its base.
        evaluations: Folders of evaluations of the adapter, or of its base.
        run: Records of its run, by default those of the run folder around it.
        options: Other values of ``CardFacts``.
    Raises:
        RunError: The adapter or the base cannot be read, or a folder is not an evaluation of either.
    """
    base, facts = read_base(model_id, adapter), read_adapter(adapter, model_id)
    if run is None:
        run = read_run(*around) if (around := find_run(adapter)) else RunFacts()
    read = read_card_evaluations(evaluations, facts, base)
    return CardFacts(base, facts, run, read, trimmed=bool(read_trim_record(adapter)), **options)


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write the card into a folder, atomically."""
    write_atomically(folder / CARD, card_text(facts).encode())


def card_text(facts: CardFacts) -> str:
    """The card, as Markdown with metadata for the hub."""
    name = f"{facts.base.name}-{facts.adapter.method}"
    data = _metadata(facts, name)
    method = METHODS[facts.adapter.method]
    sections = {
        "": "\n\n".join((_what_it_is(facts), *_front_notes(facts))),
        "Training data": _training_data(facts.run),
        "Training": _training(facts.run),
        "Results": _results(facts),
        "How to use it": usage(
            facts.kind, facts.base, facts.adapter, facts.tasks, trimmed=facts.trimmed, part=facts.part
        ),
        "Limits": _limits(facts),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections.items() if body)
    content = f"---\n{data.to_yaml()}\n---\n\n# {facts.base.name}, tuned with {method}\n\n{text}\n"
    return str(ModelCard(content))


def _metadata(facts: CardFacts, name: str) -> ModelCardData:
    base, rows = facts.base, facts.run.trained_rows
    results = eval_results(facts.evaluations, facts.scale)
    datasets = {entry["dataset"] for entry in rows.get("rows", ()) if HUB_ID.fullmatch(entry["dataset"])}
    library = None if facts.kind == ADAPTER and facts.adapter.method == FULL else LIBRARIES.get(facts.kind)
    only_transcribes = facts.tasks == ("asr",) or "sqa" not in base.tasks  # a prompt is text, too
    data = ModelCardData(
        base_model=base.hub_id or None,
        library_name=library,
        pipeline_tag=TASK_TYPES["asr"] if only_transcribes else ANY_AUDIO,
        language=[code for code in rows.get("languages", ()) if code] or None,
        datasets=sorted(datasets) or None,
        tags=["voxray", facts.adapter.method, base.family, *facts.known_tasks],
        model_name=name if results else None,
        eval_results=results or None,
    )
    for key, value in base.license.items():
        data[key] = value
    return data


def _what_it_is(facts: CardFacts) -> str:
    base, adapter, parameters = facts.base, facts.adapter, facts.run.parameters
    link = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else f"`{base.name}`"
    kind = "Fully tuned weights" if adapter.method == FULL else f"A {METHODS[adapter.method]} adapter"
    noun = {"official": "A checkpoint of the trained weights", ADAPTER: kind}.get(facts.kind, "A complete model")
    tasks = f" for {_join(facts.tasks)}" if facts.run.tasks else ""
    text = f"{noun}{tasks}, made with voxray from {link}, a {base.family} model."
    trained = sum(entry["trainable"] for entry in parameters.values())
    total = sum(entry["total"] for entry in parameters.values())
    lora = "" if adapter.rank is None else f", rank {adapter.rank}, alpha {adapter.alpha:g}"
    text += f"\n\n- Method: {METHODS[adapter.method]}{lora}"
    text += f"\n- Tuned parts of the base: {_join(adapter.roles)}"
    if trained:
        text += f"\n- Trained parameters: {trained:,} of {total:,} ({trained / total:.2%})"
    elif adapter.num_parameters is not None:
        text += f"\n- Parameters in the adapter: {adapter.num_parameters:,}"
    return text


def _front_notes(facts: CardFacts) -> Iterator[str]:
    if facts.part:
        yield (
            f"The {facts.part} of the adapter is merged into the weights. The rest is in the folder `adapter`, an "
            "adapter for this model: use both together."
        )
    elif facts.kind in ("hf", "mistral", "ct2") and facts.adapter.method != FULL:
        share = "" if facts.scale == 1 else f" at a share of {facts.scale:g}"
        yield f"The adapter is merged into the weights of the base{share}."


def _training_data(run: RunFacts) -> str:
    trained = run.trained_rows
    if not trained:
        return ""
    table = [("task", "data set", "rows", "audio", "")]
    for entry in trained["rows"]:
        audio = format_duration(entry["hours"] * 3600) if entry["hours"] else ""
        name, replayed = plain_name(entry["dataset"]), "replayed" if entry["replay"] else ""
        table.append((entry["task"], name, f"{entry['rows']:,}", audio, replayed))
    if not any(row[-1] for row in table[1:]):
        table = [row[:-1] for row in table]
    languages = ", ".join(f"{code or 'unknown'} ({rows:,} rows)" for code, rows in trained["languages"].items())
    manifests = [f"- `{entry['name']}`: `{entry['content'][:SHORT_HASH]}`" for entry in trained["manifests"]]
    hashes = "Manifests, with the start of the SHA-256 of their lines and clips:"
    return "\n\n".join((_table(table), f"Languages: {languages}.", hashes, "\n".join(manifests)))


def _training(run: RunFacts) -> str:
    settings = run.settings
    if not settings:
        return ""
    rows = run.trained_rows.get("rows_per_step")
    batch = f", of {rows:.3g} rows on average" if rows else ""
    lines = [f"optimizer steps: {run.step:,}{batch}"]
    for words, name in SETTINGS_SHOWN.items():
        lines += [f"{words} {settings[name]}"] if name in settings else []
    if settings.get("quantize", "none") != "none":
        lines.append(f"base quantised to {settings['quantize']}")
    if init := run.provenance.get("init_adapter"):
        lines.append(f"started from an earlier adapter, SHA-256 `{str(init.get('sha256', ''))[:SHORT_HASH]}`")
    if settings.get("distill_weight"):
        lines.append(f"distillation from the base, weight {settings['distill_weight']:g}")
    versions = run.provenance.get("versions", {})
    lines.append(", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions))
    return "\n".join(f"- {line}" for line in lines if line)


def _results(facts: CardFacts) -> str:
    results = [result for each in facts.evaluations for result in metric_results(each)]
    if results:
        results.sort(key=lambda result: list(TASKS).index(result.task))
        return "\n\n".join(
            (_result_table(results), "In brackets: 95 % intervals of a bootstrap over rows or speakers.")
        )
    validation = facts.run.validation
    names = [name for name in validation_metrics() if validation.get(name) is not None]
    table = [("metric", "value"), *((f"{name}{_arrow(name)}", f"{validation[name]:.4g}") for name in names)]
    if not names:
        return "It was not evaluated."
    first = f"It was not evaluated. The validation during its training, at step {validation['step']:,}, gave:"
    return f"{first}\n\n{_table(table)}"


def _result_table(results: Iterable[MetricResult]) -> str:
    """A line per task, data set and metric, with a column for the base and for every share of the adapter."""
    cells: dict[tuple[str, str, str], dict[float, MetricResult]] = {}
    for result in results:
        cells.setdefault((result.task, result.dataset, result.metric), {}).setdefault(result.scale, result)
    scales = sorted({scale for by_scale in cells.values() for scale in by_scale})
    titles = ["base" if not scale else "tuned" if scale == 1 else f"{scale:g} of the LoRA" for scale in scales]
    table = [("task", "data set", "metric", *titles, "n")]
    for (task, dataset, metric), by_scale in cells.items():
        values = [_value(by_scale.get(scale)) for scale in scales]
        counts = ", ".join(dict.fromkeys(f"{result.n:,}" for result in by_scale.values()))
        table.append((task, dataset, f"{metric}{_arrow(metric)}", *values, counts))
    return _table(table)


def _value(result: MetricResult | None) -> str:
    if result is None:
        return ""
    return f"{result.value:.4g}" + (f" ({result.low:.4g} to {result.high:.4g})" if result.has_interval else "")


def _limits(facts: CardFacts) -> str:
    entries = dataset_differences([each for each in facts.evaluations if each.scale in (0, facts.scale)])
    if not entries:
        return NOTHING_MEASURED
    table = [("task", "data set", "metric", "base", "tuned", "difference")]
    for entry in entries:
        each = entry.difference
        interval = f" ({each.interval[0]:+.4g} to {each.interval[1]:+.4g})" if each.interval else ""
        values = (f"{each.first:.4g}", f"{each.second:.4g}", f"{each.difference:+.4g}{interval}")
        table.append((entry.task, entry.dataset, f"{entry.metric}{_arrow(entry.metric)}", *values))
    first = "Gained and lost against the base, on the rows that both answered, with 95 % intervals of the difference:"
    return f"{first}\n\n{_table(table)}\n\nWhat it loses on other data than these was not measured."


def _arrow(metric: str) -> str:
    return " ↑" if higher_is_better(metric) else " ↓"


def _join(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(escape_cell, row)) + " |" for row in rows]
    return "\n".join((lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]))
