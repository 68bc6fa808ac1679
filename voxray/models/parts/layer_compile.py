"""torch.compile for the layers of a transformers model: faster steps after a minute or more of compilation.

Each layer is compiled in place, so that no name changes. All layers share one graph, so compile time does not grow with
their number. Lengths are dynamic: another batch shape does not recompile.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from voxray.core.errors import RunError, one_line

COMPILE_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropout uses the same random numbers as without compiling, so that a seed gives the same losses."""


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile the layers of a transformers encoder or decoder when they are first called.

    Raises:
        RunError: Nothing can be compiled on this machine.
    """
    check_compiler(device, "--compile")
    compiled = torch.compile(_call, dynamic=True, options=COMPILE_OPTIONS)
    for layer in model.layers:
        if layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = partial(_recompute, layer._gradient_checkpointing_func, compiled)
        else:
            layer.compile(dynamic=True, options=COMPILE_OPTIONS)
    model.voxray_compiled = True


def check_compiler(device: torch.device, flag: str) -> None:
    """Check that torch.compile works.

    Raises:
        RunError: Nothing can be compiled on this machine, because a C++ compiler or Triton is missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        if device.type == "cpu":
            get_cpp_compiler()  # torch.compile might find the probe in its cache instead
        torch.compile(_probe, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # inductor's errors have no common base class
        reason = one_line(error, 200)
        raise RunError(f"{flag}: nothing can be compiled on this machine: {reason}") from None


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1


def _recompute(checkpoint: Any, compiled: Any, forward: partial[Any], *inputs: Any) -> Any:
    """Checkpoint a compiled layer.

    Compiling the checkpointed layer instead would compile nothing if it calls code that is excluded from compilation.
    """
    return checkpoint(compiled, forward.func, forward.args, forward.keywords, *inputs)


def _call(function: Any, first_args: tuple[Any, ...], kwargs: dict[str, Any], *args: Any) -> Any:
    return function(*first_args, *args, **kwargs)


def is_compiled(model: Any) -> bool:
    return getattr(model, "voxray_compiled", False)


def eager_mode(model: Any) -> AbstractContextManager[Any]:
    """Context in which compiled layers run uncompiled, because one token and a growing cache would recompile them."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


@cache
def exclude_from_compile(function: Any) -> Any:
    """Make compiled code call a function uncompiled: one whose loop depends on the batch would recompile each time."""
    return torch.compiler.disable(function)
