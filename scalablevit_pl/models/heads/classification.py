"""Classification heads: from the last map to logits."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models.blocks import initialize_weights


class LinearHead(nn.Module):
    """LayerNorm, mean over tokens, one linear layer.

    Args:
        channels: Channels of the backbone's maps; the last one counts.
        num_classes: Number of logits.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels[-1], eps=1e-6)
        self._build(channels[-1], num_classes)
        self.apply(initialize_weights)

    def _build(self, dim: int, num_classes: int) -> None:
        self.fc = nn.Linear(dim, num_classes)

    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """Normalize and average the tokens of the last map `(B, C, H, W)`: `(B, C)`."""
        pooled: Tensor = self.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2))
        return pooled

    def pre_logits(self, pooled: Tensor) -> Tensor:
        """Compute what the last linear layer sees from pooled features `(B, C)`."""
        return pooled

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits `(B, num_classes)` from the last map `(B, C, H, W)`."""
        logits: Tensor = self.fc(self.pre_logits(self.pool(maps)))
        return logits


class MlpHead(LinearHead):
    """LayerNorm, mean over tokens, a hidden layer 4096 wide with LayerNorm and GELU, one linear layer."""

    hidden_dim = 4096

    def _build(self, dim: int, num_classes: int) -> None:
        self.hidden = nn.Linear(dim, self.hidden_dim)
        self.hidden_norm = nn.LayerNorm(self.hidden_dim, eps=1e-6)
        self.fc = nn.Linear(self.hidden_dim, num_classes)

    def pre_logits(self, pooled: Tensor) -> Tensor:
        """Compute the hidden features `(B, 4096)` from pooled features `(B, C)`."""
        return F.gelu(self.hidden_norm(self.hidden(pooled)))
