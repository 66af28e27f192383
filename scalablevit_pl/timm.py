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
    """Build a size with some backbone arguments replaced."""
    build, default_head = MODELS[name]
    with torch.device("meta"):  # for the size's arguments, not its weights
        arguments = build().config | backbone | {"in_channels": in_chans}
    with nullcontext() if device is None else torch.device(device):
        model = ImageClassifier(ScalableViT(**arguments), num_classes, head or default_head, name, global_pool)
    return model.to(dtype=dtype)


def _entry(name: str) -> Callable[..., nn.Module]:
    """Return timm's entry point of a size: it builds an `ImageClassifier`, or with `features_only` a wrapper of one."""

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        # The network's own name for timm's in_chans. timm's takes precedence: it overrides the description of weights.
        if "in_channels" in arguments:
            arguments.setdefault("in_chans", arguments.pop("in_channels"))
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        model: nn.Module = build_model_with_cfg(
            partial(_build, name), name, pretrained, feature_cfg=features, **arguments
        )
        return model

    build.__name__ = build.__qualname__ = name
    if not is_model(name) or model_entrypoint(name).__module__ != __name__:  # timm warns about a second registration
        register_model(build)
    return build


scalablevit_nano = _entry("scalablevit_nano")
scalablevit_s = _entry("scalablevit_s")
scalablevit_b = _entry("scalablevit_b")
scalablevit_l = _entry("scalablevit_l")
