import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scalablevit_pl.data.joint_transforms import (
    FixedSegmentation,
    RandomSegmentation,
    SegmentationAugmentation,
    _resize_box,
    functional,
)
from scalablevit_pl.preprocessing import DensePreprocessing, UnreadableImageError
from scalablevit_pl.preprocessing.masks import Mask

MEAN = (0.5, 0.25, 0.75)
GRAY = DensePreprocessing(40, 90, 8, "nearest", MEAN, MEAN)
PLAIN = {"crop_size": 32, "distortion": 0.0, "cat_max_ratio": 1.0}


def pair(width: int, height: int, classes: int = 5) -> tuple[Image.Image, Mask]:
    """Draw an image whose red channel is its mask."""
    state = np.random.RandomState(width)
    mask = state.randint(0, classes, (height, width), dtype=np.uint8)
    image = np.stack([mask, *state.randint(0, 256, (2, height, width), dtype=np.uint8)], axis=2)
    return Image.fromarray(image), Mask(Image.fromarray(mask), "m.png")


def vary(image: Image.Image, mask: Mask, seed: int = 0, **values: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    return RandomSegmentation(GRAY, SegmentationAugmentation(**PLAIN | values))(image, mask)


@pytest.mark.parametrize("size", [(60, 40), (40, 100), (300, 20), (7, 9), (64, 64)])
def test_image_and_mask_stay_aligned(size: tuple[int, int]) -> None:
    image, mask = pair(*size)
    for seed in range(20):
        sample = vary(image, mask, seed, scale=(0.3, 1.5))
        assert sample["image"].shape == (3, 32, 32)
        assert sample["mask"].shape == (32, 32)
        assert [sample[name].dtype for name in ("image", "mask")] == [torch.uint8] * 2
        seen = sample["mask"] != 255
        assert torch.equal(sample["image"][0][seen], sample["mask"][seen])
        assert sample["image"][:, ~seen].unique(dim=1).flatten().tolist() in ([], [128, 64, 191])  # the mean color
        rows, columns = seen.any(1).sum(), seen.any(0).sum()
        assert seen[:rows, :columns].all()
        assert seen.sum() == rows * columns


def test_the_size_varies_within_the_scale() -> None:
    image, mask = pair(60, 40)  # at scale 1 as it is
    sizes = []
    for seed in range(60):
        seen = vary(image, mask, seed, scale=(0.5, 2.0), crop_size=200)["mask"] != 255
        sizes.append((int(seen.any(1).sum()), int(seen.any(0).sum())))
    heights = [height for height, _ in sizes]
    assert 20 <= min(heights) < 26
    assert 74 < max(heights) <= 80
    assert all(abs(width - 1.5 * height) <= 1.5 for height, width in sizes)


def test_crops_are_anywhere_and_flips_are_as_frequent_as_asked() -> None:
    columns = np.tile(np.arange(90, dtype=np.uint8), (40, 1))
    image, mask = Image.merge("RGB", [Image.fromarray(columns)] * 3), Mask(Image.fromarray(columns), "m.png")
    lefts, flipped = [], 0
    for seed in range(200):
        row = vary(image, mask, seed, scale=(1.0, 1.0), crop_size=30)["mask"][0].tolist()
        flipped += row[0] > row[-1]
        lefts.append(min(row))
        assert sorted(row) == list(range(min(row), min(row) + 30))
    assert (min(lefts), max(lefts)) == (0, 60)
    assert 70 < flipped < 130
    for probability in (0.0, 1.0):
        rows = [vary(image, mask, seed, hflip=probability)["mask"][0].tolist() for seed in range(9)]
        assert all((row[0] > row[-1]) == (probability == 1.0) for row in rows)


@pytest.mark.parametrize("interpolation", ["BILINEAR", "BICUBIC", "NEAREST"])
@pytest.mark.parametrize("scale", [0.4, 0.9, 1.0, 1.7])
def test_a_resized_box_is_a_crop_of_the_resized_image(interpolation: str, scale: float) -> None:
    # No filter overshoots the range of bytes here, where clipping would depend on the order of the two directions.
    image = Image.fromarray(np.random.RandomState(0).randint(64, 192, (41, 53, 3), dtype=np.uint8))
    resampling = Image.Resampling[interpolation]
    height, width = round(41 * scale), round(53 * scale)
    box = (width // 3, height // 4, width, height // 4 + height // 2)
    expected = np.asarray(image.resize((width, height), resampling).crop(box)).astype(int)
    found = np.asarray(_resize_box(image, (height, width), box, resampling)).astype(int)
    assert np.abs(found - expected).max() <= (0 if interpolation == "NEAREST" else 2)


def test_a_crop_with_too_much_of_one_class_is_drawn_again() -> None:
    classes = np.zeros((40, 90), np.uint8)
    classes[:, 60:] = 1
    classes[:5] = 255  # counts for no class
    mask, image = Mask(Image.fromarray(classes), "m.png"), Image.new("RGB", (90, 40))

    def shares(ratio: float) -> list[float]:
        found = []
        for seed in range(100):
            crop = vary(image, mask, seed, scale=(1.0, 1.0), cat_max_ratio=ratio)["mask"]
            found.append(max(crop.eq(value).sum().item() for value in (0, 1)) / crop.ne(255).sum().item())
        return found

    assert sum(share > 0.75 for share in shares(1.0)) > 30
    # A draw fulfils it with a probability of 0.29, so that ten draws miss it in 3 % of the cases.
    assert 0 < sum(share > 0.75 for share in shares(0.75)) < 15
    # Hardly any draw fulfils this, and the tenth is used.
    assert sum(share > 0.51 for share in shares(0.51)) > 30
    whole = np.zeros((40, 90), np.uint8)
    assert vary(image, Mask(Image.fromarray(whole), "m.png"), cat_max_ratio=0.5)["mask"].eq(0).any()


def test_variation_is_a_function_of_torchs_generator() -> None:
    image, mask = pair(90, 60)
    values = {"distortion": 0.5, "cat_max_ratio": 0.5, "scale": (0.5, 2.0)}
    expected = vary(image, mask, 3, **values)
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    again = vary(image, mask, 3, **values)
    assert torch.equal(again["image"], expected["image"])
    assert torch.equal(again["mask"], expected["mask"])
    assert not torch.equal(vary(image, mask, 4, **values)["mask"], expected["mask"])


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    calls: list[tuple[str, float]] = []
    for name in ("brightness", "contrast", "saturation", "hue"):

        def adjust(image: Image.Image, amount: float, name: str = name) -> Image.Image:
            calls.append((name, amount))
            return image

        monkeypatch.setattr(functional, f"adjust_{name}", adjust)
    return calls


def test_colors_are_distorted_within_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = pair(40, 40)
    calls = recorded(monkeypatch)
    limits = {"brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 0.05}
    for seed in range(200):
        vary(image, mask, seed, distortion=1.0, **limits)
    orders = {tuple(name for name, _ in calls[start : start + 4]) for start in range(0, 800, 4)}
    assert orders == {("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")}
    for name, limit in limits.items():
        center = 0.0 if name == "hue" else 1.0
        amounts = [amount - center for other, amount in calls if other == name]
        assert len(amounts) == 200
        assert -limit <= min(amounts) < -0.9 * limit
        assert 0.9 * limit < max(amounts) <= limit
    calls.clear()
    for seed in range(200):
        vary(image, mask, seed, distortion=0.25)
    counts = [sum(other == name for other, _ in calls) for name in limits]
    assert all(25 < count < 75 for count in counts)


def test_distortion_changes_the_image_and_not_the_mask_or_the_padding() -> None:
    image, mask = pair(20, 20)
    plain = vary(image, mask, 1, crop_size=64, hflip=0.0, scale=(1.0, 1.0))
    varied = vary(image, mask, 1, crop_size=64, hflip=0.0, scale=(1.0, 1.0), distortion=1.0)
    assert torch.equal(plain["mask"], varied["mask"])
    padding = plain["mask"] == 255
    assert torch.equal(plain["image"][:, padding], varied["image"][:, padding])
    assert not torch.equal(plain["image"], varied["image"])


def test_grayscale_images_are_distorted() -> None:
    image, mask = pair(40, 40)
    one = DensePreprocessing(40, 90, mean=(0.5,), std=(0.5,))
    sample = RandomSegmentation(one, SegmentationAugmentation(crop_size=32, distortion=1.0))(image.convert("L"), mask)
    assert sample["image"].shape == (1, 32, 32)


@pytest.mark.parametrize("size", [(60, 40), (40, 100), (7, 9)])
def test_evaluation_keeps_the_mask_as_stored(size: tuple[int, int]) -> None:
    image, mask = pair(*size)
    sample = FixedSegmentation(GRAY)(image, mask)
    assert torch.equal(sample["mask"], torch.from_numpy(np.array(mask.classes)))
    expected = GRAY.sample(image)
    assert sample.keys() == {*expected, "mask", "blank"}
    assert all(torch.equal(sample[name], value) for name, value in expected.items())
    predicted = FixedSegmentation(GRAY)(image, None)
    assert predicted.keys() == expected.keys()


@pytest.mark.parametrize("size", [(60, 40), (40, 100), (7, 9)])
def test_training_without_augmentation_resizes_the_mask_to_the_image(size: tuple[int, int]) -> None:
    image, mask = pair(*size)
    sample = FixedSegmentation(GRAY, resize_mask=True)(image, mask)
    height, width = GRAY.resized_size((image.height, image.width))
    assert sample["mask"].shape == sample["image"].shape[1:]
    assert torch.equal(sample["mask"][:height, :width], sample["image"][0, :height, :width])
    sample["mask"][:height, :width] = 255
    assert sample["mask"].eq(255).all()


@pytest.mark.parametrize("training", [False, True])
def test_image_and_mask_of_different_sizes_are_an_error(training: bool) -> None:
    image, mask = pair(40, 50)
    transform = RandomSegmentation(GRAY, SegmentationAugmentation()) if training else FixedSegmentation(GRAY)
    with pytest.raises(UnreadableImageError, match=r"m\.png is a mask of 40×50 pixels for an image of 41×50"):
        transform(image.resize((41, 50)), mask)


def test_a_mask_that_ignores_all_pixels_is_named() -> None:
    image, mask = pair(40, 50)
    assert [vary(image, mask)["blank"], FixedSegmentation(GRAY)(image, mask)["blank"]] == ["", ""]
    blank = Mask(Image.new("L", (40, 50), 255), "m.png")
    assert [vary(image, blank)["blank"], FixedSegmentation(GRAY)(image, blank)["blank"]] == ["m.png"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"scale": (2.0, 1.0)}, r"scale must be two positive numbers in ascending order, got \[2.0, 1.0\]"),
        ({"hue": 0.6}, r"hue must be from 0 to 0\.5, got 0\.6"),
        ({"hflip": -0.1}, r"hflip must be from 0 to 1, got -0\.1"),
        ({"cat_max_ratio": 0.0}, r"cat_max_ratio must be above 0 and at most 1, got 0\.0"),
    ],
)
def test_values_out_of_range_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentation(**values)
