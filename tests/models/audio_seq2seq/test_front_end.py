"""Prompts, labels and features against the processor of each model type."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.audio_lm_rows import make_row, noise, sample
from helpers.audio_seq2seq_tiny import library_inputs

from voxray.core.errors import BadRow, SettingsError
from voxray.models.audio_seq2seq.facts import FACTS
from voxray.models.registry import get_family

LENGTHS = (960, 1_600, 1_601, 1_759, 1_760, 2_719, 2_720, 7_999, 16_000, 24_321, 100_000, 479_999, 480_000)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def front_end(base: str) -> Any:
    return get_family(base).front_end(base)


def row(front_end: Any, **values: Any) -> Any:
    return sample(**{"language": "de" if front_end.needs_language else "", **values})


def test_features_and_prompts_are_the_processors(base, front_end):
    for length in LENGTHS:
        inputs = library_inputs(base, [noise(length)], "de")
        features = front_end.features(noise(length))
        if "input_values" in inputs:
            assert np.array_equal(features.mel_KF.ravel()[:length], inputs["input_values"][0].numpy()), length
            assert not features.mel_KF.ravel()[length:].any()
        else:
            valid = int(inputs["attention_mask"].sum())
            assert len(features.mel_KF) == valid
            assert np.array_equal(features.mel_KF, inputs["input_features"][0, :valid].numpy()), length
            assert front_end.prompt_ids(row(front_end), length) == inputs["decoder_input_ids"][0].tolist()
        assert features.num_windows == 1


def test_encoder_positions_are_the_encoders(base, front_end):
    import torch

    family = get_family(base)
    encoder = family.load_encoder(base, dtype=torch.float32, device=torch.device("cpu"))
    for length in LENGTHS:
        clip = make_row(front_end, row(front_end), length)
        features = front_end.features(noise(clip.num_samples)).mel_KF.T[None]
        states = family.encode(encoder, torch.from_numpy(features.copy()), torch.tensor([length]))
        positions = front_end.num_positions(length)
        assert states[0, positions - 1].any() and not states[0, positions:].any(), length


def test_every_language_has_the_processors_prompt(base, front_end):
    if not front_end.needs_language:
        assert front_end.languages is None
        assert front_end.prompt_ids(sample(language="ko"), 16_000) == front_end.prompt_ids(sample(), 16_000)
        return
    assert {"de", "en", "fr"} <= front_end.languages
    for language in sorted(front_end.languages):
        ids = front_end.prompt_ids(sample(language=language), 16_000)
        assert ids == library_inputs(base, [noise(16_000)], language)["decoder_input_ids"][0].tolist()
        assert front_end.prompt_language(ids) == language


def test_contexts_are_refused(front_end):
    with pytest.raises(BadRow, match="have no place for a context; remove it"):
        front_end.prompt_ids(row(front_end, prompt="Tylenol"), 16_000)


def test_answers_end_with_the_token_that_ends_generation(front_end):
    ids = front_end.target_ids("열이 납니다 <eos></s>")
    assert ids[-1] == front_end.eos_id and front_end.eos_id not in ids[:-1], "control tokens in a text are text"
    assert front_end.decode(ids).strip() == "열이 납니다 <eos></s>"
    assert front_end.target_ids("") == [front_end.eos_id]


def test_rows_that_the_model_cannot_answer(front_end):
    for task in ("sqa", "chat"):
        with pytest.raises(BadRow, match=f"only transcribes; this row's task is {task}"):
            front_end.prompt_ids(row(front_end, task=task, prompt="What?"), 16_000)
    for length in (100, 319):
        with pytest.raises(BadRow, match=f"{length} samples are too few"):
            front_end.prompt_ids(row(front_end), length)
    if front_end.needs_language:
        with pytest.raises(BadRow, match="names no language, which this model needs"):
            front_end.prompt_ids(sample(), 16_000)
        with pytest.raises(BadRow):
            front_end.prompt_ids(sample(language="sw"), 16_000)


def test_trimming_is_refused(base):
    with pytest.raises(SettingsError, match="--trim_audio_tokens: prompts of this model have no audio tokens"):
        get_family(base).front_end(base, trim_audio=True)


def test_front_end_survives_pickling(front_end):
    copy = pickle.loads(pickle.dumps(front_end))
    assert copy.fingerprint == front_end.fingerprint
    assert copy.prompt_ids(row(copy), 20_000) == front_end.prompt_ids(row(front_end), 20_000)
    assert np.array_equal(copy.features(noise(20_000)).mel_KF, front_end.features(noise(20_000)).mel_KF)


def test_longest_clips_are_those_that_the_processor_does_not_divide(base, front_end):
    longest = {"cohere_asr": 35, "canary": 40, "moonshine": 30}[Path(base).name]
    assert front_end.max_audio_sec == FACTS[Path(base).name].max_audio_sec == longest
    assert front_end.num_windows(int(longest * 16_000)) == 1
