"""Sweeps over any flags of a training job with Ray Tune. Every trial is a Ray Train run; weak trials stop early.

Ray Tune starts trials, receives their validations and stops them. The state of a sweep is in its own folder
(``sweep.trials``); no file of Ray Tune is read again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.cluster.session import ray_session
from voxray.commands.next_steps import after_sweep
from voxray.config.search_space import format_choice
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError, Stopped
from voxray.core.manifest import require_usable_row
from voxray.launch.elastic import count_workers
from voxray.models.parts.arithmetic import chooses_type, gpus_have_bfloat16
from voxray.recipes.build_model import check_lora_targets
from voxray.recipes.run_context import RunContext, assemble_inputs, require_family
from voxray.runs.inputs import input_hashes
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import resolve_output_dir
from voxray.sweep.folder import BEST, REPORT, TABLE, open_sweep, warn_of_few_validations
from voxray.sweep.queue import Queue
from voxray.sweep.ray_tune import build_scheduler, concurrent_trials, run_on_tune, train_trial
from voxray.sweep.report import write_report
from voxray.sweep.results import SweepOutcome, summarise_trials, write_best, write_csv
from voxray.sweep.search import refuse_missing_optuna
from voxray.sweep.trials import Trial, read_trials
from voxray.sweep.work import Sweep, trial_settings


def run_sweep(settings: Any) -> SweepOutcome:
    """Run a sweep, or the rest of an earlier one, and write results.csv, best.yaml and report.html.

    Raises:
        RunError, SettingsError: The user has to correct something, or no trial has the metric.
        Stopped: By Ctrl-C or SIGTERM.
    """
    if not settings.val_jsonl:
        raise SettingsError("--val_jsonl: a sweep needs validation data to decide by")
    if settings.method == "optuna":
        refuse_missing_optuna()
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    base: Any = assemble_inputs(settings)
    require_usable_row(base.manifests)
    require_family(base)
    if "lora_targets" not in settings.domains:
        check_lora_targets(RunContext.create(base, run_dir=output_dir))
    with folder_lease(output_dir):
        has_bfloat16 = not chooses_type(base) and gpus_have_bfloat16(on_ray=True)
        inputs = input_hashes(base, "train_jsonl", "replay_jsonl", "val_jsonl")
        has_bfloat16 = open_sweep(output_dir, settings, inputs, has_bfloat16)
        warn_about_unused_flags(settings)
        warn_of_few_validations(settings)
        num_workers = max(1, count_workers(settings.num_workers)[1])
        num_processes = num_workers * max(1, settings.max_concurrent_trials)
        with ray_session(output_dir / "ray.log", max(num_processes, settings.num_actors)):
            num_workers = max(1, count_workers(settings.num_workers)[1])  # again: the cluster may have other GPUs
            concurrent = concurrent_trials(num_workers, settings.max_concurrent_trials)

            def train(config: dict[str, Any]) -> None:
                train_trial(base, num_workers, has_bfloat16, config)

            def run(queue: Queue, earlier: Sequence[Trial] | None) -> None:
                scheduler = None if earlier is None else build_scheduler(settings, earlier)
                run_on_tune(queue, train, scheduler, concurrent, output_dir / "ray")

            try:
                sweep = Sweep(base, output_dir, run, has_bfloat16=has_bfloat16)
                sweep.search()
                if settings.top_k:
                    sweep.repeat()
            except KeyboardInterrupt:
                raise Stopped(
                    f"stopped; run the same command with --resume to continue; sweep in {output_dir}"
                ) from None
        return conclude(settings, output_dir, has_bfloat16=has_bfloat16)


def conclude(settings: Any, output_dir: Path, *, has_bfloat16: bool) -> SweepOutcome:
    """Write and print the result of a sweep.

    Args:
        has_bfloat16: See ``open_sweep``.
    Raises:
        RunError: No trial has the metric.
    """
    outcome = summarise_trials(read_trials(output_dir), settings.metric, settings.mode, settings.top_k)
    write_csv(output_dir / TABLE, outcome, list(settings.domains))
    write_report(output_dir / REPORT, settings, outcome)
    best, value = outcome.winner, outcome.winning_value
    if best is None or value is None:
        reasons = [trial.reason for trial in outcome.trials if trial.reason]
        first = reasons[0] if reasons else f"no validation gave {settings.metric}"
        raise RunError(f"no trial finished: {first}; all of them in {output_dir / TABLE}")
    runs = f", mean of {len(outcome.repeated[0].values)} seeds" if outcome.repeated else ""
    type_of_best = trial_settings(settings, best.choice, best.folder, has_bfloat16=has_bfloat16)
    choice = {**best.choice, **({"bf16": True} if type_of_best.bf16 else {})}
    write_best(output_dir / BEST, settings, choice, f"{settings.metric} ({value:.4f}{runs})")
    counts = {state: sum(trial.state == state for trial in outcome.trials) for state in ("stopped", "failed")}
    others = "".join(f", {count} {state}" for state, count in counts.items() if count)
    lines = [
        f"sweep: {len(outcome.trials)} trials{others}; best {settings.metric} {value:.4f}{runs} with",
        f"  {format_choice(best.choice)}",
        *([f"  {outcome.verdict()}"] if outcome.verdict() else []),
        f"{TABLE}, {REPORT} and {BEST} in {output_dir}",
        *after_sweep(settings, output_dir),
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return outcome
