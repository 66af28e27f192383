"""How attention, its windows and its strided reduction are computed on CPUs, on GPUs and under `torch.compile`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Some kernels put the batch on a grid axis of limited length, and windows are batch entries here:
# https://github.com/pytorch/pytorch/issues/142228.
LARGEST_BATCH = 65535
# From torch 2.8 on, the compiler can check whether a condition holds for all sizes.
OPEN_SIZES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

WindowAttention = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From windows `(B, N, C)` and a mask `(B, 1, 1, N)`, or None, to attention and values, each `(B, heads, N, D)`."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax(scale · query keyᵀ) value. Query and value heads may have different widths D and E.

    From `(B, heads, N, D)`, `(B, heads, M, D)` and `(B, heads, M, E)` to `(B, heads, N, E)`. Attention weights are
    dropped with the probability `dropout`. A mask `(B, 1, 1, M)` of bool is True for the keys to attend to, at least
    one per sample.
    """
    if query.shape[0] > LARGEST_BATCH:
        tensors = [query, key, value] if mask is None else [query, key, value, mask]
        pieces = zip(*(torch.split(tensor, LARGEST_BATCH) for tensor in tensors), strict=True)
        return torch.cat([attend(q, k, v, scale, dropout, *rest) for q, k, v, *rest in pieces])
    width = value.shape[-1]
    # Fused CPU kernels need equal widths. Those of GPUs accept two widths if both are multiples of eight. Zero columns
    # do not change the products, and the extra columns of the value are cut off again.
    accepted = query.is_cuda and query.shape[-1] % 8 == width % 8 == 0
    surplus = 0 if accepted else query.shape[-1] - width
    if surplus > 0:
        value = F.pad(value, (0, surplus))
    elif surplus < 0:
        query, key = F.pad(query, (0, -surplus)), F.pad(key, (0, -surplus))
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
    return attended[..., :width]


def attend_by_window(
    attention: WindowAttention, tokens: Tensor, window: int, zero_pad: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply an attention inside each window of a map of any size: attention and values, all `(B, H, W, C)`.

    With `zero_pad`, border windows attend to the zero tokens that fill them up, not only to their real tokens.
    """
    if zero_pad or torch.compiler.is_compiling():
        return attend_padded(attention, tokens, window, masked=not zero_pad)
    return attend_regions(attention, tokens, window)


def attend_regions(attention: WindowAttention, tokens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attend separately in the full windows, the right strip, the bottom strip and the corner.

    Each region has windows of its own size. This is exact, without a mask and without padding tokens.
    """
    bands = []
    for top, bottom, tall in window_spans(tokens.shape[1], window):
        band = [
            attend_full(attention, tokens[:, top:bottom, left:right], tall, wide)
            for left, right, wide in window_spans(tokens.shape[2], window)
        ]
        bands.append([join(parts, 2) for parts in zip(*band, strict=True)])
    attended, value = (join(parts, 1) for parts in zip(*bands, strict=True))
    return attended, value


def attend_padded(
    attention: WindowAttention, tokens: Tensor, window: int, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """Attend in the windows of a map filled up with zero tokens, which are not attended to if `masked`.

    With a mask this computes what `attend_regions` does. It is slower, but one graph serves maps of many sizes.
    """
    padded = pad_to_multiple(tokens, window)
    if padded is tokens:
        return attend_full(attention, tokens, window, window)
    height, width = tokens.shape[1:3]
    mask = window_mask(tokens, padded, window) if masked else None
    attended, value = (part[:, :height, :width] for part in attend_full(attention, padded, window, window, mask))
    if torch.compiler.is_compiling():  # a check for contiguity would bind the graph to one size
        attended, value = (part.clone(memory_format=torch.contiguous_format) for part in (attended, value))
    return attended, value


def attend_full(
    attention: WindowAttention, tokens: Tensor, tall: int, wide: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend in windows of tall × wide tokens that tile the map `(B, H, W, C)`."""
    attended, value = attention(cut_windows(tokens, tall, wide), mask)
    return merge_windows(attended, tokens.shape, tall, wide), merge_windows(value, tokens.shape, tall, wide)


def cut_windows(tokens: Tensor, tall: int, wide: int) -> Tensor:
    """Cut a map into windows that tile it: `(B, H, W, C)` to `(B · windows, tall · wide, C)`.

    Cutting the tokens is cheaper than cutting query, key and value, which are three times as many numbers.
    """
    batch, height, width, channels = tokens.shape
    rows, columns = height // tall, width // wide
    windows = to_autocast(tokens.reshape(batch, rows, tall, columns, wide, channels).transpose(2, 3))
    # Fused kernels take four dimensions, so all windows of all samples share the first.
    return windows.reshape(batch * rows * columns, tall * wide, channels)


def merge_windows(heads: Tensor, shape: Sequence[int], tall: int, wide: int) -> Tensor:
    """Merge windows into a map of a given shape: `(B · windows, heads, tall · wide, D)` to `(B, H, W, heads · D)`."""
    batch, height, width, channels = shape
    windows = heads.transpose(1, 2).reshape(batch, height // tall, width // wide, tall, wide, channels)
    return windows.transpose(2, 3).reshape(batch, height, width, channels)


def window_mask(tokens: Tensor, padded: Tensor, window: int) -> Tensor:
    """Mark the real tokens in the windows of a padded map: `(B · windows, 1, 1, window²)` of bool."""
    (height, width), (tall, wide) = tokens.shape[1:3], padded.shape[1:3]
    rows, columns = (torch.arange(length, device=tokens.device) for length in (tall, wide))
    real = (rows[:, None] < height) & (columns < width)
    mask = real.view(tall // window, window, wide // window, window).transpose(1, 2)
    return mask.reshape(-1, 1, 1, window * window).repeat(tokens.shape[0], 1, 1, 1)


def window_spans(length: int, window: int) -> list[tuple[int, int, int]]:
    """Split a side into full windows and the rest: `(start, stop, window side)` of each part that is not empty."""
    full = length - length % window
    spans = [(0, full, window), (full, length, length - full)]
    return [span for span in spans if span[1] > span[0]]


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim`, without a copy if there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def pad_to_multiple(tokens: Tensor, multiple: int) -> Tensor:
    """Append zero rows and columns to `(B, H, W, C)` until H and W are multiples of `multiple`."""
    height, width = tokens.shape[1:3]
    if holds(height % multiple == 0) and holds(width % multiple == 0):
        return tokens
    # Written as a number of tiles, so that a compiler knows that `multiple` divides it, even for an open size.
    tall, wide = ((side + multiple - 1) // multiple * multiple for side in (height, width))
    return F.pad(tokens, (0, 0, 0, wide - width, 0, tall - height))


def holds(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true; while compiling, whether it is true for all sizes left open.

    A plain `if` would bind the compiled graph to sizes with the same answer. Before torch 2.8 it does.
    """
    if not torch.compiler.is_compiling() or not OPEN_SIZES:
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a second to import

    return bool(statically_known_true(condition))


def to_autocast(tokens: Tensor) -> Tensor:
    """Cast to the dtype of autocast and make contiguous. Without autocast, return the tokens unchanged.

    Otherwise each linear layer and convolution casts by itself: several copies wait for the backward pass, and a change
    of layout happens in the wider dtype. A compiler merges the casts.
    """
    if torch.compiler.is_compiling() or tokens.is_meta or tokens.dtype != torch.float32:
        return tokens
    kind = tokens.device.type
    if not torch.is_autocast_enabled(kind):
        return tokens
    return tokens.to(torch.get_autocast_dtype(kind), memory_format=torch.contiguous_format)


class DepthwiseReduction(nn.Conv2d):
    """Depthwise convolution with a stride equal to its kernel size: a weighted sum of each patch, channel by channel.

    cuDNN takes several times as long for its gradients as for those of an explicit sum, so training on a GPU uses the
    sum.

    Args:
        dim: Channels C.
        ratio: Factor by which both sides of the map shrink.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__(dim, dim, ratio, stride=ratio, groups=dim)

    def forward(self, image: Tensor) -> Tensor:
        """Reduce `(B, C, H, W)` to `(B, C, H / ratio, W / ratio)`. The ratio must divide H and W."""
        if torch.is_grad_enabled() and image.is_cuda:
            return sum_patches(image, self.weight, self.bias)
        return super().forward(image)


def sum_patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `DepthwiseReduction` as an explicit sum, in the wider dtype of image and weight `(C, 1, ratio, ratio)`.

    The result has the dtype of the image, and channels last in memory.
    """
    batch, channels, height, width = image.shape
    side = weight.shape[-1]
    tokens = image.permute(0, 2, 3, 1)  # the order in memory
    patches = tokens.reshape(batch, height // side, side, width // side, side, channels)
    reduced: Tensor = (patches * weight.permute(2, 1, 3, 0)).sum((2, 4))  # weight as (side, 1, side, C)
    reduced = reduced if bias is None else reduced + bias
    return reduced.to(image.dtype).permute(0, 3, 1, 2)
