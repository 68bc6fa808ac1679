"""The tiny Whisper's folder: its configurations and all files of a published Whisper folder.

It has every part of openai/whisper-small, each smaller, so code that works on it also works on the real one. Only the
window differs: 4 s instead of 30 s.
"""

from __future__ import annotations

from pathlib import Path

import torch
import train_tokenizer as tok
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

WINDOW_SEC, WINDOW_SAMPLES, WINDOW_FRAMES = 4, 64_000, 400  # 10 ms a frame, 20 ms a position
NUM_MEL_BINS, HIDDEN_SIZE, MAX_TARGET_POSITIONS = 80, 128, 128
# Text tokens that consist of these characters are never spoken; the published models suppress such tokens too.
NEVER_SPOKEN = set('"#()*+/:;<=>@[\\]^_`{|}~')


def whisper_config(tokenizer: WhisperTokenizer) -> WhisperConfig:
    """Build the model's configuration, about 1.2 million parameters."""
    return WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=NUM_MEL_BINS,
        d_model=HIDDEN_SIZE,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * HIDDEN_SIZE,
        decoder_ffn_dim=4 * HIDDEN_SIZE,
        max_source_positions=tok.WINDOW_POSITIONS,
        max_target_positions=MAX_TARGET_POSITIONS,
        median_filter_width=7,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(tok.START),
    )


def generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """Build the generation config of a multilingual Whisper with this tokenizer's ids."""
    id_of = tokenizer.convert_tokens_to_ids
    marks = [tok.START, tok.TRANSLATE, tok.TRANSCRIBE, "<|startoflm|>", tok.PREVIOUS, tok.NO_SPEECH]
    text_ids = range(tokenizer.eos_token_id)
    never_said = [i for i in text_ids if (text := tokenizer.decode([i]).strip()) and set(text) <= NEVER_SPOKEN]
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": id_of(f"<|{code}|>") for code in tok.LANGUAGE_CODES},
        task_to_id={"transcribe": id_of(tok.TRANSCRIBE), "translate": id_of(tok.TRANSLATE)},
        task="transcribe",  # otherwise generate omits the task from the prompt when it detects the language
        no_timestamps_token_id=id_of(tok.NO_TIMESTAMPS),
        prev_sot_token_id=id_of(tok.PREVIOUS),
        max_initial_timestamp_index=50,  # 1 s
        suppress_tokens=sorted([*never_said, *(id_of(mark) for mark in marks)]),
        begin_suppress_tokens=[tokenizer(" ", add_special_tokens=False).input_ids[0], tokenizer.eos_token_id],
        alignment_heads=[[1, head] for head in range(4)],
        max_length=MAX_TARGET_POSITIONS,
        return_timestamps=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=id_of(tok.START),
    )


def feature_extractor() -> WhisperFeatureExtractor:
    """Build the log-mel front end: Whisper's, with a 4 s window."""
    return WhisperFeatureExtractor(feature_size=NUM_MEL_BINS, chunk_length=WINDOW_SEC)


def write_processor(folder: Path) -> None:
    """Write the processor's files into the tokenizer's folder."""
    WhisperProcessor(feature_extractor(), WhisperTokenizer.from_pretrained(folder)).save_pretrained(folder)
    feature_extractor().save_pretrained(folder)  # the published folder has preprocessor_config.json as well


def write_weights(folder: Path, model: WhisperForConditionalGeneration) -> None:
    """Write float16 weights with a float32 config: half the bytes, and a loaded model computes in float32."""
    model.generation_config = generation_config(WhisperTokenizer.from_pretrained(folder))
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained makes it readable for its owner only


def build_model(folder: Path) -> WhisperForConditionalGeneration:
    """Build an untrained model from a fixed seed, for the tokenizer in ``folder``."""
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(whisper_config(WhisperTokenizer.from_pretrained(folder)))
