"""The preflight job: look at all that a run needs, find settings that fit and are quick, and write how to start it.

Its files go to the folder ``preflight`` in the run's output folder, and nothing else there is touched.
"""

import os
from pathlib import Path
from typing import Any

from voxray.cluster.session import cluster_resources, stderr_to
from voxray.config.preflight import PreflightFlags
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import TrainSettings
from voxray.core.storage import refuse_unwritable
from voxray.core.units import format_bytes
from voxray.features.from_settings import open_features_dir
from voxray.models.adapters.compatibility import refuse_changed_outputs
from voxray.models.registry import get_family
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
    free_disk_bytes,
)
from voxray.preflight.meta_model import build_meta_model, tell_coverage
from voxray.preflight.rows import RunRows, look_at_rows
from voxray.recipes.build_model import find_init_adapter
from voxray.recipes.registry import refuse_other_family
from voxray.recipes.salmonn import assemble_inputs
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import holds_run, make_folder, refuse_other_run

FOLDER = "preflight"
FRACTION_OFF = 0.2
"""How far a prediction may be from what was measured without a word about it."""
JOBS = {
    "TextSettings": "train_text",
    "AsrAdapterSettings": "train_asr_adapter",
    "MultitaskSettings": "train_multitask",
    "WhisperSettings": "train_whisper",
    "SalmonnSettings": "train_salmonn",
}
"""Training jobs, by their settings."""


class Preflight:
    """One preflight.

    Args:
        settings: Those of the preflight, which hold the training's.
    """

    def __init__(self, settings: Any) -> None:
        self.flags: PreflightFlags = settings
        self.asked = training_settings(settings)
        self.job = JOBS[type(self.asked).__name__]
        self.findings = Findings()
        self.folder: Path | None = None
        self.rows: RunRows | None = None
        self.decision: FittedSettings | None = None
        self.time: RunTime | None = None
        self.roles: dict[str, dict[str, int]] = {}

    def look(self) -> None:
        """Find out everything; what is wrong goes to the findings."""
        asked, findings = self.asked, self.findings
        with findings.caught("output"):
            mirror = RemoteSync.from_settings(asked)
            make_folder(mirror.folder / FOLDER)
            self.folder = mirror.folder / FOLDER
            if mirror.place is not None:
                refuse_unwritable(mirror.place, "--storage_path" if asked.storage_path else "--output_dir")
                mirror.fetch()
        check_libraries(findings)
        check_flags_need(asked, findings)
        check_gpu(asked, findings)
        check_shared_memory(findings)
        check_ports(findings)
        with findings.caught("resources"):
            check_cpus(asked, cluster_resources(self.log_path), findings)
        self._look_at_places()
        ready = self._made_ready()
        if ready is None:
            return
        self._look_at_model(ready)
        with stderr_to(self.log_path):  # PyTorch's profiler writes there when it starts and ends
            self.rows = look_at_rows(ready, findings)
            model_is_good = all(finding.about != "model" for finding in findings.to_fix)
            if self.rows is not None and model_is_good:
                self._plan(ready, self.rows)

    @property
    def log_path(self) -> Path:
        return self.folder / "preflight.log" if self.folder else Path(os.devnull)

    def _look_at_places(self) -> None:
        """Where the run writes: whether it may, and whether there is another run already."""
        asked, findings = self.asked, self.findings
        if asked.features_dir:
            with findings.caught("output"):
                place = open_features_dir(asked, asked.features_dir, asked.storage_path, flag="--features_dir")
                findings.add("ok", "output", f"--features_dir {place}: can be written to")
        if self.folder is None:
            return
        findings.add("ok", "output", f"--output_dir {self.folder.parent}: can be written to")
        if holds_run(self.folder.parent) and not asked.overwrite:
            with findings.caught("output"):
                refuse_other_run(self.folder.parent, asked)
                told = (
                    f"--output_dir {self.folder.parent}: holds this very run, which goes on; nothing of it is changed"
                )
                findings.add("ok", "output", told)

    def _made_ready(self) -> TrainSettings | None:
        """SALMONN's parts and annotation files as a folder and manifests, all in the preflight's own folder."""
        if not isinstance(self.asked, SalmonnSettings) or self.folder is None:
            return self.asked
        with self.findings.caught("model"):
            elsewhere = self.asked.model_copy(update={"output_dir": str(self.folder)})
            return assemble_inputs(elsewhere).model_copy(update={"output_dir": self.asked.output_dir})
        return None

    def _look_at_model(self, ready: TrainSettings) -> None:
        with self.findings.caught("model"):
            refuse_other_family(ready)
            refuse_changed_outputs(get_family(ready.model_id), ready.store, ready.quantize, None)
        if ready.init_adapter:
            with self.findings.caught("model"):
                earlier = find_init_adapter(ready, get_family(ready.model_id))
                self.findings.add("ok", "model", f"--init_adapter {earlier.folder if earlier else ''}: fits")

    def _plan(self, ready: TrainSettings, rows: RunRows) -> None:
        with self.findings.caught("model"):
            outline = build_meta_model(rows.stage, ready, rows.family)
            self.roles = tell_coverage(outline, rows.stage, rows.family, self.findings)
            self._decide(ready, rows, outline)

    def _decide(self, ready: TrainSettings, rows: RunRows, outline: Any) -> None:
        workers = planned_processes(ready.num_workers)
        goes_on = self.folder is not None and holds_run(self.folder.parent) and not ready.overwrite
        tunes = self.flags.tune and not goes_on
        decider = SettingsFitter(
            rows, ready, outline, workers, self.findings, memory_gib=self.flags.memory_gib, tunes=tunes
        )
        decider.fit_gpus()
        with threads_of_one(decider.num_workers):
            self.decision = decider.decide()
        decider.tell()
        self._compare(self.decision)
        settings, workers = self.decision.settings, decider.num_workers
        plan = rows.plan(settings, workers)
        self.time = run_time(settings, rows, plan, workers, self.decision.average, self.decision.answering)
        self._look_at_disk(settings, rows)

    def _compare(self, decision: FittedSettings) -> None:
        """Say so if the prediction is far off."""
        if decision.largest is None or decision.pack is None:
            return
        wanted, seen = decision.pack.need.peak_bytes, decision.largest.peak_bytes
        if abs(wanted - seen) > FRACTION_OFF * seen:
            told = f"predicted were {format_bytes(wanted)}, measured {format_bytes(seen)}: believe what was measured"
            self.findings.add("warning", "memory", told)

    def _look_at_disk(self, settings: TrainSettings, rows: RunRows) -> None:
        if self.folder is None:
            return
        trained = sum(entry["trainable"] for entry in self.roles.values())
        checkpoints = checkpoints_bytes(settings, trained)
        features = 0 if settings.features_dir else features_bytes(settings, rows)
        free = free_disk_bytes(self.folder)
        told = f"--output_dir {self.folder.parent}: features take {format_bytes(features)}, checkpoints at most"
        told += f" {format_bytes(checkpoints)}, and {format_bytes(free)} are free"
        self.findings.add("ok" if features + checkpoints < free else "fix", "disk", told)

    def price(self) -> float | None:
        """What the run costs, if that can be said."""
        if not self.flags.price_per_hour or self.time is None or self.time.total_sec is None:
            return None
        workers = planned_processes(self.decision.settings.num_workers) if self.decision else 1
        return self.time.total_sec / 3600 * workers * self.flags.price_per_hour


def training_settings(settings: Any) -> TrainSettings:
    """Those of the training job that a preflight gets ready."""
    fields = settings.trains.model_fields
    values = {name: value for name, value in dict(settings).items() if name in fields}
    return settings.trains.model_construct(settings.model_fields_set & set(fields), **values)
