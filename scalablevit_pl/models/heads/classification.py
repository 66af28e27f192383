"""Classification heads: from the last map to logits."""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models.blocks import initialize_weights

GlobalPool = Literal["avg", ""]


class LinearHead(nn.Module):
    """LayerNorm, mean over tokens, one linear layer.

    Args:
        channels: Channels of the backbone's maps; the last one counts.
        num_classes: Number of logits; 0 for no last layer.
        global_pool: `avg`, or empty for an output at every token.

    Attributes:
        num_features: Channels that the last linear layer sees.

    Raises:
        ValueError: If the number of classes is negative or the pooling is unknown.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, global_pool: GlobalPool = "avg") -> None:
        super().__init__()
        self.global_pool = _checked_pool(global_pool)
        self.norm: nn.Module = nn.LayerNorm(channels[-1], eps=1e-6)
        self.num_features = self._build_hidden(channels[-1])
        self.fc = _build_last(self.num_features, num_classes)
        self.apply(initialize_weights)

    def _build_hidden(self, dim: int) -> int:
        """Build the layers between pooling and last layer, and return their channels."""
        return dim

    def normalize(self, image: Tensor) -> Tensor:
        """Normalize a last map `(B, C, H, W)` to tokens `(B, H, W, C)`."""
        tokens: Tensor = self.norm(image.permute(0, 2, 3, 1))
        return tokens

    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """Normalize and average the tokens of the last map `(B, C, H, W)`: `(B, C)`, without pooling `(B, H, W, C)`."""
        tokens = self.normalize(maps[-1])
        return tokens.mean((1, 2)) if self.global_pool else tokens

    def pre_logits(self, pooled: Tensor) -> Tensor:
        """Compute the input of the last linear layer from pooled features `(…, C)`."""
        return pooled

    def forward(self, maps: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Compute logits from the last map `(B, C, H, W)`.

        Args:
            maps: The backbone's maps.
            pre_logits: Omit the last layer.

        Returns:
            `(B, num_classes)`, or `(B, num_classes, H, W)` without pooling; `num_features` channels without the last
            layer.
        """
        features = self.pre_logits(self.pool(maps))
        output: Tensor = features if pre_logits else self.fc(features)
        return output if self.global_pool else output.permute(0, 3, 1, 2)

    def reset(self, num_classes: int, global_pool: GlobalPool | None, like: Tensor) -> None:
        """Replace the last layer, on the device and with the dtype of `like`; by default the pooling stays.

        Raises:
            ValueError: If the number of classes is negative or the pooling is unknown.
        """
        pool = self.global_pool if global_pool is None else _checked_pool(global_pool)
        fc = _build_last(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        initialize_weights(fc)
        self.global_pool, self.fc = pool, fc.train(self.training)


class MlpHead(LinearHead):
    """LayerNorm, mean over tokens, a hidden layer 4096 wide with LayerNorm and GELU, one linear layer."""

    hidden_dim = 4096

    def _build_hidden(self, dim: int) -> int:
        self.hidden = nn.Linear(dim, self.hidden_dim)
        self.hidden_norm = nn.LayerNorm(self.hidden_dim, eps=1e-6)
        return self.hidden_dim

    def pre_logits(self, pooled: Tensor) -> Tensor:
        """Compute the hidden features `(…, 4096)` from pooled features `(…, C)`."""
        return F.gelu(self.hidden_norm(self.hidden(pooled)))


def _checked_pool(global_pool: GlobalPool) -> GlobalPool:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '' for none, got {global_pool!r}")
    return global_pool


def _build_last(dim: int, num_classes: int, **placement: Any) -> nn.Module:
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    return nn.Linear(dim, num_classes, **placement) if num_classes else nn.Identity()
