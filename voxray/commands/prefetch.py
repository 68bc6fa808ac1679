"""The prefetch job: model, corpus, 16 kHz audio with manifests, and features, in one folder with a lock file.

Four steps, each of which is passed over when the lock file says that it is done. What a step was made of is pinned in
the lock file before its first byte comes, and what it made is on disk under its own name only when it is whole; so the
job may be killed at any moment, and the same command goes on.
"""

import filecmp
import json
import shlex
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.commands.prepare import run_prepare_job
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flag_groups import ClipLimitFlags, FeatureFlags
from voxray.config.prefetch import PrefetchSettings
from voxray.config.prepare import PrepareSettings
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_atomically
from voxray.corpora.fetch import Source, bring, find_source
from voxray.corpora.hub import is_intact, model_files, open_repository, walk
from voxray.corpora.prepare.fingerprints import short_hash
from voxray.corpora.select import AUDIO_SUFFIXES, RowFilter
from voxray.features.from_settings import make_features
from voxray.models.registry import get_family
from voxray.prefetch.lock_file import Lock, changed_source, damaged, describe, describe_many, refuse_changes
from voxray.prefetch.plan import refuse_full_disk, show_plan
from voxray.runs.run_folder import make_folder, resolve_output_dir

MODEL_ASKED = ("model_id", "model_revision", "hub")
CORPUS_ASKED = ("dataset", "dataset_revision", "hub", "language", "splits")
LIMITS = (*ClipLimitFlags.model_fields, "min_sec", "max_sec", "max_chars", "duplicates", "leaks", "val_share", "seed")
MANIFESTS = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
CHECKSUMS = "clips.sha256"
FOLDERS = ("model", "raw", "data", "features")
JOBS = {"whisper": "train_whisper", "voxtral": "train_asr_adapter"}
"""The job that trains a model of that type on a manifest of transcripts."""


def run_prefetch(settings: PrefetchSettings) -> dict[str, Any]:
    """Run the job, or with ``dry_run`` say what it would do.

    Returns:
        The steps of the lock file.
    Raises:
        RunError, SettingsError: What the user has to put right.
    """
    folder = resolve_output_dir(settings.output_dir, settings.storage_path)
    lock = Lock(folder)
    if settings.dry_run:
        show_plan(settings, folder, lock)
        return {}
    if not lock.path.is_file() and (foreign := [name for name in FOLDERS if (folder / name).exists()]):
        raise SettingsError(f"--output_dir {folder}: holds a folder {foreign[0]} that is not of this job; name another")
    make_folder(folder)
    _fetch_model(settings, folder, lock)
    if settings.features:
        get_family(str(folder / "model"))  # refuses a model that nothing could be made for, before the long part
    # One Ray for both steps; what is done already does not start it.
    inputs = _fetch_corpus(settings, folder, lock)
    work = bool(inputs) or (settings.features and not _features_are_there(settings, folder, lock))
    with ray_session(folder / "ray.log", max(MIN_ACTORS, settings.num_actors)) if work else nullcontext():
        if inputs:
            _make_data(settings, folder, lock, inputs)
        if settings.features and work:
            _make_features(settings, folder, lock)
    if not settings.keep_raw:
        shutil.rmtree(folder / "raw", ignore_errors=True)
    _say_what_is_next(settings, folder, lock)
    return {name: lock.step(name) for name in ("model", "corpus", "data", "features")}


def _asked(settings: PrefetchSettings, names: tuple[str, ...]) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return {name: values[name] for name in names}


def _fetch_model(settings: PrefetchSettings, folder: Path, lock: Lock) -> None:
    """Bring the model into ``model``; files that are there and whole are left alone."""
    asked, target = _asked(settings, MODEL_ASKED), folder / "model"
    changes = lock.changed("model", asked)
    own = Path(settings.model_id)
    step = lock.step("model")
    if not changes and lock.is_done("model") and own.is_dir() and "sources" in step:
        changes = changed_source(step["sources"], own, verify=settings.verify)
    if changes and settings.overwrite:
        shutil.rmtree(target, ignore_errors=True)
        lock.forget("model", "features")
    else:
        refuse_changes(folder, changes)
    step = {} if lock.is_other("model", asked) else lock.step("model")
    if lock.is_done("model"):
        bad = damaged(step["files"], folder, verify=settings.verify)
        if not bad:
            console.print(f"model: {settings.model_id} is there", markup=False)
            return
        console.print(f"model: {len(bad)} file(s) damaged or gone, {bad[0]} first", markup=False)
        for path in bad:
            (folder / path).unlink(missing_ok=True)
    repository = open_repository(
        settings.model_id, "model", step.get("commit") or settings.model_revision, settings.hub
    )
    files = model_files(repository)
    if lock.is_other("model", asked):
        shutil.rmtree(target, ignore_errors=True)  # files of another model, which was cut off
    lock.begin("model", asked, commit=repository.commit)
    missing = [file for file in files if not _is_there(target / file.path, file, repository.folder)]
    refuse_full_disk(folder, sum(file.num_bytes for file in missing), "the model")
    with progress_bar("model") as bar:
        done, total = [0], sum(file.num_bytes for file in missing)

        def came(num_bytes: int) -> None:
            done[0] += num_bytes
            bar.update(done[0], total)

        for file in missing:
            repository.fetch(file, target / file.path, came)
    facts: dict[str, Any] = {"files": [describe(target / file.path, folder) for file in files]}
    if repository.folder:
        facts["sources"] = [describe(repository.folder / file.path, repository.folder) for file in files]
    lock.finish("model", **facts)
    total = sum(file.num_bytes for file in files)
    console.print(f"model: {repository.name}, {len(files)} files, {total / 2**20:,.1f} MiB in {target}", markup=False)


def _is_there(target: Path, file: Any, source: Path | None) -> bool:
    if not target.is_file() or not is_intact(target, file):
        return False
    return source is None or filecmp.cmp(target, source / file.path, shallow=False)


def _fetch_corpus(settings: PrefetchSettings, folder: Path, lock: Lock) -> tuple[Path, ...]:
    """Bring the corpus to where it can be read.

    Returns:
        What prepare is to read; () if the data made of it are done.
    """
    asked = _asked(settings, CORPUS_ASKED)
    data_asked = {**asked, **_asked(settings, ("max_rows", *LIMITS))}
    changes = lock.changed("corpus", asked) or lock.changed("data", data_asked)
    step = lock.step("corpus")
    if not changes and lock.is_done("corpus") and "base" in step:
        changes = changed_source(step["sources"], Path(step["base"]), verify=settings.verify)
    if changes and settings.overwrite:
        if lock.changed("corpus", asked) or not lock.changed("data", data_asked):
            shutil.rmtree(folder / "raw", ignore_errors=True)
            lock.forget("corpus")
        shutil.rmtree(folder / "data", ignore_errors=True)
        lock.forget("data", "features")
    else:
        refuse_changes(folder, changes)
    if lock.is_done("data") and not _damaged_data(folder, lock, verify=settings.verify):
        rows = lock.step("data")["rows"]
        shown = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        console.print(f"data: {shown} rows are there", markup=False)
        return ()
    step = {} if lock.is_other("corpus", asked) else lock.step("corpus")
    inputs = tuple(folder / path for path in step.get("inputs", ()))
    if lock.is_done("corpus") and inputs and all(path.exists() for path in inputs):
        return inputs
    where = (settings.dataset, step.get("commit") or settings.dataset_revision, settings.hub)
    source = find_source(*where, settings.language, settings.splits)
    raw = folder / "raw"
    if lock.is_other("corpus", asked):
        shutil.rmtree(raw, ignore_errors=True)
    lock.begin("corpus", asked, commit=source.commit)
    to_come = sum(file.num_bytes for file in source.files)
    refuse_full_disk(folder, to_come * (int(source.base is None) + int(source.is_packed)), "the corpus")
    with progress_bar("corpus") as bar:
        inputs = bring(source, raw, settings.language, settings.dataset, bar.update)
    described = _described_sources(source, raw)
    lock.finish("corpus", inputs=[_below(path, folder) for path in inputs], form=source.form, **described)
    if source.base is None and source.is_packed:
        shutil.rmtree(raw / "hub")  # unpacked, and its checksums are in the lock file
    return inputs


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _described_sources(source: Source, raw: Path) -> dict[str, Any]:
    """Checksums of the corpus' files; clips that are files of their own are only counted."""
    base = source.base or raw / "hub"
    paths = [base / file.path for file in source.files]
    clips = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    sources = [describe(path, base) for path in paths if path.suffix.lower() not in AUDIO_SUFFIXES]
    facts: dict[str, Any] = {"sources": sources} | ({"clips": describe_many(clips, base)} if clips else {})
    return facts | ({"base": str(base)} if source.base else {})


def _damaged_data(folder: Path, lock: Lock, *, verify: bool) -> bool:
    """Whether manifests or clips are missing or damaged; such clips are deleted, so that they are made again."""
    bad = damaged(lock.step("data")["files"], folder, verify=verify)
    if not bad and verify:
        lines = (folder / "data" / CHECKSUMS).read_text().splitlines()
        clips = [{"path": line[66:], "sha256": line[:64]} for line in lines]
        there = [clip | {"bytes": _size(folder / "data" / clip["path"])} for clip in clips]
        bad = damaged(there, folder / "data", verify=True)
        for path in bad:
            (folder / "data" / path).unlink(missing_ok=True)
    if bad:
        console.print(f"data: {len(bad)} file(s) damaged or gone, {bad[0]} first; made again", markup=False)
    return bool(bad)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _make_data(settings: PrefetchSettings, folder: Path, lock: Lock, inputs: tuple[Path, ...]) -> None:
    """Check the rows, write 16 kHz copies of their clips, and the manifests that name those."""
    data, step = folder / "data", lock.step("corpus")
    asked = _asked(settings, (*CORPUS_ASKED, "max_rows", *LIMITS))
    key = short_hash(json.dumps([asked, step["sources"], step.get("clips")], sort_keys=True))[:16]
    for old in data.glob(".work-*"):
        if old.name != f".work-{key}":
            shutil.rmtree(old)
    lock.begin("data", asked)
    root = inputs[0] if len(inputs) == 1 and inputs[0].is_dir() else Path(step.get("base") or folder / "raw" / "hub")
    select = RowFilter(root, settings.language, settings.splits, settings.max_rows)
    outputs = {"train_output": data / MANIFESTS["train"]}
    outputs |= {"val_output": data / MANIFESTS["validation"]} if "validation" in settings.splits else {}
    outputs |= {"test_output": data / MANIFESTS["test"]} if "test" in settings.splits else {}
    wanted = PrepareSettings(
        input=tuple(map(str, inputs)),
        audio_output=str(data / "audio"),
        num_actors=settings.num_actors,
        **{name: str(path) for name, path in outputs.items()},
        **{name: getattr(settings, name) for name in LIMITS},
    )
    outcome = run_prepare_job(wanted, select=select, work_dir=data / f".work-{key}")
    if settings.strict and outcome.first_fault:
        raise RunError(f"{outcome.first_fault} (--strict)")
    if select.others:
        shown = ", ".join(f"{name or 'of no split'} {count:,}" for name, count in sorted(select.others.items()))
        console.print(f"data: rows not asked for (--splits, --max_rows): {shown}", markup=False)
    manifests = _drop_empty(list(outputs.values()))
    clips = _tidy_clips(data, manifests)
    kept = [*manifests, data / "quarantine.jsonl", data / "prepare_summary.json", data / CHECKSUMS]
    rows = {name: _num_lines(data / file) for name, file in MANIFESTS.items() if data / file in manifests}
    lock.finish("data", rows=rows, files=[describe(path, folder) for path in kept], clips=clips)


def _drop_empty(manifests: list[Path]) -> list[Path]:
    """Take away manifests without a row, which no job would read."""
    kept = []
    for path in manifests:
        if path.stat().st_size:
            kept.append(path)
        else:
            path.unlink()
            console.print(f"data: no row for {path.name}, so there is none", markup=False)
    return kept


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _tidy_clips(data: Path, manifests: list[Path]) -> dict[str, Any]:
    """Write the clips' checksums, in the form that ``sha256sum -c`` reads, and delete those of rows left out."""
    named: Counter[str] = Counter()
    for manifest in manifests:
        with open(manifest, encoding="utf-8") as lines:
            named.update(json.loads(line)["audio_path"] for line in lines)
    for path in walk(data / "audio"):
        if path.relative_to(data).as_posix() not in named:
            path.unlink()
    described = [describe(data / name, data) for name in sorted(named)]
    lines = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in described)
    write_atomically(data / CHECKSUMS, lines.encode())
    return {"files": len(described), "bytes": sum(entry["bytes"] for entry in described)}


def _features_asked(settings: PrefetchSettings) -> dict[str, Any]:
    return _asked(settings, ("store", "cache_dtype", "bf16", "rows_per_shard"))


def _manifests(folder: Path, lock: Lock) -> list[str]:
    return [str(folder / "data" / MANIFESTS[name]) for name in lock.step("data")["rows"]]


def _features_are_there(settings: PrefetchSettings, folder: Path, lock: Lock) -> bool:
    """Whether the sets are made of these manifests; those in a folder that was moved are of manifests elsewhere."""
    step = lock.step("features")
    if settings.verify or not lock.is_done("features") or step["asked"] != _features_asked(settings):
        return False
    if [entry["manifest"] for entry in step["sets"]] != _manifests(folder, lock):
        return False
    if damaged(step["files"], folder, verify=False):
        return False
    console.print("features: there already", markup=False)
    return True


def _make_features(settings: PrefetchSettings, folder: Path, lock: Lock) -> None:
    """Make feature sets of the manifests, with the model that was fetched; sets of other manifests go."""
    manifests, model, before = _manifests(folder, lock), str(folder / "model"), lock.step("features").get("sets", [])
    names = set(FeatureFlags.model_fields) - {"features_cache_dir", "features_cache_gib"}
    values = {name: getattr(settings, name) for name in names}
    wanted = FeaturizeSettings(
        model_id=model, manifest=tuple(manifests), bf16=settings.bf16, verify=settings.verify, **values
    )
    lock.begin("features", _features_asked(settings), sets=before)
    report = make_features(wanted, model, manifests, folder / "features", bf16=settings.bf16)
    sets = []
    for manifest, place in zip(manifests, report.folders, strict=True):
        assert isinstance(place, Path)
        described = json.loads((place / "set.json").read_text())
        kept = {name: described[name] for name in ("fingerprint", "store", "content", "samples", "bad", "shards")}
        sets.append({"manifest": manifest, "path": _below(place, folder), **kept})
    for path in {entry["path"] for entry in before} - {entry["path"] for entry in sets}:
        shutil.rmtree(folder / path, ignore_errors=True)
    lists = [describe(folder / entry["path"] / "shards.json", folder) for entry in sets]  # every shard's checksum
    lock.finish("features", sets=sets, files=lists)


def _say_what_is_next(settings: PrefetchSettings, folder: Path, lock: Lock) -> None:
    kind = json.loads((folder / "model" / "config.json").read_text()).get("model_type")
    rows = lock.step("data")["rows"]
    words = ["--model_id", str(folder / "model"), "--train_jsonl", str(folder / "data" / MANIFESTS["train"])]
    if "validation" in rows:
        words += ["--val_jsonl", str(folder / "data" / MANIFESTS["validation"])]
    words += ["--features_dir", str(folder / "features"), "--output_dir", f"runs/{folder.name}"]
    changed = settings.model_fields_set & {"store", "cache_dtype", "rows_per_shard"}
    words += [word for name in sorted(changed) for word in (f"--{name}", str(getattr(settings, name)))]
    words += ["--bf16"] if settings.bf16 else []
    console.print(f"all of it is in {folder}, as {lock.path.name} says; next, with the network off:", markup=False)
    console.print(f"  python jobs/{JOBS.get(str(kind), 'train_asr_adapter')}.py {shlex.join(words)}", markup=False)
