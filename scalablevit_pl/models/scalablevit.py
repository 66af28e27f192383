"""The ScalableViT backbone and its published sizes (arXiv 2203.10790, table 1)."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor, nn

from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention, WindowPad
from scalablevit_pl.models.blocks import PatchEmbed, ScalableViTStage, initialize_weights
from scalablevit_pl.models.loading import LoadOptions, build_module, load_tensors, read_pretrained

STRIDES = (4, 8, 16, 32)


class ScalableViT(nn.Module):
    """Hierarchical vision transformer that returns four feature maps for images of any size.

    Args:
        embed_dims: Channels of each stage.
        num_heads: Attention heads of each stage.
        depths: Blocks of each stage.
        spatial_ratios: Factor by which SSA shrinks the key and value map in each stage.
        channel_ratios: Channels of SSA's query and key as a multiple of those of the stage, for each stage.
        window_size: Side of an IWSA window in tokens.
        mlp_ratio: Hidden channels of the MLPs as a multiple of the stage's channels.
        drop_path_rate: Stochastic depth rate of the last block. The rate grows linearly from 0 over all blocks.
        drop_rate: Dropout probability after the patch embeddings, in projections and in MLPs.
        attn_drop_rate: Dropout probability of attention weights.
        in_channels: Channels of the images.
        window_pad: With `mask` border windows attend to their real tokens only, with `zero` also to padding zeros.
        expand_value: Use the variant of SSA that the published parameter count of ScalableViT-S implies.

    Attributes:
        channels: Channels of the four maps.
        strides: Strides of the four maps in pixels.
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
        self.config: dict[str, Any] = {
            "embed_dims": list(embed_dims),
            "num_heads": list(num_heads),
            "depths": list(depths),
            "spatial_ratios": list(spatial_ratios),
            "channel_ratios": list(channel_ratios),
            "window_size": window_size,
            "mlp_ratio": mlp_ratio,
            "drop_path_rate": drop_path_rate,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "in_channels": in_channels,
            "window_pad": window_pad,
            "expand_value": expand_value,
        }
        check_config(self.config)
        self.channels: tuple[int, ...] = tuple(embed_dims)
        self.in_channels = in_channels
        total = sum(depths)
        rates = iter([drop_path_rate * block / max(total - 1, 1) for block in range(total)])
        self.stages = nn.ModuleList(
            build_stage(self.config, stage, list(islice(rates, depth))) for stage, depth in enumerate(depths)
        )
        self.apply(initialize_weights)

    def forward(self, image: Tensor, num_stages: int = len(STRIDES)) -> list[Tensor]:
        """Compute four maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))` from images `(B, in_channels, H, W)`.

        Args:
            image: The images.
            num_stages: Number of stages to compute; later ones are skipped.

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
        """Keep only the first stages. `config` becomes empty, because no arguments describe such a network."""
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass, which saves memory and costs time."""
        for stage in self.modules():
            if isinstance(stage, ScalableViTStage):
                stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides biases and norms, that take no weight decay: the PEG's convolutions."""
        return {name for name, _ in self.named_parameters() if name.endswith("peg.conv.weight")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort the parameters by depth; arguments as for `PretrainedNetwork.group_matcher`."""
        stage = r"^stages\.(\d+)"
        # A patch embedding and the PEG, which follows the first block, go with that block.
        fine = [(rf"{stage}\.blocks\.(\d+)", None), (rf"{stage}\.(?:patch_embed|peg)", (0,))]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": stage if coarse else fine}


def check_config(config: Mapping[str, Any]) -> None:
    """Check the arguments of `ScalableViT`, apart from those that its layers check."""
    for argument in ("embed_dims", "num_heads", "depths", "spatial_ratios", "channel_ratios"):
        values = config[argument]
        if len(values) != len(STRIDES):
            raise ValueError(f"{argument} must have four entries, one for each stage, got {values}")
        if argument != "channel_ratios" and min(values) < 1:
            raise ValueError(f"{argument} must be at least 1 in every stage, got {values}")
    if not isinstance(config["window_size"], int):  # which would only be noticed when the network computes
        raise ValueError(f"window_size must be a whole number, got {config['window_size']!r}")
    in_channels, mlp_ratio = config["in_channels"], config["mlp_ratio"]
    if in_channels < 1 or mlp_ratio <= 0:
        raise ValueError(f"in_channels must be at least 1 and mlp_ratio positive, got {in_channels} and {mlp_ratio}")
    for argument in ("drop_path_rate", "drop_rate", "attn_drop_rate"):
        if not 0.0 <= config[argument] < 1.0:
            raise ValueError(f"{argument} must be at least 0 and below 1, got {config[argument]}")


def build_stage(config: Mapping[str, Any], stage: int, drop_path_rates: list[float]) -> ScalableViTStage:
    """Build one stage of the network that the arguments of `ScalableViT` describe."""
    dims = config["embed_dims"]
    embed = (
        PatchEmbed(dims[stage - 1], dims[stage], 3, 2) if stage else PatchEmbed(config["in_channels"], dims[0], 7, 4)
    )
    attentions = [build_attention(config, stage, block) for block in range(config["depths"][stage])]
    return ScalableViTStage(embed, dims[stage], attentions, config["mlp_ratio"], config["drop_rate"], drop_path_rates)


def build_attention(
    config: Mapping[str, Any], stage: int, block: int
) -> InteractiveWindowSelfAttention | ScalableSelfAttention:
    """Build the attention of a block: IWSA in the first block of a stage, then SSA and IWSA alternate."""
    dim, heads = config["embed_dims"][stage], config["num_heads"][stage]
    rates = config["attn_drop_rate"], config["drop_rate"]
    if block % 2 == 0:
        return InteractiveWindowSelfAttention(dim, heads, config["window_size"], config["window_pad"], *rates)
    ratios = config["spatial_ratios"][stage], config["channel_ratios"][stage]
    return ScalableSelfAttention(dim, heads, *ratios, config["expand_value"], *rates)


def check_image(image: Tensor, in_channels: int) -> None:
    """Check that a tensor is a batch of images `(B, in_channels, H, W)`."""
    if image.ndim != 4 or image.shape[1] != in_channels or 0 in image.shape[2:]:
        raise ValueError(
            f"expected images of shape (B, {in_channels}, H, W), got {tuple(image.shape)}: "
            "add the batch dimension, or make in_channels equal the channels of the images (in a fit, entries of mean)"
        )


# Table 1 of the paper; nano is a size of this project. `options` are further arguments of `ScalableViT`.


def scalablevit_nano(drop_path_rate: float = 0.0, **options: Any) -> ScalableViT:
    """Build a small ScalableViT for small images and tests; a size of this project, not of the paper."""
    return ScalableViT((32, 64, 128, 256), (1, 2, 4, 8), (2, 2, 3, 2), drop_path_rate=drop_path_rate, **options)


def scalablevit_s(drop_path_rate: float = 0.2, **options: Any) -> ScalableViT:
    """Build ScalableViT-S: 25,793,008 parameters, 83.1 % published ImageNet top-1 with its head."""
    return ScalableViT((64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 20, 2), drop_path_rate=drop_path_rate, **options)


def scalablevit_b(drop_path_rate: float = 0.5, **options: Any) -> ScalableViT:
    """Build ScalableViT-B: 74,625,072 parameters, 84.1 % published ImageNet top-1 with its head."""
    size: dict[str, Any] = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 14, 6)}
    return ScalableViT(**size, channel_ratios=(2.0, 1.25, 1.25, 1.0), drop_path_rate=drop_path_rate, **options)


def scalablevit_l(drop_path_rate: float = 0.5, **options: Any) -> ScalableViT:
    """Build ScalableViT-L: 100,983,200 parameters, 84.4 % published ImageNet top-1 with its head."""
    size: dict[str, Any] = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (2, 6, 12, 4)}
    return ScalableViT(**size, channel_ratios=(0.25, 0.5, 1.0, 1.0), drop_path_rate=drop_path_rate, **options)
