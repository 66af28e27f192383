import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.data.transforms import (
    Augmentation,
    BatchMix,
    PatchDraw,
    erase,
    reference_transform,
    train_transform,
)
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.randomness import seeded

CLASSES = 10


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  timm draws from it
    torch.manual_seed(value)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal_but_for_the_patch(ours: Tensor, theirs: Tensor, patch: Tensor, normalized: Preprocessing) -> None:
    """Compare bytes and the patch drawn after them with timm's normalized image, which has noise in the patch."""
    assert ours.dtype == torch.uint8
    top, left, height, width, _ = patch.tolist()
    expected = normalized.normalize(ours)
    theirs = theirs.clone()
    for image in (expected, theirs):
        inside = image[:, top : top + height, left : left + width]
        assert image is expected or height == 0 or inside.unique().numel() > 0.99 * inside.numel()
        inside.zero_()
    assert torch.equal(expected, theirs)


def mixed(augmentation: Augmentation, batch: int, value: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels (one class each), and their mixtures."""
    images, labels = torch.rand(batch, 3, 12, 16), torch.arange(batch)
    seed(value)
    return images, labels, *BatchMix(augmentation, CLASSES)(images.clone(), labels)


def partners(soft_label: Tensor, own: int) -> tuple[float, int]:
    """Return the weight of the image itself in a soft label, and the other image it is mixed with."""
    others = [index for index in soft_label.nonzero().flatten().tolist() if index != own]
    assert len(others) <= 1
    return soft_label[own].item(), (others or [own])[0]


def test_images_of_one_channel_are_augmented_as_by_timm() -> None:
    preprocessing = Preprocessing(28, mean=(0.3,), std=(0.2,))
    augmentation = Augmentation(random_erasing=0.0)
    image, ours = noise(70, 50).convert("L"), train_transform(preprocessing, augmentation)
    theirs = reference_transform(preprocessing, augmentation)
    for value in range(60):
        seed(value)
        pixels = ours(image)
        seed(value)
        assert torch.equal(preprocessing.normalize(pixels), theirs(image))


def test_images_of_four_channels_are_cropped_flipped_and_jittered() -> None:
    preprocessing = Preprocessing(28, mean=(0.5,) * 4, std=(0.2,) * 4)
    transform = train_transform(preprocessing, Augmentation(auto_augment=None))
    image = Image.merge("RGBX", [*noise(70, 50).split(), noise(70, 50).convert("L")])
    assert transform(image).shape == (4, 28, 28)


def test_training_crops_a_thin_image_before_it_is_resized() -> None:
    transform = train_transform(Preprocessing(28), Augmentation(auto_augment=None))
    for size in ((1, 50_000), (50_000, 1)):
        assert transform(Image.new("RGB", size, "red")).shape == (3, 28, 28)


def test_the_defaults_are_the_deit_recipe() -> None:
    default = Augmentation()
    assert (default.mixup, default.cutmix, default.mix_prob, default.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    image = noise(70, 50)
    ours, draw_patch = train_transform(Preprocessing(), default), PatchDraw(default.random_erasing, 224)
    theirs = create_transform(
        224,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    for value in range(20):
        seed(value)
        expected = theirs(image)
        seed(value)
        assert_equal_but_for_the_patch(ours(image), expected, draw_patch(), Preprocessing())


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation((0.5, 0.6), (0.9, 1.2), 0.3, 0.2, None, 0.0),
        Augmentation((0.2, 0.9), (0.5, 2.0), 1.0, 0.0, None, 1.0),
        Augmentation((0.7, 0.8), (1.0, 1.1), 0.0, 0.4, "augmix-m3-w2", 0.5),
    ],
)
def test_the_transform_is_timms(augmentation: Augmentation) -> None:
    image = noise(41, 33)
    preprocessing = Preprocessing(24, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ours, draw_patch = train_transform(preprocessing, augmentation), PatchDraw(augmentation.random_erasing, 24)
    theirs = create_transform(
        24,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )
    for value in range(10):
        seed(value)
        expected = theirs(image)
        seed(value)
        actual = ours(image)
        assert actual.shape == (3, 24, 24)
        assert_equal_but_for_the_patch(actual, expected, draw_patch(), preprocessing)
        seed(value)
        assert torch.equal(reference_transform(preprocessing, augmentation)(image), expected)


def test_patches_have_timms_frequency_and_size_and_normal_noise() -> None:
    draw = PatchDraw(0.25, 64)
    seed(0)
    patches = torch.stack([draw() for _ in range(4000)])
    filled = patches[patches[:, 2] > 0]
    assert len(filled) / 4000 == pytest.approx(0.25, abs=0.03)
    assert len(filled[:, 4].unique()) == len(filled)  # no two patches share the seed of their noise
    areas = filled[:, 2] * filled[:, 3] / 64**2
    assert 0.015 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.35
    images = torch.full((200, 3, 64, 64), 9.0)
    erase(images, filled[:200])
    noise = images[images != 9.0]
    assert noise.numel() == int((3 * filled[:200, 2] * filled[:200, 3]).sum())
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert noise.std().item() == pytest.approx(1.0, abs=0.01)
    again = torch.full((1, 3, 64, 64), 9.0)
    erase(again, filled[7:8])
    assert torch.equal(again[0], images[7])


def test_without_variation_the_whole_image_is_used() -> None:
    still = Augmentation((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, None, 0.0)
    image, preprocessing = noise(24, 24), Preprocessing(24, 1.0)
    pixels = train_transform(preprocessing, still)(image)
    assert torch.equal(pixels, preprocessing.pixels(image))
    assert torch.equal(preprocessing.normalize(pixels), preprocessing(image))


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 9])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_the_batch_size_and_labels_sum_to_one(batch: int, mixup: float, cutmix: float) -> None:
    for value in range(5):
        images, labels, new_images, soft_labels = mixed(Augmentation(mixup=mixup, cutmix=cutmix), batch, value)
        assert new_images.shape == images.shape
        assert soft_labels.shape == (batch, CLASSES)
        assert (soft_labels >= 0.0).all()
        assert torch.allclose(soft_labels.sum(1), torch.ones(batch))
        assert len(labels) == batch


@pytest.mark.parametrize("batch", [1, 6, 7])
def test_mixup_mixes_images_and_labels_with_the_same_weights(batch: int) -> None:
    shares = []
    for value in range(10):
        images, labels, new_images, soft_labels = mixed(Augmentation(mixup=0.8, cutmix=0.0), batch, value)
        for own in labels.tolist():
            share, other = partners(soft_labels[own], own)
            expected = share * images[own] + (1.0 - share) * images[other]
            assert torch.allclose(new_images[own], expected, atol=1e-6)
            shares.append(share)
    assert batch == 1 or 0.0 < min(shares) < max(shares) < 1.0


@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize("augmentation", [Augmentation(mixup=0.8, cutmix=0.0), Augmentation(mixup=0.0, cutmix=1.0)])
def test_labels_of_several_classes_are_mixed_as_single_ones(augmentation: Augmentation, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    images, single = torch.rand(batch, 3, 8, 8, generator=generator), torch.arange(batch)
    several = torch.randint(2, (batch, 5), generator=generator).float()
    with seeded(3):
        expected_images, weights = BatchMix(augmentation, max(batch, 2))(images.clone(), single)
    with seeded(3):
        mixed_images, labels = BatchMix(augmentation, 5)(images.clone(), several)
    assert torch.equal(mixed_images, expected_images)
    torch.testing.assert_close(labels, weights[:, :batch] @ several)


@pytest.mark.parametrize("batch", [6, 7])
def test_cutmix_pastes_the_share_stated_by_the_labels(batch: int) -> None:
    shares = []
    for value in range(10):
        images, labels, new_images, soft_labels = mixed(Augmentation(mixup=0.0, cutmix=1.0), batch, value)
        for own in labels.tolist():
            share, other = partners(soft_labels[own], own)
            is_own = (new_images[own] == images[own]).all(0)
            is_other = (new_images[own] == images[other]).all(0)
            assert (is_own | is_other).all()
            assert own == other or is_own.float().mean().item() == pytest.approx(share, abs=1e-6)
            shares.append(share)
    assert min(shares) < 0.5 < max(shares)


@pytest.mark.parametrize(
    ("augmentation", "kept"),
    [
        (Augmentation(mix_prob=0.0), True),
        (Augmentation(mix_prob=1.0), False),
    ],
)
def test_mix_prob_is_the_probability_of_mixing_a_batch(augmentation: Augmentation, kept: bool) -> None:
    images, labels, new_images, soft_labels = mixed(augmentation, 6)
    assert torch.equal(images, new_images) is kept
    assert torch.equal(soft_labels, torch.nn.functional.one_hot(labels, CLASSES).float()) is kept


@pytest.mark.parametrize(("switch_prob", "is_cut"), [(0.0, False), (1.0, True)])
def test_switch_prob_chooses_between_mixup_and_cutmix(switch_prob: float, is_cut: bool) -> None:
    images, _, new_images, _ = mixed(Augmentation(switch_prob=switch_prob), 6)
    from_the_batch = (new_images[:, None] == images[None]).all(2).any(1)
    assert from_the_batch.all().item() is is_cut


@pytest.mark.parametrize(
    "values",
    [
        {"hflip": 7.0},
        {"random_erasing": -0.1},
        {"mix_prob": math.nan},
        {"switch_prob": 2.0},
        {"mixup": -1.0},
        {"cutmix": math.inf},
        {"color_jitter": -0.4},
        {"scale": (2.0, 3.0)},
        {"scale": (0.5, 0.1)},
        {"ratio": (0.0, 1.0)},
    ],
    ids=str,
)
def test_values_out_of_range_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Augmentation(**values)


@pytest.mark.parametrize("policy", ["rand-m10-n3-mstd0.5-inc1", "rand-m10", "original", "originalr", "augmix-m10"])
def test_every_level_of_a_policy_works(policy: str) -> None:
    transform = train_transform(Preprocessing(16, 1.0), Augmentation(auto_augment=policy, random_erasing=0.0))
    image = noise(20, 20)
    for value in range(300):
        seed(value)
        assert transform(image).shape == (3, 16, 16)


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterizing_keeps_the_upper_bits(bits: int) -> None:
    transform = train_transform(Preprocessing(16, 1.0), Augmentation(auto_augment="rand-m9-inc1"))
    (augment,) = [step for step in transform.transforms if hasattr(step, "ops")]
    (posterize,) = [operation for operation in augment.ops if operation.name == "PosterizeIncreasing"]
    image = noise(9, 7)
    kept = np.asarray(posterize.aug_fn(image, bits))
    assert np.array_equal(kept, np.asarray(image) & (256 - 2 ** (8 - bits)))


def test_erasing_fills_only_the_patch_with_noise_of_each_channel() -> None:
    patches = [[2, 3, 4, 6, 11], [0] * 5, [0, 7, 9, 5, 12]]
    images = torch.full((3, 3, 9, 12), 5.0)
    erase(images, torch.tensor(patches))
    expected = np.full((3, 3, 9, 12), 5.0, np.float32)
    for number, (top, left, height, width, value) in enumerate(patches):
        noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(value)).numpy()
        for channel, row, column in np.ndindex(noise.shape):
            expected[number, channel, top + row, left + column] = noise[channel, row, column]
    assert np.array_equal(images.numpy(), expected)


def test_a_policy_that_timm_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match="timm has no policy 'nonsense' for auto_augment"):
        train_transform(Preprocessing(), Augmentation(auto_augment="nonsense"))


def test_null_in_an_option_means_no_policy() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassificationDataModule, "data")
    words = ["--data=scalablevit_pl.data.ClassificationDataModule", "--data.dataset=x"]
    config = parser.parse_args([*words, "--data.augmentation.auto_augment=null"])
    assert Augmentation(**config.data.init_args.augmentation.as_dict()).auto_augment is None
