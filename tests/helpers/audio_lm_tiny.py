"""Tiny bases of the model types in ``audio_lm.facts.FACTS`` with random weights, and their processors.

Each base has every part of the released model, with windows of a few seconds. The tokenizers learn their pairs here,
and the chat templates have the layout of the released ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "환자는 혈압이 120/80 이고 열이 납니다. 다음 숫자는 무엇입니까?",
    "The patient has a fever. How many numbers are in the clip? What is said about it?",
    "일 이 삼 사 오 육 칠 팔 구 십, one two three four five",
    "language Korean English None Transcribe the input speech. Please transcribe this audio into text",
]
WINDOW_SEC = 4
SOURCES = 50 * WINDOW_SEC  # positions of a Whisper-type encoder in a window
BINS = 128
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TURNS = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] if c['type'] == 'audio' %}AUDIO{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Turns between marks, as Qwen's models have them."""
TRANSCRIPTS_ONLY = (
    "<|im_start|>system\n{% for m in messages if m['role'] == 'system' %}{{ m['content'][0]['text'] }}{% endfor %}"
    "<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    "{% for m in messages if m['role'] == 'assistant' %}<|im_start|>assistant\n{{ m['content'][0]['text'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3-ASR's layout: the text of a user's turn is left out."""
GLM_TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% for c in m['content'] %}{% if c['type'] == 'audio' %}<|begin_of_audio|><|pad|><|end_of_audio|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(special: list[str], ending: str, pad: str, plain: tuple[str, ...] = (), **names: str) -> Any:
    """A byte-level tokenizer with control tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=[])
    learner.train_from_iterator(TEXTS, trainer)
    learner.add_special_tokens(special)
    learner.add_tokens(list(plain))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learner, eos_token=ending, pad_token=pad, extra_special_tokens=names
    )


def _whisper_features() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=BINS, chunk_length=WINDOW_SEC, return_attention_mask=True)


def _text(kind: str, tokens: Any, **options: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return {"model_type": kind, "vocab_size": len(tokens), **TEXT, **ids, **options}


def _whisper_type(**options: Any) -> dict[str, Any]:
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    return {**sizes, "num_mel_bins": BINS, "max_source_positions": SOURCES, **options}


def _qwen3_asr() -> tuple[Any, Any]:
    names = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokens = tokenizer([*ENDS, *names.values()], "<|im_end|>", "<|endoftext|>", ("<asr_text>",), **names)
    processor = transformers.Qwen3ASRProcessor(transformers.Qwen3ASRFeatureExtractor(), tokens, TRANSCRIPTS_ONLY)
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    audio |= {"num_mel_bins": BINS, "output_dim": 64, "n_window_infer": 100 * WINDOW_SEC, "downsample_hidden_size": 8}
    config = transformers.Qwen3ASRConfig(
        audio_config={"model_type": "qwen3_asr_encoder", **audio},
        text_config=_text("qwen3", tokens, tie_word_embeddings=True),
        audio_token_id=processor.audio_token_id,
        eos_token_id=[tokens.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")],
        pad_token_id=tokens.pad_token_id,
    )
    return config, processor


def _qwen2_audio() -> tuple[Any, Any]:
    tokens = tokenizer([*ENDS, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], "<|im_end|>", "<|endoftext|>")
    template = TURNS.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>\n")
    processor = transformers.Qwen2AudioProcessor(_whisper_features(), tokens, template)
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **_whisper_type()},
        text_config=_text("qwen2", tokens),
        audio_token_index=processor.audio_token_id,
    )
    return config, processor


def _flamingo_audio() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "audioflamingo3_encoder", "num_mel_bins": BINS, "max_source_positions": SOURCES, **sizes}


def _audioflamingo3() -> tuple[Any, Any]:
    tokens = tokenizer([*ENDS, "<sound>"], "<|im_end|>", "<|endoftext|>")
    processor = transformers.AudioFlamingo3Processor(_whisper_features(), tokens, TURNS.replace("AUDIO", "<sound>"))
    config = transformers.AudioFlamingo3Config(
        audio_config=_flamingo_audio(),
        text_config=_text("qwen2", tokens),
        audio_token_id=processor.audio_token_id,
    )
    return config, processor


def _musicflamingo() -> tuple[Any, Any]:
    tokens = tokenizer([*ENDS, "<sound>", "<|sound_bos|>", "<|sound_eos|>"], "<|im_end|>", "<|endoftext|>")
    processor = transformers.MusicFlamingoProcessor(_whisper_features(), tokens, TURNS.replace("AUDIO", "<sound>"))
    config = transformers.MusicFlamingoConfig(
        audio_config=_flamingo_audio(),
        text_config=_text("qwen2", tokens),
        audio_token_id=processor.audio_token_id,
        audio_bos_token_id=processor.audio_bos_token_id,
        audio_eos_token_id=processor.audio_eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1200, "partial_rotary_factor": 0.25},
    )
    return config, processor


def _glmasr() -> tuple[Any, Any]:
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>"]
    tokens = tokenizer(special, "<|endoftext|>", "<|pad|>")  # the released one pads with the token of audio too
    processor = transformers.GlmAsrProcessor(_whisper_features(), tokens, GLM_TURNS)
    audio = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    audio |= {"model_type": "glmasr_encoder", "num_mel_bins": BINS, "max_position_embeddings": SOURCES}
    ends = [tokens.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>")]
    config = transformers.GlmAsrConfig(
        audio_config=audio,
        text_config=_text("llama", tokens, tie_word_embeddings=True, eos_token_id=ends),
        audio_token_id=processor.audio_token_id,
    )
    return config, processor


BASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_asr": _qwen3_asr,
    "qwen2_audio": _qwen2_audio,
    "audioflamingo3": _audioflamingo3,
    "musicflamingo": _musicflamingo,
    "glmasr": _glmasr,
}
"""{model type: function that returns configuration and processor}."""


def randomize(model: Any, std: float) -> None:
    """Draw all weights, biases and norms too, in sizes that make the answers differ. Sinusoids stay."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            torch.nn.init.normal_(weight, mean=float("norm" in name and "weight" in name), std=0.1)
        elif "embed_positions" not in name:
            torch.nn.init.normal_(weight, std=std)


def write_tiny(folder: Path, model_type: str) -> str:
    """Write a tiny base with random weights; returns its path as text."""
    from voxray.models.audio_lm.facts import FACTS

    config, processor = BASES[model_type]()
    torch.manual_seed(0)
    model = getattr(transformers, FACTS[model_type].model)(config)
    randomize(model, 0.08)
    config_ids = config.text_config
    eos = getattr(config, "eos_token_id", None) or config_ids.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=config_ids.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write_released_front_end(folder: Path, model_type: str) -> str:
    """Write configuration and processor alone, with the windows of the released models; returns the folder's path."""
    config, processor = BASES[model_type]()
    audio = config.audio_config
    for name, size in {"max_source_positions": 1500, "n_window_infer": 800}.items():
        if hasattr(audio, name):
            setattr(audio, name, size)
    if model_type == "glmasr":
        audio.max_position_embeddings = 1500
    if model_type != "qwen3_asr":
        processor.feature_extractor = transformers.WhisperFeatureExtractor(BINS, return_attention_mask=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
