"""The audio path in its three forms: in the model, from stored encoder outputs, and over whole windows."""

from typing import Any

import numpy as np
import pytest
import torch

from voxray.core.errors import SettingsError
from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.compiled_audio import weights_hash
from voxray.models.parts.logmel_windows import padded_windows
from voxray.models.salmonn.audio_path import ENCODERS, TRAINED_MODULES, StoredEncoders, WindowPath
from voxray.models.salmonn.family import Salmonn
from voxray.models.salmonn.folder import load_encoders, write_folder
from voxray.models.salmonn.front_end import SalmonnFrontEnd

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW, FRAMES, WHISPERS, BEATS = 64_000, 200, 128, 48  # of the tiny model: samples, frames, widths
LENGTHS = (1, 400, 15_999, 16_000, 16_001, 33_333, WINDOW - 1, WINDOW)
CLOSE = 1e-5
FAMILY, CPU = Salmonn(), torch.device("cpu")


@pytest.fixture(scope="module")
def alone(salmonn: str) -> Any:
    """A tiny model in which every clip is independent of its batch."""
    return FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def windows(salmonn: str, clips: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of clips of every length, and the lengths."""
    front_end = SalmonnFrontEnd(salmonn)
    windows = []
    for length in LENGTHS:
        features = front_end.features(clips["w10"][1][:length].numpy())
        windows.append(padded_windows(features.mel_KF, features.fill, features.num_windows, front_end))
    return torch.from_numpy(np.concatenate(windows)), torch.tensor(LENGTHS)


@pytest.fixture(scope="module")
def embeds(alone: Any, windows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The model's embeddings of each clip by itself (other tests compare them with those of samples)."""
    with torch.no_grad():
        return torch.cat(
            [alone.window_embeds(*(part[row : row + 1] for part in windows)) for row in range(len(LENGTHS))]
        )


@torch.no_grad()
def test_stored_outputs_give_the_models_embeddings(alone, windows, embeds):
    """For clips that are encoded together, in the model's dtype and in float16."""
    features, lengths = windows
    states = StoredEncoders(alone.speech_encoder, alone.beats)(features, lengths)
    assert states.shape == (len(LENGTHS), FRAMES, WHISPERS + BEATS)
    torch.testing.assert_close(alone.stored_embeds(states, lengths), embeds, rtol=0, atol=CLOSE)
    torch.testing.assert_close(alone.stored_embeds(states.half(), lengths), embeds, rtol=0, atol=5e-3)
    for row, length in enumerate(LENGTHS):
        num_tokens = alone.beats.num_tokens(max(length, 16_000))
        assert states[row, :num_tokens, WHISPERS:].abs().sum(-1).min() > 0
        assert not states[row, num_tokens:, WHISPERS:].any()


@torch.no_grad()
def test_encoders_loaded_alone_equal_the_models(alone, salmonn, windows):
    encoders = FAMILY.load_encoder(salmonn, dtype=torch.float32, device=CPU)
    some = [part[:3] for part in windows]
    expected = StoredEncoders(alone.speech_encoder, alone.beats)(*some)
    assert torch.equal(FAMILY.encode(encoders, *some), expected)
    assert not any(weight.requires_grad for weight in encoders.parameters())


@torch.no_grad()
def test_a_folder_that_names_parts_has_the_same_encoders(salmonn, salmonn_parts, tmp_path, windows):
    """Also in bfloat16, as with --bf16."""
    whisper, beats, llm = (salmonn_parts[f"{name}_path"] for name in ("whisper", "beats", "llama"))
    write_folder(tmp_path, whisper=whisper, beats=beats, llm=llm)
    some = [part[:2] for part in windows]
    for dtype in (torch.float32, torch.bfloat16):
        both = [load_encoders(str(folder), dtype=dtype, device=CPU)(*some) for folder in (salmonn, tmp_path)]
        assert both[0].dtype == dtype and torch.equal(*both)


def test_without_encoders_the_model_takes_their_outputs(salmonn, windows, embeds):
    """Also for batches without audio, in which the audio path takes part. The encoders' memory is freed."""
    model = FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)
    audio, text = model.config.audio_token_id, torch.tensor([[5, 6, 7]])
    some = [part[:2] for part in windows]
    states = FAMILY.encode(FAMILY.load_encoder(salmonn, dtype=torch.float32, device=CPU), *some).clone()
    FAMILY.skip_encoder(model)
    assert all(isinstance(getattr(model, name), PassThrough) for name in ENCODERS)
    stored = model.embed(torch.full((2, model.config.positions_per_clip), audio), states, num_samples=some[1])
    torch.testing.assert_close(stored, embeds[:2], rtol=0, atol=CLOSE)
    check_text_only(model, text)


def test_the_audio_path_takes_part_in_batches_without_audio(salmonn):
    model = FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)
    check_text_only(model, torch.tensor([[5, 6, 7]]))


def check_text_only(model: Any, text: torch.Tensor) -> None:
    positions_N, batch = torch.arange(text.numel()), {"input_ids": text}
    expected = FAMILY.answer_logits(model, batch, positions_N)
    weights = [
        weight.requires_grad_() for name, weight in model.named_parameters() if name.split(".")[0] in TRAINED_MODULES
    ]
    model.get_input_embeddings().weight.requires_grad_()
    for roles in (("projector", "llm"), ("encoder", "projector", "llm")):
        logits = FAMILY.answer_logits(model, batch, positions_N, roles_in_every_pass=roles)
        assert torch.equal(logits, expected)
        logits.sum().backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in weights)
        model.zero_grad()


@torch.no_grad()
def test_whole_windows_give_the_same_embeddings(alone, windows, embeds):
    """As exported for compiling: BEATs gets the whole window of every clip, and where the clip ends."""
    path = FAMILY.audio_path(alone)
    features, lengths = windows
    program = torch.export.export(path, (features[:1], lengths[:1])).module()
    for row in range(len(LENGTHS)):
        compiled = program(features[row : row + 1], lengths[row : row + 1])
        torch.testing.assert_close(compiled, embeds[row : row + 1], rtol=0, atol=CLOSE, msg=f"{LENGTHS[row]} samples")


def test_the_hash_covers_everything_that_results_depend_on(alone):
    before = weights_hash(FAMILY.audio_path(alone))
    assert weights_hash(WindowPath(alone)) == before
    for config, name, value in (
        (alone.config, "seconds_per_window", 0.5),
        (alone.config.beats_config, "encoder_attention_heads", 2),
        (alone.config.qformer_config, "num_attention_heads", 2),
    ):
        before_change = getattr(config, name)
        setattr(config, name, value)
        assert weights_hash(WindowPath(alone)) != before
        setattr(config, name, before_change)
    with torch.no_grad():
        alone.speech_query_tokens.neg_()
    assert weights_hash(WindowPath(alone)) != before
    with torch.no_grad():
        alone.speech_query_tokens.neg_()
    assert weights_hash(WindowPath(alone)) == before


def test_embeddings_that_depend_on_the_batch_are_neither_stored_nor_compiled(model, files, tmp_path):
    parts = {name: file for name, file in files.items() if name != "pad_rows"}
    write_folder(tmp_path, **parts, alone=False)
    message = r'its config.json says "alone": false, so the embeddings of a clip depend on the other clips'
    with pytest.raises(SettingsError, match=message):
        FAMILY.encoder_fingerprint(str(tmp_path))
    with pytest.raises(SettingsError, match=message):
        FAMILY.audio_path(model)
