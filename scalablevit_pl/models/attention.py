"""The two attentions of ScalableViT, on token maps of shape `(B, H, W, C)`."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WindowPad = Literal["mask", "zero"]
# Some kernels count the samples of a batch on an axis of a GPU's grid that goes no further, and windows are samples
# here: https://github.com/pytorch/pytorch/issues/142228.
LARGEST_BATCH = 65535
# Torch 2.8 is the first whose compiler can be asked whether something holds for all sizes.
OPEN_SIZES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
# Keys up to which a CPU attends faster in bfloat16 without its fused kernel, and the products take little memory.
FEW_KEYS = 64


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax(scale · query keyᵀ) value, for heads whose query and value widths may differ.

    Args:
        query: `(B, heads, N, D)`.
        key: `(B, heads, M, D)`.
        value: `(B, heads, M, E)`.
        scale: Factor on the products of query and key.
        dropout: Probability with which an attention weight is dropped.
        mask: Which keys are there, `(B, 1, 1, M)` of bool, one at least; all by default.

    Returns:
        `(B, heads, N, E)`.
    """
    if query.shape[0] > LARGEST_BATCH:
        parts = [query, key, value] if mask is None else [query, key, value, mask]
        pieces = zip(*(torch.split(part, LARGEST_BATCH) for part in parts), strict=True)
        return torch.cat([attend(q, k, v, scale, dropout, *rest) for q, k, v, *rest in pieces])
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and holds(key.shape[2] <= FEW_KEYS):
        return attend_unfused(query, key, value, scale, dropout, mask)
    width = value.shape[-1]
    # Fused kernels of a CPU want one width; those of a GPU take two, if eight divides both. Zeros add nothing to the
    # products, and the value's extra columns are cut off again.
    both = query.is_cuda and query.shape[-1] % 8 == width % 8 == 0
    surplus = 0 if both else query.shape[-1] - width
    if surplus > 0:
        value = F.pad(value, (0, surplus))
    elif surplus < 0:
        query, key = F.pad(query, (0, -surplus)), F.pad(key, (0, -surplus))
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
    return attended[..., :width]


def attend_unfused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute the same as `attend`, of the same arguments, in separate steps that hold all products at once."""
    products = (query * scale) @ key.transpose(-2, -1)
    if mask is not None:
        products = products.masked_fill(~mask, float("-inf"))
    return F.dropout(products.softmax(-1), dropout) @ value


def pad_to_multiple(tokens: Tensor, multiple: int) -> Tensor:
    """Append zero rows and columns to `(B, H, W, C)` until `multiple` divides H and W."""
    height, width = tokens.shape[1:3]
    if holds(height % multiple == 0) and holds(width % multiple == 0):
        return tokens
    # Spelled as whole tiles, which a compiler can divide by `multiple` again, even where it does not know the size.
    tall, wide = ((side + multiple - 1) // multiple * multiple for side in (height, width))
    return F.pad(tokens, (0, 0, 0, wide - width, 0, tall - height))


def to_autocast(tokens: Tensor) -> Tensor:
    """Cast to the type in which autocast has linear layers and convolutions computed, and lay out as indexed.

    Each of those layers would cast by itself, so that several casts would be kept for the backward pass, and what is
    laid out anew before them would be so in the wider type. Without autocast nothing changes. A compiler merges casts.
    """
    if torch.compiler.is_compiling() or tokens.is_meta or tokens.dtype != torch.float32:
        return tokens
    kind = tokens.device.type
    if not torch.is_autocast_enabled(kind):
        return tokens
    return tokens.to(torch.get_autocast_dtype(kind), memory_format=torch.contiguous_format)


def holds(condition: bool | torch.SymBool) -> bool:
    """Tell whether a condition on sizes holds; on sizes that a compiler leaves open, whether it does for all of them.

    Asked plainly, it would bind the compiled graph to sizes for which the answer is the same, as before torch 2.8.
    """
    if not torch.compiler.is_compiling() or not OPEN_SIZES:
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second to import

    return bool(statically_known_true(condition))


class DepthwiseReduction(nn.Conv2d):
    """Depthwise convolution whose stride is its kernel's side: a weighted sum over each patch, by channel.

    Its gradients take cuDNN, and oneDNN in bfloat16, several times as long as those of sums written out, which serve in
    training there.

    Args:
        dim: Channels C.
        ratio: Factor by which both sides of the map shrink.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__(dim, dim, ratio, stride=ratio, groups=dim)

    def forward(self, image: Tensor) -> Tensor:
        """Reduce `(B, C, H, W)`, of sides that the ratio divides, to `(B, C, H / ratio, W / ratio)`."""
        narrow = image.device.type == "cpu" and image.dtype == torch.bfloat16
        if torch.is_grad_enabled() and (image.is_cuda or narrow):
            return sum_patches(image, self.weight, self.bias)
        return super().forward(image)


def sum_patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a depthwise convolution whose stride is its kernel's side without one.

    Args:
        image: `(B, C, H, W)`, of sides that the kernel's divides.
        weight: `(C, 1, side, side)`; the products are of the wider one of both types.
        bias: `(C)`.

    Returns:
        `(B, C, H / side, W / side)` of the image's type, the channels last in memory.
    """
    batch, channels, height, width = image.shape
    side = weight.shape[-1]
    tokens = image.permute(0, 2, 3, 1)  # as they lie in memory, and as the sums do then
    patches = tokens.reshape(batch, height // side, side, width // side, side, channels)
    reduced: Tensor = (patches * weight.permute(2, 1, 3, 0)).sum((2, 4))  # by (side, 1, side, C)
    reduced = reduced if bias is None else reduced + bias
    return reduced.to(image.dtype).permute(0, 3, 1, 2)


class ScalableSelfAttention(nn.Module):
    """Global attention whose query, key and value have spatial and channel sizes of their own (SSA).

    Every token asks (query of C' = int(C · channel_ratio) channels); a map reduced by `spatial_ratio` along both sides
    answers. With a spatial ratio of 1 nothing is reduced and the query has C channels. Source: arXiv 2203.10790,
    section 3.2.

    Args:
        dim: Channels C of the token map.
        num_heads: Heads; must divide C and C'.
        spatial_ratio: Factor s by which the sides of the key and value map shrink.
        channel_ratio: Factor c between C and the channels of query and key.
        expand_value: Give the value C' channels too, as the published parameter count of ScalableViT-S implies, instead
            of C as in the released weights. Without effect where the spatial ratio is 1.
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
                "choose other heads or another channel_ratio"
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
            self.norm = nn.LayerNorm(key_dim, eps=1e-5)  # unlike the 1e-6 everywhere else, as in the released weights
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

    def _attend(self, tokens: Tensor) -> Tensor:
        """Do all before the output projection, which needs none of what is held here."""
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
        """Shrink `(B, H, W, C)` to `(B, ceil(H / s), ceil(W / s), C')`; the padding keeps every token in some patch."""
        image = pad_to_multiple(tokens, self.spatial_ratio).permute(0, 3, 1, 2)
        reduced = self.pointwise(self.depthwise(image)).permute(0, 2, 3, 1)
        return F.gelu(self.norm(reduced))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """View `(B, H, W, heads · D)` as `(B, heads, H · W, D)`."""
        batch, height, width, channels = tokens.shape
        return tokens.reshape(batch, height * width, self.num_heads, channels // self.num_heads).transpose(1, 2)


class InteractiveWindowSelfAttention(nn.Module):
    """Attention inside windows that exchange information through a convolution over all values (IWSA).

    The values, merged to the whole map again, pass a depthwise 3×3 convolution (the local interactive module, LIM),
    which is added to the windows' attention before the output projection. Source: arXiv 2203.10790, section 3.3.

    Args:
        dim: Channels C of the token map.
        num_heads: Heads; must divide C.
        window_size: Side of a window in tokens.
        window_pad: What border windows see where the window does not divide the map. `mask`: their real tokens only.
            `zero`: the map is filled up with zero tokens which take part, as in dense code of Swin and Twins.
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
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}: choose other heads or channels")
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

    def _attend(self, tokens: Tensor) -> Tensor:
        """Do all before the output projection, which needs none of what is held here."""
        if self.window_pad == "zero":
            attended, value = self._attend_padded(tokens)
        elif torch.compiler.is_compiling():
            attended, value = self._attend_padded(tokens, masked=True)
        else:
            attended, value = self._attend_regions(tokens)
        interaction: Tensor = self.lim(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return attended + interaction

    def _attend_padded(self, tokens: Tensor, masked: bool = False) -> tuple[Tensor, Tensor]:
        """Attend inside the windows of a map that is filled up with zero tokens, which do not answer where masked.

        Masked, this is what `_attend_regions` does: slower, but one graph for maps of many sizes.
        """
        padded = pad_to_multiple(tokens, self.window_size)
        if padded is tokens:
            return self._attend_windows(tokens)
        (height, width), (tall, wide), side = tokens.shape[1:3], padded.shape[1:3], self.window_size
        mask = None
        if masked:
            rows, columns = (torch.arange(length, device=tokens.device) for length in (tall, wide))
            there = (rows[:, None] < height) & (columns < width)
            mask = there.view(tall // side, side, wide // side, side).transpose(1, 2).reshape(-1, 1, 1, side * side)
            mask = mask.repeat(tokens.shape[0], 1, 1, 1)
        attended, value = (part[:, :height, :width] for part in self._attend_windows(padded, mask))
        if torch.compiler.is_compiling():  # whether they are contiguous would bind the graph to the size: copies are
            attended, value = (part.clone(memory_format=torch.contiguous_format) for part in (attended, value))
        return attended, value

    def _attend_regions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attend inside the windows of a map of any size: `(B, H, W, C)` to attention and values, each `(B, H, W, C)`.

        Full windows, the right strip, the bottom strip and the corner are attended to apart, each with windows of its
        own size: exact without a mask, and without a token that is not there.
        """
        rows = window_spans(tokens.shape[1], self.window_size)
        columns = window_spans(tokens.shape[2], self.window_size)
        bands = []
        for top, bottom, tall in rows:
            band = [
                self._attend_windows(tokens[:, top:bottom, left:right], None, tall, wide)
                for left, right, wide in columns
            ]
            bands.append([join(parts, 2) for parts in zip(*band, strict=True)])
        attended, value = (join(parts, 1) for parts in zip(*bands, strict=True))
        return attended, value

    def _attend_windows(
        self, tokens: Tensor, mask: Tensor | None = None, tall: int | None = None, wide: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend inside windows of tall × wide tokens that fill the map: `(B, H, W, C)` to attention and values.

        The tokens are put in the order of the windows before query, key and value are made of them, which are three
        times as many numbers; kernels take these as they lie.
        """
        batch, height, width, channels = tokens.shape
        tall, wide = tall or self.window_size, wide or self.window_size
        rows, columns = height // tall, width // wide
        windows = to_autocast(tokens.reshape(batch, rows, tall, columns, wide, channels).transpose(2, 3))
        # The fused kernels take four dimensions, so all windows of all samples stand in the first.
        qkv = self.qkv(windows.reshape(batch * rows * columns, tall * wide, channels))
        query, key, value = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value, self.scale, self.attn_drop_rate if self.training else 0.0, mask)

        def to_map(part: Tensor) -> Tensor:
            merged = part.transpose(1, 2).reshape(batch, rows, columns, tall, wide, channels)
            return merged.transpose(2, 3).reshape(batch, height, width, channels)

        return to_map(attended), to_map(value)


def window_spans(length: int, window: int) -> list[tuple[int, int, int]]:
    """Cut a side into full windows and the rest: `(start, stop, window side)` of each part that is not empty."""
    full = length - length % window
    spans = [(0, full, window), (full, length, length - full)]
    return [span for span in spans if span[1] > span[0]]


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim`, without the copy where there is one part only."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
