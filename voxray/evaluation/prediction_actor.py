"""A loaded model that answers the parts of an evaluation and writes their prediction shards."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from voxray.cluster.actor_pool import PoolWorker
from voxray.core.errors import RunError
from voxray.core.manifest import UNLABELLED
from voxray.core.storage import AnyPath, write_atomically, write_json
from voxray.evaluation.predictions import part_bytes, part_path, with_counts
from voxray.evaluation.row_metadata import ManifestKeys
from voxray.features.context import with_context
from voxray.features.crash_log import open_crash_log
from voxray.features.reader import FeatureRow, Features
from voxray.generation.engines.engine import InferenceEngine, TransformersEngine
from voxray.generation.engines.load import load_engine
from voxray.generation.generate import Completion, Result, bisect_failures, failure_reason
from voxray.generation.long_audio import CHUNK_MANIFEST
from voxray.generation.model import InferenceConfig
from voxray.metrics.names import is_transcript
from voxray.models.registry import get_family
from voxray.runs.remote_sync import RemoteSync

Work = Callable[[Sequence[FeatureRow], int], Iterator[tuple[int, Result]]]
"""Takes rows and a batch size; yields (index of the row, result)."""
MAX_CRASHES_PER_ROW = 2
"""A row that has ended this many processes while it was answered alone is skipped."""
ENTRY_COLUMNS = ("id", "task", "language", "source", "prompt", "num_samples")


class PredictionActor(PoolWorker):
    """Loads a model and answers parts, as a Ray Data actor or in this process.

    Attributes:
        load_error: Why the model could not be loaded, or "". It ends the job at the first part. Raised in ``__init__``,
            Ray would restart the actor and then print its own traceback.
    """

    def __init__(
        self,
        config: InferenceConfig,
        folders: Sequence[AnyPath],
        predictions: Path,
        num_threads: int,
        remote: RemoteSync | None = None,
        num_models: int = 1,
    ) -> None:
        self.config, self.predictions, self.remote = config, predictions, remote
        # the check of batch invariance has a folder of its own within that of the evaluation
        chunk_manifests = [folder / CHUNK_MANIFEST for folder in (predictions.parent, predictions.parent.parent)]
        self.features, self.keys = Features(folders), ManifestKeys(chunk_manifests)
        self._rows: dict[int, FeatureRow] = {}
        if not torch.cuda.is_available():
            torch.set_num_threads(num_threads)
        self.front_end = get_family(config.model_id).front_end(config.model_id, trim_audio=config.trim_audio)
        self.engine: InferenceEngine | None = None
        self.load_error = ""
        skip_encoder = self.features.store == "encoder"
        try:
            self.engine, _ = load_engine(config, self.front_end, skip_encoder=skip_encoder, num_processes=num_models)
        except RunError as error:
            self.load_error = str(error)
        except Exception as error:  # out of memory, or whatever else a library raises
            self.load_error = f"the model cannot be loaded: {failure_reason(error)}"

    def work(self, item: dict[str, Any]) -> dict[str, Any]:
        """Answer ``item["rows"]`` as part ``item["part"]``; returns the number of rows."""
        self.write_part(item["part"], item["rows"])
        return {"rows": len(item["rows"])}

    def write_part(self, part: int, rows: Sequence[int]) -> None:
        """Answer rows and write their prediction shard. A file beside it lists the rows that could not be answered.

        After a crash in this part the rows are answered one by one, to find the row that kills its process.

        Raises:
            RunError: There is no model, or the device has failed, so that no further row can be answered.
        """
        if self.load_error:
            raise RunError(self.load_error)
        self._rows.clear()
        entries: list[dict[str, Any]] = []
        failed: list[tuple[int, str, str]] = []
        with open_crash_log(self.predictions / f".attempts-{part:05d}", MAX_CRASHES_PER_ROW) as crash_log:
            for group in [[row] for row in rows] if crash_log.crashed_before else [list(rows)]:
                if not crash_log.start_rows(group):
                    message = f"{MAX_CRASHES_PER_ROW} processes died while they answered this row"
                    failed.append((group[0], "process_died", message))
                    continue
                answers: dict[int, Completion] = {}
                for row, answer in self._bisect(self.generate, group):
                    if isinstance(answer, Exception):
                        failed.append((row, "not_answered", failure_reason(answer)))
                    else:
                        answers[row] = answer
                losses = dict(self._bisect(self.score_references, filter(self._needs_loss, answers)))
                entries += (self._entry(row, answer, losses.get(row)) for row, answer in answers.items())
            if failed:
                write_json(failed_path(self.predictions, part), failed)
            else:  # an interrupted process may have failed at rows that this one has answered
                failed_path(self.predictions, part).unlink(missing_ok=True)
            write_atomically(part_path(self.predictions, part), part_bytes(entries))
        if self.remote:
            self.remote.push_files((failed_path(self.predictions, part), part_path(self.predictions, part)))

    def _bisect(self, work: Work[Result], rows: Iterable[int]) -> Iterator[tuple[int, Result | Exception]]:
        """Run ``work`` on stored rows; yields (row number, result or the exception that prevented it)."""

        def work_on_stored(numbers: Sequence[int], batch_size: int) -> Iterator[tuple[int, Result]]:
            return work([self._row(number) for number in numbers], batch_size)

        return bisect_failures(list(rows), self.config.batch_size, work_on_stored)

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion | Exception]]:
        """Yield (index of the row, answer, or why it has none)."""
        assert self.engine is not None
        return self.engine.generate(rows, batch_size)

    def score_references(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, float]]:
        """Yield (index of the row, -ln p of its reference answer)."""
        for start in range(0, len(rows), batch_size):
            assert isinstance(self.engine, TransformersEngine)
            yield from enumerate(self.engine.reference_losses(rows[start : start + batch_size]), start)

    def _row(self, number: int) -> FeatureRow:
        """A row of the part that is being answered. It is read once."""
        if number not in self._rows:
            row, context = self.features.row(number), self.config.context
            self._rows[number] = row if context is None else with_context(row, context, self.front_end)
        return self._rows[number]

    def _needs_loss(self, number: int) -> bool:
        """Whether the settings score the row's reference by likelihood, and the row has a reference of its own.

        Chunks of a recording have none.
        """
        row, scored = self._row(number), self.config.perplexity
        if (
            not isinstance(self.engine, TransformersEngine)
            or scored == "none"
            or (scored == "answers" and is_transcript(row.task))
        ):
            return False
        return not {"chunk_of", UNLABELLED} & set(self.keys.of(row.source))

    def _entry(self, number: int, answer: Completion, loss: float | Exception | None) -> dict[str, Any]:
        """Columns of a row's prediction."""
        row = self._row(number)
        entry = {name: getattr(row, name) for name in ENTRY_COLUMNS} | self.keys.of(row.source)
        reference = entry.pop("whole_reference", row.answer)
        if entry.pop(UNLABELLED, False):
            reference = None
        entry |= {"reference": reference, "prediction": answer.text, "sec": answer.sec}
        entry["language"] = row.language or answer.language
        entry |= {"num_new_tokens": answer.num_new_tokens, "hit_max": answer.hit_max}
        if isinstance(loss, float) and math.isfinite(loss):
            entry |= {"nll": loss, "num_tokens": len(row.target_ids)}
        return with_counts(entry)


def failed_path(predictions: Path, part: int) -> Path:
    """File in which a part lists [row number, reason, message] of the rows that could not be answered."""
    return part_path(predictions, part).with_suffix(".failed.json")
