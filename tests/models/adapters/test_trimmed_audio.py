"""Prompts without the audio tokens of padding: how many remain, which outputs they get, and equal results."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, read_rows, write_rows
from transformers import VoxtralConfig, WhisperFeatureExtractor

from voxray.batches.collate import collate_packed, collate_prompts, collate_training
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import FeatureRow, Features
from voxray.models.adapters.lora import add_lora, trainable_parameters
from voxray.models.registry import get_family
from voxray.models.voxtral.front_end import VoxtralFrontEnd
from voxray.training.loop import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = get_family(TINY)
CPU = torch.device("cpu")
SECONDS = (0.3, 2.0, 3.99, 4.0, 4.0001, 9.5)
POSITIONS = (4, 26, 50, 50, 51, 119)  # 100 frames per second, one or two more at the end, eight per position
WINDOWS = (1, 1, 1, 1, 2, 3)


def noise(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(round(seconds * 1e4))
    return (generator.integers(-8_000, 8_000, round(seconds * 16_000)) / 32_768).astype(np.float32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, small: dict[str, str]) -> str:
    """A clip of every length, with alternating tasks, and two rows of text."""
    folder = tmp_path_factory.mktemp("clips")
    rows: list[dict[str, str]] = []
    for number, seconds in enumerate(SECONDS):
        path = folder / f"{number}.wav"
        soundfile.write(path, noise(seconds), 16_000, subtype="PCM_16")
        texts = ({"transcript": "네"}, {"question": "몇 번?", "answer": "세 번"}, {"caption": "개가 짖는다"})
        rows.append({"audio_path": str(path), **texts[number % 3]})
    return write_rows(folder / "m.jsonl", [*rows[:3], *read_rows(small["tqa.train"])[:2], *rows[3:]])


def rows_of(manifest: str, folder: Path, **spec: Any) -> list[FeatureRow]:
    extractor = Extractor(TINY, FeatureSpec(**spec))
    features = Features(featurize([manifest], extractor, folder, rows_per_shard=4, use_ray=False).folders)
    assert features.num_prompt_tokens.tolist() == [len(features.row(n).prompt_ids) for n in range(len(features))]
    return [features.row(number) for number in range(len(features))]


@pytest.fixture(scope="module")
def trimmed(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> list[FeatureRow]:
    return rows_of(manifest, tmp_path_factory.mktemp("trimmed"), trim_audio=True)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    wrapped = add_lora(base, FAMILY, ("projector", "llm"), model_id=TINY, r=4, alpha=8, dropout=0.0)
    for name, parameter in trainable_parameters(wrapped):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped


# number of audio tokens


def test_a_clip_has_the_positions_that_its_frames_reach():
    front_end = VoxtralFrontEnd(TINY, trim_audio=True)
    assert [front_end.num_positions(round(seconds * 16_000)) for seconds in SECONDS] == list(POSITIONS)
    assert front_end.num_positions(1) == 1
    whole = VoxtralFrontEnd(TINY)
    assert [whole.num_positions(round(seconds * 16_000)) for seconds in SECONDS] == [50 * count for count in WINDOWS]


@pytest.mark.parametrize("num_samples", [1, 161, 1_080, 1_082, 1_083, 31_999, 63_000, 63_959, 64_000])
def test_the_last_position_is_the_last_that_the_clip_reaches(num_samples: int):
    """transformers' padded features are constant after the clip, whose last two frames can have that value too."""
    front_end = VoxtralFrontEnd(TINY, trim_audio=True)
    clip = np.random.default_rng(0).normal(0, 0.3, num_samples).astype(np.float32)
    padded_FT = WhisperFeatureExtractor.from_pretrained(TINY)(
        clip, sampling_rate=16_000, padding="max_length", max_length=64_000, return_tensors="np"
    )["input_features"][0]
    num_frames = 1 + np.flatnonzero((padded_FT != padded_FT[:, -1:]).any(axis=0)).max(initial=-1)
    num_positions = front_end.num_positions(num_samples)
    assert -(-num_frames // 8) <= num_positions <= -(-min(num_frames + 2, 400) // 8)
    assert num_positions == -(-len(front_end.features(clip).mel_KF) // 8)


def test_released_voxtral_keeps_57_of_375_positions_of_four_and_a_half_seconds(tmp_path: Path):
    VoxtralConfig(audio_token_id=24).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_bytes((Path(TINY) / "tekken.json").read_bytes())
    full = VoxtralFrontEnd(str(tmp_path), trim_audio=True)
    seconds = (0.01, 1, 4.5, 29.99, 30, 30.01, 65)
    assert [full.num_positions(round(s * 16_000)) for s in seconds] == [1, 13, 57, 375, 375, 376, 813]


def test_trimmed_features_have_their_own_fingerprint_and_the_same_audio(
    manifest: str, trimmed: list[FeatureRow], tmp_path: Path
):
    assert Extractor(TINY, FeatureSpec(trim_audio=True)).fingerprint != Extractor(TINY).fingerprint
    whole = rows_of(manifest, tmp_path)
    for short, full in zip(trimmed, whole, strict=True):
        assert np.array_equal(short.audio, full.audio) and short.num_windows == full.num_windows
        text_ids = [[token for token in row.prompt_ids.tolist() if token != 24] for row in (short, full)]
        assert text_ids[0] == text_ids[1]
    counts = [int((row.prompt_ids == 24).sum()) for row in trimmed if row.num_windows]
    assert counts == list(POSITIONS)


# outputs that they get


def language_model_inputs(model: Any, call: Any) -> torch.Tensor:
    """Embeddings that the language model gets in its first call."""
    embeddings: list[torch.Tensor] = []
    inner = model.get_base_model().model.language_model

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings.append(kwargs["inputs_embeds"])

    with inner.register_forward_pre_hook(record, with_kwargs=True), torch.no_grad():
        call()
    return embeddings[0]


@pytest.mark.parametrize("store", ["mel", "pcm16", "encoder"])
@pytest.mark.parametrize("layout", ["padded", "packed", "prompts"])
def test_tokens_take_the_first_outputs_of_their_clip(
    model: Any, manifest: str, tmp_path: Path, store: str, layout: str, request: pytest.FixtureRequest
):
    """Against transformers' get_audio_features on each clip by itself."""
    rows = rows_of(manifest, tmp_path, trim_audio=True, store=store, dtype="float32")
    front_end, base = VoxtralFrontEnd(TINY, trim_audio=True), model.get_base_model()
    if store == "encoder":
        request.addfinalizer(partial(setattr, base.model, "audio_tower", base.model.audio_tower))
        FAMILY.skip_encoder(model)
    collate = {"padded": collate_training, "packed": collate_packed, "prompts": collate_prompts}[layout]
    batch = collate(rows, front_end)
    if layout == "prompts":
        options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": front_end.pad_id}
        embeds_BLD = language_model_inputs(model, lambda: FAMILY.generate(model, batch, **options))
    else:
        embeds_BLD = language_model_inputs(model, lambda: answer_loss(model, FAMILY, batch, 0.0))
    embeddings = base.get_input_embeddings()(batch["input_ids"])
    is_audio = batch["input_ids"] == 24
    assert torch.equal(embeds_BLD[~is_audio], embeddings[~is_audio])
    expected = []
    with torch.no_grad():
        for row in rows:
            if row.num_windows:
                clip = collate_prompts([row], front_end)["input_features"]
                outputs = base.model.get_audio_features(clip, return_dict=True).pooler_output
                assert outputs.shape[0] == 50 * row.num_windows
                expected.append(outputs[: int((row.prompt_ids == 24).sum())])
    assert torch.allclose(embeds_BLD[is_audio], torch.cat(expected), atol=1e-5)


def test_whole_windows_equal_transformers_own_path(model: Any, manifest: str, tmp_path: Path):
    """With the ids and features of whole windows, transformers puts the same embeddings at the same tokens."""
    batches = [collate_training(rows_of(manifest, tmp_path / "f"), VoxtralFrontEnd(TINY))]
    full = [row for row in rows_of(manifest, tmp_path / "t", trim_audio=True) if (row.prompt_ids == 24).sum() == 50]
    batches.append(collate_training(full, VoxtralFrontEnd(TINY, trim_audio=True)))
    inner = model.get_base_model().model
    for batch in batches:
        assert "audio_outputs" not in batch
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "input_features") if name in batch}
        theirs = language_model_inputs(model, lambda inputs=inputs: inner(**inputs))
        ours = language_model_inputs(model, lambda batch=batch: answer_loss(model, FAMILY, batch, 0.0))
        assert torch.equal(ours, theirs)
    assert len(full) >= 1


# equal results


def test_packed_equals_padded(model: Any, trimmed: list[FeatureRow]):
    front_end = VoxtralFrontEnd(TINY, trim_audio=True)
    tokens = sum(len(row.target_ids) for row in trimmed)

    def loss(batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        total = sum(answer_loss(model, FAMILY, batch, 0.0) for batch in batches)
        assert isinstance(total, torch.Tensor)
        total.sum().backward()
        grads = [parameter.grad.flatten() for _, parameter in trainable_parameters(model) if parameter.grad is not None]
        return total.detach(), torch.cat(grads)

    padded, padded_grads = loss([collate_training(trimmed, front_end)])
    alone, _ = loss([collate_training([row], front_end) for row in trimmed])
    packed, packed_grads = loss([collate_packed(trimmed, front_end)])
    assert (packed - padded).abs().max() / tokens < 1e-5 and (alone - padded).abs().max() / tokens < 1e-5
    assert (packed_grads - padded_grads).abs().max() < 1e-4 * padded_grads.abs().max()
    assert (packed[:4] > 0).all(), "all four tasks are covered"


def test_generation_equals_a_naive_loop_over_rows(model: Any, trimmed: list[FeatureRow]):
    """Greedy, row by row, without a cache: embeddings are assembled here, and transformers' model runs on them."""
    front_end, base, steps = VoxtralFrontEnd(TINY, trim_audio=True), model.get_base_model(), 6
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": front_end.pad_id, "eos_token_id": 2}
    with torch.no_grad():
        answers = FAMILY.generate(model, collate_prompts(trimmed, front_end), **options).tolist()
        for row, ids in zip(trimmed, answers, strict=True):
            inputs = base.get_input_embeddings()(torch.from_numpy(row.prompt_ids.astype(np.int64)))
            if row.num_windows:
                clip = collate_prompts([row], front_end)["input_features"]
                outputs = base.model.get_audio_features(clip, return_dict=True).pooler_output
                is_audio = torch.from_numpy(row.prompt_ids == 24)
                inputs[is_audio] = outputs[: int(is_audio.sum())]
            expected: list[int] = []
            while len(expected) < steps and 2 not in expected:
                logits = base(inputs_embeds=inputs[None], use_cache=False).logits[0, -1]
                expected.append(int(logits.argmax()))
                inputs = torch.cat([inputs, base.get_input_embeddings()(torch.tensor(expected[-1:]))])
            assert ids[: len(expected)] == expected, row.id
