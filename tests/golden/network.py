"""The networks, weights and images that the golden numbers belong to."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model

SALT = "golden-v1"
DATA = Path(__file__).parent / "data"
SIZES = {"small": "scalablevit_s", "base": "scalablevit_b", "large": "scalablevit_l"}
TINY: dict[str, dict[str, Any]] = json.loads((DATA / "tiny_configs.json").read_text())


def build(name: str, **options: Any) -> ImageClassifier:
    if name in SIZES:
        return create_model(SIZES[name], **options)
    config = TINY[name]
    backbone = ScalableViT(
        config["embed_dims"],
        config["num_heads"],
        config["depths"],
        spatial_ratios=config["sr_ratios"],
        channel_ratios=config["c_ratios"],
        **options,
    )
    return ImageClassifier(backbone, config["num_classes"], "linear" if config.get("plain_head") else "mlp")


def fill(name: str) -> Iterator[tuple[str, Tensor]]:
    """Generate weights under the names of the released code, each from a seed of its own."""
    for key, shape in json.loads((DATA / f"{name}_keys.json").read_text()).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{SALT}/{key}".encode()))
        tensor = torch.randn(shape, generator=generator)
        if key.endswith(".bias"):
            tensor = 0.1 * tensor
        elif len(shape) == 1:
            tensor = 1 + 0.1 * tensor
        else:
            tensor = tensor / tensor[0].numel() ** 0.5
        yield key, tensor


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{SALT}/image".encode())))
