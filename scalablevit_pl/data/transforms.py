"""Random augmentation for training by timm: of single images, and across a batch."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor

from scalablevit_pl.preprocessing.records import Preprocessing, to_pixels


@dataclass(frozen=True)
class Augmentation:
    """Random variation of training images; the defaults are the paper's ImageNet recipe (DeiT's, by timm).

    Attributes:
        scale: Range of the random crop's area, as a fraction of the image's.
        ratio: Range of the random crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of color jitter; timm omits it if `auto_augment` is set.
        auto_augment: timm's name of a policy such as `rand-m9-mstd0.5-inc1` (RandAugment), or None.
        random_erasing: Probability of filling one patch with noise.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        mix_prob: Probability of mixing a batch.
        switch_prob: Probability of cutmix if both are on.

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
        if self.auto_augment == "None":  # the text that jsonargparse makes of null in an option
            object.__setattr__(self, "auto_augment", None)
        for name in ("hflip", "random_erasing", "mix_prob", "switch_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("color_jitter", "mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be two fractions above 0 in ascending order, got {list(self.scale)}")
        if not 0.0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be two positive numbers in ascending order, got {list(self.ratio)}")


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Build timm's training transform up to bytes: an image to `(C, input_size, input_size)`.

    The rest, normalization and random erasing, is applied to whole batches: `Preprocessing.normalize` and `erase`.
    """
    transform: Any = reference_transform(preprocessing, augmentation, use_prefetcher=True)
    transform.transforms[-1] = to_pixels  # timm's own rearranges the bytes to planes, which takes time
    return transform  # type: ignore[no-any-return]


def reference_transform(
    preprocessing: Preprocessing, augmentation: Augmentation, use_prefetcher: bool = False
) -> Callable[[Image.Image], Tensor]:
    """Build timm's own training transform: an image to normalized `(C, input_size, input_size)`.

    Only posterizing to zero bits is fixed, which fails with Pillow 13. With `use_prefetcher` it stops at bytes, before
    normalization and erasing.
    """
    values: dict[str, Any] = {
        name: getattr(augmentation, name) for name in ("scale", "ratio", "hflip", "color_jitter", "auto_augment")
    }
    values |= {name: getattr(preprocessing, name) for name in ("input_size", "interpolation", "mean", "std")}
    erasing: dict[str, Any] = {"re_prob": augmentation.random_erasing, "re_mode": "pixel", "re_count": 1}
    try:
        transform: Any = create_transform(is_training=True, use_prefetcher=use_prefetcher, **values, **erasing)
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        name = augmentation.auto_augment
        raise ValueError(
            f"timm has no policy {name!r} for auto_augment ({error}): use one such as 'rand-m9'"
        ) from error
    for step in transform.transforms:
        for operation in _operations(step):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform  # type: ignore[no-any-return]


def _operations(step: object) -> list[auto_augment.AugmentOp]:
    """List the operations of one of timm's automatic augmentations; other steps have none."""
    policies = getattr(step, "policy", None) or [getattr(step, "ops", [])]
    return [operation for policy in policies for operation in policy]


def _posterize(image: Image.Image, bits_to_keep: int, **settings: object) -> Image.Image:
    """Keep the upper bits of each channel; with zero bits the image is black.

    The strongest level of the paper's policy keeps none. Pillow returned a black image before 13, and refuses since.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits_to_keep, **settings)  # type: ignore[no-untyped-call]
    return posterized


class PatchDraw:
    """Draw the patch of an image that random erasing fills with noise (Zhong et al. 2017, arXiv 1708.04896).

    Called after the transform of a square image, it draws the same numbers as timm's RandomErasing.
    """

    def __init__(self, probability: float, size: int) -> None:
        self.erasing = RandomErasing(probability, mode="const", device="cpu")  # type: ignore[no-untyped-call]
        self.size = size

    def __call__(self) -> Tensor:
        """Return top, left, height, width and the seed of the noise: `(5,)`; zeros if there is no patch."""
        canvas = _Canvas(self.size)
        self.erasing(canvas)
        patch = [*canvas.patch, random.getrandbits(63)] if canvas.patch else [0] * 5
        return torch.tensor(patch)


class _Canvas:
    """Stands in for an image: records where timm erases it."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.side = side
        self.patch: tuple[int, ...] = ()

    def size(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def __setitem__(self, place: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = place
        self.patch = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


def erase(images: Tensor, patches: Tensor) -> None:
    """Fill patches of normalized images `(B, C, H, W)` in place with standard normal noise.

    The noise is a function of the patch's seed and the type of device only. `patches (B, 5)` of `PatchDraw` are on the
    CPU, images on any device.
    """
    generator = torch.Generator(images.device)
    for image, (top, left, height, width, seed) in zip(images, patches.tolist(), strict=True):
        if height > 0:
            generator.manual_seed(seed)
            noise = torch.randn(
                (len(image), height, width), generator=generator, device=images.device, dtype=images.dtype
            )
            image[:, top : top + height, left : left + width] = noise


@dataclass(frozen=True)
class LabelledTransform:
    """From an image and its label to a sample with `image`, `label` if there is one, and `patch (5,)` if one is drawn.

    Attributes:
        pixels: From an image to bytes.
        draw_patch: Called afterwards.
    """

    pixels: Callable[[Image.Image], Tensor]
    draw_patch: PatchDraw | None = None

    def __call__(self, image: Image.Image, label: int | Tensor | None) -> dict[str, Any]:
        """Return the sample of an image."""
        sample = {"image": self.pixels(image)} | ({} if self.draw_patch is None else {"patch": self.draw_patch()})
        return sample if label is None else sample | {"label": label}


class BatchMix:
    """Mixup or cutmix with one draw per batch, for batches of any size; smoothing labels is up to the loss."""

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
        """Mix images `(B, C, H, W)`, in place if possible, and labels, `(B,)` or `(B, K)`, to soft labels `(B, K)`."""
        batch = len(images)
        if batch % 2:  # timm mixes the first image with the last and so on, and refuses odd batches: repeat the last
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        first_half = torch.arange(len(images), device=images.device) < len(images) // 2
        images, soft_labels = self.mixup(images, first_half if labels.ndim == 2 else labels)
        if labels.ndim == 2:  # timm returned the shares of an image and of its partner, from the other half
            soft_labels = soft_labels[-1, :1] * labels + soft_labels[-1, 1:2] * labels.flip(0)
        return images[:batch], soft_labels[:batch]
