"""Steps of the recipe against the same steps with the parts of timm and torch."""

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from small_tasks import CLASSES, QUIET, swin, twins
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from scalablevit_pl.data.transforms import Augmentation, BatchMix, PatchDraw, train_transform
from scalablevit_pl.models import create_model
from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import ClassificationTask


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  timm draws from the global streams
    torch.manual_seed(number)


def photo() -> Image.Image:
    return Image.fromarray(np.random.RandomState(3).randint(0, 255, (90, 120, 3), dtype=np.uint8))


def test_the_transform_is_timm_s_with_the_recipe_s_values() -> None:
    preprocessing, augmentation = Preprocessing(input_size=48), Augmentation()
    ours, draw_patch = train_transform(preprocessing, augmentation), PatchDraw(augmentation.random_erasing, 48)
    theirs = create_transform(
        48,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    image, seen = photo(), []
    for number in range(12):
        seed(number)
        seen.append(preprocessing.normalize(ours(image)))
        top, left, height, width, _ = draw_patch().tolist()
        seed(number)
        expected = theirs(image)
        for image_of in (seen[-1], expected):  # the noise of random erasing is drawn elsewhere
            image_of[:, top : top + height, left : left + width] = 0.0
        assert torch.equal(seen[-1], expected), number
    assert not torch.equal(seen[0], seen[1])


class Batches(pl.LightningDataModule):
    """Two batches of an epoch, mixed as the recipe mixes them, with the batch's number as the seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.samples = [{"image": image, "label": index % CLASSES} for index, image in enumerate(images)]
        self.mix, self.count = BatchMix(Augmentation(), CLASSES), 0

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=4)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        seed(self.count)
        self.count += 1
        batch["image"], label = self.mix(batch["image"], batch["label"])
        batch["label"] = label.to(self.dtype)
        return batch


def drop_the_same_paths(network: nn.Module) -> None:
    """Make drop path draw the same numbers in the same forward pass, whatever was drawn before."""
    network.passes = 0

    def start(module: nn.Module, inputs: Any) -> None:
        torch.manual_seed(100 + network.passes)
        network.passes += 1

    network.register_forward_pre_hook(start)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.seen.append(outputs["loss"].item())


class StopAfter(pl.Callback):
    """End a training early; its schedule is that of all its steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def timm_steps(network: nn.Module, steps: int, warm_up: int, dtype: torch.dtype) -> list[float]:
    """Train with timm's parts and the recipe's values for a batch of 4, and return the losses."""
    base = 5e-3 * 4 / 8
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    groups = param_groups_weight_decay(network, 0.05, no_weight_decay_list=listed)
    optimizer = AdamW(groups, lr=base, betas=(0.9, 0.999), eps=1e-8)
    schedule = CosineLRScheduler(optimizer, 4, lr_min=1e-5, warmup_t=warm_up, warmup_lr_init=1e-6, t_in_epochs=False)
    mixup = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
    criterion, losses, data = SoftTargetCrossEntropy(), [], Batches(dtype)
    network.train()
    for step in range(steps):
        rows = data.samples[4 * (step % 2) : 4 * (step % 2) + 4]
        images, labels = torch.stack([row["image"] for row in rows]), torch.tensor([row["label"] for row in rows])
        seed(step)
        images, mixed_labels = mixup(images, labels)
        loss = criterion(network(images), mixed_labels.to(dtype))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step_update(step + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "build",
    [partial(create_model, "scalablevit_nano", CLASSES, head="mlp"), swin, twins],
    ids=["nano", "swin", "twins"],
)
@pytest.mark.parametrize(
    ("dtype", "steps", "warm_up"),
    # In double precision for several steps, since AdamW makes large steps of rounding errors in gradients near zero.
    [(torch.float32, 1, 0), (torch.float64, 4, 2)],
    ids=["one", "four"],
)
def test_steps_of_the_recipe_are_those_of_timm(
    build: Callable[..., nn.Module], dtype: torch.dtype, steps: int, warm_up: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build(drop_path_rate=0.2).to(dtype)
    theirs = copy.deepcopy(network)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for each in (network, theirs):
        drop_the_same_paths(each)
    task = ClassificationTask(
        network,
        partial(AdamW, lr=5e-3, weight_decay=0.05),
        partial(WarmupCosineSchedule, warmup_epochs=warm_up // 2),
        base_batch_size=8,
    )
    losses = Losses()
    trainer = pl.Trainer(
        **QUIET,
        accelerator="cpu",
        max_epochs=2,  # four steps, for which the schedule is
        gradient_clip_val=5.0,
        precision="32-true" if dtype == torch.float32 else "64-true",
        callbacks=[losses, StopAfter(steps)],
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=Batches(dtype))
    assert losses.seen == pytest.approx(timm_steps(theirs, steps, warm_up, dtype), rel=1e-7)
    after, moved = theirs.state_dict(), False
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6)
        moved |= not torch.allclose(tensor, start[name], atol=1e-3)
    assert moved
