"""A tiny Voxtral for tests, the demo and debug configs.

It has every part of the 3B model (Whisper-type encoder, four-frame projector, Llama with grouped queries, untied output
layer), each a few thousand times smaller, so code that works on it also fits the shapes of the real one. Windows are
4 s instead of 30 s, which keeps a CPU step short.
"""

from __future__ import annotations

from transformers import VoxtralConfig

WINDOW_SEC = 4
WINDOW_SAMPLES = WINDOW_SEC * 16_000  # 64,000
WINDOW_FRAMES = WINDOW_SAMPLES // 160  # 400 mel frames, 10 ms hop
WINDOW_POSITIONS = WINDOW_FRAMES // 2  # 200 encoder positions, the second convolution has stride 2
WINDOW_TOKENS = WINDOW_POSITIONS // 4  # 50 LLM positions, the projector joins four encoder positions

HIDDEN_SIZE = 128
AUDIO_TOKEN_ID = 24  # [AUDIO], as in the published models
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 1, 2, 11


def tiny_voxtral_config(vocab_size: int) -> VoxtralConfig:
    """Build the configuration of a Voxtral with about two million parameters (vocabulary of 4,096).

    The encoder's ``intermediate_size`` must be four times ``hidden_size``, because the model reshapes
    ``(B, 200, hidden_size)`` to ``(B * 50, intermediate_size)`` before the projector.

    Args:
        vocab_size: Number of token ids of the tokenizer, special ones included.
    Raises:
        ValueError: ``vocab_size`` does not include the audio token.
    Source: transformers ``models/voxtral`` (the reshape in ``get_audio_features``).
    """
    if vocab_size <= AUDIO_TOKEN_ID:
        raise ValueError(f"vocab_size must exceed the audio token id {AUDIO_TOKEN_ID}, got {vocab_size}")
    audio_config = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 4 * HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_mel_bins": 128,
        "max_source_positions": WINDOW_POSITIONS,
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 3 * HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
    }
    return VoxtralConfig(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_id=AUDIO_TOKEN_ID,
        projector_hidden_act="gelu",
    )
