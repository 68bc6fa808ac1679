"""torch.compile in tests."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def fresh() -> Any:
    """Remove compiled code of other tests before and after."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and differentiate graphs as usual, but run them eagerly, which takes seconds and needs no compiler."""
    real = torch.compile

    def captured(function: Any, *, dynamic: bool, options: Any = None) -> Any:
        return real(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", captured)
