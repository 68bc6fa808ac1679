"""Our SALMONN against an independent implementation, on inputs that the reference's outputs do not cover: other clips,
batches, losses, gradients, answers.
"""

from typing import Any

import pytest
import torch
from helpers.salmonn_oracle import Oracle
from transformers import WhisperFeatureExtractor

from voxray.models.salmonn.compat.checkpoint import official_name

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def oracle(files) -> Oracle:
    return Oracle(files)


@pytest.fixture(scope="module")
def batch(files, clips, expected, model) -> dict[str, Any]:
    """Three clips of 1 to 4 s with different prompts and answers: as one batch, and row by row."""
    wave = clips["w10"][1]
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(1)) * 0.1
    waves = [wave[30_000:67_123], noise, wave[100_000:160_000] * 0.3]
    extract = WhisperFeatureExtractor.from_pretrained(files["whisper"])
    mel = extract([wave.numpy() for wave in waves], sampling_rate=16_000, return_tensors="pt").input_features
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(wave) for wave in waves])[:, None]
    before = [expected["tok.bos"], *expected["tok.before"]]
    ends = [expected[f"tok.after_{task}"] for task in ("QA", "asr", "audiocaption")]
    answers = [[17, 300, 5, 2], expected["tok.text"][1], [400, 2]]
    prompts = [[*before, *[model.config.audio_token_id] * 88, *end] for end in ends]
    audio = {"input_features": mel, "waveform": padded, "waveform_mask": mask}
    return {"audio": audio, "before": before, "ends": ends, "answers": answers, "prompts": prompts}


def padded(rows: list[list[int]], fill: int, side: str) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def oracle_embeds(oracle: Oracle, batch: dict[str, Any]) -> list[torch.Tensor]:
    audio = batch["audio"]
    return oracle.audio_embeds(audio["input_features"], audio["waveform"], ~audio["waveform_mask"])


@torch.no_grad()
def test_the_oracle_equals_the_reference(oracle, batch_of, expected):
    """Otherwise the other tests would prove nothing."""
    mel, wave, padding = batch_of("w10", "w3")
    for number, embeds in enumerate(oracle.audio_embeds(mel, wave, padding)):
        torch.testing.assert_close(embeds, expected["enc.w10_w3.embeds"][number], rtol=0, atol=TOLERANCE)
    before = [expected["tok.bos"], *expected["tok.before"]]
    prompt = oracle.inputs(before, oracle.audio_embeds(*batch_of("w5"))[0], expected["tok.after_asr"])
    target = expected["tok.text"][0]
    loss = oracle.loss_sum(prompt, target) / len(target)
    torch.testing.assert_close(loss, expected["loss.asr"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_embeddings(oracle, batch, model):
    audio = batch["audio"]
    padding = ~audio["waveform_mask"]
    beats = model.beats(audio["waveform"], padding)
    torch.testing.assert_close(beats, oracle.beats(audio["waveform"], padding), rtol=0, atol=TOLERANCE)
    embeds = model.audio_embeds(audio["input_features"], audio["waveform"], padding)
    torch.testing.assert_close(embeds, torch.stack(oracle_embeds(oracle, batch)), rtol=0, atol=TOLERANCE)


def test_loss_and_gradients(oracle, batch, model):
    rows = list(zip(batch["prompts"], batch["answers"], strict=True))
    inputs = {
        "input_ids": padded([prompt + answer for prompt, answer in rows], 420, "right"),
        "labels": padded([[-100] * len(prompt) + answer for prompt, answer in rows], -100, "right"),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in rows], 0, "right"),
    }
    loss = model(**inputs, **batch["audio"]).loss
    loss.backward()
    grads = {official_name(name): weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    parts = zip(oracle_embeds(oracle, batch), batch["ends"], batch["answers"], strict=True)
    sums = [oracle.loss_sum(oracle.inputs(batch["before"], audio, end), answer) for audio, end, answer in parts]
    expected = torch.stack(sums).sum() / sum(map(len, batch["answers"]))
    torch.testing.assert_close(loss, expected, rtol=0, atol=TOLERANCE)
    gradients = dict(zip(oracle.trained, torch.autograd.grad(expected, list(oracle.trained.values())), strict=True))
    assert grads.keys() == gradients.keys() and len(grads) == 73
    for name, gradient in gradients.items():
        # A single query attends to itself with weight 1 whatever query and key are; a key bias changes no weights.
        is_zero = (".attention.self." in name and ".value." not in name) or name.endswith("key.bias")
        largest = float(gradient.abs().max())
        assert is_zero == (largest < 1e-6), name
        assert float((grads[name] - gradient).abs().max()) < TOLERANCE * (1 if is_zero else min(1, largest)), name


@pytest.mark.parametrize("num_beams", [1, 4])
@torch.no_grad()
def test_answers(oracle, batch, model, num_beams):
    options = {"max_new_tokens": 16, "do_sample": False, "num_beams": num_beams, "pad_token_id": 420}
    ids = padded(batch["prompts"], 420, "left")
    answers = model.generate(input_ids=ids, attention_mask=(ids != 420).long(), **batch["audio"], **options).tolist()
    for row, (audio, end) in enumerate(zip(oracle_embeds(oracle, batch), batch["ends"], strict=True)):
        expected = oracle.generate(oracle.inputs(batch["before"], audio, end), **options)
        assert answers[row][: len(expected)] == expected and set(answers[row][len(expected) :]) <= {420}
