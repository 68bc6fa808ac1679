"""A loaded model that answers parts of an evaluation and writes their prediction shards."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.core.manifest import UNLABELLED
from voxray.core.storage import AnyPath, write_atomically, write_json
from voxray.evaluation.predictions import part_bytes, part_path, with_counts
from voxray.evaluation.row_metadata import ManifestKeys
from voxray.features.crash_log import CrashLog, open_crash_log
from voxray.features.reader import FeatureRow, Features
from voxray.generation.generate import Completion, Result, bisect_failures, failure_reason, generate
from voxray.generation.likelihood import reference_losses
from voxray.generation.model import InferenceConfig, load_model
from voxray.metrics.names import is_transcript
from voxray.models.registry import get_family
from voxray.runs.remote_sync import RemoteSync

Work = Callable[[Sequence[FeatureRow], int], Iterator[tuple[int, Result]]]
"""Rows and how many at a time -> what is found for each, by its place."""
MAX_LONE_DEATHS = 2
"""How many processes may end while they answer one and the same row by itself before the row is given up."""
STORED = ("id", "task", "language", "source", "prompt", "num_samples")


class PredictionActor:
    """The unit of work of a Ray Data actor.

    Attributes:
        fault: Why there is no model, which ends the job at the first part; raised in ``__init__``, Ray would try it
            again and then show its own traceback.
    """

    def __init__(
        self,
        generation: InferenceConfig,
        folders: Sequence[AnyPath],
        predictions: Path,
        num_threads: int,
        mirror: RemoteSync | None = None,
    ) -> None:
        self.generation, self.predictions, self.mirror = generation, predictions, mirror
        self.features, self.keys = Features(folders), ManifestKeys()
        if not torch.cuda.is_available():
            torch.set_num_threads(num_threads)
        self.family = get_family(generation.model_id)
        self.front_end = self.family.front_end(generation.model_id, trim_audio=generation.trim_audio)
        self.model, self.fault = None, ""
        try:
            self.model, _ = load_model(generation, skip_encoder=self.features.store == "encoder")
        except RunError as error:
            self.fault = str(error)
        except Exception as error:  # lack of memory, or whatever else a library raises
            self.fault = f"the model cannot be loaded: {failure_reason(error)}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form of ``write_part``: a batch of one item; what ends the job comes back as ``error``."""
        item = json.loads(batch["item"][0])
        error = ""
        try:
            self.write_part(item["part"], item["rows"])
        except (RunError, OSError) as fault:
            error = one_line(fault)
        return {"rows": [len(item["rows"])], "error": [error]}

    def write_part(self, part: int, rows: Sequence[int]) -> None:
        """Answer some rows and write their prediction shard; rows that cannot be answered go beside it.

        Raises:
            RunError: There is no model, or the device has failed, so that no row can be answered any more.
        """
        if self.fault:
            raise RunError(self.fault)
        found: list[dict[str, Any]] = []
        failed: list[tuple[int, str, str]] = []
        with crash_log(self.predictions / f".attempts-{part:05d}") as attempt:
            groups = [[row] for row in rows] if attempt.alone else [list(rows)]
            for group in groups:
                if not attempt.may(group):
                    message = f"{MAX_LONE_DEATHS} processes died while they answered this row"
                    failed.append((group[0], "process_died", message))
                    continue
                answered: dict[int, Completion] = {}
                for row, answer in self._tried(self.generate, group):
                    if isinstance(answer, Exception):
                        failed.append((row, "not_answered", failure_reason(answer)))
                    else:
                        answered[row] = answer
                nll = dict(self._tried(self.weigh, [row for row in answered if self._is_weighed(row)]))
                found += (self._entry(row, answer, nll.get(row)) for row, answer in answered.items())
            if failed:
                write_json(failed_path(self.predictions, part), failed)
            else:  # a process that was cut off may have failed at rows that this one has answered
                failed_path(self.predictions, part).unlink(missing_ok=True)
            write_atomically(part_path(self.predictions, part), part_bytes(found))
        if self.mirror:
            self.mirror.push_files((failed_path(self.predictions, part), part_path(self.predictions, part)))

    def _tried(self, work: Work[Result], rows: Sequence[int]) -> Iterator[tuple[int, Result | Exception]]:
        """What some work finds for each row, or why it finds nothing."""

        def of_stored(some: Sequence[int], batch_size: int) -> Iterator[tuple[int, Result]]:
            return work([self.features.row(row) for row in some], batch_size)

        return bisect_failures(rows, self.generation.batch_size, of_stored)

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion]]:
        parts = (self.model, self.family, self.front_end, rows)
        return generate(*parts, batch_size=batch_size, search=self.generation.search)

    def weigh(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, float]]:
        """-ln p of the rows' reference answers."""
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield from enumerate(reference_losses(self.model, self.family, self.front_end, batch), start)

    def _is_weighed(self, row: int) -> bool:
        """Whether a row's reference is asked for, and is there: chunks of a recording have none of their own."""
        stored, wanted = self.features.row(row), self.generation.perplexity
        asked = wanted == "all" or (wanted == "answers" and not is_transcript(stored.task))
        return asked and not {"chunk_of", UNLABELLED} & set(self.keys.of(stored.source))

    def _entry(self, row: int, answer: Completion, nll: float | Exception | None) -> dict[str, Any]:
        stored = self.features.row(row)
        entry = {name: getattr(stored, name) for name in STORED} | self.keys.of(stored.source)
        reference = entry.pop("whole_reference", stored.answer)
        if entry.pop(UNLABELLED, False):
            reference = None
        entry |= {"reference": reference, "prediction": answer.text, "sec": answer.sec}
        entry |= {"num_new_tokens": answer.num_new_tokens, "hit_max": answer.hit_max}
        if isinstance(nll, float) and math.isfinite(nll):
            entry |= {"nll": nll, "num_tokens": len(stored.target_ids)}
        return with_counts(entry)


def failed_path(predictions: Path, part: int) -> Path:
    """Where a part lists [row number, reason, message] of the rows that it could not answer."""
    return part_path(predictions, part).with_suffix(".failed.json")


class Attempt:
    """One process at work on one part.

    Attributes:
        alone: Whether rows are answered one by one, since an earlier process ended on this part.
    """

    def __init__(self, begun: CrashLog) -> None:
        self._begun, self.alone = begun, begun.again

    def may(self, rows: Sequence[int]) -> bool:
        """Note what is about to be answered; False for a row that has ended enough processes."""
        if not self.alone:
            return True
        if self._begun.deaths[rows[0]] >= MAX_LONE_DEATHS:
            return False
        self._begun.begin(rows[0])
        return True


@contextmanager
def crash_log(mark: Path) -> Iterator[Attempt]:
    """Remember on disk that a part is being worked on, so that a row that kills its process is found and given up.

    A process that ends on a part leaves its mark behind. The next one answers the part's rows one by one, and notes
    each before it begins.
    """
    with open_crash_log(mark) as begun:
        yield Attempt(begun)
