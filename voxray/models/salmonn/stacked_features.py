"""SALMONN's stored and batched features: BEATs' filter bank beside Whisper's log-mel, both in frames of 10 ms.

Both start a frame every 160 samples, so a clip's two spectrograms fit into one array, which is stored and batched like
log-mel. Padded frames hold the log-mel's fill value; BEATs gets the features of silence instead.

Shape letters: K frames of a clip, W windows of all clips in order, T mel frames of a window, F bins, M = 128 bins of
the filter bank.
"""

import numpy as np
import torch

from voxray.audio.fbank import FRAME_SAMPLES, HOP_SAMPLES, NUM_MEL_BINS, SAMPLE_RATE_HZ
from voxray.models.salmonn.beats import SILENCE, beats_fbank

MIN_SAMPLES = SAMPLE_RATE_HZ  # SALMONN pads shorter clips with zeros to 1 s


@torch.no_grad()
def stack_features(mel_KF: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Append BEATs' features of a clip to its log-mel.

    Args:
        mel_KF: Log-mel with at least one frame per 160 samples.
        samples: float32, shape (num_samples,), at 16 kHz.
    Returns:
        float32, shape (K, F + 128).
    """
    padded = np.zeros((len(mel_KF) - 1) * HOP_SAMPLES + FRAME_SAMPLES, np.float32)
    padded[: len(samples)] = samples[: len(padded)]
    return np.concatenate([mel_KF, beats_fbank(torch.from_numpy(padded)[None])[0].numpy()], axis=1)


def split_features(
    features_WFT: torch.Tensor, num_samples_W: torch.Tensor, num_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split stacked features into the log-mel and BEATs' features.

    Args:
        features_WFT: Whole windows; the last 128 bins are BEATs'.
        num_samples_W: Unpadded samples of every window.
        num_frames: Frames of each window that BEATs gets.
    Returns:
        Whisper's mel_WFT and BEATs' fbank_WTM.
    """
    mel_WFT, fbank_WMT = features_WFT[:, :-NUM_MEL_BINS], features_WFT[:, -NUM_MEL_BINS:]
    is_silent_WT = torch.arange(num_frames, device=num_samples_W.device) * HOP_SAMPLES >= num_samples_W[:, None]
    fbank_WTM = fbank_WMT[..., :num_frames].transpose(1, 2)
    return mel_WFT, fbank_WTM.masked_fill(is_silent_WT[..., None], SILENCE)
