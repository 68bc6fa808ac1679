"""The engines by name."""

from collections.abc import Callable
from typing import Any

from voxray.config.engine_flags import STORES
from voxray.config.recipes import load_object
from voxray.generation.engines.engine import InferenceEngine, TransformersEngine
from voxray.generation.model import InferenceConfig, load_model
from voxray.models.front_end import FrontEnd

ENGINES = {
    "ct2": "voxray.generation.engines.ct2_engine:Ct2Engine",
    "vllm": "voxray.generation.engines.vllm_engine:VllmEngine",
    "server": "voxray.generation.engines.server:ServerEngine",
}
"""{name of ``InferenceConfig.engine``: class}. Each has ``check(config)``, which raises a SettingsError."""


def engine_store(engine: str) -> Any:
    """Kind of stored audio that an engine reads, unless rows hold another one that it reads too."""
    return STORES.get(engine, ("mel",))[0]


def check_engine(config: InferenceConfig) -> None:
    """Check that the engine has what it needs for this model, before rows are prepared.

    Raises:
        SettingsError: It cannot answer with this base or adapter, or is not installed.
    """
    if config.engine in ENGINES:
        load_object(ENGINES[config.engine]).check(config)


def load_engine(
    config: InferenceConfig, front_end: FrontEnd, *, skip_encoder: bool = False, num_processes: int = 1
) -> tuple[InferenceEngine, int]:
    """Load base and adapter; returns the engine and the number of adapter tensors loaded.

    Args:
        skip_encoder, num_processes: See ``load_model``.
    Raises:
        RunError, SettingsError: They cannot be loaded.
    """
    if config.engine in ENGINES:
        engine: Callable[..., Any] = load_object(ENGINES[config.engine])
        return engine(config, front_end), 0
    model, num_tensors = load_model(config, skip_encoder=skip_encoder, num_processes=num_processes)
    return TransformersEngine(model, front_end, config), num_tensors
