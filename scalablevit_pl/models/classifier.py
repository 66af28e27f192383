"""An image classifier: backbone and head."""

from typing import Any, Literal

from torch import Tensor, nn

from scalablevit_pl.models.heads.classification import LinearHead, MlpHead
from scalablevit_pl.models.scalablevit import ScalableViT

HeadName = Literal["mlp", "linear"]
HEADS: dict[str, type[LinearHead]] = {"mlp": MlpHead, "linear": LinearHead}


class ImageClassifier(nn.Module):
    """A ScalableViT backbone with a classification head; its weights are named `backbone.*` and `head.*`.

    Args:
        backbone: Gives four maps and knows their channels.
        num_classes: Number of logits.
        head: `mlp`, the released networks' head with a hidden layer 4096 wide, or `linear`.
        name: What `config` calls the network; `create_model` gives the size's name.

    Attributes:
        config: Plain values from which `build_classifier` makes the same network.

    Raises:
        ValueError: If there is no class, or the head is unknown.
    """

    def __init__(
        self, backbone: ScalableViT, num_classes: int, head: HeadName = "mlp", name: str = "scalablevit_custom"
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)}, got {head!r}")
        self.backbone = backbone
        self.head = HEADS[head](backbone.channels, num_classes)
        self.num_classes = num_classes
        self.config: dict[str, Any] = {
            "name": name,
            "num_classes": num_classes,
            "head": head,
            "backbone": backbone.config,
        }

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits `(B, num_classes)` from images `(B, C, H, W)` of any size."""
        logits: Tensor = self.head(self.backbone(image))
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, which saves memory and costs time."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides biases and norms, that take no weight decay: the PEG's convolutions."""
        return {name for name, _ in self.named_parameters() if name.endswith("peg.conv.weight")}
