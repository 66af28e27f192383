import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data import create_transform
from torchvision import transforms
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.v2 import functional

from scalablevit_pl.preprocessing import (
    DensePreprocessing,
    ImagePreprocessing,
    Interpolation,
    Preprocessing,
    UnreadableImageError,
    decode_image,
    open_image,
    read_preprocessing,
    read_record,
)

PIXELS = np.random.RandomState(0)
MODES = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
MODES |= {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.rot90(np.fliplr(pixels)),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(np.fliplr(pixels), -1),
    8: np.rot90,
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(PIXELS.randint(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


def assert_decodes_to(content: bytes, expected: np.ndarray) -> None:
    image = decode_image(content)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


def test_bytes_path_and_opened_image_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise(20, 10)
    path = tmp_path / "image.png"
    image.save(path)
    expected = np.asarray(image)
    assert_decodes_to(path.read_bytes(), expected)
    with Image.open(path) as opened:
        for source in (path, str(path), opened, image):
            assert np.array_equal(np.asarray(decode_image(source)), expected)


def test_grayscale_is_repeated_over_the_channels() -> None:
    grey = PIXELS.randint(0, 256, (7, 9), dtype=np.uint8)
    assert_decodes_to(encode(Image.fromarray(grey)), np.stack([grey] * 3, axis=2))


def test_one_bit_is_black_and_white() -> None:
    bits = PIXELS.rand(7, 9) > 0.5
    assert_decodes_to(encode(Image.fromarray(bits)), np.stack([bits * np.uint8(255)] * 3, axis=2))


def test_sixteen_bits_keep_their_upper_eight() -> None:
    grey = PIXELS.randint(0, 2**16, (7, 9), dtype=np.uint16)
    grey[0, :2] = 0, 2**16 - 1
    upper = np.stack([(grey // 256).astype(np.uint8)] * 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert_decodes_to(encode(Image.fromarray(grey), kind), upper)


def float_tiff(values: list[float]) -> bytes:
    return encode(Image.fromarray(np.array([values], np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
        ([0.0, 0.1, 0.3], [0, 26, 76]),
        ([0.0, 1.0, 1.0], [0, 255, 255]),
        ([0.0, 3.0, 128.0, 255.0], [0, 3, 128, 255]),
    ],
    ids=str,
)
def test_floating_point_pixels_from_0_to_1_are_scaled_and_bytes_are_kept(
    values: list[float], expected: list[int]
) -> None:
    assert_decodes_to(float_tiff(values), np.array([[[value] * 3 for value in expected]], np.uint8))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.0, 1.5], "from 0 to 1.5"),
        ([-0.5, 0.5], "from -0.5 to 0.5"),
        ([-1.0, 7.0], "from -1 to 7"),
        ([0.0, 256.0], "from 0 to 256"),
        ([0.0, math.nan], "from nan to nan"),
        ([0.0, math.inf], "from 0 to inf"),
    ],
    ids=str,
)
def test_other_floating_point_pixels_are_rejected_with_their_range(values: list[float], reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=f"cannot read row 3: its pixels are {reason}, neither from 0 to 1"):
        decode_image(float_tiff(values), "row 3")


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"transparency": bytes(range(256))}], ids=str)
def test_a_palette_is_resolved_to_its_colors(options: dict[str, object]) -> None:
    palette = noise(16, 16).quantize(64)
    assert_decodes_to(encode(palette, **options), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(mode: str) -> None:
    opaque = noise(9, 7).convert(mode.removesuffix("A"))
    image = opaque.copy()
    image.putalpha(Image.fromarray(PIXELS.randint(0, 256, (7, 9), dtype=np.uint8)))
    assert image.mode == mode
    assert_decodes_to(encode(image), np.asarray(opaque.convert("RGB")))


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 20))
    content = encode(red.convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "CMYK"
    image = decode_image(content)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(red, int)).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(orientation: int, kind: str) -> None:
    image = noise(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.asarray(decode_image(encode(image, kind)))
    assert_decodes_to(encode(image, kind, exif=exif), TURNS[orientation](stored))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3
    assert_decodes_to(content, np.asarray(frames[0]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_a_truncated_image_is_rejected(kind: str, tolerant: bool, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some libraries leave it
    content = encode(noise(64, 64), kind)
    with pytest.raises(UnreadableImageError, match="cannot read row 3:"):
        decode_image(content[: int(len(content) * part)], "row 3")


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"\x89PNG\r\n\x1a\n", b"GIF89a"], ids=repr)
def test_content_that_is_not_an_image_is_rejected_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "strange.png"
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(UnreadableImageError, match=r"strange\.png.*repair or delete"):
            decode_image(source)
    with pytest.raises(UnreadableImageError, match="cannot read row 7"):
        decode_image(content, "row 7")
    with pytest.raises(UnreadableImageError, match="cannot read an image"):
        decode_image(content)


def test_damage_is_reported_whatever_the_decoder_raises() -> None:
    content = bytearray(encode(noise(8, 8), "DDS"))
    content[80] = 129  # flags of the pixel format, for which Pillow raises NotImplementedError
    with pytest.raises(UnreadableImageError, match="row 3"):
        decode_image(bytes(content), "row 3")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(UnreadableImageError, match=path.name):
            decode_image(path)


def test_a_decompression_bomb_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(noise(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="bomb"):
        decode_image(content)


@pytest.mark.filterwarnings("error")
def test_a_large_image_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(10, 15)
    content = encode(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_decodes_to(content, np.asarray(image))


@pytest.mark.parametrize(
    "values", [{"std": (math.nan, 1.0, 1.0)}, {"mean": (math.inf, 0.0, 0.0)}, {"input_size": 28.5}]
)
def test_values_that_are_not_numbers_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Preprocessing(**values)


def test_formats_that_start_programs_are_rejected() -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImageError, match="row 1: it is not an image of a known format"):
        decode_image(content, "row 1")


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


def test_images_are_opened_from_every_type(tmp_path: Path) -> None:
    image = noise(7, 5)
    image.save(tmp_path / "x.png")
    pixels = np.asarray(image)
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), encode(image), image, pixels, pixels[:, ::-1][:, ::-1]):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), pixels)
    grey = pixels[..., 0]
    assert np.array_equal(np.asarray(open_image(grey)), np.stack([grey] * 3, axis=-1))
    with_alpha = np.concatenate([pixels, pixels[..., :1]], axis=2)
    assert np.array_equal(np.asarray(open_image(with_alpha)), pixels)


@pytest.mark.parametrize(
    "source", [np.zeros((2, 2, 3)), np.zeros((2, 2, 5), np.uint8), np.zeros((0, 2), np.uint8), [[1]], None], ids=str
)
def test_other_types_are_rejected_with_the_accepted_ones(source: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an image: give a path, a PIL image, or an array \(H, W\)"):
        open_image(source)
