"""A network for semantic segmentation: backbone, norms, decoder and auxiliary head."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from scalablevit_pl.models.backbone import TimmBackbone, build_backbone
from scalablevit_pl.models.heads.semantic_fpn import SemanticFPN
from scalablevit_pl.models.heads.upernet import AuxiliaryHead, UperNet
from scalablevit_pl.models.pretrained import PretrainedNetwork
from scalablevit_pl.models.scalablevit import ScalableViT

if TYPE_CHECKING:
    from scalablevit_pl.models.pretrained import ImageLike

DecoderName = Literal["semantic_fpn", "upernet"]
# Each decoder with the width of the paper.
DECODERS: dict[str, tuple[type[SemanticFPN] | type[UperNet], int]] = {
    "semantic_fpn": (SemanticFPN, 256),
    "upernet": (UperNet, 512),
}
MAX_CLASSES = 255  # a mask has one byte for each pixel, and 255 marks pixels that nothing counts


class SegmentationHead(nn.Module):
    """A LayerNorm for each map, then a decoder and, in training, an auxiliary head.

    Args:
        channels: Channels of the backbone's maps.
        num_classes: Number of classes.
        decoder: `semantic_fpn` or `upernet`.
        width: Channels of the decoder; the auxiliary head has half as many.
        auxiliary: Build an auxiliary head on the map of stride 16.
        out_norm: Normalize the maps.
        dropout: Fraction of the channels that are dropped before the last layers.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        decoder: DecoderName,
        width: int,
        auxiliary: bool,
        out_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=1e-6) if out_norm else nn.Identity() for size in channels)
        self.decoder = DECODERS[decoder][0](channels, num_classes, width, dropout=dropout)
        self.auxiliary = AuxiliaryHead(channels, num_classes, width // 2, dropout) if auxiliary else None

    def forward(self, maps: Sequence[Tensor], auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Compute logits `(B, num_classes, H_0, W_0)` from maps `(B, C_i, H_i, W_i)`.

        Args:
            maps: The backbone's maps.
            auxiliary: Also return the logits of the auxiliary head `(B, num_classes, H_2, W_2)`, None if there is none.
        """
        normalized = [
            norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, features in zip(self.norms, maps, strict=True)
        ]
        logits: Tensor = self.decoder(normalized)
        if not auxiliary:
            return logits
        return logits, None if self.auxiliary is None else self.auxiliary(normalized)


class SemanticSegmenter(PretrainedNetwork):
    """A backbone with a head for semantic segmentation; its weights are named `backbone.*` and `head.*`.

    Args:
        backbone: Gives four maps and knows their channels.
        num_classes: Number of classes, from 2 to 255.
        head: `semantic_fpn` or `upernet`.
        width: Channels of the head; by default the paper's, 256 for `semantic_fpn` and 512 for `upernet`.
        auxiliary: Build an auxiliary head, for a second loss in training.
        out_norm: Normalize the backbone's maps.
        dropout: Fraction of the channels that are dropped before the last layers.
        name: What `config` calls the network; `create_segmenter` gives the backbone's name.

    Attributes:
        config: Plain values from which `from_config` builds the same network.

    Raises:
        ValueError: If the number of classes, the head, the width or the dropout is out of range.
    """

    task = "semantic-segmentation"
    usage = 'model.predict("photo.jpg")  # the class of each pixel, (H, W), for each image'

    def __init__(
        self,
        backbone: ScalableViT | TimmBackbone,
        num_classes: int,
        head: DecoderName = "semantic_fpn",
        width: int | None = None,
        auxiliary: bool = False,
        out_norm: bool = True,
        dropout: float = 0.1,
        name: str = "scalablevit_custom",
    ) -> None:
        super().__init__()
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes must be from 2 to {MAX_CLASSES}, got {num_classes}")
        if head not in DECODERS:
            raise ValueError(f"head must be one of {sorted(DECODERS)}, got {head!r}")
        width = DECODERS[head][1] if width is None else width
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2, got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.backbone = backbone
        self.head = SegmentationHead(backbone.channels, num_classes, head, width, auxiliary, out_norm, dropout)
        self.last_layers = ("head.decoder.classifier", "head.auxiliary.classifier")[: 1 + auxiliary]
        self.num_classes = num_classes
        self.in_chans = backbone.in_channels
        self.config = {
            "name": name,
            "num_classes": num_classes,
            "head": head,
            "width": width,
            "auxiliary": auxiliary,
            "out_norm": out_norm,
            "dropout": dropout,
            "backbone": backbone.config,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the segmenter that a `config` describes, randomly initialized."""
        return cls(**{**config, "backbone": build_backbone(config["backbone"])})

    @property
    def preprocessing(self) -> Any:
        """Transform of the images; by default that of the paper's evaluation, short side 512."""
        from scalablevit_pl.preprocessing import DensePreprocessing

        return self._preprocessing or DensePreprocessing().with_channels(self.in_chans)

    @preprocessing.setter
    def preprocessing(self, preprocessing: Any) -> None:
        if preprocessing is not None and not hasattr(preprocessing, "restore_classes"):
            kind = type(preprocessing).__name__
            raise ValueError(f"a segmenter needs a DensePreprocessing, which restores the size of images, got {kind}")
        self._preprocessing = preprocessing

    _preprocessing: Any = None

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits `(B, num_classes, ceil(H / 4), ceil(W / 4))` from images `(B, C, H, W)` of any size."""
        logits: Tensor = self.head(self.backbone(image))
        return logits

    def forward_with_auxiliary(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of both heads from images `(B, C, H, W)`, for training.

        Returns:
            Logits `(B, num_classes, ceil(H / 4), ceil(W / 4))`, and those of the auxiliary head
            `(B, num_classes, ceil(H / 16), ceil(W / 16))`, or None if there is no such head.
        """
        logits: tuple[Tensor, Tensor | None] = self.head(self.backbone(image), auxiliary=True)
        return logits

    def predict(self, images: "ImageLike | Sequence[ImageLike]", batch_size: int = 1) -> list[Tensor]:
        """Find the class of each pixel.

        Args:
            images: An image or several, each as `preprocess` takes it; or a folder or a pattern such as `photos/*.jpg`
                for its image files, sorted by name.
            batch_size: Images of equal size that go through the network at a time.

        Returns:
            For each image the classes `(H, W)` of its pixels, uint8, in its own size.

        Raises:
            ValueError: If an image cannot be read, or a number is below 1.
        """
        return [
            self.preprocessing.restore_classes(logits, size)
            for outputs, sizes in self._outputs(images, batch_size)
            for logits, size in zip(outputs, sizes, strict=True)
        ]
