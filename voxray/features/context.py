"""Gives stored rows another context: in training, and in evaluation by flags."""

from dataclasses import replace

import numpy as np

from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.models.front_end import FrontEnd


def sample_with_context(sample: Sample, context: str) -> Sample:
    """The sample with another context; a sample that is no transcription is returned as it is."""
    return replace(sample, prompt=context) if sample.task.template == "transcription" else sample


def with_context(row: FeatureRow, context: str, front_end: FrontEnd) -> FeatureRow:
    """The row with another context in its prompt; a row that is no transcription is returned as it is.

    Args:
        context: Text in one line; "" for none.
    """
    task = TASKS[row.task]
    if row.prompt == context or task.template != "transcription":
        return row
    is_timed = front_end.needs_sequential_generate(row.prompt_ids, 1)
    segments = ((0.0, 0.0, row.answer),) if is_timed else ()  # the prompt depends on their presence only
    sample = Sample(row.id, task, context, row.answer, row.source, row.language, row.source, segments=segments)
    ids = front_end.prompt_ids(sample, row.num_samples)
    return replace(row, prompt=context, prompt_ids=np.asarray(ids, np.int32))
