"""The rows of manifests by their lengths alone: what a run's plan needs, without making a feature.

Texts are tokenized; of clips only the header is read, unless the row says how long its part is. What a row turns out to
be when it is decoded may differ by a sample, which moves no window but one in a million.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from voxray.audio.decode import header_seconds
from voxray.core.console import Bar
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, chunks, read_chunk
from voxray.features.extract import Extractor
from voxray.features.reader import RowLengths
from voxray.features.shards import TASK_CODES

THREADS = 8
LINES_AT_A_TIME = 256


@dataclass
class Columns:
    """What was found so far, a list for every column of ``RowLengths``."""

    task: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_target_tokens: list[int] = field(default_factory=list)
    num_windows: list[int] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=list)
    has_language: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class BadManifestLine:
    """A row that featurize would leave out."""

    manifest: str
    line: int
    reason: str
    message: str


class Lengths(RowLengths):
    """Rows of some manifests, as ``Features`` would have them.

    Args:
        manifests: Their paths, in order.
        extractor: What would make their features.
        augmented: Whether their clips get variants.
    Attributes:
        bad: Rows that would be left out.
        segmented: Sources of rows that say when their parts are said, and can be divided.
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
        max_extra_prompt_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._extractor, self._augmented, self.max_extra_prompt_tokens = (
            extractor,
            augmented,
            max_extra_prompt_tokens or {},
        )
        self._columns, self._sources = Columns(), list[str]()
        self.bad: list[BadManifestLine] = []
        self.segmented: set[str] = set()
        work = [chunk for manifest in dict.fromkeys(manifests) for chunk in chunks(manifest, LINES_AT_A_TIME)]
        total, done = sum(chunk.num_lines for chunk in work), 0
        with ThreadPoolExecutor(THREADS) as pool:
            for chunk in work:
                found = read_chunk(chunk)
                self.bad += [BadManifestLine(chunk.manifest, line, bad.reason, bad.message) for line, bad in found.bad]
                seconds = pool.map(_seconds, found.samples)
                for sample, length in zip(found.samples, seconds, strict=True):
                    self._add(sample, length)
                done += chunk.num_lines
                bar.update(done, total)
        columns = self._columns
        for name in Columns.__dataclass_fields__:
            kind = {"task": np.int8, "has_language": np.bool_}.get(name, np.int64)
            setattr(self, name, np.array(getattr(columns, name), kind))

    def __len__(self) -> int:
        return len(self._sources)

    def source(self, number: int) -> str:
        return self._sources[int(number)]

    def variant(self, number: int) -> int:
        """Which variant of its sample a row is."""
        return int(number) - int(np.searchsorted(self.sample, self.sample[number]))

    def _add(self, sample: Sample, seconds: "float | BadRow") -> None:
        try:
            if isinstance(seconds, BadRow):
                raise seconds
            self._add_variants(sample, seconds)
        except BadRow as error:
            manifest, _, line = sample.source.rpartition(":")
            self.bad.append(BadManifestLine(manifest, int(line), error.reason, error.message))

    def _add_variants(self, sample: Sample, seconds: float) -> None:
        storing, front_end, columns = self._extractor.spec, self._extractor.front_end, self._columns
        sample = replace(sample, language=sample.language or storing.language)
        limit, waveform = front_end.max_audio_sec, storing.waveform
        if seconds > limit:
            raise BadRow("audio_too_long", f"{sample.audio_path} lasts {seconds:.1f} s, over the {limit:g} s that fit")
        target = len(front_end.target_ids(sample.answer, sample.segments))
        variants = waveform.num_variants if self._augmented and sample.task.has_audio else 1
        number = columns.sample[-1] + 1 if columns.sample else 0
        for variant in range(variants):
            speed = waveform.speed(variant) if variant else 1.0
            speed = 1.0 if seconds / speed > limit else speed
            num_samples = int(seconds / speed * front_end.sample_rate_hz + 0.5)
            if sample.task.has_audio and not num_samples:
                raise BadRow("audio_empty", f"{sample.audio_path} holds no sample")
            columns.num_prompt_tokens.append(len(front_end.prompt_ids(sample, num_samples)))
            columns.num_windows.append(front_end.num_windows(num_samples) if num_samples else 0)
            columns.num_target_tokens.append(target)
            columns.num_samples.append(num_samples)
            columns.task.append(TASK_CODES[sample.task.name])
            columns.sample.append(number)
            columns.has_language.append(bool(sample.language))
            self._sources.append(sample.source)
        if sample.segments:
            self.segmented.add(sample.source)


def _seconds(sample: Sample) -> "float | BadRow":
    """Length of a row's clip, 0 for text, or why there is none."""
    if not sample.task.has_audio:
        return 0.0
    try:
        return sample.duration_sec or header_seconds(sample.audio_path) - sample.start_sec
    except OSError as error:
        return BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror or error}")
    except (ValueError, BadRow) as error:
        return BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error}")
