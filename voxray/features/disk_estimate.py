"""Estimates the disk space of encoder outputs before any of them is computed.

A 30 s window of Voxtral's encoder is 1,500 x 1,280 values: 3.8 MB in bfloat16, five times its log-mel. So the job first
estimates what it will write, from the clips' headers alone, and gives every shard a byte limit. Together the shards
stay within the budget, whatever a header claims.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from voxray.audio.decode import header_seconds
from voxray.core.errors import RunError
from voxray.core.manifest import Sample, read_chunk
from voxray.core.storage import AnyPath, free_disk_bytes, num_bytes
from voxray.core.units import GIB
from voxray.features.extract import Extractor
from voxray.features.shards import shard_path

if TYPE_CHECKING:
    from voxray.features.chunk import WorkItem

SHARD_BYTES, ROW_BYTES = 16_384, 512  # schema and footer of a shard; lengths and padding of a row
THREADS = 8


def with_byte_limits(
    work: Sequence["WorkItem"],
    extractor: Extractor,
    features_dir: AnyPath,
    max_bytes: float,
    on_estimate: Callable[[int], None],
) -> list["WorkItem"]:
    """Set the largest size of every chunk's shard.

    Args:
        max_bytes: Budget for all shards together.
        on_estimate: Called with the upper bound of the bytes needed, before anything is written.
    Raises:
        RunError: The shards need more than the budget or the free disk space.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        estimates = list(pool.map(lambda item: chunk_bytes(item, extractor), work))
    total, existing = sum(estimates), sum(_existing_bytes(item) for item in work)
    on_estimate(total)
    sizes = f"encoder outputs need up to {total / GIB:.3g} GiB"
    if total > max_bytes:
        raise RunError(f"--cache_budget_gib {max_bytes / GIB:.3g}: {sizes}; nothing was written")
    free = _free_bytes(features_dir)
    if total - existing > free:
        raise RunError(f"{features_dir}: {sizes}, and the disk has {free / GIB:.3g} GiB left; nothing was written")
    # Unused budget is distributed over the shards, for clips that are longer than their headers say.
    margin = min(max_bytes, free + existing, 4 * total) / max(total, 1)
    return [replace(item, max_bytes=estimate * margin) for item, estimate in zip(work, estimates, strict=True)]


def chunk_bytes(item: "WorkItem", extractor: Extractor) -> int:
    """Upper bound of the size of a chunk's shard in bytes, if the clips are as long as their headers say."""
    raw = item.chunk.read_bytes()
    samples = read_chunk(item.chunk, raw).samples
    variants = extractor.spec.waveform.num_variants if item.augmented else 1
    windows = sum(_windows(sample, extractor, item.augmented) for sample in samples) * variants
    front_end = extractor.front_end
    window_bytes = front_end.encoder_positions * front_end.encoder_dim * extractor.spec.torch_dtype.itemsize
    text_bytes = (ROW_BYTES * len(samples) + 8 * len(raw)) * variants  # the texts, and four bytes per token
    return SHARD_BYTES + text_bytes + windows * (window_bytes + 4 * front_end.encoder_positions)


def _windows(sample: Sample, extractor: Extractor, augmented: bool) -> int:
    """Upper bound of the encoder windows of a sample's longest variant."""
    if not sample.task.has_audio:
        return 0
    try:
        seconds = sample.duration_sec or header_seconds(sample.audio_path) - sample.start_sec
    except (OSError, ValueError):
        return 1  # featurize will report the error
    slowest = min(extractor.spec.waveform.speeds, default=1.0) if augmented else 1.0
    rate_hz = extractor.front_end.sample_rate_hz
    longest = min(seconds / min(1.0, slowest), extractor.front_end.max_audio_sec)
    return max(1, extractor.front_end.num_windows(int(longest * rate_hz) + rate_hz // 100))


def _existing_bytes(item: "WorkItem") -> int:
    try:
        return num_bytes(shard_path(item.folder, item.chunk.number))
    except OSError:
        return 0


def _free_bytes(features_dir: AnyPath) -> float:
    if not isinstance(features_dir, Path):
        return float("inf")
    return free_disk_bytes(features_dir)
