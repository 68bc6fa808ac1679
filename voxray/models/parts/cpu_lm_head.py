"""The output layer for a few rows over a large vocabulary, on a CPU in float32.

Each token costs at least one pass over the output layer's weights. PyTorch's product takes two to three times as long
as that for 4 to 16 rows; oneDNN's, with the weights in its own layout, takes about as long. In return it needs a second
copy of the weights, and it sums in another order.

Measured on the 30 s Voxtral of benchmarks/evaluate.py (131,072 tokens, batches of 8 rows, one thread): generation
takes 31 % more CPU time without this module. Perplexity does not use it.

Shape letters: B rows, D width.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch

MIN_OUTPUTS = 16_384
"""Smaller layers fit into the processor's cache and gain nothing."""
MAX_ROWS = 64
_reordered_weights: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], torch.Tensor]] = WeakKeyDictionary()


def few_rows_linear(layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
    """Apply an output layer to a few rows. It is faster than ``layer`` in inference mode only.

    Args:
        layer: A Linear, or a module in its place (LoRA, 8 bits), which is called as usual.
    Returns:
        Outputs, shape (B, outputs).
    """
    is_compiling = torch.compiler.is_compiling()  # torch.compile does not know these operators
    if is_compiling or not (_is_supported(layer) and len(hidden_BD) <= MAX_ROWS and hidden_BD.is_inference()):
        return layer(hidden_BD)
    weights = layer.weight
    version = (weights.data_ptr(), weights._version)
    if _reordered_weights.get(layer, (None,))[0] != version:
        _reordered_weights[layer] = (version, torch.ops.mkldnn._reorder_linear_weight(weights, 8))
    return torch.ops.mkldnn._linear_pointwise(hidden_BD, _reordered_weights[layer][1], layer.bias, "none", [], "")


def _is_supported(layer: Any) -> bool:
    """Whether the layer is a large frozen Linear in float32 on a CPU, and oneDNN is available."""
    if type(layer) is not torch.nn.Linear or layer.out_features < MIN_OUTPUTS:
        return False
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):  # ZeRO-3 gathers the weights
        return False
    weights = layer.weight
    supported = weights.device.type == "cpu" and weights.dtype == torch.float32 and not weights.requires_grad
    # Private operators of torch.compile, which may disappear from a later version of PyTorch.
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return supported and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
