"""Prepare a network for a training: parts that it leaves as they are, and gradient checkpointing."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

FEATURES = "features"  # all but the last layer


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Exclude parts from training: modules as the state dict spells them, or `features` for all but the last layer."""
    for name in names:
        if name != FEATURES:
            _check_name(network, name)
        for module in frozen_modules(network, name):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze={list(names)} leaves nothing to train: freeze fewer parts")


def frozen_modules(network: nn.Module, name: str) -> list[nn.Module]:
    """List all modules of a frozen part; for `features` the containers of the last layer are among them."""
    if name != FEATURES:
        return list(network.get_submodule(name).modules())
    if not hasattr(network, "get_classifier"):
        raise ValueError(
            f"freeze={FEATURES!r} needs a network with a get_classifier method, which {type(network).__name__} does "
            "not have: name the modules to freeze instead"
        )
    last: Any = network.get_classifier()  # type: ignore[operator]
    layers = last if isinstance(last, tuple) else (last,)  # some of timm's have two
    trained = {module for layer in layers for module in layer.modules()}
    return [module for module in network.modules() if module not in trained]


def _check_name(network: nn.Module, name: str) -> None:
    modules = {key: module for key, module in network.named_modules(remove_duplicate=False) if key}
    valid = [key for key, module in modules.items() if any(True for _ in module.parameters())]
    if name not in valid:
        valid += [FEATURES] if hasattr(network, "get_classifier") else []
        reason = "has no parameters" if name in modules else f"is not a module of {type(network).__name__}"
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        remedy = f"did you mean {near[0]!r}?" if near else "omit it"
        raise ValueError(f"freeze names {name!r}, which {reason}: {remedy}")


def checkpoint_gradients(network: nn.Module) -> None:
    """Switch gradient checkpointing on."""
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:  # all three occur in timm
        raise ValueError(
            f"{type(network).__name__} does not support grad_checkpointing: switch it off, and save memory by a "
            "smaller --data.batch_size with more --trainer.accumulate_grad_batches"
        ) from error
