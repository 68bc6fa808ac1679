"""The reference implementation's files, and a SALMONN loaded from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSETS

REFERENCE = ASSETS / "salmonn-reference"
FILES = {
    "whisper": REFERENCE / "whisper",
    "beats": REFERENCE / "beats.pt",
    "llm": REFERENCE / "llama_fast",
    "checkpoint": REFERENCE / "salmonn_v1.pth",
    "pad_rows": REFERENCE / "pad_rows.pt",
}


@pytest.fixture(scope="session")
def files() -> dict[str, Path]:
    """Arguments of ``salmonn.load``."""
    return dict(FILES)


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """Outputs of the reference implementation."""
    return torch.load(REFERENCE / "outputs.pt", weights_only=True)


@pytest.fixture(scope="session")
def clips() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a clip -> its log-mel (F, T) from transformers' extractor, and its samples."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor.from_pretrained(FILES["whisper"])
    waves = torch.load(REFERENCE / "inputs.pt", weights_only=True)
    clips = {}
    for name, wave in waves.items():
        mel = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
        clips[name.removeprefix("wav.")] = (mel, wave)
    return clips


@pytest.fixture(scope="session")
def model(files) -> Any:
    """In eval mode. Tests that change it must restore it."""
    from voxray.models import salmonn

    return salmonn.load(**files)


@pytest.fixture
def batch_of(clips):
    """Names of clips -> (mel_BFT, waveform_BN, padding_mask_BN), padded to the longest."""

    def make(*names: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        waves = [clips[name][1] for name in names]
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        lengths = torch.tensor([len(wave) for wave in waves])
        mask = torch.arange(padded.shape[1]) >= lengths[:, None]
        return torch.stack([clips[name][0] for name in names]), padded, mask

    return make


@pytest.fixture
def rows_of(model, expected, batch_of):
    """Clips, prompts and answers -> a batch for ``forward``.

    With ``reference_layout``, prompts are padded to the longest before the answers start, as in the reference.
    """

    def make(
        names: Sequence[str], prompts: Sequence[str], answers: Sequence[int], *, reference_layout: bool = False
    ) -> dict[str, torch.Tensor]:
        pad, audio = expected["tok.pad"], model.config.audio_token_id
        ends = [expected[f"tok.after_{prompt}"] for prompt in prompts]
        texts = [expected["tok.text"][number] for number in answers]
        longest = max(map(len, ends))
        rows, labels, masks = [], [], []
        for end, text in zip(ends, texts, strict=True):
            gap = longest - len(end) if reference_layout else 0
            prompt = [expected["tok.bos"], *expected["tok.before"], *[audio] * 88, *end]
            rows.append([*prompt, *[pad] * gap, *text])
            labels.append([*[-100] * (len(prompt) + gap), *text])
            masks.append([*[1] * len(prompt), *[0] * gap, *[1] * len(text)])
        size = max(map(len, rows))
        columns = {"input_ids": (rows, pad), "labels": (labels, -100), "attention_mask": (masks, 0)}
        mel, wave, padding = batch_of(*names)
        return {
            **{key: torch.tensor([[*r, *[fill] * (size - len(r))] for r in c]) for key, (c, fill) in columns.items()},
            "input_features": mel,
            "waveform": wave,
            "waveform_mask": ~padding,
        }

    return make
