"""Our prompts and features against VoxtralProcessor's."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, TINY
from transformers import VoxtralProcessor

from voxray.core.chat import CLIP, Turn
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.models.parts.logmel_windows import padded_windows
from voxray.models.voxtral.front_end import VoxtralFrontEnd

WINDOW_SAMPLES = 64_000  # the tiny model's 4 s
SHAPE = {"audio_kwargs": {"pad_to_multiple_of": WINDOW_SAMPLES, "max_source_positions": 400}}
LENGTHS = (1, 2, 160, 199, 200, 201, 400, 401, 7_999, 8_000, 8_001, 16_000, 63_800, 63_999, 64_000, 64_001, 100_000)


@pytest.fixture(scope="module")
def processor() -> VoxtralProcessor:
    return VoxtralProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def front_end() -> VoxtralFrontEnd:
    return VoxtralFrontEnd(TINY)


def noise(num_samples: int) -> np.ndarray:
    """Speech-like levels on the 16-bit grid, so that a WAV file holds them exactly."""
    generator = np.random.default_rng(num_samples)
    return (generator.integers(-8_000, 8_000, num_samples) / 32_768).astype(np.float32)


def sample(task: str, prompt: str = "", language: str = "") -> Sample:
    audio = "x.wav" if TASKS[task].has_audio else ""
    return Sample("id", TASKS[task], prompt, "", audio, language, "m.jsonl:1")


@pytest.mark.parametrize("language", ["ko", "en", ""])
@pytest.mark.parametrize("num_windows", [1, 2, 3])
def test_transcription_prompt(processor, front_end, language, num_windows):
    clip = noise((num_windows - 1) * WINDOW_SAMPLES + 9_000)
    request = {"audio": [clip], "format": ["wav"], "sampling_rate": 16_000, "model_id": "tiny"}
    reference = processor.apply_transcription_request(**request, language=language or None, **SHAPE)
    assert front_end.prompt_ids(sample("asr", language=language), len(clip)) == reference["input_ids"][0].tolist()


@pytest.mark.parametrize("question", ["마지막 숫자는 무엇입니까?", "How many numbers? ", "환자 120/80 😀\nnew line"])
def test_spoken_question_prompt(processor, front_end, question):
    content = [{"type": "audio", "path": str(next((SPEECH / "val").glob("*.wav")))}, {"type": "text", "text": question}]
    kwargs = {**SHAPE, "return_tensors": "pt", "return_dict": True, "tokenize": True}
    reference = processor.apply_chat_template([{"role": "user", "content": content}], processor_kwargs=kwargs)
    assert front_end.prompt_ids(sample("sqa", question), WINDOW_SAMPLES) == reference["input_ids"][0].tolist()


def test_text_question_prompt(processor, front_end):
    text = TASKS["tqa"].prompt({"instruction": "다음 숫자는?", "input": "일 이 삼", "output": "사"})
    assert text == "다음 숫자는?\n일 이 삼"
    reference = processor.apply_chat_template([{"role": "user", "content": text}])
    assert front_end.prompt_ids(sample("tqa", text), 0) == reference["input_ids"][0].tolist()


@pytest.mark.parametrize("text", ["혈압이 120/80 이고요", "plain English", "😀 emoji", "쀍 뷁"])
def test_answers_end_with_eos_and_decode_to_themselves(processor, front_end, text):
    ids = front_end.target_ids(text)
    assert ids[-1] == processor.tokenizer.eos_token_id == 2
    assert front_end.decode(ids) == text
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_control_tokens_have_voxtrals_ids(front_end):
    assert (front_end.audio_id, front_end.begin_audio_id, front_end.transcribe_id) == (24, 25, 34)
    assert (front_end.bos_id, front_end.eos_id, front_end.pad_id) == (1, 2, 11)


def test_golden_prompt(front_end):
    assert front_end.prompt_ids(sample("asr"), 1) == [1, 3, 25, *[24] * 50, 4, 34]


def test_windows_follow_the_models_configuration(front_end):
    assert (front_end.window_frames, front_end.positions_per_window, front_end.num_mel_bins) == (400, 50, 128)


def test_released_voxtral_has_375_positions_in_30_seconds(tmp_path):
    """The released model's numbers come from its configuration by the same arithmetic."""
    from transformers import VoxtralConfig, WhisperFeatureExtractor

    VoxtralConfig(audio_token_id=24).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_bytes((Path(TINY) / "tekken.json").read_bytes())
    full = VoxtralFrontEnd(str(tmp_path))
    assert (full.window_frames, full.positions_per_window, full.num_mel_bins) == (3_000, 375, 128)


def test_front_end_survives_pickling(front_end):
    copy = pickle.loads(pickle.dumps(front_end))
    assert copy.fingerprint == front_end.fingerprint
    assert copy.target_ids("열이 납니다") == front_end.target_ids("열이 납니다")


def test_shards_hold_the_processors_features(processor, front_end, tmp_path):
    """Every length from one sample to three windows: float16 of the processor's value, fill and padding included."""
    lines = []
    for length in (*LENGTHS, 3 * WINDOW_SAMPLES - 1, 3 * WINDOW_SAMPLES):
        soundfile.write(tmp_path / f"{length}.wav", noise(length), 16_000, subtype="PCM_16")
        lines.append(f'{{"audio_path": "{length}.wav", "transcript": "a", "id": "{length}"}}\n')
    (tmp_path / "m.jsonl").write_text("".join(lines))
    report = featurize([str(tmp_path / "m.jsonl")], Extractor(TINY), tmp_path / "f", rows_per_shard=4, use_ray=False)
    features = Features(report.folders)
    assert len(features) == len(lines)
    for number in range(len(features)):
        row = features.row(number)
        request = {"audio": [noise(int(row.id))], "format": ["wav"], "sampling_rate": 16_000, "model_id": "tiny"}
        reference = processor.apply_transcription_request(**request, **SHAPE)
        assert row.prompt_ids.tolist() == reference["input_ids"][0].tolist()
        expected = reference["input_features"].numpy()
        stored = padded_windows(row.audio, row.fill, row.num_windows, front_end)
        assert stored.shape == expected.shape
        assert np.abs(stored - expected).max() <= np.finfo(np.float16).eps, row.id
        ours = front_end.features(noise(int(row.id)))
        unrounded_KF = np.full((expected.shape[0] * 400, 128), ours.fill, np.float32)
        unrounded_KF[: len(ours.mel_KF)] = ours.mel_KF
        reference_KF = expected.transpose(0, 2, 1).reshape(-1, 128)
        if int(row.id) > 8_000:
            assert np.array_equal(unrounded_KF, reference_KF), row.id
        else:
            assert torch.allclose(torch.tensor(unrounded_KF), torch.tensor(reference_KF), atol=5e-7, rtol=0)


def test_other_preprocessors_are_refused(tmp_path):
    from transformers import VoxtralConfig, WhisperFeatureExtractor

    from voxray.core.errors import RunError

    VoxtralConfig.from_pretrained(TINY).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"feature_size 80, not 128"):
        VoxtralFrontEnd(str(tmp_path))


TALK = (
    Turn("user", (CLIP, "무엇이 들립니까?")),
    Turn("assistant", ("숫자 120/80 입니다.",)),
    Turn("user", ("How many? [INST]</s>",)),
    Turn("assistant", ("Five",)),
    Turn("user", ("Thanks.",)),
)
CONVERSATIONS = {
    "audio first": TALK,
    "text before audio": (Turn("user", ("들으세요:", CLIP, "무엇?")), *TALK[1:3]),
    "audio later": (Turn("user", ("Hello",)), Turn("assistant", ("Hi",)), Turn("user", ("What?", CLIP))),
    "one question": TALK[:1],
    "audio alone": (Turn("user", (CLIP,)),),
    "system": (Turn("system", ("짧게.",)), Turn("user", ("무엇?",)), *TALK[1:3]),
}


def mistral_ids(turns: tuple[Turn, ...]) -> list[int]:
    """Ids of mistral-common: as a prompt if the user's turn is the last one, or else as an example of fine-tuning."""
    from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.audio import Audio
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mode = ValidationMode.test if turns[-1].role == "user" else ValidationMode.finetuning
    clip = AudioChunk(input_audio=Audio(noise(9_000), 16_000, "wav").to_base64("wav"))
    messages = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    contents = [[clip if part == CLIP else TextChunk(text=part) for part in turn.parts] for turn in turns]
    request = ChatCompletionRequest(
        messages=[
            messages[turn.role](content=content if turn.role == "user" else turn.text)
            for turn, content in zip(turns, contents, strict=True)
        ]
    )
    return MistralTokenizer.from_file(f"{TINY}/tekken.json", mode=mode).encode_chat_completion(request).tokens


def conversation(turns: tuple[Turn, ...], answer: str = "열이 납니다") -> Sample:
    has_audio = any(CLIP in turn.parts for turn in turns)
    task, audio = TASKS["chat" if has_audio else "text_chat"], "x.wav" if has_audio else ""
    return Sample("id", task, "", answer, audio, "", "m.jsonl:1", turns=turns)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_those_of_mistral_common(front_end, name):
    """Tokens with a label are those by which mistral-common's ids grow with an answer."""
    turns = CONVERSATIONS[name]
    stored = front_end.prompt_ids(conversation(turns), 9_000)
    ids = [-1 - token if token < 0 else token for token in stored]
    assert ids == mistral_ids(turns)
    assert [*ids, *front_end.target_ids("열이 납니다")] == mistral_ids((*turns, Turn("assistant", ("열이 납니다",))))
    spans = [
        range(len(mistral_ids(turns[:number])), len(mistral_ids(turns[: number + 1])))
        for number, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
    assert [number for number, token in enumerate(stored) if token < 0] == [number for span in spans for number in span]


def test_a_conversation_is_the_processors(processor, front_end):
    path = str(next((SPEECH / "val").glob("*.wav")))
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "audio", "path": path} if part == CLIP else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in TALK
    ]
    kwargs = {**SHAPE, "return_tensors": "pt", "return_dict": True, "tokenize": True}
    reference = processor.apply_chat_template(messages, processor_kwargs=kwargs)["input_ids"][0].tolist()
    stored = front_end.prompt_ids(conversation(TALK), WINDOW_SAMPLES)
    assert [-1 - token if token < 0 else token for token in stored] == reference


def test_one_question_has_the_prompt_of_a_spoken_question(front_end):
    row = conversation((Turn("user", (CLIP, "무엇?")),))
    assert front_end.prompt_ids(row, 9_000) == front_end.prompt_ids(sample("sqa", "무엇?"), 9_000)


def test_a_system_message_beside_a_clip_is_refused_as_by_mistral_common(front_end):
    turns = (Turn("system", ("짧게.",)), *TALK[:1])
    with pytest.raises(BadRow, match="no system message beside a clip; put its text into the user's first message"):
        front_end.prompt_ids(conversation(turns), 9_000)
    with pytest.raises(ValueError, match=r"audio chunks in messages at indexes \[1\]. This is not allowed"):
        mistral_ids(turns)
