"""Check everything that a training run needs, and find settings that fit and are fast.

The files of a preflight are in the folder ``preflight`` of the run's output folder. It changes nothing else there.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from voxray.cluster.session import cluster_resources, stderr_to
from voxray.config.preflight import PreflightFlags
from voxray.config.recipes import find_recipe
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import free_disk_bytes, require_writable
from voxray.core.units import format_bytes
from voxray.features.from_settings import open_features_dir
from voxray.models.adapters.compatibility import check_encoder_unchanged
from voxray.preflight.budget import GPUS
from voxray.preflight.estimate import RunTime, checkpoints_bytes, features_bytes, run_time
from voxray.preflight.findings import Findings
from voxray.preflight.fit_settings import FittedSettings, SettingsFitter, planned_processes, threads_of_one
from voxray.preflight.machine import (
    check_cpus,
    check_flags_need,
    check_gpu,
    check_libraries,
    check_ports,
    check_shared_memory,
)
from voxray.preflight.meta_model import build_meta_model, report_parameters
from voxray.preflight.rows import RunRows, check_manifests, read_rows
from voxray.recipes.build_model import check_lora_targets, find_init_adapter
from voxray.recipes.run_context import RunContext, assemble_inputs, with_run_dtype
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import holds_run, make_folder, refuse_other_run

FOLDER = "preflight"
MAX_PREDICTION_ERROR = 0.2
"""Relative difference between predicted and measured memory above which the report warns."""


class Preflight:
    """One preflight.

    Attributes:
        flags: Settings of the preflight, which include those of the training.
        settings: Settings of the training.
        job: Name of the training job's script.
        folder: Folder of the preflight's files; None if it cannot be made.
        rows: Rows that the run would use; None if there are none.
        decision: Settings that fit; None if the checks did not get that far.
        time: Estimated duration of the run.
        roles: {role: {"total", "trainable", "lora_layers"}}.
    """

    def __init__(self, settings: Any) -> None:
        self.flags: PreflightFlags = settings
        self.settings = training_settings(settings)
        self.job = find_recipe(self.settings).job
        self.findings = Findings()
        self.folder: Path | None = None
        self.rows: RunRows | None = None
        self.decision: FittedSettings | None = None
        self.time: RunTime | None = None
        self.roles: dict[str, dict[str, int]] = {}

    def check(self) -> None:
        """Run all checks. Problems go to the findings."""
        with suppress(RunError, SettingsError):  # problems of base and folder are reported below
            on_ray = str(self.settings.num_workers) != "0"
            has_bfloat16 = GPUS[self.flags.gpu].has_bfloat16 if self.flags.gpu else None
            run_dir = RemoteSync.from_settings(self.settings).folder
            self.settings = with_run_dtype(self.settings, run_dir, on_ray=on_ray, has_bfloat16=has_bfloat16)
        settings, findings = self.settings, self.findings
        with findings.caught("output"):
            remote = RemoteSync.from_settings(settings)
            make_folder(remote.folder / FOLDER)
            self.folder = remote.folder / FOLDER
            if remote.remote_dir is not None:
                require_writable(remote.remote_dir, "--storage_path" if settings.storage_path else "--output_dir")
                remote.fetch()
        check_libraries(findings)
        check_flags_need(settings, findings)
        check_gpu(settings, findings, self.flags.gpu)
        check_shared_memory(findings)
        check_ports(findings)
        with findings.caught("resources"):
            check_cpus(settings, cluster_resources(self.log_path), findings)
        self._check_outputs()
        run = self._check_model()
        has_rows = check_manifests(run.settings if run else settings, findings)
        if run is None or not has_rows:
            return
        with stderr_to(self.log_path):  # PyTorch's profiler writes there when it starts and ends
            self.rows = read_rows(run, findings)
            model_is_good = all(finding.about != "model" for finding in findings.to_fix)
            if self.rows is not None and model_is_good:
                with findings.caught("model"):
                    meta_model = build_meta_model(run)
                    self.roles = report_parameters(meta_model, run.family, findings)
                    self._fit_settings(self.rows, meta_model)

    @property
    def log_path(self) -> Path:
        return self.folder / "preflight.log" if self.folder else Path(os.devnull)

    def _check_outputs(self) -> None:
        """Whether the output folders are writable, and whether they hold another run."""
        settings, findings = self.settings, self.findings
        if settings.features_dir:
            with findings.caught("output"):
                path = open_features_dir(settings, settings.features_dir, settings.storage_path, flag="--features_dir")
                findings.add("ok", "output", f"--features_dir {path}: can be written to")
        if self.folder is None:
            return
        run_dir = self.folder.parent
        findings.add("ok", "output", f"--output_dir {run_dir}: can be written to")
        if holds_run(run_dir) and not settings.overwrite:
            with findings.caught("output"):
                refuse_other_run(run_dir, settings)
                message = f"--output_dir {run_dir}: holds this very run, which goes on; nothing of it is changed"
                findings.add("ok", "output", message)

    def _check_model(self) -> RunContext | None:
        """Whether the base and the adapter to start from fit the job; None if the base cannot be used at all."""
        settings = self.settings
        if self.folder is not None and find_recipe(settings).assemble:  # its files go to the preflight's own folder
            with self.findings.caught("model"):
                elsewhere = settings.model_copy(update={"output_dir": str(self.folder)})
                settings = assemble_inputs(elsewhere).model_copy(update={"output_dir": settings.output_dir})
            if settings is self.settings:  # it failed
                return None
        run = None
        with self.findings.caught("model"):
            run = RunContext.create(settings)
            check_encoder_unchanged(run.family, settings.store, settings.quantize, None)
            check_lora_targets(run)
        if run and settings.init_adapter:
            with self.findings.caught("model"):
                init_adapter = find_init_adapter(run)
                folder = init_adapter.folder if init_adapter else ""
                self.findings.add("ok", "model", f"--init_adapter {folder}: fits")
        return run

    def _fit_settings(self, rows: RunRows, meta_model: Any) -> None:
        settings = rows.run.settings
        num_workers = planned_processes(settings.num_workers)
        resumes = self.folder is not None and holds_run(self.folder.parent) and not settings.overwrite
        tunes = self.flags.tune and not resumes
        fitter = SettingsFitter(
            rows,
            meta_model,
            num_workers,
            self.findings,
            memory_gib=self.flags.memory_gib,
            gpu=self.flags.gpu,
            tunes=tunes,
        )
        fitter.fit_gpus()
        with threads_of_one(fitter.num_workers):
            self.decision = fitter.decide()
        fitter.tell()
        self._compare_memory(self.decision)
        settings, num_workers = self.decision.settings, fitter.num_workers
        plan = rows.plan(settings, num_workers)
        self.time = run_time(settings, rows, plan, num_workers, self.decision.average, self.decision.answering)
        self._check_disk(settings, rows)

    def _compare_memory(self, decision: FittedSettings) -> None:
        """Warn if the prediction differs from the measurement."""
        if decision.largest is None or decision.pack is None:
            return
        predicted, measured = decision.pack.need.allocated_bytes, decision.largest.peak_bytes
        if abs(predicted - measured) > MAX_PREDICTION_ERROR * measured:
            figures = f"predicted were {format_bytes(predicted)}, measured {format_bytes(measured)}"
            self.findings.add("warning", "memory", f"{figures}: believe what was measured")

    def _check_disk(self, settings: TrainSettings, rows: RunRows) -> None:
        if self.folder is None:
            return
        num_trained = sum(entry["trainable"] for entry in self.roles.values())
        checkpoints = checkpoints_bytes(settings, num_trained)
        features = 0 if settings.features_dir else features_bytes(settings, rows)
        free = free_disk_bytes(self.folder)
        sizes = f"features take {format_bytes(features)}, checkpoints at most {format_bytes(checkpoints)}"
        message = f"--output_dir {self.folder.parent}: {sizes}, and {format_bytes(free)} are free"
        self.findings.add("ok" if features + checkpoints < free else "fix", "disk", message)

    def price(self) -> float | None:
        """Cost of the run, if its duration and the price per hour are known."""
        if not self.flags.price_per_hour or self.time is None or self.time.total_sec is None:
            return None
        num_workers = planned_processes(self.decision.settings.num_workers) if self.decision else 1
        return self.time.total_sec / 3600 * num_workers * self.flags.price_per_hour


def training_settings(settings: Any) -> TrainSettings:
    """The settings of the training job that a preflight's settings include."""
    fields = settings.trains.model_fields
    values = {name: value for name, value in dict(settings).items() if name in fields}
    return settings.trains.model_construct(settings.model_fields_set & set(fields), **values)
