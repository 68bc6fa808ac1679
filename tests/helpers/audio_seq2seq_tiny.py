"""Tiny bases of the model types in ``audio_seq2seq.facts.FACTS`` with random weights, and their processors.

Each base has every part of the released model. The tokenizers learn their pairs here; prompts have the layout of the
released ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from helpers.audio_lm_tiny import randomize, tokenizer

BINS = 16
CONTEXT = ["<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>"]
OPTIONS = ["<|pnc|>", "<|nopnc|>", "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"]
CANARY_PROMPT = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}"
    "<|startofcontext|><|startoftranscript|><|emo:undefined|><|{{ c['source_language'] }}|>"
    "<|{{ c['target_language'] }}|>{% if c['punctuation'] %}<|pnc|>{% else %}<|nopnc|>{% endif %}"
    "<|noitn|><|notimestamp|><|nodiarize|>{% endfor %}{% endfor %}"
)
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_mel_bins": BINS,
    "subsampling_conv_channels": 8,
}
DECODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


def _prompted_tokenizer(languages: Any) -> Any:
    special = ["<pad>", "<eos>", "<bos>", "▁", *CONTEXT, *OPTIONS, *(f"<|{code}|>" for code in sorted(languages))]
    return tokenizer(special, "<eos>", "<pad>")


def _ids(tokens: Any) -> dict[str, Any]:
    bos = tokens.convert_tokens_to_ids("<bos>")
    ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": bos}
    return ids | {"vocab_size": len(tokens)}


def _cohere_asr() -> tuple[Any, Any]:
    from transformers.models.cohere_asr.processing_cohere_asr import LANGUAGES

    tokens = _prompted_tokenizer(LANGUAGES)
    processor = transformers.CohereAsrProcessor(transformers.CohereAsrFeatureExtractor(feature_size=BINS), tokens)
    start = tokens.convert_tokens_to_ids("▁")
    config = transformers.CohereAsrConfig(
        encoder_config=ENCODER, decoder_start_token_id=start, **DECODER, **_ids(tokens)
    )
    return config, processor


def _canary() -> tuple[Any, Any]:
    from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME

    tokens = _prompted_tokenizer(LANGUAGE_CODE_TO_NAME)
    extractor = transformers.ParakeetFeatureExtractor(feature_size=BINS)
    processor = transformers.CanaryProcessor(extractor, tokens, CANARY_PROMPT)
    encoder = {**ENCODER, "model_type": "parakeet_encoder", "layerdrop": 0.1}  # NeMo trains with dropout
    decoder = {**DECODER, "hidden_size": 32, "num_key_value_heads": 4, "head_dim": 8, **_ids(tokens)}
    config = transformers.CanaryConfig(encoder_config=encoder, decoder_config=decoder, **_ids(tokens))
    config.decoder_start_token_id = tokens.convert_tokens_to_ids("<|startofcontext|>")
    return config, processor


def _moonshine() -> tuple[Any, Any]:
    tokens = tokenizer(["<unk>", "<s>", "</s>"], "</s>", "</s>")
    processor = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(do_normalize=False), tokens)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 194}
    sizes |= {f"{part}_num_{name}": 2 for part in ("encoder", "decoder") for name in ("hidden_layers",)}
    sizes |= {f"{part}_num_attention_heads": 4 for part in ("encoder", "decoder")}
    start, end = tokens.convert_tokens_to_ids(["<s>", "</s>"])
    ids = {"bos_token_id": start, "decoder_start_token_id": start, "eos_token_id": end, "vocab_size": len(tokens)}
    return transformers.MoonshineConfig(**sizes, **ids), processor


BASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "cohere_asr": _cohere_asr,
    "canary": _canary,
    "moonshine": _moonshine,
}
"""{model type: function that returns configuration and processor}."""


def write_tiny_seq2seq(folder: Path, model_type: str) -> str:
    """Write a tiny base with random weights; returns its path as text."""
    from voxray.models.audio_seq2seq.facts import FACTS

    config, processor = BASES[model_type]()
    torch.manual_seed(0)
    model = getattr(transformers, FACTS[model_type].model)(config)
    randomize(model, 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer, std=0.3)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def library_inputs(base: str, clips: list[np.ndarray], language: str) -> dict[str, Any]:
    """The processor's inputs for clips, and the prompt of a transcription."""
    processor = transformers.AutoProcessor.from_pretrained(base)
    model_type = Path(base).name
    if model_type == "moonshine":
        return dict(processor(clips, sampling_rate=16_000, return_tensors="pt", padding=True))
    if model_type == "canary":
        text = processor.apply_transcription_request(["x.wav"] * len(clips), source_language=language, tokenize=False)
        return dict(processor(audio=clips, text=text, sampling_rate=16_000))
    inputs = dict(processor(clips, language=language, sampling_rate=16_000))
    inputs.pop("audio_chunk_index")
    return inputs
