"""Collates stored rows into tensors. Labels are masked here and nowhere else.

A batch names positions by numbers: token l of row b has number b * L + l. The rows are known on the CPU, so these
numbers are computed here. A model that looked for them itself would have to wait for the GPU.

Shape letters: B rows, L tokens, N tokens of all answers, A audio tokens of all prompts, W windows of all rows one
after the other, P outputs of a window, F mel bins, T mel frames of a window.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from voxray.audio.decode import PCM_SCALE
from voxray.features.reader import FeatureRow
from voxray.features.shards import TASK_CODES
from voxray.models.front_end import FrontEnd
from voxray.models.interface import IGNORED, Batch
from voxray.models.parts.logmel_windows import padded_windows, samples_by_window

Masks = Callable[[np.ndarray], np.ndarray] | None
"""Function that masks parts of a clip's log-mel, shape (frames, bins); None masks nothing."""
ON_CPU = ("num_samples", "segment_ends")
"""Tensors of a batch that stay on the CPU, because models read their values."""
PREPARED = "prepared"
"""``store`` of rows whose audio is the model's input (see ``with_model_input``)."""


def collate_training(rows: Sequence[FeatureRow], front_end: FrontEnd, masks: Masks = None) -> Batch:
    """Collate prompts and answers with padding on the right; only answers and their end-of-text tokens have labels.

    Args:
        masks: Applied to the log-mel of every clip (SpecAugment), in the order of the rows.
    Returns:
        ``input_ids``, ``labels`` (B, L) int64; ``attention_mask`` (B, L) int64 if any row is padded; ``task`` (B,)
        int64; ``answer_positions`` (N,) int64, one before each answer token; and, if any row has audio,
        ``input_features``: (W, F, T) float32, or the encoder outputs as stored; for front ends that count samples
        also ``num_samples`` (W,) int64; for front ends with audio tokens also ``audio_positions`` (A,) int64, and
        ``audio_outputs`` (A,) int64, the numbers of the W * P outputs that have tokens, unless all have.
    """
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in rows]
    shape = (len(rows), max(lengths))
    starts = range(0, shape[0] * shape[1], shape[1])
    ids_BL = np.full(shape, front_end.pad_id, np.int64)
    labels_BL = np.full(shape, IGNORED, np.int64)
    mask_BL = np.zeros(shape, np.int64)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = len(row.prompt_ids)
        ids_BL[number, :start] = row.prompt_ids
        ids_BL[number, start:length] = row.target_ids
        labels_BL[number, :length] = _labels(row)
        mask_BL[number, :length] = 1
    batch = {"input_ids": torch.from_numpy(ids_BL), "labels": torch.from_numpy(labels_BL)}
    if min(lengths) < shape[1]:
        batch["attention_mask"] = torch.from_numpy(mask_BL)
    batch["task"] = torch.tensor([TASK_CODES[row.task] for row in rows])
    batch["answer_positions"] = _answer_positions(rows, starts)
    return batch | _audio(rows, starts, front_end, masks)


def collate_packed(rows: Sequence[FeatureRow], front_end: FrontEnd, masks: Masks = None) -> Batch:
    """Collate prompts and answers one after the other into a single packed row without padding.

    Args:
        masks: See ``collate_training``.
    Returns:
        ``input_ids``, ``position_ids`` (which restart at 0 with every sample), ``labels`` and ``task`` (of every
        token), all (1, L) int64; ``segment_ends`` (number of samples,) int64; ``answer_positions`` and the tensors of
        rows with audio as in ``collate_training``.
    """
    parts = [(row.prompt_ids, row.target_ids) for row in rows]
    lengths = [len(prompt) + len(target) for prompt, target in parts]
    ids = np.concatenate([array for part in parts for array in part]).astype(np.int64)
    labels = np.concatenate([_labels(row) for row in rows])
    columns = {
        "input_ids": ids,
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "labels": labels.astype(np.int64),
        "task": np.repeat([TASK_CODES[row.task] for row in rows], lengths).astype(np.int64),
    }
    batch = {name: torch.from_numpy(column)[None] for name, column in columns.items()}
    ends = np.cumsum(lengths)
    starts = [0, *ends[:-1].tolist()]
    batch["segment_ends"] = torch.from_numpy(ends)
    batch["answer_positions"] = _answer_positions(rows, starts)
    return batch | _audio(rows, starts, front_end, masks)


def collate_prompts(rows: Sequence[FeatureRow], front_end: FrontEnd) -> Batch:
    """Collate prompts alone, padded on the left as generation needs them.

    Returns:
        ``input_ids``, ``attention_mask`` (B, L) int64, and the tensors of rows with audio as in ``collate_training``.
    """
    shape = (len(rows), max(len(row.prompt_ids) for row in rows))
    starts = [(number + 1) * shape[1] - len(row.prompt_ids) for number, row in enumerate(rows)]
    ids_BL = np.full(shape, front_end.pad_id, np.int64)
    mask_BL = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        ids_BL[number, shape[1] - len(row.prompt_ids) :] = row.prompt_ids
        mask_BL[number, shape[1] - len(row.prompt_ids) :] = 1
    batch = {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}
    return batch | _audio(rows, starts, front_end, None)


def with_model_input(row: FeatureRow, front_end: FrontEnd) -> FeatureRow:
    """The row with the model's input in place of its stored audio. A thread prepares rows that are collated later."""
    if not row.num_windows:
        return row
    return replace(row, audio=_model_input(row, front_end, None), store=PREPARED)


def answer_rows(batch: Batch) -> np.ndarray:
    """The row of each answer token, (N,), counted within the batch."""
    positions_N = batch["answer_positions"].numpy()
    if "segment_ends" in batch:
        return np.searchsorted(batch["segment_ends"].numpy(), positions_N, side="right")
    return positions_N // batch["labels"].shape[1]


def pinned(batch: Batch) -> Batch:
    """A copy of a batch in page-locked memory, which a GPU reads while the CPU goes on."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch to a device, but for those of ``ON_CPU``."""
    return {name: tensor if name in ON_CPU else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _labels(row: FeatureRow) -> np.ndarray:
    """Token ids of prompt and answer, ``IGNORED`` where they have no label."""
    prompt = np.full(len(row.prompt_ids), IGNORED)
    if row.prompt_labels is not None:
        prompt[row.prompt_labels] = row.prompt_ids[row.prompt_labels]
    return np.concatenate([prompt, row.target_ids])


def _answer_positions(rows: Sequence[FeatureRow], starts: Sequence[int]) -> torch.Tensor:
    """Positions that predict the tokens of the answers.

    Args:
        starts: Position of each row's first token.
    """
    parts = [start - 1 + np.flatnonzero(_labels(row) != IGNORED) for row, start in zip(rows, starts, strict=True)]
    return torch.from_numpy(np.concatenate(parts))


def _audio(rows: Sequence[FeatureRow], starts: Sequence[int], front_end: FrontEnd, masks: Masks) -> Batch:
    with_audio = [row for row in rows if row.num_windows]
    if not with_audio:
        return {}
    inputs = torch.from_numpy(np.concatenate([_model_input(row, front_end, masks) for row in with_audio]))
    batch = {"input_features": inputs.view(torch.bfloat16) if inputs.dtype == torch.uint16 else inputs}
    if front_end.needs_num_samples:
        lengths = [length for row in with_audio for length in samples_by_window(front_end, row.num_samples)]
        batch["num_samples"] = torch.tensor(lengths)
    return batch if front_end.audio_id is None else batch | _audio_positions(rows, starts, front_end)


def _audio_positions(rows: Sequence[FeatureRow], starts: Sequence[int], front_end: FrontEnd) -> Batch:
    """Positions of the audio tokens, and the outputs that take their place: the first ones of every clip."""
    positions, outputs, num_outputs = [], [], 0
    for row, start in zip(rows, starts, strict=True):
        [in_prompt] = np.nonzero(np.asarray(row.prompt_ids) == front_end.audio_id)
        clip_outputs = row.num_windows * front_end.positions_per_window
        assert len(in_prompt) <= clip_outputs, f"{row.id}: {len(in_prompt)} audio tokens for {clip_outputs} outputs"
        positions.append(start + in_prompt)
        outputs.append(np.arange(num_outputs, num_outputs + len(in_prompt)))
        num_outputs += clip_outputs
    batch = {"audio_positions": torch.from_numpy(np.concatenate(positions))}
    if len(batch["audio_positions"]) < num_outputs:
        batch["audio_outputs"] = torch.from_numpy(np.concatenate(outputs))
    return batch


def _model_input(row: FeatureRow, front_end: FrontEnd, masks: Masks) -> np.ndarray:
    """The model's input for a clip: log-mel, (windows, bins, frames), or the encoder outputs as stored."""
    if row.store in ("encoder", PREPARED):
        return row.audio
    mel_KF, fill = row.audio, row.fill
    if row.store == "pcm16":
        features = front_end.features(row.audio.astype(np.float32) / PCM_SCALE)
        mel_KF, fill = features.mel_KF, features.fill
    return padded_windows(masks(mel_KF) if masks else mel_KF, fill, row.num_windows, front_end)
