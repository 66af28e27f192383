"""The ScalableViT backbone and its published sizes (arXiv 2203.10790, table 1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor, nn

from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention, WindowPad
from scalablevit_pl.models.blocks import PatchEmbed, ScalableViTStage, initialize_weights
from scalablevit_pl.models.fusion import fuse
from scalablevit_pl.models.loading import LoadOptions, build_module, load_tensors, read_pretrained

STRIDES = (4, 8, 16, 32)


class ScalableViT(nn.Module):
    """Hierarchical vision transformer that returns four feature maps for images of any size.

    Args:
        embed_dims: Channels of the four stages.
        num_heads: Attention heads of the four stages.
        depths: Blocks of the four stages.
        spatial_ratios: Factor by which SSA shrinks the key and value map, for each stage.
        channel_ratios: Factor between the channels of SSA's query and key and those of the stage.
        window_size: Side of an IWSA window in tokens.
        mlp_ratio: Hidden channels of the MLPs as a multiple of the stage's channels.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 over all blocks.
        drop_rate: Dropout after the patch embeddings, in projections and in MLPs.
        attn_drop_rate: Dropout of attention weights.
        in_channels: Channels of the image.
        window_pad: `mask`: windows at the border attend to their real tokens only. `zero`: to zero tokens as well.
        expand_value: The variant of SSA that the published size of ScalableViT-S implies.

    Attributes:
        channels: Channels of the four maps.
        strides: Pixels per token of the four maps.
        config: The arguments above as plain values; `ScalableViT(**config)` builds the same network.

    Raises:
        ValueError: If a sequence does not have four entries or the values of a stage do not fit together.
    """

    strides: tuple[int, ...] = STRIDES

    def __init__(
        self,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        spatial_ratios: Sequence[int] = (8, 4, 2, 1),
        channel_ratios: Sequence[float] = (1.25, 1.25, 1.25, 1.0),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        in_channels: int = 3,
        window_pad: WindowPad = "mask",
        expand_value: bool = False,
    ) -> None:
        super().__init__()
        per_stage: dict[str, Sequence[float]] = {
            "embed_dims": embed_dims,
            "num_heads": num_heads,
            "depths": depths,
            "spatial_ratios": spatial_ratios,
            "channel_ratios": channel_ratios,
        }
        for argument, values in per_stage.items():
            if len(values) != len(STRIDES):
                raise ValueError(f"{argument} must have four entries, one for each stage, got {list(values)}")
            if argument != "channel_ratios" and min(values) < 1:
                raise ValueError(f"{argument} must be at least 1 in every stage, got {list(values)}")
        if in_channels < 1 or mlp_ratio <= 0:
            raise ValueError(
                f"in_channels must be at least 1 and mlp_ratio positive, got {in_channels} and {mlp_ratio}"
            )
        for argument, rate in {
            "drop_path_rate": drop_path_rate,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
        }.items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{argument} must be at least 0 and below 1, got {rate}")
        self.config: dict[str, Any] = {argument: list(values) for argument, values in per_stage.items()} | {
            "window_size": window_size,
            "mlp_ratio": mlp_ratio,
            "drop_path_rate": drop_path_rate,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "in_channels": in_channels,
            "window_pad": window_pad,
            "expand_value": expand_value,
        }
        self.channels: tuple[int, ...] = tuple(embed_dims)
        self.in_channels = in_channels
        total = sum(depths)
        drop_path_rates = iter([drop_path_rate * index / max(total - 1, 1) for index in range(total)])

        def attention(stage: int, block: int) -> ScalableSelfAttention | InteractiveWindowSelfAttention:
            dim, heads = embed_dims[stage], num_heads[stage]
            if block % 2 == 0:
                return InteractiveWindowSelfAttention(dim, heads, window_size, window_pad, attn_drop_rate, drop_rate)
            ratios = spatial_ratios[stage], channel_ratios[stage]
            return ScalableSelfAttention(dim, heads, *ratios, expand_value, attn_drop_rate, drop_rate)

        self.stages = nn.ModuleList()
        for stage, dim in enumerate(embed_dims):
            patch_embed = (
                PatchEmbed(embed_dims[stage - 1], dim, 3, 2) if stage > 0 else PatchEmbed(in_channels, dim, 7, 4)
            )
            attentions = [attention(stage, block) for block in range(depths[stage])]
            rates = [next(drop_path_rates) for _ in attentions]
            self.stages.append(ScalableViTStage(patch_embed, dim, attentions, mlp_ratio, drop_rate, rates))
        self.apply(initialize_weights)

    def forward(self, image: Tensor, num_stages: int = len(STRIDES)) -> list[Tensor]:
        """Compute four maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))` from images `(B, in_channels, H, W)`.

        Args:
            image: The images.
            num_stages: Compute the maps of so many stages only.

        Raises:
            ValueError: If the images have another rank or number of channels.
        """
        check_image(image, self.in_channels)
        maps: list[Tensor] = []
        for stage in list(self.stages)[:num_stages]:
            image = stage(image)
            maps.append(image)
        return maps

    def truncate(self, num_stages: int) -> None:
        """Drop all stages but the first ones; nothing describes such a network, so that `config` becomes empty."""
        del self.stages[num_stages:]
        self.channels, self.strides = self.channels[:num_stages], self.strides[:num_stages]
        self.config = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Unpack[LoadOptions]) -> Self:
        """Load the backbone of a network of any task from a folder or from the Hugging Face Hub, in eval mode.

        Arguments and errors are those of `PretrainedNetwork.from_pretrained`.
        """
        stored = read_pretrained(pretrained_model_name_or_path, "backbone.", **options)
        backbone = build_module(lambda: cls(**stored.description.config["backbone"]), stored)
        load_tensors(backbone, stored.tensors, stored.source, prefix="backbone.", assign=True)
        return backbone.eval()

    def fuse(self) -> Self:
        """Compute linear layers and GELUs by oneDNN in inference on a CPU, as `scalablevit_pl.models.fuse` does.

        Weights and their names stay; outputs differ by rounding. Quantize before. Returns the network itself.
        """
        fuse(self)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, which saves memory and costs time."""
        for stage in self.modules():
            if isinstance(stage, ScalableViTStage):
                stage.grad_checkpointing = enable


def check_image(image: Tensor, in_channels: int) -> None:
    """Refuse what is no batch of images `(B, in_channels, H, W)`.

    Raises:
        ValueError: If the images have another rank or number of channels.
    """
    if image.ndim != 4 or image.shape[1] != in_channels or 0 in image.shape[2:]:
        raise ValueError(
            f"expected images of shape (B, {in_channels}, H, W), got {tuple(image.shape)}: "
            "add the batch dimension, or build the network for as many channels as the images have"
        )


def scalablevit_nano(
    drop_path_rate: float = 0.0, window_pad: WindowPad = "mask", expand_value: bool = False, in_channels: int = 3
) -> ScalableViT:
    """Build a small ScalableViT for small images and tests; a size of this project, not of the paper."""
    return ScalableViT(
        embed_dims=(32, 64, 128, 256),
        num_heads=(1, 2, 4, 8),
        depths=(2, 2, 3, 2),
        drop_path_rate=drop_path_rate,
        window_pad=window_pad,
        expand_value=expand_value,
        in_channels=in_channels,
    )


def scalablevit_s(
    drop_path_rate: float = 0.2, window_pad: WindowPad = "mask", expand_value: bool = False, in_channels: int = 3
) -> ScalableViT:
    """Build ScalableViT-S: 25,793,008 parameters, 83.1 % published ImageNet top-1 with its head."""
    return ScalableViT(
        embed_dims=(64, 128, 256, 512),
        num_heads=(2, 4, 8, 16),
        depths=(2, 2, 20, 2),
        drop_path_rate=drop_path_rate,
        window_pad=window_pad,
        expand_value=expand_value,
        in_channels=in_channels,
    )


def scalablevit_b(
    drop_path_rate: float = 0.5, window_pad: WindowPad = "mask", expand_value: bool = False, in_channels: int = 3
) -> ScalableViT:
    """Build ScalableViT-B: 74,625,072 parameters, 84.1 % published ImageNet top-1 with its head."""
    return ScalableViT(
        embed_dims=(96, 192, 384, 768),
        num_heads=(3, 6, 12, 24),
        depths=(2, 2, 14, 6),
        channel_ratios=(2.0, 1.25, 1.25, 1.0),
        drop_path_rate=drop_path_rate,
        window_pad=window_pad,
        expand_value=expand_value,
        in_channels=in_channels,
    )


def scalablevit_l(
    drop_path_rate: float = 0.5, window_pad: WindowPad = "mask", expand_value: bool = False, in_channels: int = 3
) -> ScalableViT:
    """Build ScalableViT-L: 100,983,200 parameters, 84.4 % published ImageNet top-1 with its head."""
    return ScalableViT(
        embed_dims=(128, 256, 512, 1024),
        num_heads=(4, 8, 16, 32),
        depths=(2, 6, 12, 4),
        channel_ratios=(0.25, 0.5, 1.0, 1.0),
        drop_path_rate=drop_path_rate,
        window_pad=window_pad,
        expand_value=expand_value,
        in_channels=in_channels,
    )
