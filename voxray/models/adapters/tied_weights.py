"""Weights that several layers of a base share, such as those of the input and output embeddings."""

from collections.abc import Collection
from typing import Any

import torch

from voxray.models.hf_files import unwrap_peft


def untie(model: Any, names: Collection[str], *, unless_all: bool = False) -> None:
    """Give some parameters a copy of the values that they share, so that a change of them changes no other layer.

    The model's configuration then says that its embeddings are not tied, so both are saved and loaded.

    Args:
        names: Full names of the parameters in ``model``. Those that share nothing stay as they are.
        unless_all: Leave a group of parameters shared unless ``names`` has all of the group.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for group in groups.values():
        chosen = [name for name in group if name in names]
        if len(group) == 1 or not chosen or (unless_all and len(chosen) < len(group)):
            continue
        for name in chosen:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            shared = getattr(module, attribute)
            setattr(module, attribute, torch.nn.Parameter(shared.detach().clone(), shared.requires_grad))
        config = unwrap_peft(model).config
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
