"""The rows of a run before it starts: read, counted, chosen as training does, and one of every task decoded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voxray.batches.plan import Plan
from voxray.config.train import SHARED_ROWS, TrainSettings
from voxray.core.console import progress_bar
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import require_usable_row, samples_at
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.from_settings import feature_spec
from voxray.features.reader import FeatureRow
from voxray.features.shards import TASK_CODES
from voxray.models.front_end import FrontEnd
from voxray.preflight.findings import Findings
from voxray.preflight.lengths import BadManifestLine, Lengths
from voxray.preflight.shapes import PackShape, pack_shape
from voxray.recipes.choose_rows import choose_rows
from voxray.recipes.run_context import RunContext
from voxray.recipes.run_stage import build_plan

PERCENTILES = (0, 50, 95, 100)


@dataclass
class RunRows:
    """The rows that a run would use.

    Attributes:
        train, held_out: All usable rows of the manifests.
        rows, held_out_rows: Row numbers to train on and to validate with.
    """

    run: RunContext
    extractor: Extractor
    train: Lengths
    held_out: Lengths
    rows: np.ndarray
    held_out_rows: np.ndarray
    _decoded: dict[tuple[int, bool], FeatureRow | None] = field(default_factory=dict)

    @property
    def front_end(self) -> FrontEnd:
        return self.extractor.front_end

    def plan(self, settings: TrainSettings, num_workers: int) -> Plan:
        """The plan that training would make."""
        microbatches_per_step = num_workers * settings.grad_accum
        return build_plan(
            self.run.stage,
            settings,
            self.train,
            self.rows,
            microbatches_per_step,
            self.front_end.cross_attention_positions,
        )

    def shape(self, rows: Sequence[int] | np.ndarray, *, packed: bool) -> PackShape:
        """Sizes of a microbatch of training rows."""
        lengths, rows = self.train, np.asarray(rows)
        labels = lengths.num_labels(rows)
        others = lengths.num_prompt_tokens[rows] + lengths.num_target_tokens[rows] - labels
        return pack_shape(range(len(rows)), others, labels, lengths.num_windows[rows], packed=packed)

    def decode(self, numbers: Sequence[int] | np.ndarray, *, held_out: bool = False) -> list[FeatureRow]:
        """Rows as shards would give them, without those that do not decode.

        Args:
            held_out: Whether the numbers are of validation rows.
        """
        lengths, missing = self.held_out if held_out else self.train, dict[str, list[int]]()
        for number in map(int, numbers):
            if (number, held_out) not in self._decoded:
                self._decoded[number, held_out] = None
                missing.setdefault(lengths.source(number), []).append(number)
        for sample in samples_at(missing):
            try:
                variants, _ = self.extractor.sample_rows(sample, augmented=not held_out)
            except BadRow:
                continue
            for number in missing[sample.source]:
                self._decoded[number, held_out] = stored_row(variants[lengths.variant(number)], self.extractor)
        return [row for number in numbers if (row := self._decoded[int(number), held_out]) is not None]


def stored_row(row: dict[str, Any], extractor: Extractor) -> FeatureRow:
    """A row as a shard would give it; zeros of the same size and type take the place of encoder outputs."""
    spec = extractor.spec
    values = {name: row[name] for name in FeatureRow.__dataclass_fields__ if name in row}
    ids = {name: np.asarray(row[name], np.int32) for name in ("prompt_ids", "target_ids")}
    if spec.store == "encoder":
        dtype = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[spec.dtype]
        audio = np.zeros((row["num_windows"], *extractor.frame_shape), dtype)
    else:
        audio = row["audio"].astype(np.float16 if spec.store == "mel" else np.int16)
    return FeatureRow(**{**values, **ids, "store": spec.store, "audio": audio})


def check_manifests(settings: TrainSettings, findings: Findings) -> bool:
    """Whether every manifest can be read and has a usable row. Problems go to the findings."""
    good = True
    for manifest in dict.fromkeys(settings.manifests):
        flags = ("train_jsonl", "replay_jsonl", "val_jsonl")
        flag = next(f"--{name}" for name in flags if manifest in getattr(settings, name))
        try:
            require_usable_row((manifest,))
        except RunError as error:
            good = False
            findings.add("fix", "data", f"{flag} {error}")
    for path in settings.shared_manifests:
        findings.add("warning", "data", f"--val_jsonl {path}: {SHARED_ROWS}")
    return good


def read_rows(run: RunContext, findings: Findings) -> RunRows | None:
    """Read the manifests and choose rows as training does. Problems go to the findings.

    Returns:
        None if there is nothing to train on.
    """
    settings, extractor = run.settings, None
    with findings.caught("model"):
        extractor = Extractor(settings.model_id, feature_spec(settings, bf16=settings.bf16))
    if extractor:
        with findings.caught("data"):
            return _choose_rows(run, extractor, findings)
    return None


def _choose_rows(run: RunContext, extractor: Extractor, findings: Findings) -> RunRows:
    settings, stage = run.settings, run.stage
    extra_tokens = stage.prompt_sampler.max_extra_prompt_tokens if stage.prompt_sampler else None
    with progress_bar("rows") as bar:
        options = {"augmented": True, "replay": settings.replay_jsonl, "max_extra_prompt_tokens": extra_tokens}
        train = Lengths(settings.train_jsonl, extractor, bar, **options)
        held_out = Lengths(settings.val_jsonl, extractor, bar, augmented=False)
    for flag, lengths in (("--train_jsonl", train), ("--val_jsonl", held_out)):
        _report_bad_lines(flag, lengths, settings, findings)
    divided = frozenset(train.segmented | held_out.segmented)
    rows, held_out_rows, lost = choose_rows(stage, settings, train, held_out, extractor.front_end, divided)
    _report_lost(lost, train, findings)
    chosen = RunRows(run, extractor, train, held_out, rows, held_out_rows)
    _report_lengths(chosen, findings)
    _report_tasks(chosen, findings)
    if not settings.val_jsonl:
        findings.add("warning", "data", "no --val_jsonl: nothing is validated, and no checkpoint is the best")
    elif not len(held_out_rows):
        findings.add("warning", "data", "--val_jsonl: no row is left to validate with")
    for line in _examples(chosen, findings):
        findings.add("ok", "example", line)
    return chosen


def _report_bad_lines(flag: str, lengths: Lengths, settings: TrainSettings, findings: Findings) -> None:
    """Report rows that featurize would leave out: for every reason, the first one and the number."""
    first_of_reason: dict[tuple[str, str], BadManifestLine] = {}
    for bad in lengths.bad:
        first_of_reason.setdefault((bad.manifest, bad.reason), bad)
    counts = Counter((bad.manifest, bad.reason) for bad in lengths.bad)
    for key, bad in first_of_reason.items():
        message = f"{flag} {bad.manifest}:{bad.line}: {bad.reason}: {bad.message}"
        message += f"; {counts[key]} such row(s)" if counts[key] > 1 else ""
        message += " (--strict)" if settings.strict else ""
        findings.add("fix" if settings.strict else "warning", "data", message)
    if len(lengths):
        findings.add("ok", "data", f"{flag}: {len(np.unique(lengths.sample))} usable row(s), {len(lengths.bad)} bad")
    elif lengths.bad:
        raise RunError(f"{flag}: no row is usable; the first fault: {lengths.bad[0].message}")


def _report_lost(lost: Sequence[tuple[Lengths, int, str, str]], train: Lengths, findings: Findings) -> None:
    """Report rows that training leaves out, by reason."""
    by_reason: dict[tuple[str, str], list[tuple[Lengths, int, str, str]]] = {}
    for entry in lost:
        by_reason.setdefault(("--train_jsonl" if entry[0] is train else "--val_jsonl", entry[2]), []).append(entry)
    for (flag, reason), entries in by_reason.items():
        lengths, row, _, message = max(entries, key=lambda entry: entry[0].num_tokens[entry[1]])
        message = f"{flag}: {len(entries)} row(s) left out, {reason}: {message}; such as {lengths.source(row)}"
        findings.add("warning", "data", message)


def _report_lengths(chosen: RunRows, findings: Findings) -> None:
    lengths = chosen.train
    for name, rows in _rows_by_task(lengths, chosen.rows):
        tokens = ", ".join(f"{value:.0f}" for value in np.percentile(lengths.num_tokens[rows], PERCENTILES))
        message = f"{name}: tokens least, median, 95 %, most {tokens} of --max_len {chosen.run.settings.max_len}"
        if TASKS[name].has_audio:
            seconds = np.percentile(lengths.num_samples[rows] / chosen.front_end.sample_rate_hz, PERCENTILES)
            message += f"; seconds {', '.join(f'{value:.1f}' for value in seconds)}"
        findings.add("ok", "lengths", message)


def _report_tasks(chosen: RunRows, findings: Findings) -> None:
    total = len(np.unique(chosen.train.sample[chosen.rows]))
    by_task = _rows_by_task(chosen.train, chosen.rows)
    counts = {name: len(np.unique(chosen.train.sample[rows])) for name, rows in by_task}
    shares = ", ".join(f"{name} {count} ({count / total:.1%})" for name, count in counts.items())
    message = f"rows to train on: {shares}"
    if weights := chosen.run.stage.task_weights:
        sum_of_weights = sum(weights.values())
        message += "; drawn as " + ", ".join(
            f"{name} {weight / sum_of_weights:.1%}" for name, weight in weights.items()
        )
    findings.add("ok", "tasks", message)


def _rows_by_task(lengths: Lengths, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, code in TASK_CODES.items():
        of_task = rows[lengths.task[rows] == code]
        if len(of_task):
            yield name, of_task


def _examples(chosen: RunRows, findings: Findings) -> Iterator[str]:
    """The first row of every task, decoded: prompt | answer."""
    for name, rows in _rows_by_task(chosen.train, chosen.rows):
        decoded = chosen.decode(rows[:1])
        if not decoded:
            source = chosen.train.source(rows[0])
            findings.add("warning", "data", f"--train_jsonl {source}: does not decode; such rows are left out")
            continue
        show = chosen.front_end.show
        yield f"{name}: {show(decoded[0].prompt_ids.tolist())} | {show(decoded[0].target_ids.tolist())}"
