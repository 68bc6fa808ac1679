"""Features as they are stored and batched: BEATs' filter bank beside Whisper's log-mel, both in frames of 10 ms.

Both begin a frame every 160 samples, so a clip's two spectrograms go into one array of frames and through everything
that handles log-mel. Whatever fills a padded frame there, BEATs gets the features of silence.

Shape letters: K frames of a clip, W windows of all clips one after the other, T frames, F log-mel bins, M = 128 bins of
the filter bank.
"""

import numpy as np
import torch

from voxray.audio.fbank import FRAME_SAMPLES, HOP_SAMPLES, NUM_MEL_BINS, SAMPLE_RATE_HZ
from voxray.models.salmonn.beats import SILENCE, beats_fbank

MIN_SAMPLES = SAMPLE_RATE_HZ  # SALMONN pads shorter clips with zeros to 1 s


@torch.no_grad()
def beside(mel_KF: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Put BEATs' features of a clip beside its log-mel.

    Args:
        mel_KF: At least as many frames as there are steps of 160 samples.
        samples: float32, shape (num_samples,), 16 kHz.
    Returns:
        float32, shape (K, F + 128).
    """
    heard = np.zeros((len(mel_KF) - 1) * HOP_SAMPLES + FRAME_SAMPLES, np.float32)
    heard[: len(samples)] = samples[: len(heard)]
    return np.concatenate([mel_KF, beats_fbank(torch.from_numpy(heard)[None])[0].numpy()], axis=1)


def apart(
    features_WFT: torch.Tensor, num_samples_W: torch.Tensor, num_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the two apart again.

    Args:
        features_WFT: Whole windows, F + 128 bins.
        num_samples_W: Samples of every window that are no padding.
        num_frames: Frames that BEATs gets of each.
    Returns:
        Whisper's mel_WFT and BEATs' fbank_WTM.
    """
    mel_WFT, fbank_WMT = features_WFT[:, :-NUM_MEL_BINS], features_WFT[:, -NUM_MEL_BINS:]
    is_silent_WT = torch.arange(num_frames, device=num_samples_W.device) * HOP_SAMPLES >= num_samples_W[:, None]
    fbank_WTM = fbank_WMT[..., :num_frames].transpose(1, 2)
    return mel_WFT, fbank_WTM.masked_fill(is_silent_WT[..., None], SILENCE)
