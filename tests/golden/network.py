"""The networks whose numbers are stored here, built with this package."""

import json
from pathlib import Path
from typing import Any

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model

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
