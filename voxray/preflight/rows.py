"""The rows of a run before it starts: read, counted, chosen as training chooses them, and one of each task decoded."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voxray.batches.plan import Plan
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.core.console import progress_bar
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import require_usable_row, samples_at
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.from_settings import feature_spec
from voxray.features.reader import FeatureRow
from voxray.features.shards import TASK_CODES
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.models.registry import get_family
from voxray.preflight.findings import Findings
from voxray.preflight.lengths import BadManifestLine, Lengths
from voxray.preflight.shapes import PackShape, pack_shape
from voxray.recipes import asr_adapter, multitask, salmonn, text, whisper
from voxray.recipes.run_stage import Stage, build_plan, choose_rows

STAGES: dict[type[TrainSettings], Callable[..., Stage]] = {
    TextSettings: text.build_stage,
    AsrAdapterSettings: asr_adapter.build_stage,
    MultitaskSettings: multitask.build_stage,
    WhisperSettings: whisper.build_stage,
    SalmonnSettings: salmonn.build_stage,
}
"""What each training job trains, by the class of its settings."""
TASK_OF_CODE = {code: name for name, code in TASK_CODES.items()}
PERCENTILES = (0, 50, 95, 100)


@dataclass
class RunRows:
    """What a run would train on.

    Attributes:
        train, held_out: All usable rows of the manifests.
        rows, held_out_rows: Those that are trained on and validated with.
    """

    stage: Stage
    family: ModelFamily
    extractor: Extractor
    train: Lengths
    held_out: Lengths
    rows: np.ndarray
    held_out_rows: np.ndarray
    _made: dict[tuple[int, bool], FeatureRow | None] = field(default_factory=dict)

    @property
    def front_end(self) -> FrontEnd:
        return self.extractor.front_end

    def plan(self, settings: TrainSettings, num_workers: int) -> Plan:
        """The run's plan, as training makes it."""
        microbatches_per_step = num_workers * settings.grad_accum
        positions = self.front_end.cross_attention_positions
        return build_plan(self.stage, settings, self.train, self.rows, microbatches_per_step, positions)  # type: ignore[arg-type]

    def shape(self, rows: Sequence[int] | np.ndarray, *, packed: bool) -> PackShape:
        """Sizes of a pack of training rows."""
        lengths = self.train
        columns = (lengths.num_prompt_tokens, lengths.num_target_tokens, lengths.num_windows)
        return pack_shape(rows, *columns, packed=packed)

    def made(self, numbers: Sequence[int] | np.ndarray, *, held_out: bool = False) -> list[FeatureRow]:
        """Rows as they come out of shards; those that do not decode are left out.

        Args:
            held_out: They are rows to validate with, not to train on.
        """
        lengths, wanted = self.held_out if held_out else self.train, dict[str, list[int]]()
        for number in map(int, numbers):
            if (number, held_out) not in self._made:
                self._made[number, held_out] = None
                wanted.setdefault(lengths.source(number), []).append(number)
        for sample in samples_at(wanted):
            try:
                found, _ = self.extractor.sample_rows(sample, augmented=not held_out)
            except BadRow:
                continue
            for number in wanted[sample.source]:
                self._made[number, held_out] = stored_row(found[lengths.variant(number)], self.extractor)
        return [row for number in numbers if (row := self._made[int(number), held_out]) is not None]


def stored_row(row: dict[str, Any], extractor: Extractor) -> FeatureRow:
    """A row as a shard would give it; in the place of an encoder's outputs stand zeros, of the same size and type."""
    storing = extractor.spec
    values = {name: row[name] for name in FeatureRow.__dataclass_fields__ if name in row}
    ids = {name: np.asarray(row[name], np.int32) for name in ("prompt_ids", "target_ids")}
    if storing.store == "encoder":
        kind = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[storing.dtype]
        audio = np.zeros((row["num_windows"], *extractor.frame_shape), kind)
    else:
        audio = row["audio"].astype(np.float16 if storing.store == "mel" else np.int16)
    return FeatureRow(**{**values, **ids, "store": storing.store, "audio": audio})


def look_at_rows(settings: TrainSettings, findings: Findings) -> RunRows | None:
    """Read the manifests and choose rows; what is wrong with them goes to the findings.

    Returns:
        None if there is nothing to train on.
    """
    good = True
    for manifest in dict.fromkeys((*settings.train_jsonl, *settings.val_jsonl)):
        flag = "--train_jsonl" if manifest in settings.train_jsonl else "--val_jsonl"
        try:
            require_usable_row((manifest,))
        except RunError as error:
            good = False
            findings.add("fix", "data", f"{flag} {error}")
    with findings.caught("model"):
        family = get_family(settings.model_id)
        extractor = Extractor(settings.model_id, feature_spec(settings, bf16=settings.bf16))
        if good:
            with findings.caught("data"):
                return _chosen(settings, family, extractor, findings)
    return None


def _chosen(settings: TrainSettings, family: ModelFamily, extractor: Extractor, findings: Findings) -> RunRows:
    stage = STAGES[type(settings)](settings)
    spare = stage.redraw.max_extra_prompt_tokens if stage.redraw else None
    with progress_bar("rows") as bar:
        train = Lengths(settings.train_jsonl, extractor, bar, augmented=True, max_extra_prompt_tokens=spare)
        held_out = Lengths(settings.val_jsonl, extractor, bar, augmented=False)
    for flag, lengths in (("--train_jsonl", train), ("--val_jsonl", held_out)):
        _tell_bad(flag, lengths, settings, findings)
    divided = frozenset(train.segmented | held_out.segmented)
    rows, held_out_rows, lost = choose_rows(stage, settings, train, held_out, extractor.front_end, divided)
    _tell_lost(lost, train, findings)
    found = RunRows(stage, family, extractor, train, held_out, rows, held_out_rows)
    _tell_lengths(found, settings, findings)
    _tell_mix(found, settings, findings)
    if not settings.val_jsonl:
        findings.add("warning", "data", "no --val_jsonl: nothing is validated, and no checkpoint is the best")
    elif not len(held_out_rows):
        findings.add("warning", "data", "--val_jsonl: no row is left to validate with")
    for line in _examples(found, findings):
        findings.add("ok", "example", line)
    return found


def _tell_bad(flag: str, lengths: Lengths, settings: TrainSettings, findings: Findings) -> None:
    """Rows that featurize would leave out, by reason, with the first of each."""
    firsts: dict[tuple[str, str], BadManifestLine] = {}
    for bad in lengths.bad:
        firsts.setdefault((bad.manifest, bad.reason), bad)
    counts = Counter((bad.manifest, bad.reason) for bad in lengths.bad)
    for key, bad in firsts.items():
        told = f"{flag} {bad.manifest}:{bad.line}: {bad.reason}: {bad.message}"
        told += f"; {counts[key]} such row(s)" if counts[key] > 1 else ""
        findings.add("fix" if settings.strict else "warning", "data", told + (" (--strict)" if settings.strict else ""))
    if len(lengths):
        findings.add("ok", "data", f"{flag}: {len(np.unique(lengths.sample))} usable row(s), {len(lengths.bad)} bad")
    elif lengths.bad:
        raise RunError(f"{flag}: no row is usable; the first fault: {lengths.bad[0].message}")


def _tell_lost(lost: Sequence[tuple[Lengths, int, str, str]], train: Lengths, findings: Findings) -> None:
    """Rows that training leaves out, by reason."""
    of_kind: dict[tuple[str, str], list[tuple[Lengths, int, str, str]]] = {}
    for entry in lost:
        of_kind.setdefault(("--train_jsonl" if entry[0] is train else "--val_jsonl", entry[2]), []).append(entry)
    for (flag, reason), entries in of_kind.items():
        lengths, row, _, message = max(entries, key=lambda entry: entry[0].num_tokens[entry[1]])
        told = f"{flag}: {len(entries)} row(s) left out, {reason}: {message}; such as {lengths.source(row)}"
        findings.add("warning", "data", told)


def _tell_lengths(found: RunRows, settings: TrainSettings, findings: Findings) -> None:
    lengths = found.train
    for name, rows in _of_tasks(lengths, found.rows):
        tokens = ", ".join(f"{value:.0f}" for value in np.percentile(lengths.num_tokens[rows], PERCENTILES))
        told = f"{name}: tokens least, median, 95 %, most {tokens} of --max_len {settings.max_len}"
        if TASKS[name].has_audio:
            seconds = np.percentile(lengths.num_samples[rows] / found.front_end.sample_rate_hz, PERCENTILES)
            told += f"; seconds {', '.join(f'{value:.1f}' for value in seconds)}"
        findings.add("ok", "lengths", told)


def _tell_mix(found: RunRows, settings: TrainSettings, findings: Findings) -> None:
    total = len(np.unique(found.train.sample[found.rows]))
    rows = {name: len(np.unique(found.train.sample[rows])) for name, rows in _of_tasks(found.train, found.rows)}
    shares = ", ".join(f"{name} {count} ({count / total:.1%})" for name, count in rows.items())
    told = f"rows to train on: {shares}"
    weights = found.stage.task_weights
    if weights:
        sum_of = sum(weights.values())
        told += "; drawn as " + ", ".join(f"{name} {weight / sum_of:.1%}" for name, weight in weights.items())
    findings.add("ok", "tasks", told)


def _of_tasks(lengths: Lengths, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for code, name in TASK_OF_CODE.items():
        of_task = rows[lengths.task[rows] == code]
        if len(of_task):
            yield name, of_task


def _examples(found: RunRows, findings: Findings) -> Iterator[str]:
    """The first row of every task, decoded: prompt | answer."""
    for name, rows in _of_tasks(found.train, found.rows):
        made = found.made(rows[:1])
        if not made:
            source = found.train.source(rows[0])
            findings.add("warning", "data", f"--train_jsonl {source}: does not decode; such rows are left out")
            continue
        show = found.front_end.show
        yield f"{name}: {show(made[0].prompt_ids.tolist())} | {show(made[0].target_ids.tolist())}"
