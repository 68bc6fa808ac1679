"""Answer requests without feature shards: a row, or the chunks of a recording that is too long for the model."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from voxray.core.errors import BadRow
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.reader import FeatureRow
from voxray.generation.engines.engine import InferenceEngine
from voxray.generation.generate import Completion, bisect_failures
from voxray.generation.join_chunks import join_texts
from voxray.generation.long_audio import can_answer_in_chunks, overlap_share, recording_num_samples, split_into_chunks


@dataclass(frozen=True)
class AnswerRequest:
    """A sample to answer, as features.

    Attributes:
        sample: The sample.
        rows: The row, or one row per chunk.
        num_samples: Audio samples of the whole recording.
        overlap_share: Share of each chunk that overlaps with the next.
    """

    sample: Sample
    rows: list[FeatureRow]
    num_samples: int
    overlap_share: float = 0.0

    def text(self, completions: Sequence[Completion]) -> str:
        """The answers to the rows as one text."""
        return join_texts((completion.text for completion in completions), self.overlap_share)


def make_sample(
    name: str,
    question: str,
    audio_path: str = "",
    language: str = "",
    source: str = "",
    target_language: str = "",
) -> Sample:
    """A sample for a text question or a question about a clip; without a question, for the transcript or translation.

    Args:
        name: Id of the row.
        language: Language of the clip, as a code or "".
        source: Name of the sample in messages; ``name`` if empty.
        target_language: Code of the language to translate the clip into; "" transcribes it.
    """
    task = TASKS["tqa" if not audio_path else "sqa" if question else "ast" if target_language else "asr"]
    return Sample(name, task, question, "", audio_path, language, source or name, target_language=target_language)


def make_request(sample: Sample, extractor: Extractor, max_len: int) -> AnswerRequest:
    """Extract the features of a sample, or of its chunks if it is speech that is too long for the model.

    Args:
        max_len: Longest prompt in tokens.
    Raises:
        BadRow: The sample has no features or its prompt is too long.
    """
    try:
        rows, share = [_feature_row(sample, extractor)], 0.0
        num_samples = rows[0].num_samples
    except BadRow as error:
        if not can_answer_in_chunks(error.reason, sample):
            raise
        chunks = split_into_chunks(sample, extractor.front_end, max_len, extractor.spec.language)
        share = overlap_share(chunks)
        rows = [_feature_row(chunk, extractor) for chunk in chunks]
        num_samples = recording_num_samples(sample, chunks, extractor.front_end)
    for row in rows:
        if len(row.prompt_ids) > max_len:
            raise BadRow("too_long", f"{len(row.prompt_ids)} tokens, over --max_len {max_len}")
    return AnswerRequest(sample, rows, num_samples, share)


def _feature_row(sample: Sample, extractor: Extractor) -> FeatureRow:
    return FeatureRow.from_values(extractor.sample_rows(sample)[0][0], extractor.spec.store)


def answer_requests(
    requests: Sequence[AnswerRequest], engine: InferenceEngine, batch_size: int
) -> Iterator[tuple[AnswerRequest, list[Completion | Exception]]]:
    """Answer requests together; yields each with its rows' completions, or the exception of a row that has none.

    They are yielded in their order, each as soon as it and all before it are answered.

    Raises:
        RunError: The device has failed.
    """
    rows = [row for request in requests for row in request.rows]

    def generate_rows(numbers: Sequence[int], batch_size: int) -> Iterator[tuple[int, Completion | Exception]]:
        return engine.generate([rows[number] for number in numbers], batch_size)

    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].prompt_ids))
    waiting, first = deque(requests), 0
    completions: dict[int, Completion | Exception] = {}
    for number, completion in bisect_failures(order, batch_size, generate_rows):
        completions[number] = completion
        while waiting and all(first + index in completions for index in range(len(waiting[0].rows))):
            request = waiting.popleft()
            yield request, [completions.pop(first + index) for index in range(len(request.rows))]
            first += len(request.rows)
