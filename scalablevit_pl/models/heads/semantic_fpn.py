"""Semantic FPN, the lighter of the paper's heads for semantic segmentation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from scalablevit_pl.models.blocks import initialize_weights
from scalablevit_pl.models.heads.layers import ConvNormReLU, build_pixel_classifier, merge_top_down, resize


class SemanticFPN(nn.Module):
    """Feature pyramid whose levels are upsampled to the finest one, summed and classified (arXiv 1901.02446).

    Args:
        channels: Channels of the backbone's maps, fine to coarse.
        num_classes: Number of classes.
        width: Channels of the pyramid.
        level_width: Channels after the pyramid; by default half of `width`.
        dropout: Fraction of the channels that are dropped before the last layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 256,
        level_width: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        level_width = width // 2 if level_width is None else level_width
        self.laterals = nn.ModuleList(nn.Conv2d(size, width, 1) for size in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        # One convolution before each upsampling by two, and one for the finest level.
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvNormReLU(level_width if step else width, level_width, 3) for step in range(max(1, level)))
            for level in range(len(channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.apply(initialize_weights)
        self.classifier = build_pixel_classifier(level_width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits `(B, num_classes, H_0, W_0)` from maps `(B, C_i, H_i, W_i)`."""
        laterals = [lateral(features) for lateral, features in zip(self.laterals, maps, strict=True)]
        pyramid = merge_top_down(laterals, "nearest")
        levels = [self._upsample(self.outputs[index](pyramid[index]), index, maps) for index in range(len(maps))]
        logits: Tensor = self.classifier(self.dropout(sum(levels)))
        return logits

    def _upsample(self, features: Tensor, level: int, maps: Sequence[Tensor]) -> Tensor:
        """Bring a level of the pyramid to the size of the finest map."""
        convolutions: Any = self.levels[level]
        for step, convolution in enumerate(convolutions):
            features = convolution(features)
            if level:
                features = resize(features, maps[level - 1 - step])
        return features
