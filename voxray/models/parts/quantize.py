"""Storage of a base's frozen weights: float32, bfloat16 or float16, and optionally 8 or 4 bits.

A family names the roles whose Linear layers are quantized. In Voxtral and SALMONN that is only the language model:
encoder and projector are a small part of the memory, and an unquantized encoder still computes the outputs that
``--store encoder`` has stored. Embeddings and output layer are never quantized, because that harms quality most.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from voxray.core.errors import RunError, library_errors
from voxray.models.hf_files import check_size

QUANTIZED = ("8bit", "4bit")


def base_dtype(*, bf16: bool, fp16: bool) -> torch.dtype:
    """Type of the weights that are not quantized, and of the computation."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def quantization_config(quantize: str, dtype: torch.dtype, keep: Sequence[str]) -> Any:
    """The ``quantization_config`` argument of ``from_pretrained``; None for ``none``.

    8 bits are LLM.int8 (rows of int8, outlier columns in float16). 4 bits are NF4 in blocks of 64 weights whose scales
    are quantized again, with computation in ``dtype``.

    Args:
        quantize: ``none``, ``8bit`` or ``4bit``.
        keep: Names of modules that are not quantized, with everything inside them, anywhere in the model.
    Raises:
        RunError: bitsandbytes is not installed.
    Source: Dettmers et al., LLM.int8() (2022) and QLoRA (2023).
    """
    if quantize not in QUANTIZED:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(f"--quantize {quantize}: needs bitsandbytes, which is not installed (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    # transformers matches at the start or the end of a name, so a bare "audio_tower" would not match modules inside it
    skip = [rf".*\b{name}" for name in keep]
    if quantize == "8bit":
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
    """Load a base in eval mode, with every weight frozen.

    Args:
        model_class: Its class in transformers.
        dtype: Type of the weights and of the computation.
        quantize, keep: See ``quantization_config``.
    Raises:
        RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = quantization_config(quantize, dtype, keep)
    options: dict[str, Any] = {"quantization_config": config} if config else {}
    if config or device.type != "cpu":  # convert each weight on its device, not all of them in the memory of the CPU
        options["device_map"] = {"": device}
    with library_errors(f"--model_id {model_id}: cannot load the model"):
        check_size(model_class, model_id)
        model: Any = model_class.from_pretrained(model_id, dtype=dtype, **options)
    stabilize_quantized_layers(model)
    return model.to(device).requires_grad_(False).eval()


def stabilize_quantized_layers(model: Any) -> None:
    """Make quantized layers compute the same in training and evaluation, in any order.

    4 bits: on a CPU with AVX512-BF16 the first evaluation would repack the weights with scales in bfloat16 for good, so
    a validation would change the training after it. 8 bits: on a CPU, PEFT's DoRA repeatedly replaces the weight by a
    copy without scales, and the layer would use the copy's. Here the scales move into the layer's state at once, which
    otherwise happens in its first forward pass, and copies are ignored.
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
