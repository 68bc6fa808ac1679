"""Parts of a model whose weights are handled one after the other, because all together may not fit in memory."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from voxray.models.hf_files import unwrap_peft


@dataclass(frozen=True, eq=False)
class LayerUnit:
    """Modules whose weights are in memory together, from the forward pass of the first one.

    Attributes:
        modules: One module; or the token embeddings and an output layer with the same weights.
        parameters: Their parameters.
    """

    modules: tuple[torch.nn.Module, ...]
    parameters: tuple[torch.nn.Parameter, ...]


def find_units(model: torch.nn.Module, whole: Collection[torch.nn.Parameter] = ()) -> list[LayerUnit]:
    """Find the units of a model: transformer layers, token embeddings, and single layers outside of them.

    Some parameters are in no unit: norms, position tables, and weights that several units share. Position tables inside
    a layer are not either, because BEATs reads them from outside of it.

    Args:
        whole: Parameters that no unit shall have.
    """
    base = unwrap_peft(model)
    embeddings = base.get_input_embeddings()
    modules = list(_unit_modules(base, embeddings))
    users: dict[torch.nn.Parameter, list[torch.nn.Module]] = {}
    for module in modules:
        for parameter in module.parameters():
            users.setdefault(parameter, []).append(module)
    tied = {module for module in users.get(embeddings.weight, ()) if module is not embeddings}
    tables = [module for module in base.modules() if type(module) is torch.nn.Embedding and module is not embeddings]
    units, excluded = [], {*whole, *(table.weight for table in tables)}
    for module in (each for each in modules if each not in tied):
        group = (embeddings, *tied) if module is embeddings else (module,)
        parameters = [each for each, layers in users.items() if each.ndim and set(layers) <= set(group)]
        if chosen := tuple(each for each in parameters if each not in excluded):
            units.append(LayerUnit(group, chosen))
    return units


def _unit_modules(module: torch.nn.Module, embeddings: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Modules of which each can be a unit, in the order in which the model holds them."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif child is embeddings or is_single_layer(child):
            yield child
        else:
            yield from _unit_modules(child, embeddings)


def is_single_layer(module: torch.nn.Module) -> bool:
    """Whether a module is one layer. With LoRA it is that as a whole, because DoRA reads the weights inside it."""
    return hasattr(module, "base_layer") or type(module) in (torch.nn.Linear, torch.nn.Conv1d)


def around_forward(unit: LayerUnit, context: Callable[[], AbstractContextManager[None]]) -> Iterator[RemovableHandle]:
    """Hooks that enter a new context before the forward pass of a unit, and leave it afterwards."""
    entered: list[AbstractContextManager[None]] = []

    def before(module: torch.nn.Module, inputs: Any) -> None:
        entered.append(context())
        entered[-1].__enter__()

    def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    yield unit.modules[0].register_forward_pre_hook(before)
    yield unit.modules[-1].register_forward_hook(after)
