"""The two attentions of ScalableViT (arXiv 2203.10790), on token maps of shape `(B, H, W, C)`."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models.kernels import DepthwiseReduction, attend, attend_by_window, pad_to_multiple, to_autocast

WindowPad = Literal["mask", "zero"]


class ScalableSelfAttention(nn.Module):
    """Global attention with separate spatial and channel sizes for query, key and value (SSA, section 3.2).

    Every token is a query of C' = int(C · channel_ratio) channels. Keys and values come from a map whose sides are
    reduced by `spatial_ratio`. With a spatial ratio of 1 the map is not reduced and the query has C channels.

    Args:
        dim: Channels C of the token map.
        num_heads: Number of heads; must divide C and C'.
        spatial_ratio: Factor s by which the sides of the key and value map shrink.
        channel_ratio: Factor c between C and the channels of query and key.
        expand_value: Give the value C' channels, as the published parameter count of ScalableViT-S implies, instead of
            the C of the released weights. Has no effect if the spatial ratio is 1.
        attn_drop_rate: Dropout probability of attention weights.
        drop_rate: Dropout probability of the output.

    Raises:
        ValueError: If the heads do not divide the channels, or a ratio is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_ratio: int = 1,
        channel_ratio: float = 1.0,
        expand_value: bool = False,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if spatial_ratio < 1 or channel_ratio <= 0:
            raise ValueError(
                f"spatial_ratio must be at least 1 and channel_ratio positive, got {spatial_ratio} and {channel_ratio}"
            )
        key_dim = int(dim * channel_ratio) if spatial_ratio > 1 else dim
        if key_dim < 1 or dim % num_heads or key_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide dim={dim} and the {key_dim} channels of query and key: "
                "choose another number of heads or another channel_ratio"
            )
        value_dim = key_dim if expand_value else dim
        self.num_heads = num_heads
        self.spatial_ratio = spatial_ratio
        self.scale = (channel_ratio * dim / num_heads) ** -0.5
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(dim, key_dim)
        if spatial_ratio > 1:
            self.depthwise = DepthwiseReduction(dim, spatial_ratio)
            self.pointwise = nn.Conv2d(dim, key_dim, 1)
            self.norm = nn.LayerNorm(key_dim, eps=1e-5)  # 1e-6 everywhere else; both as in the released weights
            self.k = nn.Linear(key_dim, key_dim)
            self.v = nn.Linear(key_dim, value_dim)
        else:
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(value_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend from every token to the reduced map: `(B, H, W, C)` to `(B, H, W, C)`."""
        output: Tensor = self.drop(self.proj(self._attend(tokens)))
        return output

    def _attend(self, tokens: Tensor) -> Tensor:  # apart from `forward`, to free its tensors before the projection
        batch, height, width, _ = tokens.shape
        tokens = to_autocast(tokens)
        if self.spatial_ratio > 1:
            reduced = self._reduce(tokens)
            key, value = self.k(reduced), self.v(reduced)
        else:
            key, value = self.kv(tokens).chunk(2, dim=-1)
        attended = attend(
            self._split_heads(self.q(tokens)),
            self._split_heads(key),
            self._split_heads(value),
            self.scale,
            self.attn_drop_rate if self.training else 0.0,
        )
        return attended.transpose(1, 2).reshape(batch, height, width, self.proj.in_features)

    def _reduce(self, tokens: Tensor) -> Tensor:
        """Reduce `(B, H, W, C)` to `(B, ceil(H / s), ceil(W / s), C')`. Padding keeps every token in a patch."""
        image = pad_to_multiple(tokens, self.spatial_ratio).permute(0, 3, 1, 2)
        reduced = self.pointwise(self.depthwise(image)).permute(0, 2, 3, 1)
        return F.gelu(self.norm(reduced))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """View `(B, H, W, heads · D)` as `(B, heads, H · W, D)`."""
        batch, height, width, channels = tokens.shape
        return tokens.reshape(batch, height * width, self.num_heads, channels // self.num_heads).transpose(1, 2)


class InteractiveWindowSelfAttention(nn.Module):
    """Attention inside windows that exchange information through a convolution over all values (IWSA, section 3.3).

    The values, merged to the whole map again, pass through a depthwise 3×3 convolution (the local interactive module,
    LIM), which is added to the attention of the windows before the output projection.

    Args:
        dim: Channels C of the token map.
        num_heads: Number of heads; must divide C.
        window_size: Side of a window in tokens.
        window_pad: What border windows attend to if the window does not divide the map. `mask`: only their real tokens.
            `zero`: also the zero tokens that fill up the map, as in dense code of Swin and Twins.
        attn_drop_rate: Dropout probability of attention weights.
        drop_rate: Dropout probability of the output.

    Raises:
        ValueError: If the heads do not divide the channels, the window is empty or `window_pad` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        window_pad: WindowPad = "mask",
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}: choose another number of heads or channels")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        if window_pad not in ("mask", "zero"):
            raise ValueError(f"window_pad must be 'mask' or 'zero', got {window_pad!r}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.window_pad = window_pad
        self.scale = (dim / num_heads) ** -0.5
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lim = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend inside windows and mix the values across them: `(B, H, W, C)` to `(B, H, W, C)`."""
        output: Tensor = self.drop(self.proj(self._attend(tokens)))
        return output

    def _attend(self, tokens: Tensor) -> Tensor:  # apart from `forward`, to free its tensors before the projection
        attended, value = attend_by_window(self._attend_windows, tokens, self.window_size, self.window_pad == "zero")
        interaction: Tensor = self.lim(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return attended + interaction

    def _attend_windows(self, windows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend inside windows `(B, N, C)`: attention and values, each `(B, heads, N, D)`."""
        qkv = self.qkv(windows).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return attend(query, key, value, self.scale, self.attn_drop_rate if self.training else 0.0, mask), value
