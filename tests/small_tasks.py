"""Small networks, samples and trainers for tests of tasks."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD

from scalablevit_pl.models import create_model
from scalablevit_pl.optim import WarmupCosineSchedule

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
