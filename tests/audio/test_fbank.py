"""Our Kaldi filter bank agrees with torchaudio's."""

import pytest
import torch
from torchaudio.compliance import kaldi

from voxray.audio.fbank import FLOOR, kaldi_fbank, num_fbank_frames


def noise(num_samples: int) -> torch.Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples)) * 0.1


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16_000, 48_123])
def test_agrees_with_torchaudio(num_samples):
    wave_1N = noise(num_samples)[None]
    ours = kaldi_fbank(wave_1N)[0]
    assert len(ours) == num_fbank_frames(num_samples)
    for dtype, tolerance in ((torch.float64, 2e-4), (torch.float32, 1e-3)):
        reference = kaldi.fbank(wave_1N.to(dtype) * 2**15, num_mel_bins=128, sample_frequency=16_000)
        torch.testing.assert_close(ours, reference.float(), rtol=0, atol=tolerance)


def test_quiet_bins_of_a_tone_are_exact():
    """In float32 the quiet bins have only rounding errors."""
    wave_1N = torch.sin(2 * torch.pi * 440 * torch.arange(16_000, dtype=torch.float64) / 16_000)[None]
    reference = kaldi.fbank(wave_1N * 2**15, num_mel_bins=128, sample_frequency=16_000)
    torch.testing.assert_close(kaldi_fbank(wave_1N)[0], reference.float(), rtol=0, atol=1e-4)


def test_silence_is_the_floor():
    fbank = kaldi_fbank(torch.zeros(2, 1_000))
    assert torch.equal(fbank, torch.full_like(fbank, FLOOR).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_it(dtype):
    """The reference is infinite everywhere under float16, unless its samples are float64."""
    wave_1N = noise(8_000)[None]
    plain = kaldi_fbank(wave_1N)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(kaldi_fbank(wave_1N), plain)
