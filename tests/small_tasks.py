"""Small networks, samples and trainers for tests of tasks."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD

from scalablevit_pl.models import create_model
from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.preprocessing import DensePreprocessing

Samples = list[dict[str, Any]]
CLASSES = 7
# Trains without changing a weight.
STILL = {"optimizer": partial(SGD, lr=0.0), "schedule": partial(WarmupCosineSchedule, warmup_lr=0.0, min_lr=0.0)}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Scores(nn.Module):
    """Logits that are the image's own values, as long as the weights stay as they are."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.eye(num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.weight + self.bias


class Recorder(pl.Callback):
    """Record losses and learning rates of each training batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.logged: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.logged.append(trainer.callback_metrics["train/lr"].item())


def make_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """Build a quiet trainer of one epoch on the CPU."""
    values: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
    return pl.Trainer(**QUIET | values | options)


def make_samples(count: int, num_classes: int = CLASSES) -> Samples:
    """Draw images that `Scores` takes, and labels."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, num_classes, 1, 1, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return [{"image": image, "label": label} for image, label in zip(images, labels.tolist(), strict=True)]


def make_images(count: int, classes: int = CLASSES) -> Samples:
    """Draw images of 32 × 32 pixels; the labels go around."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [{"image": image, "label": index % classes} for index, image in enumerate(images)]


def log_probabilities(samples: Samples) -> Tensor:
    """Return the logarithms of the probabilities that `Scores` gives, in double precision."""
    logits = torch.stack([sample["image"].flatten() for sample in samples]).double()
    return logits - logits.exp().sum(1, keepdim=True).log()


def calibration_error(probabilities: Tensor, labels: list[int], bins: int = 15) -> float:
    """Compute equation 3 of Guo et al. 2017, sample by sample."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels, strict=True):
        confidence = max(row)
        number = next(place for place in range(1, bins + 1) if confidence <= place / bins)
        members.setdefault(number, []).append((confidence, row.index(confidence) == label))
    error = 0.0
    for inside in members.values():
        accuracy = sum(right for _, right in inside) / len(inside)
        mean = sum(confidence for confidence, _ in inside) / len(inside)
        error += len(inside) / len(labels) * abs(accuracy - mean)
    return error


def mean_average_precision(scores: list[list[float]], truth: list[list[bool]]) -> float:
    """Sum precision times the step of recall over the thresholds of each class that has samples."""
    precisions = []
    for own, right in zip(zip(*scores, strict=True), zip(*truth, strict=True), strict=True):
        total, before = 0.0, 0.0
        for threshold in sorted(set(own), reverse=True):
            found = [hit for score, hit in zip(own, right, strict=True) if score >= threshold]
            recall = sum(found) / max(sum(right), 1)
            total, before = total + (recall - before) * sum(found) / len(found), recall
        precisions += [total] if any(right) else []
    return sum(precisions) / len(precisions)


def course(step: int, total: int, warmup: int, rate: float) -> float:
    """Return the learning rate of the paper's schedule at a step."""
    if step < warmup:
        return 1e-6 + (rate - 1e-6) * step / warmup
    return 1e-5 + (rate - 1e-5) * (1.0 + math.cos(math.pi * step / total)) / 2.0


def nano(drop_path_rate: float = 0.0) -> nn.Module:
    """Build the nano classifier."""
    return create_model("scalablevit_nano", num_classes=CLASSES, drop_path_rate=drop_path_rate)


def swin(drop_path_rate: float = 0.0) -> nn.Module:
    """Build a small Swin of timm's."""
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 12, "depths": (1, 2, 2, 1)}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=CLASSES, drop_path_rate=drop_path_rate, **sizes
    )


def twins(drop_path_rate: float = 0.0) -> nn.Module:
    """Build a small Twins of timm's."""
    sizes = {"img_size": 32, "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 1)}
    return timm.create_model("twins_svt_small", num_classes=CLASSES, drop_path_rate=drop_path_rate, **sizes)


class Coarse(nn.Module):
    """Logits of stride 4 for each pixel's neighborhood, and those of an auxiliary head of stride 8."""

    def __init__(self, num_classes: int = CLASSES, channels: int = 3, auxiliary: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        self.convolution = nn.Conv2d(channels, num_classes, 5, stride=4, padding=2)
        self.auxiliary = nn.Conv2d(channels, num_classes, 9, stride=8, padding=4) if auxiliary else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        return self.convolution(image)

    def forward_with_auxiliary(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        return self(image), None if self.auxiliary is None else self.auxiliary(image)


SCENE = DensePreprocessing(32, 64, 16)
SCENE_SIZES = ((40, 56), (32, 32), (70, 33), (24, 90), (64, 64), (33, 70), (32, 32), (16, 16), (45, 32))


def make_scene(index: int, num_classes: int = CLASSES) -> tuple[Image.Image, Tensor]:
    """Draw an image and its mask, where a tenth of the pixels is ignored and the last class does not occur."""
    height, width = SCENE_SIZES[index % len(SCENE_SIZES)]
    generator = torch.Generator().manual_seed(index)
    coarse = torch.randint(256, (3, 6, 6), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(coarse.permute(1, 2, 0).numpy()).resize((width, height))
    mask = torch.randint(num_classes - 1, (height, width), generator=generator, dtype=torch.uint8)
    return image, mask.where(torch.rand(height, width, generator=generator) > 0.1, 255)


def evaluation_scenes(count: int, num_classes: int = CLASSES) -> Samples:
    """Draw samples of an evaluation: images as the network sees them, masks of the original size."""
    samples = []
    for index in range(count):
        image, mask = make_scene(index, num_classes)
        sample = SCENE.sample(image)
        pixels = SCENE.normalize(sample.pop("image"))
        samples.append({"image": pixels, **sample, "mask": mask, "index": index, "path": f"{index}.jpg"})
    return samples


def training_scenes(count: int, num_classes: int = CLASSES) -> Samples:
    """Draw samples of a training, all of one size."""
    samples = []
    for index in range(count):
        image, _ = make_scene(index)
        generator = torch.Generator().manual_seed(index)
        mask = torch.randint(num_classes, (32, 32), generator=generator, dtype=torch.uint8)
        pixels = SCENE.normalize(SCENE.pixels(image.resize((32, 32))))
        samples.append({"image": pixels, "mask": mask.where(torch.rand(32, 32, generator=generator) > 0.1, 255)})
    return samples
