"""An image classifier: backbone and head, with the interface of timm's models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from scalablevit_pl.models.heads.classification import GlobalPool, LinearHead, MlpHead
from scalablevit_pl.models.pretrained import PretrainedNetwork
from scalablevit_pl.models.scalablevit import STRIDES, ScalableViT

if TYPE_CHECKING:
    from scalablevit_pl.models.pretrained import ImageLike
    from scalablevit_pl.weights.stored import Description

HeadName = Literal["mlp", "linear"]
HEADS: dict[str, type[LinearHead]] = {"mlp": MlpHead, "linear": LinearHead}


def default_pretrained_cfg(name: str, num_classes: int = 1000, in_channels: int = 3) -> dict[str, Any]:
    """Describe, in timm's names, a network without released weights: preprocessing, classes and two of its layers."""
    return {
        "url": "",
        "architecture": name,
        "num_classes": num_classes,
        "input_size": (in_channels, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "backbone.stages.0.patch_embed.proj",
        "classifier": "head.fc",
    }


def timm_entries(preprocessing: Any, in_chans: int = 3) -> dict[str, Any]:
    """Describe a preprocessing in timm's names."""
    size = (in_chans, preprocessing.input_size, preprocessing.input_size)
    values: dict[str, Any] = preprocessing.to_dict() | {"mean": preprocessing.mean, "std": preprocessing.std}
    pool_size = (-(-preprocessing.input_size // STRIDES[-1]),) * 2  # of the last map
    return values | {"input_size": size, "pool_size": pool_size, "crop_mode": "center"}


class ImageClassifier(PretrainedNetwork):
    """A ScalableViT backbone with a classification head; its weights are named `backbone.*` and `head.*`.

    Args:
        backbone: Gives four maps and knows their channels.
        num_classes: Number of logits; with 0 there is no last layer.
        head: `mlp`, the released networks' head with a hidden layer 4096 wide, or `linear`.
        name: What `config` calls the network; `create_model` gives the size's name.
        global_pool: `avg`, or nothing for an output at every token of the last map.

    Attributes:
        config: Plain values from which `build_classifier` builds the same network; empty once it is pruned.
        pretrained_cfg: What goes with the weights, in timm's names: preprocessing, and `label_names` where known.
            `reset_classifier` drops the labels alone; `default_cfg` is the same.
        feature_info: For each map its channels (`num_chs`), stride (`reduction`) and module (`module`).
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Raises:
        ValueError: If the number of classes is negative, or the head or the pooling unknown.
    """

    task = "image-classification"
    last_layers = ("head.fc",)
    backbone: ScalableViT
    usage = 'model.predict("photo.jpg")  # the most probable labels with their probabilities'

    def __init__(
        self,
        backbone: ScalableViT,
        num_classes: int,
        head: HeadName = "mlp",
        name: str = "scalablevit_custom",
        global_pool: GlobalPool = "avg",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)}, got {head!r}")
        self.backbone = backbone
        self.head = HEADS[head](backbone.channels, num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = backbone.in_channels
        self.config: dict[str, Any] = {
            "name": name,
            "num_classes": num_classes,
            "head": head,
            "global_pool": global_pool,
            "backbone": backbone.config,
        }
        self.pretrained_cfg = default_pretrained_cfg(name, num_classes, backbone.in_channels)
        self.default_cfg = self.pretrained_cfg
        # Under this name timm looks for what it has to save along with the weights.
        self._model_args = {"head": head} | backbone.config
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": stride, "module": f"backbone.stages.{stage}"}
            for stage, (channels, stride) in enumerate(zip(backbone.channels, backbone.strides, strict=True))
        ]

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.backbone.channels[-1]

    @property
    def head_hidden_size(self) -> int:
        """Channels that the last layer sees."""
        return self.head.num_features

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None where they are not known; they may be set, one for each logit.

        They are `label_names` of `pretrained_cfg`.
        """
        names = self.pretrained_cfg.get("label_names")
        return list(names) if names and len(names) == self.num_classes else None

    @class_names.setter  # type: ignore[override]
    def class_names(self, names: Sequence[str]) -> None:
        if len(names) != self.num_classes:
            raise ValueError(f"{len(names)} names for {self.num_classes} classes: give one for each")
        self.pretrained_cfg["label_names"] = list(names)

    @property
    def preprocessing(self) -> Any:
        """Transform of the images, as `pretrained_cfg` describes it.

        Raises:
            ValueError: If `pretrained_cfg` describes something else than a square center crop.
        """
        from scalablevit_pl.preprocessing.records import read_preprocessing

        return read_preprocessing(self.pretrained_cfg, self.in_chans)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the classifier that a `config` describes, randomly initialized."""
        # Older descriptions have no pooling; what has a default in the constructor must be stated.
        required = {key: config[key] for key in ("name", "head")}
        return cls(**{"global_pool": "avg", **config, **required, "backbone": ScalableViT(**config["backbone"])})

    def annotate(self, description: "Description", labels: bool = True) -> None:
        """Set preprocessing and, with `labels`, class names in `pretrained_cfg` to those of a description."""
        self.multi_label = labels and description.multi_label
        cfg, names = dict(description.pretrained_cfg), description.class_names
        if not cfg and description.preprocessing is not None:
            cfg = timm_entries(description.preprocessing, self.in_chans)
        cfg.pop("label_names", None)
        self.pretrained_cfg.update(cfg | {"num_classes": self.num_classes})
        if labels and names is not None:
            self.class_names = names

    def describe(self) -> "Description":
        """Return everything about the network except its weights, with timm's entries."""
        return replace(super().describe(), pretrained_cfg=self.pretrained_cfg)

    def predict(  # type: ignore[override]
        self, images: "ImageLike | Sequence[ImageLike]", top_k: int = 5, batch_size: int = 32
    ) -> list[list[tuple[str, float]]]:
        """Classify images.

        Args:
            images: An image or several, each as `preprocess` takes it; or a folder or a pattern such as `photos/*.jpg`
                for its image files, sorted by name.
            top_k: Number of labels to return, at most.
            batch_size: Images that go through the network at a time.

        Returns:
            For each image its most probable labels with their probabilities, the most probable first; with
            `multi_label` these do not sum to 1. Without class names a label is the class's index.

        Raises:
            ValueError: If an image cannot be read, or a number is below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        names = self.class_names or [str(index) for index in range(self.num_classes)]
        predictions = []
        for logits, _ in self._outputs(images, batch_size):
            every = logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=1)
            top = every.topk(min(top_k, self.num_classes))
            for probabilities, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                predictions.append([(names[i], p) for i, p in zip(indices, probabilities, strict=True)])
        return predictions

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits `(B, num_classes)` from images `(B, C, H, W)` of any size."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map `(B, num_features, ceil(H / 32), ceil(W / 32))`, not normalized, from `(B, C, H, W)`."""
        maps: list[Tensor] = self.backbone(x)
        return maps[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits `(B, num_classes)` from the last map, or with `pre_logits` `(B, head_hidden_size)`."""
        output: Tensor = self.head([x], pre_logits)
        return output

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps of some stages.

        Args:
            x: Images `(B, C, H, W)`.
            indices: Stages, negative ones from the end, or how many of the last ones; by default all.
            norm: Apply the head's norm to the last stage's map.
            stop_early: Compute no stage behind the last one that is asked for.
            output_fmt: `NCHW`, the only one there is.
            intermediates_only: Return the maps alone.

        Returns:
            The map of the last stage that was computed, as `forward_features` gives it, and the maps
            `(B, C_i, H_i, W_i)` of the chosen stages, in the network's order.

        Raises:
            ValueError: If there is no such stage, or another format is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        count = len(self.backbone.stages)
        taken = _resolve_indices(indices, count)
        maps: list[Tensor] = self.backbone(x, max(taken) + 1 if stop_early else count)
        intermediates = [features for stage, features in enumerate(maps) if stage in taken]
        if norm and count - 1 in taken:
            intermediates[-1] = self.head.normalize(maps[-1]).permute(0, 3, 1, 2)
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of some stages do not need; a head that loses its stage goes in any case.

        Args:
            indices: As for `forward_intermediates`.
            prune_norm: Drop the head's norm.
            prune_head: Drop all of the head but its norm.

        Returns:
            The chosen stages, counted from the start.

        Raises:
            ValueError: If there is no such stage.
        """
        taken = _resolve_indices(indices, len(self.backbone.stages))
        cut = max(taken) + 1 < len(self.backbone.stages)
        if cut:
            self.backbone.truncate(max(taken) + 1)
        if cut or prune_head:
            norm, self.head = self.head.norm, LinearHead(self.backbone.channels, 0, "")
            self.head.norm, self.num_classes = norm, 0
        if cut or prune_norm:
            self.head.norm = nn.Identity()
        if cut or prune_head or prune_norm:
            self.config = {}
        self.head.train(self.training)
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Put a newly initialized last layer in, on the old weights' device and of their dtype; labels are forgotten.

        Args:
            num_classes: Number of logits; with 0 there is no last layer.
            global_pool: `avg`, or nothing for an output at every token; by default it stays.

        Raises:
            ValueError: If the number of classes is negative or the pooling unknown.
        """
        # There may be no last layer, and after pruning no head at all.
        nearest = next(chain(self.head.fc.parameters(), self.head.parameters(), self.parameters()))
        self.head.reset(num_classes, global_pool, nearest)
        self.num_classes, self.multi_label = num_classes, False
        self.pretrained_cfg = {key: value for key, value in self.pretrained_cfg.items() if key != "label_names"}
        self.default_cfg = self.pretrained_cfg
        # A new dictionary: the old one may already be part of a record.
        self.config = self.config | {"num_classes": num_classes, "global_pool": self.head.global_pool}


def _resolve_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Turn a choice among `count` stages into their numbers from the start."""
    if indices is None:
        indices = count
    if isinstance(indices, int):
        taken = list(range(count - indices, count))
    else:
        taken = [index + count if index < 0 else index for index in indices]
    if not taken or min(taken) < 0 or max(taken) >= count:
        raise ValueError(f"indices must choose among {count} stages, got {indices}")
    return taken
