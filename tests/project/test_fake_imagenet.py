import io
from collections import Counter

from fake_imagenet import make_images
from PIL import Image


def test_the_images_cover_many_kinds() -> None:
    images = make_images("train", 1003)
    opened = [Image.open(io.BytesIO(image.content)) for image in images]
    assert set(Counter(image.mode for image in opened)) == {"RGB", "L", "CMYK"}
    assert {image.format for image in opened} == {"JPEG", "PNG"}
    assert {image.getexif().get(0x0112) for image in opened} == {None, 6}
    assert len({image.size for image in opened}) > 100
    assert {image.label for image in images} == set(range(1000))
