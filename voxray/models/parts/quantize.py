"""How a base's frozen weights are held: float32, bfloat16 or float16, and optionally 8 or 4 bits in the language model.

Only the language model's Linear layers are quantised. The audio encoder and the projector are a small part of the
memory, and what the encoder computes stays what ``--store encoder`` has stored; embeddings and ``lm_head`` are what
quantisation harms most.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from voxray.core.errors import RunError, one_line

QUANTIZED = ("8bit", "4bit")


def base_dtype(*, bf16: bool, fp16: bool) -> torch.dtype:
    """Type of the base weights that are not quantised, and of all its computing."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def quantization(kind: str, dtype: torch.dtype, keep: Sequence[str]) -> Any:
    """Configuration for ``from_pretrained``, or None for ``none``.

    8 bits are LLM.int8 (rows of int8, outlying columns in float16); 4 bits are NF4 in blocks of 64 whose scales are
    quantised again, computing in ``dtype``.

    Args:
        kind: ``none``, ``8bit`` or ``4bit``.
        keep: Names of modules that are not quantised, nor anything in them, wherever they stand in the model.
    Raises:
        RunError: bitsandbytes is not installed.
    Source: Dettmers et al., LLM.int8() (2022) and QLoRA (2023).
    """
    if kind not in QUANTIZED:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(f"--quantize {kind}: needs bitsandbytes, which is not installed (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    # transformers matches from the start of a name or at its end, so a bare "audio_tower" spares nothing within it
    skip = [rf".*\b{name}" for name in keep]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def load_frozen(
    model_class: Any, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str, keep: Sequence[str]
) -> Any:
    """Load a base with every weight frozen.

    Args:
        model_class: Its class in transformers.
        dtype: Type of the weights and of computing.
        quantize, keep: See ``quantization``.
    Raises:
        RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = quantization(quantize, dtype, keep)
    options: dict[str, Any] = {"quantization_config": config, "device_map": {"": device}} if config else {}
    try:
        model: Any = model_class.from_pretrained(model_id, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise RunError(f"--model_id {model_id}: cannot load the weights: {one_line(error)}") from None
    settle(model)
    return model.to(device).requires_grad_(False).eval()


def settle(model: Any) -> None:
    """Make quantised layers compute the same in training and evaluation, and after either.

    4 bits: on a CPU with AVX512-BF16 the first evaluation would repack the weights with scales in bfloat16, for good,
    and so a validation would change the training after it. 8 bits: PEFT's DoRA, on a CPU, replaces a weight by a copy
    without scales, over and over, and the layer would take those of the copy; here the scales stay in the layer's
    state, where its first forward pass would move them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.init_8bit_state()
            module.register_forward_pre_hook(_ignore_copies)


def _ignore_copies(layer: Any, inputs: Any) -> None:
    if layer.weight.SCB is None:
        layer.weight.CB = None
