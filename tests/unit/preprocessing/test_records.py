import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.v2 import functional

from scalablevit_pl.preprocessing.records import (
    DensePreprocessing,
    ImagePreprocessing,
    Interpolation,
    Preprocessing,
    read_preprocessing,
    read_record,
)

PIXELS = np.random.RandomState(0)
MODES = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
MODES |= {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(PIXELS.randint(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(61, 43), (37, 90), (17, 11), (9, 300), (32, 32), (36, 36), (33, 32)], ids=str)
@pytest.mark.parametrize(("input_size", "crop_pct"), [(32, 0.875), (32, 1.0), (31, 0.9), (24, 0.7)])
@pytest.mark.parametrize("interpolation", MODES)
def test_pixels_are_those_of_torchvision_and_timm(
    size: tuple[int, int], input_size: int, crop_pct: float, interpolation: Interpolation
) -> None:
    image = noise(*size)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = Preprocessing(input_size, crop_pct, interpolation, mean, std)(image)
    torchvision = transforms.Compose(
        [
            transforms.Resize(int(input_size / crop_pct), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(input_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    timm = create_transform(
        input_size, is_training=False, crop_pct=crop_pct, interpolation=interpolation, mean=mean, std=std
    )
    assert ours.dtype == torch.float32
    assert ours.shape == (3, input_size, input_size)
    assert ours.is_contiguous()
    assert torch.equal(ours, torchvision(image))
    assert torch.equal(ours, timm(image))


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("width", "height"), [(1, 501), (1, 502), (700, 1), (64, 1), (2, 128)], ids=str)
def test_a_thin_image_has_the_pixels_of_the_whole_resized_image(
    width: int, height: int, interpolation: Interpolation
) -> None:
    image = noise(width, height)
    scale = 32 // min(width, height)
    whole = image.resize((width * scale, height * scale), MODES[interpolation])
    left, top = (whole.width - 28) // 2, (whole.height - 28) // 2
    expected = np.asarray(whole.crop((left, top, left + 28, top + 28)))
    pixels = Preprocessing(28, 0.875, interpolation).pixels(image)
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 100_000)], ids=str)
def test_a_thin_image_is_never_resized_as_a_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recorded(image: Image.Image, size: tuple[int, int], *arguments: Any) -> Image.Image:
        resized.append(size)
        return resize(image, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    image = Image.new("RGB", size, "red")
    assert Preprocessing(28).pixels(image).shape == (3, 28, 28)
    assert DensePreprocessing(32, 128).pixels(image).shape[0] == 3
    assert max(width * height for width, height in resized) <= 65 * 32**2


def test_the_defaults_are_those_of_imagenet() -> None:
    image = noise(300, 280)
    assert torch.equal(Preprocessing()(image), create_transform(224, interpolation="bicubic", crop_pct=0.875)(image))


def test_the_given_image_is_not_changed() -> None:
    image = noise(32, 32)
    before = np.array(image)
    Preprocessing(32, 1.0)(image).zero_()
    assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize("shape", [(256, 3, 1, 1), (3, 16, 16)])
def test_denormalization_restores_every_byte(shape: tuple[int, ...]) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    pixels = pixels[:, None, None, None].expand(shape) if len(shape) == 4 else pixels.view(1, 16, 16).expand(shape)
    for preprocessing in (Preprocessing(), Preprocessing(mean=(0.0, 0.5, 1.0), std=(1.0, 0.01, 10.0))):
        images = preprocessing.normalize(pixels)
        assert images.dtype == torch.float32
        assert torch.equal(preprocessing.denormalize(images), pixels)


def test_denormalization_clips() -> None:
    assert Preprocessing().denormalize(torch.full((3, 1, 1), 99.0)).flatten().tolist() == [255] * 3
    assert Preprocessing().denormalize(torch.full((3, 1, 1), -99.0)).flatten().tolist() == [0] * 3


def test_the_record_survives_json() -> None:
    preprocessing = Preprocessing(28, 0.9, "lanczos", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    values = json.loads(json.dumps(preprocessing.to_dict()))
    assert values == {
        "input_size": 28,
        "crop_pct": 0.9,
        "interpolation": "lanczos",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    assert values == preprocessing.to_dict()
    assert Preprocessing.from_dict(values) == preprocessing


SIZES = [(61, 43), (43, 61), (300, 20), (20, 300), (64, 64), (40, 90), (33, 100)]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", [Preprocessing(28), DensePreprocessing(28, 64)], ids=["crop", "dense"])
def test_each_channel_of_an_image_is_transformed_alone(kind: ImagePreprocessing, channels: int) -> None:
    mean, std = (0.1, 0.2, 0.3, 0.4)[:channels], (0.5, 0.6, 0.7, 0.8)[:channels]
    record = dataclasses.replace(kind, mean=mean, std=std)
    assert record.channels == channels
    assert read_record(json.loads(json.dumps(record.to_dict()))) == record
    bands = [band for image in (noise(50, 40), noise(50, 40)) for band in image.split()][:channels]
    image = bands[0] if channels == 1 else Image.merge("RGBX", bands)
    transformed = record(image)
    for number, band in enumerate(bands):
        alone = dataclasses.replace(kind, mean=mean[number : number + 1], std=std[number : number + 1])
        assert torch.equal(transformed[number], alone(band)[0])
    grey = dataclasses.replace(kind, mean=mean[:1] * 3, std=std[:1] * 3)
    assert torch.equal(transformed[0], grey(Image.merge("RGB", bands[:1] * 3))[1])
    assert torch.equal(record.denormalize(transformed), record.pixels(image))
    assert record.summary()["input"].startswith({1: "grayscale,", 4: "RGBA,"}[channels])


def test_a_record_for_other_channels_has_the_average_statistics() -> None:
    record = Preprocessing(28, mean=(0.1, 0.2, 0.6), std=(0.25, 0.5, 0.75))
    for channels in (1, 4):
        other = record.with_channels(channels)
        assert (other.mean, other.std) == (pytest.approx((0.3,) * channels), (0.5,) * channels)
        assert dataclasses.replace(other, mean=record.mean, std=record.std) == record
    for channels in (2, 3, 5):
        assert record.with_channels(channels) is record


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_dense_pixels_are_those_of_torchvision(size: tuple[int, int], interpolation: Interpolation) -> None:
    image = noise(*size)
    preprocessing = DensePreprocessing(40, 90, 32, interpolation, mean=(0.1, 0.5, 0.9))
    resize = transforms.Resize(40, transforms.InterpolationMode(interpolation), max_size=90)
    resized = functional.pil_to_tensor(resize(image))
    height, width = resized.shape[1:]
    assert preprocessing.resized_size((image.height, image.width)) == (height, width)
    padding = [0, 0, -width % 32, -height % 32]
    expected = torch.cat(
        [
            functional.pad(channel[None], padding, fill=fill)
            for channel, fill in zip(resized, (26, 128, 230), strict=True)
        ]
    )
    pixels = preprocessing.pixels(image)
    assert torch.equal(pixels, expected)
    assert preprocessing.output_size((image.height, image.width)) == pixels.shape[1:]
    assert torch.equal(preprocessing(image), preprocessing.normalize(expected))
    border = preprocessing(image)[:, height:]
    assert not border.numel() or border.abs().max() < 0.01  # the mean color is zero after normalization


def test_a_sample_has_the_sizes_that_a_task_needs() -> None:
    image, dense = noise(90, 30), DensePreprocessing(40, 90, 32)
    sample = dense.sample(image)
    sizes = {name: sample[name].tolist() for name in ("size", "resized", "padded")}
    assert sizes == {"size": [30, 90], "resized": [30, 90], "padded": [32, 96]}
    assert sample["size"].dtype == torch.int64
    assert torch.equal(sample["image"], dense.pixels(image))
    crop = Preprocessing(28)
    assert crop.sample(image).keys() == {"image"}
    assert torch.equal(crop.sample(image)["image"], crop.pixels(image))


def test_an_extremely_long_image_keeps_a_pixel() -> None:
    preprocessing = DensePreprocessing(8, 16, 4)
    assert preprocessing.resized_size((1, 10_000)) == (1, 16)
    assert preprocessing.pixels(noise(1000, 1)).shape == (3, 4, 16)


def test_images_are_padded_to_a_common_size() -> None:
    preprocessing = DensePreprocessing(8, 16, 4, mean=(0.0, 0.5, 1.0))
    pixels = torch.zeros(3, 2, 3, dtype=torch.uint8)
    padded = preprocessing.pad(pixels, (5, 6))
    assert padded.shape == (3, 5, 6)
    assert not padded[:, :2, :3].any()
    border = torch.ones(5, 6, dtype=torch.bool)
    border[:2, :3] = False
    assert padded[:, border].unique(dim=1).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_predictions_return_to_the_original_pixels(size: tuple[int, int]) -> None:
    preprocessing = DensePreprocessing(40, 90)
    width, height = size
    new_height, new_width = preprocessing.resized_size((height, width))
    padded = torch.full((2, *preprocessing.output_size((height, width))), 99.0)
    ramp = (torch.arange(new_width) + 0.5) / new_width  # from the left to the right border of the image
    padded[:, :new_height, :new_width] = ramp
    maps = preprocessing.restore(padded, (height, width))
    assert maps.shape == (2, height, width)
    assert torch.allclose(maps[0], (torch.arange(width) + 0.5) / width, atol=0.5 / min(width, new_width))
    boxes = torch.rand(5, 4) * 40
    expected = resize_boxes(boxes, [new_height, new_width], [height, width])
    assert torch.allclose(preprocessing.restore_boxes(boxes, (height, width)), expected)


def test_records_state_their_kind_except_the_center_crop() -> None:
    dense = DensePreprocessing(600, 1000, 16, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    values = json.loads(json.dumps(dense.to_dict()))
    assert values == {
        "kind": "short_side",
        "short_side": 600,
        "long_side": 1000,
        "divisor": 16,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    crop = Preprocessing(28)
    assert list(crop.to_dict()) == ["input_size", "crop_pct", "interpolation", "mean", "std"]
    assert (read_record(values), read_record(crop.to_dict())) == (dense, crop)
    assert read_record(crop.to_dict() | {"kind": "center_crop"}) == crop
    assert (crop.output_size((90, 70)), dense.output_size((30, 45))) == ((28, 28), (608, 912))
    for kind in ("long_side", ["short_side"], None):
        with pytest.raises(ValueError, match="is unknown: use one of center_crop, short_side"):
            read_record(values | {"kind": kind})
    for other in (values, crop.to_dict() | {"kind": "short_side"}):
        with pytest.raises(ValueError, match="a center_crop preprocessing record holds"):
            Preprocessing.from_dict(other)


@pytest.mark.parametrize("record", [Preprocessing(64, 0.5), DensePreprocessing(64, 128)])
def test_a_summary_describes_the_transform(record: ImagePreprocessing) -> None:
    rows = record.summary()
    assert set(rows) == {"input", "mean, std"}
    assert "short side resized to" in rows["input"]
    assert "128" in rows["input"]
    assert rows["mean, std"] == "0.485, 0.456, 0.406; 0.229, 0.224, 0.225 for pixels from 0 to 1"


@pytest.mark.parametrize(
    "values",
    [
        {"short_side": 0},
        {"short_side": 2049},
        {"long_side": 511},
        {"long_side": 16385},
        {"divisor": 0},
        {"divisor": 16384},
        {"divisor": 0.5},
        {"interpolation": "cubic"},
        {"std": (0.1, 0.0, 0.1)},
    ],
    ids=str,
)
def test_dense_values_out_of_range_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DensePreprocessing(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"input_size": 0},
        {"crop_pct": 0.0},
        {"crop_pct": 1.01},
        {"crop_pct": float("nan")},
        {"interpolation": "cubic"},
        {"mean": (0.5,)},
        {"mean": (0.5,) * 2, "std": (0.5,) * 2},
        {"mean": (), "std": ()},
        {"std": (0.1, 0.0, 0.1)},
        {"std": (0.1, 0.1, 0.1, 0.1)},
    ],
    ids=str,
)
def test_values_out_of_range_are_rejected(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Preprocessing(**values)


@pytest.mark.parametrize("change", [{"mean": 0.5}, {"mean": None}, {"input_size": "28"}], ids=str)
def test_records_with_wrong_types_are_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is not a preprocessing record|a whole number"):
        Preprocessing.from_dict(Preprocessing().to_dict() | change)


@pytest.mark.parametrize("name", Preprocessing().to_dict())
def test_an_incomplete_record_is_rejected(name: str) -> None:
    values = Preprocessing().to_dict()
    del values[name]
    with pytest.raises(ValueError, match=name):
        Preprocessing.from_dict(values)


def test_a_record_with_an_unknown_value_is_rejected() -> None:
    with pytest.raises(ValueError, match="gamma"):
        Preprocessing.from_dict(Preprocessing().to_dict() | {"gamma": 2.2})


@pytest.mark.parametrize(
    "values", [{"std": (math.nan, 1.0, 1.0)}, {"mean": (math.inf, 0.0, 0.0)}, {"input_size": 28.5}]
)
def test_values_that_are_not_numbers_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Preprocessing(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"input_size": 10**9},
        {"input_size": 16385, "crop_pct": 1.0},
        {"input_size": 10**400},
        {"crop_pct": 1e-9},
        {"crop_pct": 1e-320},
        {"input_size": True},
    ],
    ids=lambda values: str(values)[:40],
)
def test_sizes_beyond_any_image_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="input_size"):
        Preprocessing(**values)
    assert Preprocessing(16384, 1.0).input_size == 16384


@pytest.mark.parametrize("size", [(3,), (3, 64), (3, 64, 48), (3, 64, 64, 64), ()])
def test_a_timm_description_must_have_a_square_size(size: tuple[int, ...]) -> None:
    cfg = {"crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": [1, 1, 1]}
    assert read_preprocessing(cfg | {"input_size": [3, 64, 64]}).input_size == 64
    with pytest.raises(ValueError, match="only square center crops are supported"):
        read_preprocessing(cfg | {"input_size": size})


@pytest.mark.parametrize("crop_mode", [None, "", "center"])
def test_a_timm_description_must_crop_the_center(crop_mode: str | None) -> None:
    cfg = PREPROCESSING_CFG | {"crop_mode": crop_mode}
    expected = Preprocessing(64, 0.9, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert read_preprocessing(cfg) == expected
    for other in ("squash", "border", ["center"]):
        with pytest.raises(ValueError, match="only square center crops"):
            read_preprocessing(cfg | {"crop_mode": other})


PREPROCESSING_CFG = {
    "input_size": (3, 64, 64),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}
