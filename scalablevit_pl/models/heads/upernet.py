"""UperNet, the heavier of the paper's heads for semantic segmentation, and its auxiliary head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models.blocks import initialize_weights
from scalablevit_pl.models.heads.layers import ConvNormReLU, build_pixel_classifier, merge_top_down, resize

AUXILIARY_LEVEL = 2  # of the map of stride 16


class UperNet(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid, and the fusion of all its levels (arXiv 1807.10221).

    Args:
        channels: Channels of the backbone's maps, fine to coarse.
        num_classes: Number of classes.
        width: Channels of all hidden maps.
        pool_sizes: Sides of the maps to which the coarsest map is pooled.
        dropout: Fraction of the channels that are dropped before the last layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 512,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pool_sizes = tuple(pool_sizes)
        self.pools = nn.ModuleList(ConvNormReLU(channels[-1], width, 1) for _ in pool_sizes)
        self.bottleneck = ConvNormReLU(channels[-1] + width * len(pool_sizes), width, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(size, width, 1) for size in channels[:-1])
        self.outputs = nn.ModuleList(ConvNormReLU(width, width, 3) for _ in channels[:-1])
        self.fusion = ConvNormReLU(width * len(channels), width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.apply(initialize_weights)
        self.classifier = build_pixel_classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits `(B, num_classes, H_0, W_0)` from maps `(B, C_i, H_i, W_i)`."""
        laterals = [lateral(features) for lateral, features in zip(self.laterals, maps[:-1], strict=True)]
        *fine, coarsest = merge_top_down([*laterals, self._pool(maps[-1])], "bilinear")
        levels = [output(features) for output, features in zip(self.outputs, fine, strict=True)] + [coarsest]
        fused = self.fusion(torch.cat([resize(features, maps[0]) for features in levels], dim=1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits

    def _pool(self, features: Tensor) -> Tensor:
        pooled = [
            resize(pool(F.adaptive_avg_pool2d(features, side)), features)
            for side, pool in zip(self.pool_sizes, self.pools, strict=True)
        ]
        context: Tensor = self.bottleneck(torch.cat([features, *pooled], dim=1))
        return context


class AuxiliaryHead(nn.Module):
    """One 3×3 convolution and the last layer on the map of stride 16: a second loss, in training only.

    Args:
        channels: Channels of the backbone's maps, fine to coarse.
        num_classes: Number of classes.
        width: Channels of the hidden map.
        dropout: Fraction of the channels that are dropped before the last layer.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvNormReLU(channels[AUXILIARY_LEVEL], width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.apply(initialize_weights)
        self.classifier = build_pixel_classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits `(B, num_classes, H_2, W_2)` from maps `(B, C_i, H_i, W_i)`."""
        logits: Tensor = self.classifier(self.dropout(self.conv(maps[AUXILIARY_LEVEL])))
        return logits
