"""Register the networks with timm: after `import scalablevit_pl.timm`, `timm.create_model` builds them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import nn

from scalablevit_pl.models import (
    ImageClassifier,
    InteractiveWindowSelfAttention,
    ScalableSelfAttention,
    ScalableViT,
    list_models,
)
from scalablevit_pl.models.blocks import DropPath
from scalablevit_pl.models.classifier import HeadName, default_pretrained_cfg
from scalablevit_pl.models.factory import MODELS
from scalablevit_pl.models.heads.classification import GlobalPool
from scalablevit_pl.models.scalablevit import check_image

__all__ = ["scalablevit_b", "scalablevit_l", "scalablevit_nano", "scalablevit_s"]

default_cfgs = generate_default_cfgs({name: default_pretrained_cfg(name) for name in list_models()})

# torch.fx cannot follow what depends on the size of a map.
for _module in (DropPath, InteractiveWindowSelfAttention, ScalableSelfAttention):
    register_notrace_module(_module)
register_notrace_function(check_image)  # type: ignore[no-untyped-call]


def _register(entry: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register an entry point once, since timm warns about registered names."""
    name = entry.__name__
    if is_model(name) and model_entrypoint(name).__module__ == __name__:
        return entry
    return register_model(entry)


def _build(
    name: str,
    num_classes: int,
    in_chans: int,
    head: HeadName | None = None,
    global_pool: GlobalPool = "avg",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **backbone: Any,
) -> ImageClassifier:
    """Build a size with some backbone arguments replaced.

    Raises:
        TypeError: If the backbone has no such argument.
        ValueError: If a value does not fit.
    """
    build, default_head = MODELS[name]
    with torch.device("meta"):  # for the size's arguments, not its weights
        arguments = build().config | backbone | {"in_channels": in_chans}
    with nullcontext() if device is None else torch.device(device):
        model = ImageClassifier(ScalableViT(**arguments), num_classes, head or default_head, name, global_pool)
    return model.to(dtype=dtype)


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """Build a network as timm does: an `ImageClassifier`, or with `features_only` timm's wrapper around one."""
    # The network's own name for timm's in_chans. timm's takes precedence: it overrides the description of weights.
    if "in_channels" in arguments:
        arguments.setdefault("in_chans", arguments.pop("in_channels"))
    model: nn.Module = build_model_with_cfg(
        partial(_build, name),
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )
    return model


@_register
def scalablevit_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a small ScalableViT for small images and tests; a size of this project, not of the paper."""
    return _create("scalablevit_nano", pretrained, kwargs)


@_register
def scalablevit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ScalableViT-S."""
    return _create("scalablevit_s", pretrained, kwargs)


@_register
def scalablevit_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ScalableViT-B."""
    return _create("scalablevit_b", pretrained, kwargs)


@_register
def scalablevit_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ScalableViT-L."""
    return _create("scalablevit_l", pretrained, kwargs)
