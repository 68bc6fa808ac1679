"""Whisper's front end against transformers' own processor: features, prompts, labels, times."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, WHISPER, manifest, read_rows

from voxray.audio.augment import WaveformAugmentation
from voxray.audio.decode import decode
from voxray.core.errors import BadRow, SettingsError
from voxray.core.manifest import Sample, parse_row
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor, FeatureSpec
from voxray.models.parts.logmel_windows import padded_windows
from voxray.models.whisper.front_end import WhisperFrontEnd

SPOKEN = Sample("a", TASKS["asr"], "", "환자는 어제부터 열이 납니다", str(SPEECH / "sample.wav"), "ko", "m:1")


@pytest.fixture(scope="module")
def front_end() -> WhisperFrontEnd:
    return WhisperFrontEnd(WHISPER)


@pytest.fixture(scope="module")
def processor():
    from transformers import WhisperProcessor

    return WhisperProcessor.from_pretrained(WHISPER)


@pytest.mark.parametrize("language", ["ko", "en"])
@pytest.mark.parametrize("text", ["환자는 어제부터 열이 납니다", "120/80, 36.5 mmHg", "naïve 漢字 🙂", " a  b "])
def test_prompt_and_target_equal_the_processors_labels(front_end, processor, language, text):
    processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    ours = front_end.prompt_ids(replace(SPOKEN, language=language), 1) + front_end.target_ids(text)
    assert ours == processor.tokenizer(text).input_ids
    assert front_end.decode(front_end.target_ids(text)) == processor.tokenizer.decode(ours, skip_special_tokens=True)


@pytest.mark.parametrize("context", ["아스피린, 와파린", "Tylenol 500 mg", "<|en|> is text"])
def test_a_context_stands_where_the_processor_puts_it(front_end, processor, context):
    ids = front_end.prompt_ids(replace(SPOKEN, prompt=context), 1)
    plain = front_end.prompt_ids(SPOKEN, 1)
    start = len(ids) - len(plain)
    assert ids[start:] == plain and front_end.prompt_language(ids) == "ko"
    if "<|" in context:  # the processor refuses control tokens
        assert front_end.decode(ids[1:start]) == f" {context}" and not set(ids[1:start]) & set(plain)
    else:
        assert ids[:start] == processor.get_prompt_ids(context).tolist()


def test_of_a_long_context_the_last_tokens_count(front_end, processor):
    context = ", ".join(f"약 {number}" for number in range(400))
    ids = front_end.prompt_ids(replace(SPOKEN, prompt=context), 1)
    kept = front_end.max_positions // 2 - 1
    assert ids[1 : kept + 1] == processor.get_prompt_ids(context).tolist()[-kept:]
    assert ids[kept + 1 :] == front_end.prompt_ids(SPOKEN, 1)


def translated(target: str = "en", language: str = "ko") -> Sample:
    return replace(SPOKEN, task=TASKS["ast"], answer="He has a fever.", language=language, target_language=target)


@pytest.mark.parametrize("language", ["ko", "en", "jv"])
def test_prompts_of_translations_equal_the_processors(front_end, processor, language):
    own = "jw" if language == "jv" else language  # Whisper's own code
    forced = processor.get_decoder_prompt_ids(language=own, task="translate")
    prompt = front_end.prompt_ids(translated(language=language), 1)
    assert prompt == [front_end.start_id, *(token_id for _, token_id in forced)]
    assert front_end.show(prompt) == f"<|startoftranscript|><|{own}|><|translate|><|notimestamps|>"
    assert front_end.prompt_language(prompt) == language and not front_end.needs_sequential_generate(prompt, 1)
    unknown = front_end.prompt_ids(translated(language=""), 1)
    assert front_end.show(unknown) == "<|startoftranscript|><|translate|><|notimestamps|>"


@pytest.mark.parametrize(
    ("sample", "reason", "message"),
    [
        (
            translated("ko"),
            "unsupported_task",
            "Whisper translates into English only; target_language of this row is ko",
        ),
        (
            translated("yue"),
            "unsupported_task",
            "Whisper translates into English only; target_language of this row is y",
        ),
        (translated(language="zz"), "bad_language", "language 'zz' is none of the 99 that"),
    ],
)
def test_translations_into_other_languages_are_refused(front_end, sample, reason, message):
    with pytest.raises(BadRow) as error:
        front_end.prompt_ids(sample, 1)
    assert error.value.reason == reason and str(error.value).startswith(message) and "\n" not in str(error.value)


def test_features_equal_the_processors(front_end, processor):
    for row in read_rows(manifest("asr.val"))[:6]:
        samples = decode(row["audio_path"], 16_000)
        features = front_end.features(samples)
        ours = padded_windows(features.mel_KF, features.fill, features.num_windows, front_end)
        expected = processor.feature_extractor(samples, sampling_rate=16_000, return_tensors="np").input_features
        assert np.array_equal(ours, expected)


def test_long_recordings_are_clamped_relative_to_the_whole(front_end, processor):
    samples = np.concatenate([decode(row["audio_path"], 16_000) for row in read_rows(manifest("asr.val"))[:6]])
    features = front_end.features(samples)
    assert features.num_windows == 3
    options = {"sampling_rate": 16_000, "truncation": False, "return_tensors": "np"}
    [expected_FT] = processor.feature_extractor(samples, padding="longest", **options).input_features
    # the processor reflects the end of a recording that it does not pad
    assert np.abs(features.mel_KF[: expected_FT.shape[1] - 3] - expected_FT.T[:-3]).max() < 1e-6


def test_languages(front_end):
    assert (
        front_end.show(front_end.prompt_ids(SPOKEN, 1)) == "<|startoftranscript|><|ko|><|transcribe|><|notimestamps|>"
    )
    unknown = front_end.prompt_ids(replace(SPOKEN, language=""), 1)
    assert front_end.show(unknown) == "<|startoftranscript|><|transcribe|><|notimestamps|>"
    with pytest.raises(BadRow, match=r"language 'zz' is none of the 99 that .*whisper-tiny has: af, am, ar"):
        front_end.prompt_ids(replace(SPOKEN, language="zz"), 1)
    javanese = front_end.show(front_end.prompt_ids(replace(SPOKEN, language="jv"), 1))
    assert "<|jw|>" in javanese, "Whisper's own code"
    assert "yue" not in front_end.languages and front_end.prompt_language(unknown) == ""


def test_folders_without_a_generation_config(front_end, tmp_path):
    """Of older trainers; and English-only ones, whose prompts have neither language nor task."""
    shutil.copytree(WHISPER, tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    old = WhisperFrontEnd(str(tmp_path / "old"))
    assert old.prompt_ids(SPOKEN, 1) == front_end.prompt_ids(SPOKEN, 1) and old.language_ids == front_end.language_ids
    config = json.loads((Path(WHISPER) / "generation_config.json").read_text())
    (tmp_path / "old" / "generation_config.json").write_text(json.dumps({**config, "is_multilingual": False}))
    english = WhisperFrontEnd(str(tmp_path / "old"))
    for language in ("", "en"):
        ids = english.prompt_ids(replace(SPOKEN, language=language), 1)
        assert english.show(ids) == "<|startoftranscript|><|notimestamps|>" and english.prompt_language(ids) == "en"
    with pytest.raises(BadRow, match=r"language 'ko' is none of the 1 that .*old has: en") as error:
        english.prompt_ids(SPOKEN, 1)
    assert error.value.reason == "bad_language"
    with pytest.raises(BadRow, match="old is an English-only checkpoint, which does not translate") as error:
        english.prompt_ids(translated(language="en"), 1)
    assert error.value.reason == "unsupported_task"
    assert not english.needs_language and english.fingerprint != front_end.fingerprint


def test_other_tasks_are_refused(front_end):
    with pytest.raises(BadRow, match="this row's task is tqa") as error:
        front_end.prompt_ids(Sample("a", TASKS["tqa"], "q", "a", "", "ko", "m:1"), 0)
    assert error.value.reason == "unsupported_task"
    with pytest.raises(SettingsError, match="--trim_audio_tokens: Whisper has no audio tokens"):
        WhisperFrontEnd(WHISPER, trim_audio=True)


def test_rows_with_segments_are_transcribed_with_times(front_end, processor):
    line = (
        b'{"audio_path": "sample.wav", "transcript": "\xec\x97\xb4\xec\x9d\xb4 \xeb\x82\xa9\xeb\x8b\x88\xeb\x8b\xa4", '
    )
    line += b'"language": "ko", "segments": [{"start": 0, "end": 0.84, "text": "\xec\x97\xb4\xec\x9d\xb4"}, '
    line += b'{"start": 1.1, "end": 2.5, "text": "\xeb\x82\xa9\xeb\x8b\x88\xeb\x8b\xa4"}]}'
    sample = parse_row(line, str(SPEECH / "m.jsonl"), 1)
    prompt, target = front_end.prompt_ids(sample, 3 * 16_000), front_end.target_ids(sample.answer, sample.segments)
    assert front_end.show(prompt) == "<|startoftranscript|><|ko|><|transcribe|>"
    assert front_end.show(target) == "<|0.00|> 열이<|0.84|><|1.10|> 납니다<|2.50|><|endoftext|>"
    assert front_end.decode(target).strip() == "열이 납니다"
    offsets = processor.tokenizer.decode(target[:-1], output_offsets=True)["offsets"]
    assert [entry["timestamp"] for entry in offsets] == [(0.0, 0.84), (1.1, 2.5)], "as the processor reads them"
    assert front_end.needs_sequential_generate(prompt, 1) and front_end.needs_sequential_generate(
        front_end.prompt_ids(SPOKEN, 1), 2
    )
    assert not front_end.needs_sequential_generate(front_end.prompt_ids(SPOKEN, 1), 1)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ('[{"start": 0, "end": "1", "text": "a"}]', "needs numbers and a text"),
        ('[{"start": 1, "end": 1, "text": "a"}]', "1 to 1 s does not follow"),
        ('[{"start": 0, "end": 2, "text": "a"}, {"start": 1, "end": 3, "text": "b"}]', "1 to 3 s does not follow"),
    ],
)
def test_impossible_segments_are_refused(segments, message):
    line = f'{{"audio_path": "sample.wav", "transcript": "a b", "segments": {segments}}}'.encode()
    with pytest.raises(BadRow, match=message) as error:
        parse_row(line, str(SPEECH / "m.jsonl"), 1)
    assert error.value.reason == "bad_segment"
    other = b'{"audio_path": "sample.wav", "transcript": "a", "segments": ["x", 3]}'
    assert parse_row(other, str(SPEECH / "m.jsonl"), 1).segments == (), "the same key with another meaning"


def test_segments_have_to_fit_transcript_and_clip(front_end):
    segments = ((0.0, 1.0, "열이,"), (1.0, 2.5, "납니다"))
    sample = Sample("a", TASKS["asr"], "", "열이 납니다.", "a.wav", "ko", "m:1", segments=segments)
    front_end.prompt_ids(sample, round(2.45 * 16_000))
    with pytest.raises(BadRow, match=r"segments end at 2\.5 s, and the clip lasts 2\.00 s") as error:
        front_end.prompt_ids(sample, 2 * 16_000)
    assert error.value.reason == "bad_segment"
    assert front_end.target_ids(sample.answer, segments)
    with pytest.raises(BadRow, match="the segments say '열이, 납니다', and the transcript '열이 없다'") as error:
        front_end.target_ids("열이 없다", segments)
    assert error.value.reason == "segments_differ"


def test_times_of_a_faster_clip_are_those_of_its_audio(tmp_path):
    segments = [{"start": 0, "end": 0.4, "text": "열이"}, {"start": 0.4, "end": 1.0, "text": "납니다"}]
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    row = {"audio_path": "a.wav", "transcript": "열이 납니다", "language": "ko", "segments": segments}
    sample = parse_row(json.dumps(row).encode(), str(tmp_path / "m.jsonl"), 1)
    extractor = Extractor(WHISPER, FeatureSpec(waveform=WaveformAugmentation(num_variants=2, speeds=(1.25,))))
    (_, faster), _ = extractor.sample_rows(sample)
    shown = extractor.front_end.show(faster["target_ids"])
    assert shown == "<|0.00|> 열이<|0.32|><|0.32|> 납니다<|0.80|><|endoftext|>"


def test_front_end_survives_pickling(front_end):
    copy = pickle.loads(pickle.dumps(front_end))
    assert copy.prompt_ids(SPOKEN, 1) == front_end.prompt_ids(SPOKEN, 1) and copy.fingerprint == front_end.fingerprint
    assert torch.tensor(copy.target_ids("열")).equal(torch.tensor(front_end.target_ids("열")))
