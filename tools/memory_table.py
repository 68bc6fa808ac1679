"""Print which models can be trained on which GPU, as the Markdown table of the README.

python tools/memory_table.py

A cell holds the largest batches, of the powers of two up to 256, that preflight's memory model allows in bf16 and with
--quantize 4bit. They are for LoRA with rank 16 on the roles that the job trains by default, recomputed activations
(--grad_ckpt), clips of 30 s with 100 tokens of answer, and validation. No weights are needed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from voxray.core.units import GIB  # noqa: E402
from voxray.models.adapters.lora import add_lora  # noqa: E402
from voxray.models.audio_lm.facts import FACTS as AUDIO_LM  # noqa: E402
from voxray.models.audio_seq2seq.facts import FACTS as AUDIO_SEQ2SEQ  # noqa: E402
from voxray.models.audio_seq2seq.facts import encoder_config  # noqa: E402
from voxray.models.hf_files import build_on_meta  # noqa: E402
from voxray.models.interface import ModelFamily  # noqa: E402
from voxray.models.registry import families  # noqa: E402
from voxray.models.salmonn.config import BeatsConfig, SalmonnConfig, qformer_config  # noqa: E402
from voxray.models.salmonn.model import SalmonnForConditionalGeneration  # noqa: E402
from voxray.preflight.budget import GPU_SHARE  # noqa: E402
from voxray.preflight.memory import MemoryModel, Training  # noqa: E402
from voxray.preflight.shapes import ComputeConfig, PackShape  # noqa: E402
from voxray.recipes.build_model import checkpoint_gradients, set_modes  # noqa: E402

GPUS = (16, 24, 48, 80, 141)  # GiB
PRECISIONS = ("bf16", "4bit")
BATCHES = tuple(2**power for power in range(9))
CLIP_SEC, ANSWER_TOKENS, OTHER_PROMPT_TOKENS = 30, 100, 20
VALIDATION_ROWS, NEW_TOKENS = 8, 256

QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28}
WHISPER_SMALL = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
WHISPER_LARGE = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
VICUNA = {"vocab_size": 32_000}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Voxtral-Mini-3B": ("voxtral", {}),
    "Voxtral-Small-24B": ("voxtral", {"hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40}),
    "Qwen3-ASR-1.7B": ("qwen3_asr", {}),
    "Qwen2-Audio-7B": ("qwen2_audio", {"intermediate_size": 11_008, "vocab_size": 156_032}),
    "Audio-Flamingo-3": ("audioflamingo3", {**QWEN_7B, "num_key_value_heads": 4, "vocab_size": 152_064}),
    "GLM-ASR-Nano": ("glmasr", {}),
    "whisper-small": ("whisper", WHISPER_SMALL),
    "whisper-large-v3": ("whisper", {**WHISPER_LARGE, "num_mel_bins": 128}),
    "Cohere-Transcribe": ("cohere_asr", {}),
    "Canary-1B-v2": ("canary", {}),
    "SALMONN-7B": ("salmonn", {**VICUNA, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}),
    "SALMONN-13B": ("salmonn", {**VICUNA, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40}),
}
"""{name: (model type, sizes that differ from the defaults of transformers)}, of the language model or of all parts."""


def released_config(name: str) -> Any:
    """Configuration of a released model, without tokens."""
    import transformers

    model_type, sizes = MODELS[name]
    if model_type == "salmonn":
        large = WHISPER_LARGE | {key.replace("encoder", "decoder"): value for key, value in WHISPER_LARGE.items()}
        heads = sizes["hidden_size"] // 128
        text = transformers.LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
        qformer = qformer_config(width=768, heads=12, ffn=3072, layers=2, encoder_width=1280 + 768)
        parts: Any = {"beats_config": BeatsConfig(), "qformer_config": qformer, "text_config": text}
        return SalmonnConfig(speech_config=transformers.WhisperConfig(**large), **parts)
    facts = (AUDIO_LM | AUDIO_SEQ2SEQ)[model_type]
    config = getattr(transformers, facts.config)()
    if model_type == "whisper":
        decoder = {key.replace("encoder", "decoder"): value for key, value in sizes.items()}
        return transformers.WhisperConfig(**(sizes | decoder), max_target_positions=448)
    if not sizes:
        return config
    text = config.text_config.to_dict() | sizes
    text.pop("layer_types", None)  # of the default number of layers
    config.text_config = type(config.text_config).from_dict(text)
    return config


def build(name: str) -> tuple[Any, ModelFamily]:
    """The model with the LoRA layers that its job trains by default, on the meta device, and its family."""
    import transformers

    model_type, _ = MODELS[name]
    family: ModelFamily = families()[model_type]()()
    roles = tuple(family.roles) if model_type in AUDIO_SEQ2SEQ else ("projector", "llm")
    config, model_class = released_config(name), SalmonnForConditionalGeneration
    if model_type != "salmonn":
        model_class = getattr(transformers, (AUDIO_LM | AUDIO_SEQ2SEQ)[model_type].model)
    base = build_on_meta(lambda: model_class._from_config(config, dtype=torch.bfloat16), name)
    with torch.device("meta"):
        model = add_lora(base, family, roles, model_id=name, r=16, alpha=32, dropout=0.05)
    checkpoint_gradients(base)
    set_modes(model, family, roles)
    return model, family


def clip_sizes(name: str, config: Any) -> tuple[Any, int, int]:
    """What the memory model reads of a front end, prompt tokens of a clip, and its windows."""
    model_type, _ = MODELS[name]
    if model_type == "salmonn":
        sizes = {"encoder_positions": config.speech_config.max_source_positions, "encoder_dim": 1280 + 768}
        return SimpleNamespace(**sizes, cross_attention_positions=0), config.positions_per_clip, 1
    if model_type in AUDIO_LM:
        lm_facts, audio = AUDIO_LM[model_type], config.audio_config
        frames = lm_facts.window_frames(audio)
        positions, windows = int(lm_facts.positions(frames, audio)), -(-CLIP_SEC * 100 // frames)
        sizes = {"encoder_positions": positions * lm_facts.merged, "encoder_dim": audio.hidden_size}
        return SimpleNamespace(**sizes, cross_attention_positions=0), positions * windows, windows
    encoder = encoder_config(config)
    positions = int(AUDIO_SEQ2SEQ[model_type].positions(CLIP_SEC * 16_000, encoder))
    sizes = {"encoder_positions": positions, "encoder_dim": getattr(encoder, "hidden_size", 0)}
    return SimpleNamespace(**sizes, cross_attention_positions=positions), 0, 1


def needs(name: str) -> dict[str, dict[int, int]]:
    """{precision: {batch: bytes}}."""
    model, family = build(name)
    front_end, audio_tokens, windows = clip_sizes(name, model.get_base_model().config)
    prompt = audio_tokens + OTHER_PROMPT_TOKENS
    length, result = prompt + ANSWER_TOKENS, dict[str, dict[int, int]]()
    for precision in PRECISIONS:
        quantize = "none" if precision == "bf16" else precision
        computing = ComputeConfig(torch.bfloat16, on_gpu=True, grad_ckpt=True, quantize=quantize)
        memory = MemoryModel(model, family, front_end, computing, Training(grad_accum=4))
        by_batch = {}
        for batch in BATCHES:
            shape = PackShape(batch, batch * length, length, batch * windows, batch * ANSWER_TOKENS)
            rows = max(VALIDATION_ROWS, batch)
            validation = PackShape(rows, rows * prompt, prompt, rows * windows, rows)
            by_batch[batch] = memory.need(shape, validation, NEW_TOKENS).peak_bytes
        result[precision] = by_batch
    return result


def cell(by_precision: Mapping[str, Mapping[int, int]], gib: int) -> str:
    """The largest batches that fit into a GPU, in the order of ``PRECISIONS``; a dash where none does."""
    limit = gib * GIB * GPU_SHARE
    fitting = ([n for n, num_bytes in by_batch.items() if num_bytes <= limit] for by_batch in by_precision.values())
    return " / ".join(str(max(batches, default="-")) for batches in fitting)


def row(name: str) -> str:
    """The line of a model."""
    by_precision = needs(name)
    return f"| {name} | {' | '.join(cell(by_precision, gib) for gib in GPUS)} |"


if __name__ == "__main__":
    print(f"| model | {' | '.join(f'{gib} GiB' for gib in GPUS)} |", "| --- " * (1 + len(GPUS)) + "|", sep="\n")
    for model_name in MODELS:
        print(row(model_name))
