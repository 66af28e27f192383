"""Backbones by their description: ScalableViT, and the networks of timm."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models.scalablevit import STRIDES, ScalableViT

# Swin for images of any size, with shifted windows in all stages, as the code of its paper for dense tasks has it.
ANY_SIZE = {"strict_img_size": False, "always_partition": True}


class TimmBackbone(nn.Module):
    """A network of timm that returns maps with strides 4, 8, 16 and 32 for images of any size.

    Images are padded with zeros, right and bottom, to multiples of 32, and the maps are cut accordingly.

    Args:
        model_name: timm's name of the network.
        in_channels: Channels of the images.
        drop_path_rate: Stochastic depth; by default timm's.
        pretrained: Load timm's weights, which may need a download.

    Attributes:
        channels: Channels of each map.
        strides: Strides of the maps.
        config: Plain values from which `build_backbone` builds the same network, with random weights.

    Raises:
        ValueError: If timm does not know the network, or it has no such maps.
    """

    strides = STRIDES
    model: Any

    def __init__(
        self,
        model_name: str,
        in_channels: int = 3,
        drop_path_rate: float | None = None,
        pretrained: bool = False,
    ) -> None:
        import timm  # a third of a second that our own networks do not need

        super().__init__()
        # A name may also mean a repository to download from.
        if not timm.is_model(model_name):
            raise ValueError(f"timm does not know the network {model_name!r}: timm.list_models() has the names")
        drop_path = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        arguments: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": in_channels, **drop_path}
        try:
            self.model = timm.create_model(model_name, **{**arguments, **ANY_SIZE})
        except TypeError:  # most networks know no fixed size and no such arguments
            self.model = timm.create_model(model_name, **arguments)
        reductions = [info["reduction"] for info in getattr(self.model, "feature_info", [])]
        if not set(STRIDES) <= set(reductions) or not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"{model_name!r} has maps with strides {sorted(set(reductions))}: choose one of timm's networks with "
                "4, 8, 16 and 32, such as swin_tiny_patch4_window7_224 or resnet50"
            )
        # The last of several maps with the same stride is the output of its stage.
        self.indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.channels: tuple[int, ...] = tuple(self.model.feature_info[index]["num_chs"] for index in self.indices)
        self.in_channels = in_channels
        self.config: dict[str, Any] = {
            "model_name": model_name,
            "in_channels": in_channels,
            "drop_path_rate": drop_path_rate,
        }
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute four maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))` from images `(B, in_channels, H, W)`."""
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        maps = self.model.forward_intermediates(
            padded, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        return [
            features[:, :, : -(-height // stride), : -(-width // stride)]
            for features, stride in zip(maps, STRIDES, strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, if timm's network supports it."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides biases and norms, that take no weight decay according to timm."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that sort the parameters by depth."""
        return prefix_patterns(self.model.group_matcher(coarse=coarse), r"model\.")


def build_backbone(config: Mapping[str, Any]) -> ScalableViT | TimmBackbone:
    """Build the backbone that its `config` describes, with random weights."""
    if "model_name" in config:
        return TimmBackbone(config["model_name"], config["in_channels"], config["drop_path_rate"])
    return ScalableViT(**config)


def prefix_patterns(patterns: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the patterns of a `group_matcher` for parameters whose names begin with a prefix."""

    def change(spec: Any) -> Any:
        if isinstance(spec, str):
            return f"^{prefix}(?:{spec.removeprefix('^')})"
        return spec and [(change(pattern), suffix) for pattern, suffix in spec]

    return {name: change(spec) for name, spec in patterns.items()}
