"""torch.compile for the layers of a language model: faster steps after a minute or more of compiling.

Each layer is compiled in place, so that no name changes, and all of them share one graph, so the time that compiling
takes does not grow with their number. Lengths are dynamic: another batch shape does not compile again.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from voxray.core.errors import RunError, one_line

OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropout draws what it draws without compiling, so that losses stay those of the seed."""


def compile_layers(language_model: Any, device: torch.device) -> None:
    """Compile the layers of a transformers language model when they are first called.

    Raises:
        RunError: Nothing can be compiled on this machine, for want of a C++ compiler or of Triton.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        if device.type == "cpu":
            get_cpp_compiler()  # the probe may be there already, from a time when there was one
        torch.compile(_probe, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # inductor's errors have no common type
        reason = one_line(error, 200)
        raise RunError(f"--compile: nothing can be compiled on this machine: {reason}") from None
    compiled = torch.compile(_call, dynamic=True, options=OPTIONS)
    for layer in language_model.layers:
        if layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = partial(_recompute, layer._gradient_checkpointing_func, compiled)
        else:
            layer.compile(dynamic=True, options=OPTIONS)
    language_model.voxray_compiled = True


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1


def _recompute(checkpoint: Any, compiled: Any, forward: partial[Any], *inputs: Any) -> Any:
    """Checkpoint a compiled layer: the other way round nothing is compiled where the layer calls ``left_out`` code."""
    return checkpoint(compiled, forward.func, forward.args, forward.keywords, *inputs)


def _call(function: Any, first: tuple[Any, ...], named: dict[str, Any], *inputs: Any) -> Any:
    return function(*first, *inputs, **named)


def is_compiled(language_model: Any) -> bool:
    return getattr(language_model, "voxray_compiled", False)


def uncompiled(language_model: Any) -> AbstractContextManager[Any]:
    """Within it compiled layers run as they are: they would be compiled anew for one token and a cache that grows."""
    return torch.compiler.set_stance("force_eager") if is_compiled(language_model) else nullcontext()


@cache
def left_out(function: Any) -> Any:
    """A function that compiled code calls as it is: one that loops as often as a batch says would compile each time."""
    return torch.compiler.disable(function)
