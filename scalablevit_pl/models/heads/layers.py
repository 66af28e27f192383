"""Layers and steps that dense heads share."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormReLU(nn.Module):
    """Convolution without bias that keeps the map's size, batch norm, ReLU.

    Args:
        in_channels: Channels of the incoming map.
        out_channels: Channels of the result.
        kernel_size: Side of the kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Transform `(B, in_channels, H, W)` to `(B, out_channels, H, W)`."""
        return F.relu(self.norm(self.conv(image)), inplace=True)


def resize(image: Tensor, like: Tensor, mode: str = "bilinear") -> Tensor:
    """Resize a map `(B, C, H, W)` to height and width of another one; `mode` is `bilinear` or `nearest`."""
    return F.interpolate(image, like.shape[-2:], mode=mode, align_corners=False if mode == "bilinear" else None)


def merge_top_down(maps: Sequence[Tensor], mode: str) -> list[Tensor]:
    """Add to each map `(B, C, H_i, W_i)` the sum of all coarser ones, resized step by step: the FPN's top-down path."""
    merged = [maps[-1]]
    for features in reversed(maps[:-1]):
        merged.insert(0, features + resize(merged[0], features, mode))
    return merged


def build_pixel_classifier(width: int, num_classes: int) -> nn.Conv2d:
    """Build the 1×1 convolution to the logits of the classes, with small weights: all classes begin equally likely."""
    classifier = nn.Conv2d(width, num_classes, 1)
    if not classifier.weight.is_meta:  # torch would import a thousand modules to notice that there is nothing to fill
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
    return classifier
