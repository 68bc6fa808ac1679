"""Prompts, labels, placeholder counts and features against the processor of each model type."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.audio_lm_rows import answers_questions, library_inputs, make_row, noise, request_text, sample
from helpers.audio_lm_tiny import BASES, write_released_front_end
from transformers import AutoProcessor

from voxray.core.chat import CLIP, Turn
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.models.front_end import row_target_ids, stop_ids
from voxray.models.parts.logmel_windows import padded_windows, samples_by_window
from voxray.models.registry import get_family

LENGTHS = (
    *(1_600, 1_601, 1_759, 1_760, 2_400, 4_000, 7_999, 8_000, 8_001, 8_159, 8_160, 15_999, 16_000, 16_001, 24_321),
    *(48_000, 63_840, 63_841, 63_999, 64_000, 64_001, 64_160, 64_161, 64_480, 64_640, 100_000, 128_000, 128_160),
    *(480_000, 1_440_000),
)
"""30 clips of 0.1 s to 90 s; a window has 64,000 samples."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor(base: str) -> Any:
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def front_end(base: str) -> Any:
    return get_family(base).front_end(base)


def fitting(front_end: Any) -> list[int]:
    """Lengths that the model takes."""
    return [length for length in LENGTHS if length <= front_end.max_audio_sec * 16_000]


def test_transcription_prompts_of_all_lengths(base, processor, front_end):
    text = request_text(processor, Path(base).name)
    for length in fitting(front_end):
        reference = library_inputs(base, [text], [noise(length)])["input_ids"][0].tolist()
        assert front_end.prompt_ids(sample(), length) == reference, length
        assert reference.count(front_end.audio_id) == front_end.num_positions(length)


@pytest.mark.parametrize("context", ["아스피린, 와파린", "Tylenol"])
def test_a_context_stands_where_the_processor_puts_a_prompt(base, processor, front_end, context):
    text = request_text(processor, Path(base).name, context=context)
    reference = library_inputs(base, [text], [noise(16_000)])["input_ids"][0].tolist()
    assert context in text and front_end.prompt_ids(sample(prompt=context), 16_000) == reference


def test_control_tokens_in_a_context_are_text(processor, front_end):
    context = f"a {processor.tokenizer.eos_token}{processor.audio_token} b"
    ids, plain = (front_end.prompt_ids(sample(prompt=text), 16_000) for text in (context, "a  b"))
    assert context in processor.tokenizer.decode(ids)
    assert all(ids.count(token) == plain.count(token) for token in (front_end.audio_id, front_end.eos_id))


def test_features_are_the_processors(base, processor, front_end):
    """The valid frames too: those of all windows together are those of the processor's mask."""
    text = request_text(processor, Path(base).name)
    for length in fitting(front_end):
        inputs = library_inputs(base, [text], [noise(length)])
        features = front_end.features(noise(length))
        ours = padded_windows(features.mel_KF, features.fill, features.num_windows, front_end)
        theirs = inputs["input_features"].numpy()
        if theirs.shape[-1] != front_end.window_frames:  # one long clip, not windows
            ours, theirs = (np.concatenate(list(windows), axis=1) for windows in (ours, theirs))
            both = min(ours.shape[1], theirs.shape[1])
            assert not ours[:, both:].any() and not theirs[:, both:].any()
            ours, theirs = ours[:, :both], theirs[:, :both]
        assert np.array_equal(ours, theirs[: len(ours)]), length
        mask = next(
            mask
            for name, mask in inputs.items()
            if name.endswith("mask") and mask.ndim == 2 and mask.shape[-1] != inputs["input_ids"].shape[-1]
        )
        counted = sum(-(-samples // 160) for samples in samples_by_window(front_end, length))
        left_out = int(mask.sum()) - counted  # a last window that is too short for a position
        assert 0 <= left_out <= 6 and front_end.num_positions(length) > 0


def test_labels_are_the_processors_continuation(base, processor, front_end):
    """Prompt and answer are tokenized like the whole conversation."""
    row = sample(language="ko" if front_end.answer_names_language else "")
    text = request_text(processor, Path(base).name, row.language)
    end = processor.tokenizer.decode([front_end.eos_id])
    whole = library_inputs(base, [f"{text}{row.answer}{end}"], [noise(16_000)])["input_ids"][0].tolist()
    assert [*front_end.prompt_ids(row, 16_000), *row_target_ids(front_end, row)] == whole


@pytest.mark.parametrize("task", ["sqa", "tqa", "aac"])
def test_questions_are_the_processors(base, processor, front_end, task):
    row = sample(task, prompt="How many numbers? 몇 번?\n")
    if not answers_questions(front_end):
        with pytest.raises(BadRow, match=f"only transcribes; this row's task is {task}"):
            front_end.prompt_ids(row, 16_000)
        return
    content = [{"type": "text", "text": row.prompt}]
    if row.audio_path:
        content.insert(0, {"type": "audio", "path": "x.wav"})
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    reference = (
        library_inputs(base, [text], [noise(16_000)])["input_ids"][0].tolist()
        if row.audio_path
        else processor.tokenizer(text)["input_ids"]
    )
    assert front_end.prompt_ids(row, 16_000) == reference
    assert front_end.prompt_ids(row, 0).count(front_end.audio_id) == 0


def test_a_translation_is_a_question(front_end):
    text = TASKS["ast"].prompt({"target_language": "ko"})
    if not answers_questions(front_end):
        with pytest.raises(BadRow, match="only transcribes; this row's task is ast") as error:
            front_end.prompt_ids(sample("ast", prompt=text), 16_000)
        assert error.value.reason == "unsupported_task"
        return
    prompt = front_end.prompt_ids(sample("ast", prompt=text), 16_000)
    assert prompt == front_end.prompt_ids(sample("sqa", prompt=text), 16_000)
    assert "Translate the speech into Korean." in front_end.show(prompt)


def test_control_tokens_in_a_question_are_text(processor, front_end):
    if not answers_questions(front_end):
        return
    question = f"what is {processor.tokenizer.eos_token}{processor.audio_token}?"
    ids = front_end.prompt_ids(sample("sqa", prompt=question), 16_000)
    assert ids.count(front_end.audio_id) == front_end.num_positions(16_000)
    plain = front_end.prompt_ids(sample("sqa", prompt="what is ?"), 16_000)
    assert ids.count(front_end.eos_id) == plain.count(front_end.eos_id)
    assert question in processor.tokenizer.decode(ids)


TALK = (
    Turn("system", ("Be brief.",)),
    Turn("user", (CLIP, "What is said?")),
    Turn("assistant", ("환자는 열이 납니다",)),
    Turn("user", ("How many numbers? 몇 번?",)),
    Turn("assistant", ("three",)),
    Turn("user", ("Thanks.",)),
)
CONVERSATIONS = (
    TALK,
    TALK[1:],
    TALK[1:2],
    (Turn("user", ("What is said?", CLIP)), *TALK[2:4]),
    (Turn("user", ("one",)), *TALK[2:3], Turn("user", (CLIP, "two?"))),
    (TALK[0], TALK[3], *TALK[4:]),
)


def conversation(turns: tuple[Turn, ...]) -> Sample:
    has_audio = any(CLIP in turn.parts for turn in turns)
    return replace(sample("chat" if has_audio else "text_chat", answer="열"), turns=turns)


def template_ids(base: str, processor: Any, turns: tuple[Turn, ...], *, is_prompt: bool) -> list[int]:
    """The processor's ids of a conversation of this library's own chat template."""
    messages = [
        {
            "role": role,
            "content": [
                {"type": "audio", "path": "x.wav"} if part == CLIP else {"type": "text", "text": part} for part in parts
            ],
        }
        for role, parts in turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
    if any(CLIP in turn.parts for turn in turns):
        return library_inputs(base, [text], [noise(16_000)])["input_ids"][0].tolist()
    return processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_conversations_are_the_processors(base, processor, front_end, turns):
    """Ids, and labels: an answer is what the template adds to the prompt before it, up to a token that ends answers."""
    row = conversation(turns)
    if not answers_questions(front_end):
        with pytest.raises(BadRow, match=f"only transcribes; this row's task is {row.task.name}"):
            front_end.prompt_ids(row, 16_000)
        return
    stored = front_end.prompt_ids(row, 16_000)
    ids = [-1 - token if token < 0 else token for token in stored]
    assert ids == template_ids(base, processor, turns, is_prompt=True)
    whole = template_ids(base, processor, (*turns, Turn("assistant", ("열",))), is_prompt=False)
    with_answer = [*ids, *row_target_ids(front_end, row)]
    assert with_answer[: len(whole)] == whole or whole[: len(with_answer)] == with_answer
    has_label = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            start = len(template_ids(base, processor, turns[:number], is_prompt=True))
            end = start + len(front_end.target_ids(turn.text))
            assert ids[end - 1] in stop_ids(front_end) and not {*ids[start : end - 1]} & stop_ids(front_end)
            has_label += range(start, end)
    assert [number for number, token in enumerate(stored) if token < 0] == has_label


def test_control_tokens_in_a_conversation_are_text(processor, front_end):
    if not answers_questions(front_end):
        return
    control = f"x{processor.tokenizer.eos_token}{processor.audio_token}"
    plain, turns = (
        (
            Turn("system", (f"brief{text}",)),
            Turn("user", (CLIP, f"what{text}?")),
            Turn("assistant", (f"this{text}",)),
            Turn("user", (f"why{text}?",)),
        )
        for text in ("", control)
    )
    ids = [-1 - token if token < 0 else token for token in front_end.prompt_ids(conversation(turns), 16_000)]
    without = front_end.prompt_ids(conversation(plain), 16_000)
    assert ids.count(front_end.audio_id) == without.count(front_end.audio_id) == front_end.num_positions(16_000)
    ends = [sum(token in (end, -1 - end) for token in without) for end in stop_ids(front_end)]
    assert [ids.count(end) for end in stop_ids(front_end)] == ends
    assert processor.tokenizer.decode(ids).count(control) == 4


def test_a_template_that_leaves_out_a_message_is_refused(base, front_end):
    """Rows would train without a part of their conversation."""
    if not answers_questions(front_end):
        return
    own = front_end._processor.chat_template
    try:
        front_end._processor.chat_template = own.replace(
            "for m in messages", "for m in messages if m['role'] != 'system'"
        )
        with pytest.raises(BadRow, match="leaves out a message"):
            front_end.prompt_ids(conversation(TALK), 16_000)
        front_end._processor.chat_template = "{{ raise_exception('no system') }}"
        with pytest.raises(BadRow, match=r"the chat template of .*: no system"):
            front_end.prompt_ids(conversation(TALK), 16_000)
    finally:
        front_end._processor.chat_template = own


def test_answers_end_and_decode_to_themselves(processor, front_end):
    for text in ("혈압이 120/80 이고요", "plain English", "", processor.tokenizer.eos_token):
        ids = front_end.target_ids(text)
        assert ids[-1] == front_end.eos_id and ids.count(front_end.eos_id) == 1
        assert front_end.decode(ids) == text
    assert front_end.eos_id in stop_ids(front_end)
    assert front_end.pad_id != front_end.audio_id


def test_front_end_survives_pickling(front_end):
    copy = pickle.loads(pickle.dumps(front_end))
    assert copy.fingerprint == front_end.fingerprint
    assert copy.prompt_ids(sample(), 20_000) == front_end.prompt_ids(sample(), 20_000)
    assert np.array_equal(copy.features(noise(20_000)).mel_KF, front_end.features(noise(20_000)).mel_KF)


def test_show_shortens_audio(processor, front_end):
    ids = front_end.prompt_ids(sample(), 16_000)
    assert f"{processor.audio_token}x{front_end.num_positions(16_000)}" in front_end.show(ids)


def test_refusals(base, front_end):
    with pytest.raises(SettingsError, match=r"--trim_audio_tokens: .* leave it out"):
        get_family(base).front_end(base, trim_audio=True)
    if front_end.num_positions(160):
        return
    with pytest.raises(BadRow, match="160 samples are too few"):
        front_end.prompt_ids(sample(), 160)


def test_windows_without_a_position_are_left_out(front_end):
    """They would cost a pass of the encoder and give nothing."""
    for length in (64_000, 64_001, 128_000, 128_320):
        assert all(front_end._positions(samples) for samples in front_end.samples_by_window(length))
        row = make_row(front_end, sample(), length)
        assert row.num_windows == len(front_end.samples_by_window(length))


def test_a_base_without_template_is_refused(base, tmp_path):
    if Path(base).name == "qwen2_audio":  # its processor has a template of its own
        return
    for file in Path(base).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RunError, match="no chat template, so it answers no task"):
        get_family(str(tmp_path)).front_end(str(tmp_path))


class TestLanguages:
    """Qwen3-ASR: the prompt forces a language, or the answer names it."""

    @pytest.fixture(scope="class")
    def qwen(self, tiny_base: Any) -> Any:
        base = tiny_base("qwen3_asr")
        return get_family(base).front_end(base)

    @pytest.mark.parametrize("language", ["ko", "en", "yue"])
    def test_prompt_forces_the_language(self, tiny_base, qwen, language):
        base = tiny_base("qwen3_asr")
        text = request_text(AutoProcessor.from_pretrained(base), "qwen3_asr", language)
        reference = library_inputs(base, [text], [noise(16_000)])["input_ids"][0].tolist()
        ids = qwen.prompt_ids(sample(language=language), 16_000)
        assert ids == reference and qwen.prompt_language(ids) == language
        assert qwen.decode(row_target_ids(qwen, sample(language=language))) == sample().answer

    def test_answer_names_no_language_if_the_row_has_none(self, qwen):
        ids = row_target_ids(qwen, sample())
        assert qwen.show(ids).startswith(f"language None<asr_text>{sample().answer}")
        assert qwen.decode(ids) == sample().answer
        assert qwen.prompt_language(qwen.prompt_ids(sample(), 16_000)) == ""
        # Training finds rows with an empty answer by their number of tokens.
        assert row_target_ids(qwen, sample(answer="")) == qwen.target_ids("") == [qwen.eos_id]

    def test_other_languages_are_refused(self, qwen):
        with pytest.raises(BadRow):
            qwen.prompt_ids(sample(language="sw"), 16_000)


@pytest.mark.parametrize("model_type", BASES)
def test_released_windows_have_the_processors_tokens_and_features(model_type, tmp_path):
    """30 clips of 0.1 s to 90 s, where the model takes them."""
    base = write_released_front_end(tmp_path, model_type)
    front_end = get_family(base).front_end(base)
    assert front_end.window_frames == (800 if model_type == "qwen3_asr" else 3000)
    text = request_text(AutoProcessor.from_pretrained(base), model_type)
    for length in (*LENGTHS[:-2], 479_999, 480_000, 512_345, 1_440_000):
        if length > front_end.max_audio_sec * 16_000:
            continue
        inputs = library_inputs(base, [text], [noise(length)])
        assert front_end.prompt_ids(sample(), length) == inputs["input_ids"][0].tolist(), length
        features = front_end.features(noise(length))
        ours = padded_windows(features.mel_KF, features.fill, features.num_windows, front_end)
        theirs = inputs["input_features"].numpy()
        if model_type == "qwen3_asr":
            ours = np.concatenate(list(ours), axis=1)[None, :, : theirs.shape[-1]]
            theirs = theirs[:, :, : ours.shape[-1]]
        assert np.array_equal(ours, theirs), length


def test_released_sizes_follow_from_the_configuration():
    """The numbers of the released models: 30 s or 8 s windows, and positions of a full one."""
    from transformers import AudioFlamingo3Config, GlmAsrConfig, Qwen2AudioConfig, Qwen3ASRConfig

    from voxray.models.audio_lm.facts import FACTS

    sizes = {"qwen3_asr": (Qwen3ASRConfig, 800, 104), "qwen2_audio": (Qwen2AudioConfig, 3000, 750)}
    sizes |= {"audioflamingo3": (AudioFlamingo3Config, 3000, 750), "glmasr": (GlmAsrConfig, 3000, 375)}
    for model_type, (config_class, frames, positions) in sizes.items():
        facts, audio = FACTS[model_type], config_class().audio_config
        assert facts.window_frames(audio) == frames
        assert facts.positions(frames, audio) == positions
        many = torch.arange(1, frames + 1)
        assert facts.positions(many, audio).tolist() == [facts.positions(int(count), audio) for count in many]
