"""What hears, in its three forms: the model itself, outputs that were stored, and whole windows for compiling."""

from typing import Any

import numpy as np
import pytest
import torch

from voxray.core.errors import SettingsError
from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.compiled_audio import weights_hash
from voxray.models.parts.logmel_windows import padded_windows
from voxray.models.salmonn.audio_path import TOWERS, TRAINED, StoredEncoders, WindowPath
from voxray.models.salmonn.family import Salmonn
from voxray.models.salmonn.folder import load_towers, write_folder
from voxray.models.salmonn.front_end import SalmonnFrontEnd

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW, FRAMES, WHISPERS, BEATS = 64_000, 200, 128, 48  # of the tiny model: samples, frames, widths
LENGTHS = (1, 400, 15_999, 16_000, 16_001, 33_333, WINDOW - 1, WINDOW)
CLOSE = 1e-5
FAMILY, CPU = Salmonn(), torch.device("cpu")


@pytest.fixture(scope="module")
def alone(salmonn: str) -> Any:
    """A tiny model, which hears every clip as if it were by itself."""
    return FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def windows(salmonn: str, clips: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of clips of every length, and the lengths."""
    front_end = SalmonnFrontEnd(salmonn)
    found = []
    for length in LENGTHS:
        features = front_end.features(clips["w10"][1][:length].numpy())
        found.append(padded_windows(features.mel_KF, features.fill, features.num_windows, front_end))
    return torch.from_numpy(np.concatenate(found)), torch.tensor(LENGTHS)


@pytest.fixture(scope="module")
def heard(alone: Any, windows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What the model makes of each clip by itself (other tests hold that against what it makes of samples)."""
    with torch.no_grad():
        return torch.cat(
            [alone.window_embeds(*(part[row : row + 1] for part in windows)) for row in range(len(LENGTHS))]
        )


@torch.no_grad()
def test_stored_outputs_are_what_the_model_hears(alone, windows, heard):
    """Of clips that were encoded together, in the model's own type and in float16."""
    features, lengths = windows
    states = StoredEncoders(alone.speech_encoder, alone.beats)(features, lengths)
    assert states.shape == (len(LENGTHS), FRAMES, WHISPERS + BEATS)
    torch.testing.assert_close(alone.stored_embeds(states, lengths), heard, rtol=0, atol=CLOSE)
    torch.testing.assert_close(alone.stored_embeds(states.half(), lengths), heard, rtol=0, atol=5e-3)
    for row, length in enumerate(LENGTHS):
        own = alone.beats.num_tokens(max(length, 16_000))
        assert states[row, :own, WHISPERS:].abs().sum(-1).min() > 0 and not states[row, own:, WHISPERS:].any()


@torch.no_grad()
def test_a_loaded_pair_of_encoders_is_the_models(alone, salmonn, windows):
    towers = FAMILY.load_encoder(salmonn, dtype=torch.float32, device=CPU)
    some = [part[:3] for part in windows]
    wanted = StoredEncoders(alone.speech_encoder, alone.beats)(*some)
    assert torch.equal(FAMILY.encode(towers, *some), wanted) and not any(w.requires_grad for w in towers.parameters())


@torch.no_grad()
def test_a_folder_of_named_parts_has_the_same_pair(salmonn, salmonn_parts, tmp_path, windows):
    """In bfloat16 too, as --bf16 stores them."""
    whisper, beats, llm = (salmonn_parts[f"{name}_path"] for name in ("whisper", "beats", "llama"))
    write_folder(tmp_path, whisper=whisper, beats=beats, llm=llm)
    some = [part[:2] for part in windows]
    for dtype in (torch.float32, torch.bfloat16):
        both = [load_towers(str(place), dtype=dtype, device=CPU)(*some) for place in (salmonn, tmp_path)]
        assert both[0].dtype == dtype and torch.equal(*both)


def test_without_encoders_it_takes_their_outputs(salmonn, windows, heard):
    """Also for batches without audio, in which what hears takes part; the encoders are out of memory."""
    model = FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)
    audio, text = model.config.audio_token_id, torch.tensor([[5, 6, 7]])
    some = [part[:2] for part in windows]
    states = FAMILY.encode(FAMILY.load_encoder(salmonn, dtype=torch.float32, device=CPU), *some).clone()
    FAMILY.skip_encoder(model)
    assert all(isinstance(getattr(model, name), PassThrough) for name in TOWERS)
    embeds = model.embed(torch.full((2, model.config.positions_per_clip), audio), states, num_samples=some[1])
    torch.testing.assert_close(embeds, heard[:2], rtol=0, atol=CLOSE)
    check_text_alone(model, text)


def test_batches_without_audio_take_part(salmonn):
    model = FAMILY.load_model(salmonn, dtype=torch.float32, device=CPU)
    check_text_alone(model, torch.tensor([[5, 6, 7]]))


def check_text_alone(model: Any, text: torch.Tensor) -> None:
    keep, batch = torch.ones_like(text, dtype=torch.bool), {"input_ids": text}
    wanted = FAMILY.answer_logits(model, batch, keep)
    weights = [weight.requires_grad_() for name, weight in model.named_parameters() if name.split(".")[0] in TRAINED]
    model.get_input_embeddings().weight.requires_grad_()
    for roles in (("projector", "llm"), ("encoder", "projector", "llm")):
        found = FAMILY.answer_logits(model, batch, keep, roles_in_every_pass=roles)
        assert torch.equal(found, wanted)
        found.sum().backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in weights)
        model.zero_grad()


@torch.no_grad()
def test_whole_windows_are_the_same_clips(alone, windows, heard):
    """As they are exported for compiling: BEATs hears the window of every clip, and knows where it ends."""
    path = FAMILY.audio_path(alone)
    features, lengths = windows
    program = torch.export.export(path, (features[:1], lengths[:1])).module()
    for row in range(len(LENGTHS)):
        found = program(features[row : row + 1], lengths[row : row + 1])
        torch.testing.assert_close(found, heard[row : row + 1], rtol=0, atol=CLOSE, msg=f"{LENGTHS[row]} samples")


def test_what_a_program_depends_on_is_in_its_hash(alone):
    before = weights_hash(FAMILY.audio_path(alone))
    assert weights_hash(WindowPath(alone)) == before
    for config, name, value in (
        (alone.config, "seconds_per_window", 0.5),
        (alone.config.beats_config, "encoder_attention_heads", 2),
        (alone.config.qformer_config, "num_attention_heads", 2),
    ):
        kept = getattr(config, name)
        setattr(config, name, value)
        assert weights_hash(WindowPath(alone)) != before
        setattr(config, name, kept)
    with torch.no_grad():
        alone.speech_query_tokens.neg_()
    assert weights_hash(WindowPath(alone)) != before
    with torch.no_grad():
        alone.speech_query_tokens.neg_()
    assert weights_hash(WindowPath(alone)) == before


def test_what_depends_on_the_batch_is_neither_stored_nor_compiled(model, files, tmp_path):
    parts = {name: file for name, file in files.items() if name != "pad_rows"}
    write_folder(tmp_path, **parts, alone=False)
    told = r'its config.json says "alone": false, so what it makes of a clip depends on the others'
    with pytest.raises(SettingsError, match=told):
        FAMILY.encoder_fingerprint(str(tmp_path))
    with pytest.raises(SettingsError, match=told):
        FAMILY.audio_path(model)
