"""The plan of a prefetch: files to fetch and the disk space needed, without fetching anything."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.table import Table

from voxray.audio.decode import header_seconds
from voxray.config.prefetch import PrefetchSettings
from voxray.core.console import clock, console
from voxray.core.errors import RunError
from voxray.core.storage import free_disk_bytes
from voxray.core.units import format_bytes
from voxray.corpora.fetch import CorpusSource, find_source, importer_inputs, num_corpus_bytes
from voxray.corpora.hub import RepoFile, model_files, open_repository
from voxray.corpora.importers import IMPORTERS, ImportedRow, detect
from voxray.corpora.select import RowFilter
from voxray.models.hf_files import read_config
from voxray.prefetch.lock_file import LockFile

MP3_BYTES_PER_SEC = 7_000
"""Common Voice's clips: MP3, mono, 48 kHz, about 56 kbit/s."""
FLAC_BYTES_PER_SEC = 18_000
"""16 kHz, mono, 16 bit is 32,000; FLAC takes 45 % off speech."""
CLIP_SEC = 5.0
"""Typical clip of Common Voice. It matters only for encoder outputs, which are for whole windows."""
CLIPS_READ = 50
WINDOW_BYTES = 1500 * 768 * 2
"""Encoder outputs of whisper-small for one window of 30 s, in 16 bits."""
MEL_BINS = 80


def refuse_full_disk(folder: Path, num_bytes: float, what: str) -> None:
    """Make sure that the disk of a folder has enough free space.

    Raises:
        RunError: It has less than ``num_bytes``.
    """
    free = free_disk_bytes(folder)
    if num_bytes > free:
        raise RunError(
            f"--output_dir {folder}: {what} needs {format_bytes(num_bytes)}, and the disk has {format_bytes(free)} left"
        )


def show_plan(settings: PrefetchSettings, folder: Path, lock: LockFile) -> None:
    """Print the steps of a prefetch and their sizes. Writes nothing, and reads only names, sizes and headers.

    Raises:
        RunError, SettingsError: The job would fail, as far as that can be known beforehand.
    """
    table = Table(title=f"prefetch into {folder} (dry run: nothing is written)", title_justify="left")
    for name in ("", "files", "size", "here already", "to download"):
        table.add_column(name, justify="left" if not name else "right")
    commit = lock.step("model").get("commit") or settings.model_revision
    repository = open_repository(settings.model_id, "model", commit, settings.hub)
    need = _add(table, f"model {settings.model_id}", model_files(repository), folder / "model")
    revision = lock.step("corpus").get("commit") or settings.dataset_revision
    source = find_source(settings.dataset, revision, settings.hub, settings.language, settings.splits)
    need += _add_corpus(table, source, folder, settings, done=lock.is_done("corpus"))
    seconds = _estimate_sec(source, settings)
    outputs = [("16 kHz audio, about", seconds * FLAC_BYTES_PER_SEC, lock.is_done("data"))]
    if settings.features:
        outputs.append(("features, about", _feature_bytes(settings, seconds), lock.is_done("features")))
    for label, size, is_done in outputs:
        missing = 0.0 if is_done else size
        table.add_row(label, "", format_bytes(size), "all" if is_done else "", format_bytes(missing))
        need += missing
    console.print(table)
    free = free_disk_bytes(folder)
    enough = "enough" if need < free else "NOT enough"
    speech = f"about {clock(seconds)} h of speech"
    console.print(f"to come: about {format_bytes(need)}, {speech}; the disk has {format_bytes(free)} left: {enough}")
    for name, commit in (("model", repository.commit), ("corpus", source.commit)):
        if commit:
            console.print(f"{name}: revision {commit}", markup=False)


def _add(table: Table, label: str, files: Sequence[RepoFile], target: Path) -> float:
    """Add a table row for files to fetch; returns the bytes that are missing."""
    existing = [file for file in files if _exists(target / file.path, file.num_bytes)]
    total, present = (sum(file.num_bytes for file in group) for group in (files, existing))
    table.add_row(label, f"{len(files):,}", format_bytes(total), f"{len(existing):,}", format_bytes(total - present))
    return total - present


def _exists(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _add_corpus(table: Table, source: CorpusSource, folder: Path, settings: PrefetchSettings, *, done: bool) -> float:
    """Add the table rows of the corpus; returns the bytes that are missing, unpacked files included."""
    label = f"corpus {settings.dataset}, {settings.language}"
    total = sum(file.num_bytes for file in source.files)
    if done or (source.base and not source.is_packed):
        note, count = "is there" if done else "is read where it lies", f"{len(source.files):,}"
        table.add_row(f"{label} ({note})", count, format_bytes(total), count, format_bytes(0))
        return 0.0
    need = 0.0
    if source.base is None:
        need = _add(table, label, source.files, folder / "raw" / "hub")
    if source.is_packed:
        label = "unpacked, about" if source.base is None else f"{label}, unpacked, about"
        table.add_row(label, f"{len(source.files):,}", format_bytes(total), "", format_bytes(total))
        need += total
    return need


def _estimate_sec(source: CorpusSource, settings: PrefetchSettings) -> float:
    """Seconds of speech: from the headers of some clips if the rows can be read already, else from the file sizes."""
    inputs = [] if source.base is None or source.is_packed else importer_inputs(source, source.base)
    select = RowFilter(source.base or Path(), settings.language, settings.splits, settings.max_rows)
    rows = (row for path in inputs for row in select(IMPORTERS[detect(path)](path)))
    clips = [str(row.values.get("audio_path", "")) for row in rows if isinstance(row, ImportedRow)]
    seconds = []
    for path in filter(None, itertools.islice(clips, 0, None, max(1, len(clips) // CLIPS_READ))):
        with suppress(OSError, ValueError):
            seconds.append(header_seconds(path))
    if seconds:
        return sum(seconds) / len(seconds) * len(clips)
    total = num_corpus_bytes(source) / MP3_BYTES_PER_SEC
    limit = settings.max_rows * len(settings.splits) * CLIP_SEC
    return min(total, limit) if limit else total


def _feature_bytes(settings: PrefetchSettings, seconds: float) -> float:
    """Bytes of the shards: 100 frames of float16 per second, 16-bit samples, or encoder outputs of whole windows."""
    bins, window_bytes = MEL_BINS, float(WINDOW_BYTES)
    if Path(settings.model_id).is_dir():
        config = read_config(settings.model_id)
        audio = config.get("audio_config") or config.get("encoder_config") or config
        bins = int(audio.get("num_mel_bins", bins))
        width = audio.get("d_model") or audio.get("hidden_size") or 768
        window_bytes = int(audio.get("max_source_positions", 1500)) * int(width) * 2.0
    if settings.store == "encoder":
        return seconds / CLIP_SEC * window_bytes * (2 if settings.cache_dtype == "float32" else 1)
    return seconds * (32_000 if settings.store == "pcm16" else 100 * 2 * bins)
