"""Logits of a few rows over a large vocabulary, on a CPU in float32.

There a token costs at least the reading of the output layer's weights. PyTorch's own product takes two to three times
as long for 4 to 16 rows; oneDNN's, with the weights laid out for it, takes about as long as the reading. The price is a
second copy of these weights, and sums that are added in another order.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch

MIN_OUTPUTS = 16_384
"""Smaller layers stay in the processor's cache, and gain nothing."""
MAX_ROWS = 64
_laid_out: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], torch.Tensor]] = WeakKeyDictionary()


def few_rows_linear(layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
    """What a layer gives for a few rows; to be called in inference mode.

    Args:
        layer: A Linear, or whatever stands in its place (LoRA, 8 bits): that is called as it is.
    Returns:
        Its outputs, shape (B, outputs).
    """
    if not (_pays(layer) and len(hidden_BD) <= MAX_ROWS and hidden_BD.is_inference()):
        return layer(hidden_BD)
    weights = layer.weight
    state = (weights.data_ptr(), weights._version)
    if _laid_out.get(layer, (None,))[0] != state:
        _laid_out[layer] = (state, torch.ops.mkldnn._reorder_linear_weight(weights, 8))
    return torch.ops.mkldnn._linear_pointwise(hidden_BD, _laid_out[layer][1], layer.bias, "none", [], "")


def _pays(layer: Any) -> bool:
    """Whether oneDNN is there and the layer is large, on a CPU, in float32, and will stay as it is."""
    if type(layer) is not torch.nn.Linear or layer.out_features < MIN_OUTPUTS:
        return False
    if layer._forward_pre_hooks or "forward" in vars(layer):  # somebody (ZeRO-3) fetches the weights for each call
        return False
    weights = layer.weight
    fits = weights.device.type == "cpu" and weights.dtype == torch.float32 and not weights.requires_grad
    # operators that torch.compile itself uses, and so not promised to stay
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return fits and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
