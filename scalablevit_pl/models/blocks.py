"""The parts of a ScalableViT stage: patch embedding, position encoding, blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention


def initialize_weights(module: nn.Module) -> None:
    """Initialize one layer in place, as the released network does. For use with `Module.apply`.

    Linear layers: truncated normal with std 0.02. Convolutions: normal with std sqrt(2 / fan_out), where fan_out is the
    kernel area times the output channels per group. Norms: 1. Biases: 0.
    """
    if getattr(getattr(module, "weight", None), "is_meta", False):
        return  # there is nothing to fill, and torch would import a thousand modules to notice it
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Strided convolution from a map to tokens, then LayerNorm over the channels.

    Args:
        in_channels: Channels of the incoming map.
        dim: Channels of the tokens.
        patch_size: Side of the kernel. Patches overlap. The padding is half of it, so sizes are rounded up.
        stride: Factor by which the map's sides shrink.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """Embed `(B, C_in, H, W)` as tokens `(B, ceil(H / stride), ceil(W / stride), C)`."""
        tokens: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))
        return tokens


class PositionEncodingGenerator(nn.Module):
    """Position encoding by a depthwise 3×3 convolution with zero padding (PEG, arXiv 2102.10882)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the encoding: `(B, H, W, C)` to `(B, H, W, C)`."""
        encoding: Tensor = self.conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tokens + encoding


class InplaceGELU(nn.Module):
    """Exact GELU of a tensor that nothing else needs. Without gradients it works in place to save memory."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform a tensor of any shape."""
        output: Tensor = F.gelu(tokens) if torch.is_grad_enabled() else torch.ops.aten.gelu_(tokens)
        return output


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them, applied to each token.

    In inference GELU overwrites the output of `fc1`, so a hook that keeps this output must keep a copy.
    """

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act: nn.Module = InplaceGELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(…, C)` to `(…, C)`."""
        output: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(tokens)))))
        return output


class DropPath(nn.Module):
    """Add a residual branch, or drop it for random samples (stochastic depth, arXiv 1603.09382).

    The branches that remain are scaled up to keep their mean.

    Args:
        rate: Probability of dropping the branch of a sample in training.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """Add a branch `(B, …)` to tokens of the same shape."""
        if not self.training or self.rate == 0.0:
            return tokens + branch
        shape = (tokens.shape[0],) + (1,) * (tokens.ndim - 1)
        # In a 16-bit dtype the scale would be off by a thousandth.
        wide = torch.promote_types(tokens.dtype, torch.float32)
        scale = torch.empty(shape, dtype=wide, device=tokens.device).bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)
        return torch.addcmul(tokens, branch, scale).to(torch.promote_types(tokens.dtype, branch.dtype))


class ScalableViTBlock(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with LayerNorm and a residual connection.

    Args:
        attn: The attention over `(B, H, W, C)`.
        dim: Channels C.
        mlp_ratio: Hidden channels of the MLP as a multiple of C.
        drop_rate: Dropout probability inside the MLP.
        drop_path_rate: Probability of dropping a residual branch of a sample.
    """

    def __init__(
        self, attn: nn.Module, dim: int, mlp_ratio: float = 4.0, drop_rate: float = 0.0, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(B, H, W, C)` to `(B, H, W, C)`."""
        # The branches are not bound to names, so their memory is freed early.
        tokens = self.drop_path(tokens, self.attn(self.norm1(tokens)))
        output: Tensor = self.drop_path(tokens, self.mlp(self.norm2(tokens)))
        return output


class ScalableViTStage(nn.Module):
    """One resolution of the network: patch embedding, then blocks with IWSA, SSA, IWSA, … and a PEG after the first.

    Args:
        patch_embed: Embeds the incoming map as tokens of this stage.
        dim: Channels C of this stage.
        attentions: The attention of each block, in order.
        mlp_ratio: Hidden channels of the MLPs as a multiple of C.
        drop_rate: Dropout probability after the patch embedding and inside the MLPs.
        drop_path_rates: The stochastic depth rate of each block.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        dim: int,
        attentions: list[ScalableSelfAttention | InteractiveWindowSelfAttention],
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rates: list[float],
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            ScalableViTBlock(attn, dim, mlp_ratio, drop_rate, rate)
            for attn, rate in zip(attentions, drop_path_rates, strict=True)
        )
        self.peg = PositionEncodingGenerator(dim)
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> Tensor:
        """Transform `(B, C_in, H, W)` to `(B, C, ceil(H / stride), ceil(W / stride))`, channels last in memory."""
        tokens: Tensor = self.drop(self.patch_embed(image))
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if index == 0:
                tokens = self.peg(tokens)
        return tokens.permute(0, 3, 1, 2)
