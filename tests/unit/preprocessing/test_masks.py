import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datamodules import encoded
from PIL import Image

from scalablevit_pl.preprocessing import UnreadableImageError
from scalablevit_pl.preprocessing.masks import IGNORED, Mask, MaskFormat

VALUES = np.random.RandomState(0).randint(0, 4, (5, 7), dtype=np.uint8)
VALUES[0, :2] = 255
COLORS = ((0, 0, 0), (255, 0, 0), (1, 2, 3), (3, 2, 1))


def read(content: bytes | Image.Image, classes: int = 4, **values: Any) -> Any:
    content = encoded(content) if isinstance(content, Image.Image) else content
    return np.asarray(MaskFormat(classes, **values).read(content, "m.png").classes)


def palette_image() -> Image.Image:
    image = Image.fromarray(VALUES, "P")
    image.putpalette([(7 * value) % 256 for value in range(768)])
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(VALUES),
        palette_image(),
        Image.fromarray(VALUES.astype(np.uint16)),
        Image.merge("LA", [Image.fromarray(VALUES), Image.new("L", (7, 5), 9)]),
        Image.merge("RGB", [Image.fromarray(VALUES)] * 3),
        Image.merge("RGBA", [*[Image.fromarray(VALUES)] * 3, Image.new("L", (7, 5), 9)]),
    ],
    ids=["grayscale", "palette", "16 bits", "with alpha", "equal channels", "equal channels with alpha"],
)
def test_the_values_of_pixels_are_classes(image: Image.Image) -> None:
    assert np.array_equal(read(image), VALUES)


def test_a_mask_of_one_bit_has_two_classes() -> None:
    assert np.array_equal(read(Image.fromarray(VALUES == 1), classes=2), VALUES == 1)


def test_16_bits_hold_values_above_255() -> None:
    values = np.array([[0, 1, 65535, 300]], np.uint16)
    assert read(Image.fromarray(values), 301, ignore_value=65535)[0, :3].tolist() == [0, 1, 255]
    with pytest.raises(UnreadableImageError, match=r"m\.png has 2 pixels of the value 300, but the 2 classes"):
        read(Image.fromarray(np.array([[0, 300, 300, 65535]], np.uint16)), 2)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_tiff_masks_may_have_wide_pixels(mode: str) -> None:
    image = Image.fromarray(VALUES).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    assert np.array_equal(read(buffer.getvalue()), VALUES)
    image.putpixel((0, 0), -7)
    image.save(buffer := io.BytesIO(), "TIFF")
    with pytest.raises(UnreadableImageError, match="1 pixels of the value"):
        read(buffer.getvalue())


def test_masks_of_fractions_are_rejected() -> None:
    Image.fromarray(VALUES / np.float32(2)).save(buffer := io.BytesIO(), "TIFF")
    with pytest.raises(UnreadableImageError, match=r"m\.png has values that are not whole numbers"):
        read(buffer.getvalue())


@pytest.mark.parametrize("ignore_value", [255, 254, 2])
@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_zero_is_ignored_and_classes_start_at_one_if_asked(reduce_zero_label: bool, ignore_value: int) -> None:
    expected = []
    for value in range(4):
        one = value - 1 if reduce_zero_label else value
        expected.append(255 if value == ignore_value or one < 0 else one)
    values = np.array([[0, 1, 2, 3, ignore_value]], np.uint8)
    found = read(Image.fromarray(values), 4, reduce_zero_label=reduce_zero_label, ignore_value=ignore_value)
    assert found.tolist() == [[*expected, 255]]


def looked_up(pixels: np.ndarray, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    classes = np.empty(pixels.shape[:2], np.uint8)
    for row in range(classes.shape[0]):
        for column in range(classes.shape[1]):
            classes[row, column] = colors.index(tuple(pixels[row, column].tolist()))
    return classes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_are_looked_up_in_the_palette(mode: str) -> None:
    pixels = np.array(COLORS, np.uint8)[VALUES % 4]
    image = Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read(image, palette=COLORS), looked_up(pixels, COLORS))
    reduced = read(image, 3, palette=COLORS, reduce_zero_label=True)
    assert np.array_equal(reduced, (looked_up(pixels, COLORS) - 1))  # 0 - 1 is 255
    ignored = read(image, 3, palette=COLORS, ignore_value=3)
    assert np.array_equal(ignored, np.where(looked_up(pixels, COLORS) == 3, 255, looked_up(pixels, COLORS)))


def test_a_palette_also_names_shades_of_gray() -> None:
    image = Image.fromarray((VALUES == 1).astype(np.uint8) * 255)
    assert np.array_equal(read(image, 2, palette=((0, 0, 0), (255, 255, 255))), VALUES == 1)
    assert np.array_equal(read(image.convert("1"), 2, palette=((0, 0, 0), (255, 255, 255))), VALUES == 1)


def test_a_color_that_is_not_in_the_palette_is_named() -> None:
    image = Image.new("RGB", (40, 50), (255, 0, 0))
    for place in ((3, 4), (5, 6), (7, 8)):
        image.putpixel(place, (9, 8, 7))
    image.putpixel((0, 0), (1, 1, 1))
    with pytest.raises(UnreadableImageError, match=r"m\.png has 3 pixels of the color \[9, 8, 7\], which is not in"):
        read(image, palette=COLORS)


def test_a_color_image_needs_a_palette() -> None:
    with pytest.raises(UnreadableImageError, match=r"m\.png is a color image: .* --data\.palette"):
        read(Image.fromarray(np.array(COLORS, np.uint8)[VALUES % 4]))


def test_a_value_outside_the_classes_is_counted() -> None:
    values = np.zeros((40, 50), np.uint8)
    values[3, :12] = 4
    values[5, 5] = 200
    with pytest.raises(
        UnreadableImageError,
        match=r"m\.png has 12 pixels of the value 4, but the 4 classes are the values 0 to 3: set --data\.reduce_zero",
    ):
        read(Image.fromarray(values))
    with pytest.raises(UnreadableImageError, match="values 0 to 2: correct the mask"):
        read(Image.fromarray(values), 3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000"])
def test_a_mask_of_lossy_compression_is_rejected(kind: str) -> None:
    with pytest.raises(UnreadableImageError, match=rf"m\.png is a {kind}, which may change"):
        read(encoded(Image.new("L", (9, 9)), kind))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.int32(-5), "9 pixels of the value -5,"),
        (np.float32(-1), "9 pixels of the value -1,"),
        (np.float32(2.0**32), "9 pixels of the value "),
        (np.float32(1e30), "9 pixels of the value "),
        (np.float32("inf"), "not whole numbers"),
        (np.float32("nan"), "not whole numbers"),
    ],
)
def test_numbers_far_from_the_classes_are_rejected(value: Any, problem: str) -> None:
    with pytest.raises(UnreadableImageError, match=problem):
        read(encoded(Image.fromarray(np.full((3, 3), value)), "TIFF"))


@pytest.mark.parametrize("content", [b"", b"no image", encoded(Image.fromarray(VALUES))[:-30]])
def test_damaged_masks_are_named(content: bytes) -> None:
    with pytest.raises(UnreadableImageError, match=r"cannot read m\.png: .*; repair or delete it"):
        read(content)


def test_huge_masks_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
    with pytest.raises(UnreadableImageError, match=r"cannot read m\.png: Image size \(35 pixels\) exceeds"):
        read(Image.fromarray(VALUES))


def test_a_mask_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.fromarray(VALUES).save(buffer := io.BytesIO(), "PNG", exif=exif)
    assert np.array_equal(read(buffer.getvalue()), np.rot90(VALUES, -1))


def test_image_and_mask_must_have_one_size() -> None:
    mask = Mask(Image.new("L", (7, 5)), "m.png")
    mask.check_size((7, 5))
    with pytest.raises(UnreadableImageError, match=r"m\.png is a mask of 7×5 pixels for an image of 7×6: store both"):
        mask.check_size((7, 6))
    with pytest.raises(UnreadableImageError, match="for an image of 5×7, which is turned upright by its EXIF"):
        mask.check_size((5, 7))


def test_a_mask_that_ignores_all_pixels_is_blank() -> None:
    image = Image.new("L", (7, 5), IGNORED)
    assert Mask(image, "").blank
    image.putpixel((6, 4), 0)
    assert not Mask(image, "").blank


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"palette": ((0, 0, 0), (1, 1, 1))}, r"2 colors for the values 0 to 2 of 3 classes"),
        ({"palette": ((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3))}, "4 colors for the values 0 to 2"),
        ({"palette": ((0, 0, 0), (1, 1, 1), (2, 2, 2)), "reduce_zero_label": True}, "3 colors for the values 1 to 3"),
        ({"palette": ((0, 0, 0), (1, 1, 1), (0, 0, 0))}, r"the color \[0, 0, 0\] twice"),
        ({"palette": ((0, 0, 0), (1, 1, 1), (0, 0, 256))}, r"three values from 0 to 255, got \[0, 0, 256\]"),
        ({"ignore_value": -1}, "ignore_value must be from 0 to 65535, got -1"),
    ],
)
def test_a_format_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskFormat(3, **values)


def test_loader_processes_get_the_format(tmp_path: Path) -> None:
    Image.fromarray(VALUES).save(tmp_path / "m.png")
    copied = pickle.loads(pickle.dumps(MaskFormat(4)))
    mask = copied.read(tmp_path / "m.png", "m.png")
    assert np.array_equal(np.asarray(mask.classes), VALUES)
    assert mask.name == "m.png"
