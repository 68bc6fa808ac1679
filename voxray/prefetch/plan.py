"""What a prefetch would bring and how much disk it takes, said before any of it happens."""

import itertools
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from voxray.audio.decode import header_seconds
from voxray.config.prefetch import PrefetchSettings
from voxray.core.console import clock, console
from voxray.core.errors import RunError
from voxray.core.units import format_bytes
from voxray.corpora.fetch import Source, find_source, num_corpus_bytes, readable
from voxray.corpora.hub import RepoFile, model_files, open_repository
from voxray.corpora.importers import IMPORTERS, ImportedRow, detect
from voxray.corpora.select import RowFilter
from voxray.models.hf_files import read_config
from voxray.prefetch.lock_file import Lock

MP3_BYTES_PER_SEC = 7_000
"""Common Voice's clips: MP3, mono, 48 kHz, about 56 kbit/s."""
FLAC_BYTES_PER_SEC = 18_000
"""16 kHz, mono, 16 bit is 32,000; FLAC takes 45 % off speech."""
CLIP_SEC = 5.0
"""A usual clip of Common Voice; only the encoder's outputs, which are for whole windows, depend on it."""
CLIPS_READ = 50
WINDOW_BYTES = 1500 * 768 * 2
"""Encoder outputs of whisper-small for one window of 30 s, in 16 bits."""
MEL_BINS = 80


def refuse_full_disk(folder: Path, num_bytes: float, what: str) -> None:
    """
    Raises:
        RunError: The disk has less than that left.
    """
    free = free_bytes(folder)
    if num_bytes > free:
        raise RunError(
            f"--output_dir {folder}: {what} needs {format_bytes(num_bytes)}, and the disk has {format_bytes(free)} left"
        )


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, which need not exist yet, has left."""
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(there).free


def show_plan(settings: PrefetchSettings, folder: Path, lock: Lock) -> None:
    """Print what there is to do and what it takes; nothing is written, and nothing read but names, sizes and headers.

    Raises:
        RunError, SettingsError: As the job itself, where that shows beforehand.
    """
    table = Table(title=f"prefetch into {folder} (dry run: nothing is written)", title_justify="left")
    for name in ("", "files", "size", "there already", "to come"):
        table.add_column(name, justify="left" if not name else "right")
    commit = lock.step("model").get("commit") or settings.model_revision
    repository = open_repository(settings.model_id, "model", commit, settings.hub)
    need = _add(table, f"model {settings.model_id}", model_files(repository), folder / "model")
    where = (settings.dataset, lock.step("corpus").get("commit") or settings.dataset_revision, settings.hub)
    source = find_source(*where, settings.language, settings.splits)
    need += _add_corpus(table, source, folder, settings, done=lock.is_done("corpus"))
    done = lock.is_done("data")
    seconds = _estimated_sec(source, settings)
    made = [("16 kHz audio, about", seconds * FLAC_BYTES_PER_SEC, done)]
    if settings.features:
        made.append(("features, about", _feature_bytes(settings, seconds), lock.is_done("features")))
    for what, size, is_done in made:
        to_come = 0.0 if is_done else size
        table.add_row(what, "", format_bytes(size), "all" if is_done else "", format_bytes(to_come))
        need += to_come
    console.print(table)
    free = free_bytes(folder)
    enough = "enough" if need < free else "NOT enough"
    speech = f"about {clock(seconds)} h of speech"
    console.print(f"to come: about {format_bytes(need)}, {speech}; the disk has {format_bytes(free)} left: {enough}")
    for name, found in (("model", repository.commit), ("corpus", source.commit)):
        if found:
            console.print(f"{name}: revision {found}", markup=False)


def _add(table: Table, what: str, files: Any, target: Path) -> float:
    """A line for files that are to come as they are; returns the bytes to come."""
    there = [file for file in files if (target / file.path).is_file() and _fits(target / file.path, file)]
    total, had = (sum(file.num_bytes for file in some) for some in (files, there))
    table.add_row(what, f"{len(files):,}", format_bytes(total), f"{len(there):,}", format_bytes(total - had))
    return total - had


def _fits(path: Path, file: RepoFile) -> bool:
    return path.stat().st_size == file.num_bytes


def _add_corpus(table: Table, source: Source, folder: Path, settings: PrefetchSettings, *, done: bool) -> float:
    what = f"corpus {settings.dataset}, {settings.language}"
    total = sum(file.num_bytes for file in source.files)
    if done or (source.base and not source.is_packed):
        where = "is there" if done else "is read where it lies"
        table.add_row(
            f"{what} ({where})",
            f"{len(source.files):,}",
            format_bytes(total),
            f"{len(source.files):,}",
            format_bytes(0),
        )
        return 0.0
    need = 0.0
    if source.base is None:
        need = _add(table, what, source.files, folder / "raw" / "hub")
    if source.is_packed:
        label = "unpacked, about" if source.base is None else f"{what}, unpacked, about"
        table.add_row(label, f"{len(source.files):,}", format_bytes(total), "", format_bytes(total))
        need += total
    return need


def _estimated_sec(source: Source, settings: PrefetchSettings) -> float:
    """Seconds of speech: of rows that can be read already by the headers of some of their clips, else by size."""
    inputs = [] if source.base is None or source.is_packed else readable(source, source.base)
    select = RowFilter(source.base or Path(), settings.language, settings.splits, settings.max_rows)
    rows = (row for path in inputs for row in select(IMPORTERS[detect(path)].rows(path)))
    clips = [str(row.values.get("audio_path", "")) for row in rows if isinstance(row, ImportedRow)]
    found = []
    for path in filter(None, itertools.islice(clips, 0, None, max(1, len(clips) // CLIPS_READ))):
        with suppress(OSError, ValueError):
            found.append(header_seconds(path))
    if found:
        return sum(found) / len(found) * len(clips)
    seconds = num_corpus_bytes(source) / MP3_BYTES_PER_SEC
    most = settings.max_rows * len(settings.splits) * CLIP_SEC
    return min(seconds, most) if most else seconds


def _feature_bytes(settings: PrefetchSettings, seconds: float) -> float:
    """Bytes of the shards: 100 frames of float16 a second, samples of 16 bits, or whole windows of the encoder."""
    bins, window_bytes = MEL_BINS, float(WINDOW_BYTES)
    if Path(settings.model_id).is_dir():
        config = read_config(settings.model_id)
        audio = config.get("audio_config", config)
        bins = int(audio.get("num_mel_bins", bins))
        width = audio.get("d_model") or audio.get("hidden_size") or 768
        window_bytes = int(audio.get("max_source_positions", 1500)) * int(width) * 2.0
    if settings.store == "encoder":
        return seconds / CLIP_SEC * window_bytes * (2 if settings.cache_dtype == "float32" else 1)
    return seconds * (32_000 if settings.store == "pcm16" else 100 * 2 * bins)
