"""Random augmentation for training, by timm: of one image, and across a batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor

from scalablevit_pl.preprocessing import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied; the defaults are the paper's recipe for ImageNet (DeiT's, as timm implements it).

    Attributes:
        scale: Range of the random crop's area, as a fraction of the image's.
        ratio: Range of the random crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of colour jitter; timm leaves it out while `auto_augment` is on.
        auto_augment: timm's name of a policy such as `rand-m9-mstd0.5-inc1` (RandAugment), or None.
        random_erasing: Probability with which one patch is filled with noise.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        mix_prob: Probability with which a batch is mixed.
        switch_prob: Probability of cutmix where both are on.

    Raises:
        ValueError: If a value is out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("hflip", "random_erasing", "mix_prob", "switch_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        for name in ("color_jitter", "mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must hold two fractions above 0, the smaller one first, got {list(self.scale)}")
        if not 0.0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must hold two positive numbers, the smaller one first, got {list(self.ratio)}")


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Build timm's training transform: an RGB image to a normalized `(3, input_size, input_size)`."""
    transform: Callable[[Image.Image], Tensor] = create_transform(
        preprocessing.input_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
        re_count=1,
    )
    for step in transform.transforms:  # type: ignore[attr-defined]
        for operation in _operations(step):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _operations(step: object) -> list[auto_augment.AugmentOp]:
    """List the operations of one of timm's automatic augmentations; other steps have none."""
    policies = getattr(step, "policy", None) or [getattr(step, "ops", [])]
    return [operation for policy in policies for operation in policy]


def _posterize(image: Image.Image, bits_to_keep: int, **settings: object) -> Image.Image:
    """Keep the upper bits of each channel; with none of them left the image is black.

    The strongest level of the paper's policy keeps none. Pillow made that a black image before 13 and refuses it since.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits_to_keep, **settings)  # type: ignore[no-untyped-call]
    return posterized


class BatchMix:
    """Mixup or cutmix with one draw per batch, for batches of any size.

    Label smoothing is the loss's business, so the mixed labels are not smoothed here.

    Args:
        augmentation: Says how strongly and how often.
        num_classes: Width of the soft labels.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        self.mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            prob=augmentation.mix_prob,
            switch_prob=augmentation.switch_prob,
            label_smoothing=0.0,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images `(B, C, H, W)`, in place where it can, and labels `(B,)` to soft labels `(B, num_classes)`."""
        batch = len(images)
        if batch % 2:  # timm pairs the first with the last and refuses odd batches: the last image finds itself a twin
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        images, soft_labels = self.mixup(images, labels)
        return images[:batch], soft_labels[:batch]
