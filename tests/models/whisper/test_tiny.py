"""transformers loads the tiny Whisper in assets/ with its own classes, and it transcribes the speech that it knows."""

import json

import jiwer
import numpy as np
import pytest
import soundfile
from conftest import ASSETS, manifest, read_rows
from transformers import (
    AutoProcessor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

WHISPER = ASSETS / "whisper-tiny"
SAMPLE_RATE_HZ = 16_000

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(WHISPER).eval()


@pytest.fixture(scope="module")
def processor() -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(WHISPER)


@pytest.fixture(scope="module")
def known_voices() -> list[tuple[dict, np.ndarray]]:
    """Rows of base.val with their clips: unseen texts in voices of the training set, Korean and English."""
    return [(row, soundfile.read(row["audio_path"], dtype="float32")[0]) for row in read_rows(manifest("base.val"))]


def error_rate(references: list[str], transcripts: list[str]) -> float:
    """Character error rate without spaces."""
    return jiwer.cer([text.replace(" ", "") for text in references], [text.replace(" ", "") for text in transcripts])


def test_the_folder_is_complete(model, processor):
    assert isinstance(AutoProcessor.from_pretrained(WHISPER), WhisperProcessor)
    assert processor.feature_extractor.nb_max_frames == 2 * model.config.max_source_positions == 400
    assert model.config.num_mel_bins == processor.feature_extractor.feature_size == 80
    assert model.config.vocab_size == len(processor.tokenizer)
    assert {str(weights.dtype) for weights in model.parameters()} == {"torch.float32"}
    assert model.proj_out.weight.data_ptr() == model.model.decoder.embed_tokens.weight.data_ptr()
    assert sum(path.stat().st_size for path in WHISPER.iterdir()) < 5e6


def test_special_tokens_have_the_ids_that_transformers_expects(model, processor):
    tokenizer, settings = processor.tokenizer, model.generation_config
    tokenizer.set_prefix_tokens(language="ko", task="transcribe", predict_timestamps=False)  # computes its ids itself
    start, korean, transcribe, no_timestamps = tokenizer.prefix_tokens
    assert settings.decoder_start_token_id == model.config.decoder_start_token_id == start
    assert settings.lang_to_id["<|ko|>"] == korean and settings.task_to_id["transcribe"] == transcribe
    assert settings.no_timestamps_token_id == no_timestamps
    assert {f"<|{code}|>" for code in list(LANGUAGES)[:99]} == set(settings.lang_to_id)
    for config in (settings, model.config):
        assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id == start - 1
    token_ids = {
        "<|startofprev|>": settings.prev_sot_token_id,
        "<|0.00|>": no_timestamps + 1,
        "<|4.00|>": len(tokenizer) - 1,
    }
    assert tokenizer.convert_tokens_to_ids([*token_ids]) == [*token_ids.values()]
    assert tokenizer.convert_tokens_to_ids("<|nospeech|>") == no_timestamps - 1  # WhisperNoSpeechDetection relies on it
    assert {start, *settings.task_to_id.values()} < set(settings.suppress_tokens)
    assert settings.begin_suppress_tokens == [
        *tokenizer(" ", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize(
    "text", ["머리가 많이 아픕니다", " since this morning", "뷁 漢字 🙂 naïve\n\t", "<|0.00|", "  a  b "]
)
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_older_vocabulary_files_give_the_same_tokens(processor):
    older = WhisperTokenizer(
        vocab=json.loads((WHISPER / "vocab.json").read_text(encoding="utf-8")),
        merges=[tuple(line.split(" ")) for line in (WHISPER / "merges.txt").read_text("utf-8").splitlines()[1:]],
    )
    for text in ("환자 번호 삼 오 이", " my head hurts", "안녕"):
        assert older.tokenize(text) == processor.tokenizer.tokenize(text)
    added = json.loads((WHISPER / "added_tokens.json").read_text(encoding="utf-8"))
    assert added == {k: v for k, v in processor.tokenizer.get_added_vocab().items() if k != "<|endoftext|>"}


def test_known_voices_are_transcribed_and_their_language_is_detected(model, processor, known_voices):
    rows, clips = zip(*known_voices, strict=True)
    inputs = processor(list(clips), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
    truth, languages = [row["transcript"] for row in rows], [row["language"] for row in rows]
    detected = processor.tokenizer.convert_ids_to_tokens(model.detect_language(inputs))
    assert detected == [f"<|{language}|>" for language in languages]
    for with_timestamps in (False, True):
        ids = model.generate(
            input_features=inputs, language=languages, task="transcribe", return_timestamps=with_timestamps
        )
        assert error_rate(truth, processor.batch_decode(ids, skip_special_tokens=True)) < 0.05


def test_the_pipeline_detects_the_language_and_transcribes(known_voices):
    row, clip = known_voices[3]
    transcriber = pipeline("automatic-speech-recognition", model=str(WHISPER))
    output = transcriber({"raw": clip, "sampling_rate": SAMPLE_RATE_HZ}, return_timestamps=True)
    assert output["text"].strip() == row["transcript"]
    [(start, end)] = [chunk["timestamp"] for chunk in output["chunks"]]
    assert start == pytest.approx(0, abs=0.1) and end == pytest.approx(len(clip) / SAMPLE_RATE_HZ, abs=0.25)


@pytest.mark.parametrize("language", ["ko", "en"])
def test_a_long_recording_is_transcribed_in_order(model, processor, known_voices, language):
    pairs = [pair for pair in known_voices if pair[0]["language"] == language][:6]
    pause = np.zeros(SAMPLE_RATE_HZ // 2, np.float32)
    samples = np.concatenate([part for _, clip in pairs for part in (clip, pause)])
    assert len(samples) > 10 * SAMPLE_RATE_HZ  # three windows at least
    inputs = processor(
        samples,
        sampling_rate=SAMPLE_RATE_HZ,
        truncation=False,
        padding="longest",
        return_attention_mask=True,
        return_tensors="pt",
    )
    output = model.generate(
        **inputs, language=language, task="transcribe", return_timestamps=True, return_segments=True
    )
    text = processor.decode(output["sequences"][0], skip_special_tokens=True)
    assert error_rate([" ".join(row["transcript"] for row, _ in pairs)], [text]) < 0.15
    starts = [float(segment["start"]) for segment in output["segments"][0]]
    assert starts == sorted(starts) and len(starts) == len(pairs)


def test_silence_gives_nospeech(model, processor):
    silence = np.zeros(2 * SAMPLE_RATE_HZ, np.float32)
    inputs = processor(silence, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
    start = model.generation_config.decoder_start_token_id
    logits = model(input_features=inputs, decoder_input_ids=inputs.new_full((1, 1), start).long()).logits
    assert processor.tokenizer.decode(logits[0, -1].argmax()) == "<|nospeech|>"
