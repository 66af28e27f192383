"""Semantic segmentation as a user of the package writes it: a network, a task, its data and its report.

docs/extending.md shows parts of this module.
"""

import csv
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassJaccardIndex

from scalablevit_pl.data import BaseDataModule, Preprocessing
from scalablevit_pl.data.images import Targets
from scalablevit_pl.models import PretrainedNetwork, ScalableViT
from scalablevit_pl.tasks import BaseTask, MetricInfo, Report
from scalablevit_pl.tasks.report import gather_by_index

CLASSES = ["background", "circle", "square", "triangle"]
COLORS = ((60, 60, 60), (200, 60, 60), (60, 160, 60), (70, 70, 210))
CORNERS = (0, 32, 4, 3)
IGNORED = 255  # class of the pixels that no loss and no metric counts
SHOWN = 8  # images in the picture of a report
NANO = {"embed_dims": [32, 64, 128, 256], "num_heads": [1, 2, 4, 8], "depths": [2, 2, 3, 2]}


class ToyHead(nn.Module):
    """Sum the four maps in one size and number of channels, and classify each of its positions."""

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(size, width, 1) for size in channels)
        self.last_layer = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        projected = [project(features) for project, features in zip(self.project, maps, strict=True)]
        return self.last_layer(sum(F.interpolate(features, size, mode="bilinear") for features in projected))


class ToySegmenter(PretrainedNetwork):
    """Logits `(B, K, H, W)` for images `(B, 3, H, W)`."""

    task = "semantic-segmentation"
    last_layers = ("head.last_layer",)

    def __init__(self, num_classes: int, width: int = 32, backbone: dict[str, Any] = NANO) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = ScalableViT(**backbone)
        self.head = ToyHead(self.backbone.channels, width, num_classes)
        self.config = {"num_classes": num_classes, "width": width, "backbone": self.backbone.config}

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.head(self.backbone(image)), image.shape[-2:], mode="bilinear")

    def predict(self, images: Any, batch_size: int = 32) -> list[Tensor]:
        """Return the class of each pixel `(H, W)` for each image."""
        return [logits.argmax(0) for logits in super().predict(images, batch_size)]


class ToySegmentationTask(BaseTask):
    """Train a network that maps `image` to logits `(B, K, H, W)` with the cross-entropy to `mask (B, H, W)`."""

    monitor, mode, shown = "miou", "max", ("miou",)
    described: ClassVar = {
        "loss": MetricInfo("cross-entropy", "loss", plotted=True),
        "miou": MetricInfo("mean IoU", "mean_iou", plotted=True),
    }

    def loss(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        losses = F.cross_entropy(output, batch["mask"], ignore_index=IGNORED, reduction="none")
        return losses.sum((1, 2)) / (batch["mask"] != IGNORED).sum((1, 2)).clamp(min=1)  # one of each image

    def metrics(self, part: str) -> dict[str, Metric]:
        iou = MulticlassJaccardIndex(self.num_classes, ignore_index=IGNORED, validate_args=False)
        return {"miou": iou} if part == "train" else {"miou": iou, "loss": MeanMetric()}

    def update(self, metrics: Mapping[str, Any], output: Tensor, batch: dict[str, Any]) -> None:
        metrics["miou"].update(output.argmax(1), batch["mask"])
        if "loss" in metrics:
            metrics["loss"].update(self.loss(output, batch))

    def predict(self, output: Tensor) -> Tensor:
        return output.argmax(1)

    def report(self, data: Any, predict: bool = False) -> "ToyReport":
        return ToyReport(data)


class LowestTask(ToySegmentationTask):
    """Call the lowest metric the best: that of the first epoch, where a training succeeds."""

    mode = "min"


class ToyReport(Report):
    """Write the accuracy and the classes of each image as `predictions.csv`, some images as `predictions.png`."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.rows: dict[int, dict[str, Any]] = {}
        self.pictures: dict[int, Tensor] = {}

    def add(self, batch: dict[str, Any], predictions: Tensor) -> None:
        for position, index in enumerate(batch["index"].tolist()):
            predicted, names = predictions[position], self.data.class_names
            shares = (predicted.flatten().bincount(minlength=len(names)) / predicted.numel()).tolist()
            row = {"index": index, "path": batch["path"][position], "accuracy": ""}
            self.rows[index] = row | {name: f"{share:.6f}" for name, share in zip(names, shares, strict=True)}
            if "mask" in batch:
                mask = batch["mask"][position]
                self.rows[index]["accuracy"] = f"{(predicted == mask)[mask != IGNORED].float().mean():.6f}"
                if index < SHOWN:
                    self.pictures[index] = self._picture(batch["image"][position], mask, predicted)

    def _picture(self, image: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
        """Return image, mask and prediction side by side: bytes `(H, 3 W, 3)`."""
        colors = torch.tensor([*COLORS, (255, 255, 255)], dtype=torch.uint8)
        painted = [colors[classes.cpu().clamp(max=len(COLORS))] for classes in (mask, predicted)]
        pixels = self.data.preprocessing.denormalize(image).permute(1, 2, 0).cpu()
        return torch.cat([pixels, *painted], dim=1)

    def gather(self) -> None:
        self.rows, self.pictures = gather_by_index(self.rows), gather_by_index(self.pictures)

    def write(self, folder: Path, title: str) -> None:
        self.write_predictions(folder)
        Image.fromarray(torch.cat(list(self.pictures.values())).numpy()).save(folder / "predictions.png")

    def write_predictions(self, out: Path) -> None:
        with (out / "predictions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["index", "path", "accuracy", *self.data.class_names])
            writer.writeheader()
            writer.writerows(self.rows.values())


class ToySegmentationDataModule(BaseDataModule):
    """Images with a column `mask` that holds their classes as PNG files: `mask (B, H, W)`."""

    def __init__(self, dataset: str, preprocessing: Preprocessing, **kwargs: Any) -> None:
        super().__init__(dataset, preprocessing=preprocessing, **kwargs)
        self.class_names = CLASSES

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        return Targets(["mask"], read_mask)

    def transform(self, training: bool) -> "JointTransform":
        return JointTransform(self.preprocessing, flip=training)


def read_mask(row: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["mask"].read()))


@dataclass(frozen=True)
class JointTransform:
    """Crop image and mask alike, and in training flip both or none."""

    preprocessing: Preprocessing
    flip: bool

    def __call__(self, image: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
        mirror = ImageOps.mirror if self.flip and random.random() < 0.5 else Image.Image.copy
        sample = {"image": self.preprocessing.pixels(mirror(image))}
        if mask is not None:
            nearest = replace(self.preprocessing, interpolation="nearest")
            sample["mask"] = nearest.pixels(mirror(mask).convert("RGB"))[0].long()
        return sample


def write_shapes(folder: Path, side: int = 64, **splits: int) -> None:
    """Write a data set of coloured shapes with masks as parquet files, given the number of images of each split."""
    drawn = random.Random(0)
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Value("binary")})
    for split, count in splits.items():
        pairs = [draw_shapes(drawn, side) for _ in range(count)]
        rows = {"image": [image for image, _ in pairs], "mask": [encoded(mask) for _, mask in pairs]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


def draw_shapes(drawn: random.Random, side: int) -> tuple[Image.Image, Image.Image]:
    image, mask = Image.new("RGB", (side, side), COLORS[0]), Image.new("L", (side, side), 0)
    for kind in drawn.sample(range(1, len(CLASSES)), k=2):
        radius = drawn.randint(side // 8, side // 4)
        circle = (drawn.randint(radius, side - radius), drawn.randint(radius, side - radius), radius)
        ImageDraw.Draw(image).regular_polygon(circle, CORNERS[kind], fill=COLORS[kind])
        ImageDraw.Draw(mask).regular_polygon(circle, CORNERS[kind], fill=kind, outline=IGNORED)
    noise = np.random.RandomState(drawn.randrange(2**32)).normal(0.0, 40.0, (side, side, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)), mask


def encoded(mask: Image.Image) -> bytes:
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()
