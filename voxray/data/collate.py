"""Stored rows -> tensors. Labels are masked here and nowhere else.

Shape letters: B rows, L tokens, W windows of all rows one after the other, F mel bins, T mel frames of a window.
"""

from collections.abc import Sequence

import numpy as np
import torch

from voxray.data.shards import TASK_CODES, FeatureRow
from voxray.models.family import FrontEnd

IGNORED = -100  # the label that PyTorch's cross entropy passes over

Batch = dict[str, torch.Tensor]


def collate_training(rows: Sequence[FeatureRow], front_end: FrontEnd) -> Batch:
    """Prompt and answer, padded on the right; only the answer and its end-of-text token have labels.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (B, L) int64, ``task`` (B,) int64, and ``input_features`` (W, F,
        T) float32 if any row has audio.
    """
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in rows]
    shape = (len(rows), max(lengths))
    ids_BL = np.full(shape, front_end.pad_id, np.int64)
    labels_BL = np.full(shape, IGNORED, np.int64)
    mask_BL = np.zeros(shape, np.int64)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = len(row.prompt_ids)
        ids_BL[number, :start] = row.prompt_ids
        ids_BL[number, start:length] = row.target_ids
        labels_BL[number, start:length] = row.target_ids
        mask_BL[number, :length] = 1
    batch = {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}
    batch["labels"] = torch.from_numpy(labels_BL)
    batch["task"] = torch.tensor([TASK_CODES[row.task] for row in rows])
    return batch | _audio(rows, front_end)


def collate_prompts(rows: Sequence[FeatureRow], front_end: FrontEnd) -> Batch:
    """Prompts alone, padded on the left as generation needs them.

    Returns:
        ``input_ids``, ``attention_mask`` (B, L) int64, and ``input_features`` (W, F, T) float32 if any row has audio.
    """
    shape = (len(rows), max(len(row.prompt_ids) for row in rows))
    ids_BL = np.full(shape, front_end.pad_id, np.int64)
    mask_BL = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        ids_BL[number, shape[1] - len(row.prompt_ids) :] = row.prompt_ids
        mask_BL[number, shape[1] - len(row.prompt_ids) :] = 1
    batch = {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}
    return batch | _audio(rows, front_end)


def _audio(rows: Sequence[FeatureRow], front_end: FrontEnd) -> Batch:
    windows = [padded_windows(row, front_end) for row in rows if row.num_windows]
    return {"input_features": torch.from_numpy(np.concatenate(windows))} if windows else {}


def padded_windows(row: FeatureRow, front_end: FrontEnd) -> np.ndarray:
    """A clip's features as the model takes them: valid frames, then the fill, cut into windows.

    Returns:
        float32, shape (row.num_windows, num_mel_bins, window_frames).
    """
    shape = (row.num_windows * front_end.window_frames, front_end.num_mel_bins)
    mel_KF = np.full(shape, row.fill, np.float32)
    mel_KF[: len(row.mel_KB)] = row.mel_KB
    mel_WTF = mel_KF.reshape(row.num_windows, front_end.window_frames, front_end.num_mel_bins)
    return np.ascontiguousarray(mel_WTF.transpose(0, 2, 1))
