import io
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image, ImageFile

from scalablevit_pl.preprocessing import UnreadableImageError, decode_image, decoding
from scalablevit_pl.preprocessing.decoding import is_image_file, open_image

PIXELS = np.random.RandomState(0)
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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_are_decoded_to_the_channels_that_are_asked_for(mode: str) -> None:
    image = Image.fromarray(PIXELS.randint(0, 256, (7, 9, 4), dtype=np.uint8))
    image = (image if mode in ("LA", "RGBA") else image.convert("RGB")).convert(mode)
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    for channels, expected in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        decoded = decode_image(content, channels=channels)
        assert decoded.mode == {1: "L", 3: "RGB", 4: "RGBX"}[channels]  # RGBA would weight colors in a resize
        assert np.array_equal(np.asarray(decoded), np.asarray(image.convert(expected)))


def test_sixteen_bit_and_floating_point_pixels_have_any_number_of_channels() -> None:
    grey = PIXELS.randint(0, 256, (7, 9), dtype=np.uint8)
    for image in (Image.fromarray(grey.astype(np.uint16) * 256), Image.fromarray(grey.astype(np.float32))):
        content = encode(image, "TIFF")
        assert np.array_equal(np.asarray(decode_image(content, channels=1)), grey)
        opaque = np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=2)
        assert np.array_equal(np.asarray(decode_image(content, channels=4)), opaque)


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


def test_formats_that_start_programs_are_rejected() -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImageError, match="row 1: it is not an image of a known format"):
        decode_image(content, "row 1")


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
    assert np.array_equal(np.asarray(open_image(with_alpha, 4)), with_alpha)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_arrays_and_tensors_have_their_channels_first_or_last(channels: int, kind: Callable[[Any], Any]) -> None:
    pixels = PIXELS.randint(0, 256, (7, 9, channels), dtype=np.uint8)
    expected = pixels[..., 0] if channels == 1 else pixels
    for source in (pixels, np.ascontiguousarray(pixels.transpose(2, 0, 1))):
        assert np.array_equal(np.asarray(open_image(kind(source), channels)), expected)
    assert np.array_equal(np.asarray(open_image(kind(pixels[..., 0]), 1)), pixels[..., 0])


def test_a_tensor_has_its_channels_first_and_an_array_last_where_both_are_possible() -> None:
    pixels = PIXELS.randint(0, 256, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(pixels)), pixels)
    assert np.array_equal(np.asarray(open_image(torch.from_numpy(pixels))), pixels.transpose(1, 2, 0))


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((0, 2), np.uint8),
        np.zeros(2, np.uint8),
        torch.zeros(3, 4, 4),
        [[1]],
        None,
    ],
    ids=str,
)
def test_other_types_are_rejected_with_the_accepted_ones(source: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an image: give a path, a PIL image, or an array \(H, W\)"):
        open_image(source)


PICTURES = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP"


@pytest.mark.parametrize("kind", PICTURES.split())
def test_formats_decode_as_pillow_does(kind: str) -> None:
    content = encode(noise(32, 32), kind)
    with Image.open(io.BytesIO(content)) as opened:
        assert_decodes_to(content, np.asarray(opened.convert("RGB")))


def test_a_known_suffix_decides_without_a_look_at_the_file() -> None:
    for name in ("x.jpg", "x.JFIF", "x.jpe", "x.mpo", "x.pgm", "x.avif", "x.apng", "x.tga"):
        assert is_image_file(Path(name)), name
    for name in ("x.eps", "x.pdf", "x.WMF", "x.h5", "x.mpg"):
        assert not is_image_file(Path(name)), name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "AVIF"])
def test_the_first_bytes_decide_for_other_suffixes(kind: str, tmp_path: Path) -> None:
    for name in ("image", "image.img", "image.0001"):
        (tmp_path / name).write_bytes(encode(noise(8, 8), kind))
        assert is_image_file(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG", b"P1 results\n1 2 3\n", b"GIF89a" + bytes(9), bytes(99)], ids=repr
)
def test_other_files_are_not_images(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    assert not is_image_file(tmp_path / "x.dat")
    assert not is_image_file(tmp_path / "missing.dat")


@pytest.fixture
def no_known_formats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget which formats are installed, before and after the test."""
    caches = (decoding._installed, decoding._known_suffixes)
    for registry in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, registry, dict(getattr(Image, registry)))
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_pillow_heif_is_used_where_it_is_installed(
    no_known_formats: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def register() -> None:
        Image.init()
        Image.register_open("HEIF", GifImagePlugin.GifImageFile, lambda start: start.startswith(b"GIF"))
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setattr(decoding, "FORMATS", ("PNG", "HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    image = noise(8, 8).quantize(16)
    assert_decodes_to(encode(image, "GIF"), np.asarray(image.convert("RGB")))
    assert is_image_file(Path("x.heic"))


def test_without_pillow_heif_its_files_are_not_read(
    no_known_formats: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it raises ImportError
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    assert not is_image_file(tmp_path / "x.heic")
