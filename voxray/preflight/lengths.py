"""Lengths of the rows of manifests, which are all that planning a run needs. No features are computed.

Texts are tokenized. The length of a clip comes from the row or else from the file's header. The decoded length may
differ by a sample, which changes the number of windows in one of a million rows.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from voxray.audio.decode import header_seconds
from voxray.core.console import Bar
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, chunks, read_chunk
from voxray.core.source import Source, stretch
from voxray.features.extract import Extractor
from voxray.features.reader import RowLengths
from voxray.features.shards import TASK_CODES
from voxray.models.front_end import row_target_ids

THREADS = 8
LINES_PER_CHUNK = 256


@dataclass
class Columns:
    """The rows read so far: one list per column of ``RowLengths``."""

    task: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_target_tokens: list[int] = field(default_factory=list)
    num_prompt_labels: list[int] = field(default_factory=list)
    num_windows: list[int] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=list)
    has_language: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class BadManifestLine:
    """A manifest line that featurize would skip."""

    manifest: str
    line: int
    reason: str
    message: str


class Lengths(RowLengths):
    """The rows that ``Features`` of some manifests would have, with their lengths.

    Args:
        manifests: Paths of the manifests, in order.
        extractor: The extractor that would compute their features.
        augmented: Whether their clips get variants.
        replay: Paths of manifests whose rows are replayed. They get no variants.
        max_extra_prompt_tokens: See ``RowLengths``.
    Attributes:
        bad: Lines that would be skipped.
        segmented: Sources of rows with timestamped segments, which can be split.
    Raises:
        RunError: A manifest cannot be read.
    """

    def __init__(
        self,
        manifests: Sequence[str],
        extractor: Extractor,
        bar: Bar,
        *,
        augmented: bool,
        replay: Sequence[str] = (),
        max_extra_prompt_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._extractor = extractor
        self.max_extra_prompt_tokens = max_extra_prompt_tokens or {}
        self._columns, self._sources = Columns(), list[str]()
        self.bad: list[BadManifestLine] = []
        self.segmented: set[str] = set()
        names = dict.fromkeys((*manifests, *replay))
        work = [chunk for manifest in names for chunk in chunks(manifest, LINES_PER_CHUNK)]
        num_lines, num_done = sum(chunk.num_lines for chunk in work), 0
        with ThreadPoolExecutor(THREADS) as pool:
            for chunk in work:
                is_replay = chunk.manifest in replay
                if is_replay:
                    self.first_replay = min(self.first_replay, len(self))
                rows = read_chunk(chunk)
                self.bad += [BadManifestLine(chunk.manifest, line, bad.reason, bad.message) for line, bad in rows.bad]
                for sample, seconds in zip(rows.samples, pool.map(_clip_seconds, rows.samples), strict=True):
                    self._add(sample, seconds, augmented=augmented and not is_replay)
                num_done += chunk.num_lines
                bar.update(num_done, num_lines)
        for name in Columns.__dataclass_fields__:
            dtype = {"task": np.int8, "has_language": np.bool_}.get(name, np.int64)
            setattr(self, name, np.array(getattr(self._columns, name), dtype))

    def __len__(self) -> int:
        return len(self._sources)

    def source(self, number: int) -> str:
        return self._sources[int(number)]

    def variant(self, number: int) -> int:
        """The number of a row's variant within its sample."""
        return int(number) - int(np.searchsorted(self.sample, self.sample[number]))

    def _add(self, sample: Sample, seconds: "float | BadRow", *, augmented: bool) -> None:
        try:
            if isinstance(seconds, BadRow):
                raise seconds
            self._add_variants(sample, seconds, augmented=augmented)
        except BadRow as error:
            self.bad.append(BadManifestLine(*Source.parse(sample.source), error.reason, error.message))

    def _add_variants(self, sample: Sample, seconds: float, *, augmented: bool) -> None:
        spec, front_end, columns = self._extractor.spec, self._extractor.front_end, self._columns
        sample = replace(sample, language=sample.language or spec.language)
        limit, waveform = front_end.max_audio_sec, spec.waveform
        if seconds > limit:
            raise BadRow("audio_too_long", f"{sample.audio_path} lasts {seconds:.1f} s, over the {limit:g} s that fit")
        num_target_tokens = len(row_target_ids(front_end, sample))
        variants = waveform.num_variants if augmented and sample.task.has_audio else 1
        number = columns.sample[-1] + 1 if columns.sample else 0
        for variant in range(variants):
            speed = waveform.speed(variant) if variant else 1.0
            speed = 1.0 if seconds / speed > limit else speed
            num_samples = int(seconds / speed * front_end.sample_rate_hz + 0.5)
            if sample.task.has_audio and not num_samples:
                raise BadRow("audio_empty", f"{sample.audio_path} has no samples")
            timed = replace(sample, segments=stretch(sample.segments, 1 / speed))
            prompt_ids = front_end.prompt_ids(timed, num_samples)
            columns.num_prompt_tokens.append(len(prompt_ids))
            columns.num_prompt_labels.append(sum(token < 0 for token in prompt_ids))
            columns.num_windows.append(front_end.num_windows(num_samples) if num_samples else 0)
            columns.num_target_tokens.append(num_target_tokens)
            columns.num_samples.append(num_samples)
            columns.task.append(TASK_CODES[sample.task.name])
            columns.sample.append(number)
            columns.has_language.append(bool(sample.language))
            self._sources.append(sample.source)
        if sample.segments:
            self.segmented.add(sample.source)


def _clip_seconds(sample: Sample) -> "float | BadRow":
    """Length of a row's clip in seconds; 0 for text; an error if it cannot be read."""
    if not sample.task.has_audio:
        return 0.0
    try:
        return sample.duration_sec or header_seconds(sample.audio_path) - sample.start_sec
    except BadRow as error:
        return error
    except OSError as error:
        return BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror or error}")
    except ValueError as error:
        return BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error}")
