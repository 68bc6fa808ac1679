"""What is asked and answered as one, without shards: a row, or the chunks of a recording that is too long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.reader import FeatureRow
from voxray.generation.generate import Completion, bisect_failures, generate
from voxray.generation.join_chunks import join_texts
from voxray.generation.long_audio import is_too_long, overlap_share, split_into_chunks, whole_samples
from voxray.generation.model import InferenceConfig
from voxray.models.interface import FrontEnd
from voxray.models.registry import get_family


@dataclass(frozen=True)
class AnswerRequest:
    """One thing to answer.

    Attributes:
        rows: The row, or one for each chunk.
        num_samples: Of the whole recording.
        overlap_share: Of each chunk, what it has in common with the next.
    """

    rows: list[FeatureRow]
    num_samples: int
    overlap_share: float = 0.0

    def text(self, answers: Sequence[Completion]) -> str:
        """The answers to its rows as one text."""
        return join_texts((answer.text for answer in answers), self.overlap_share)


def make_sample(
    name: str, question: str, audio_path: str = "", language: str = "", source: str = "", duration_sec: float = 0.0
) -> Sample:
    """What a person asks: a question in text, one about a clip, or, without any, what is said in the clip.

    Args:
        name: Id of the row.
        language: Of the clip, as a two-letter code or "".
        source: How messages call it.
        duration_sec: Of the clip, where its file does not say so.
    """
    task = TASKS["tqa" if not audio_path else "sqa" if question else "asr"]
    return Sample(name, task, question, "", audio_path, language, source or name, duration_sec=duration_sec)


def make_request(sample: Sample, extractor: Extractor, max_len: int) -> AnswerRequest:
    """Features of a sample, or of its chunks if it is speech that is too long for the model.

    Args:
        max_len: Longest prompt in tokens.
    Raises:
        BadRow: It has none.
    """
    try:
        rows, share = [FeatureRow.of(extractor.sample_rows(sample)[0][0])], 0.0
        num_samples = rows[0].num_samples
    except BadRow as error:
        if not is_too_long(error.reason, sample):
            raise
        parts = split_into_chunks(sample, extractor.front_end, max_len)
        share = overlap_share(parts)
        rows = [FeatureRow.of(extractor.sample_rows(part)[0][0]) for part in parts]
        num_samples = whole_samples(sample, parts, extractor.front_end)
    for row in rows:
        if len(row.prompt_ids) > max_len:
            raise BadRow("too_long", f"{len(row.prompt_ids)} tokens, over --max_len {max_len}")
    return AnswerRequest(rows, num_samples, share)


def answer_requests(
    items: Sequence[AnswerRequest], model: Any, front_end: FrontEnd, how: InferenceConfig
) -> Iterator[tuple[AnswerRequest, list[Completion | Exception]]]:
    """Answer items together; yields each with the answers to its rows, or why a row has none.

    Raises:
        RunError: The device has failed.
    """
    family, rows = get_family(how.model_id), [row for item in items for row in item.rows]

    def generate_places(places: Sequence[int], batch_size: int) -> Iterator[tuple[int, Completion]]:
        some = [rows[place] for place in places]
        return generate(model, family, front_end, some, batch_size=batch_size, search=how.search)

    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].prompt_ids))
    told = dict(bisect_failures(order, how.batch_size, generate_places))
    answers = iter([told[place] for place in range(len(rows))])
    for item in items:
        yield item, [next(answers) for _ in item.rows]
