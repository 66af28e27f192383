import io
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_imagenet import FakeImage, make_images, put_on_hub, write_folders, write_parquet
from hub_server import HubServer
from PIL import Image, ImageOps

from scalablevit_pl.data import ClassificationDataModule, Preprocessing
from scalablevit_pl.data.imagenet import imagenet_names
from scalablevit_pl.preprocessing import UnreadableImageError

SPLITS = {"train": make_images("train", 1003), "validation": make_images("validation", 41)}
SMALL = Preprocessing(16)


def make_data(dataset: str, **arguments: Any) -> ClassificationDataModule:
    return ClassificationDataModule(
        dataset,
        batch_size=64,
        num_workers=0,
        preprocessing=SMALL,
        augmentation=None,
        class_order="imagenet",
        split_sizes={split: len(images) for split, images in SPLITS.items()},
        **arguments,
    )


def batches(dataset: str, split: str) -> list[dict[str, Any]]:
    data = make_data(dataset, test_split=split)
    data.prepare_data()
    data.setup("test")
    assert data.class_names == list(imagenet_names())
    return list(islice(data.test_dataloader(), 3))


def expected(images: list[FakeImage]) -> torch.Tensor:
    """Decode by the shortest way."""
    opened = [ImageOps.exif_transpose(Image.open(io.BytesIO(image.content))).convert("RGB") for image in images]
    return torch.stack([SMALL(image) for image in opened])


def test_parquet_folders_and_the_hub_give_the_same_batches(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    put_on_hub(hub, "lab/imagenet", SPLITS)
    sources = [
        str(write_parquet(tmp_path / "parquet", SPLITS)),
        str(write_folders(tmp_path / "folders", SPLITS)),
        "lab/imagenet",
    ]
    for split, images in SPLITS.items():
        images = images[: 3 * 64]
        labels, pixels = [image.label for image in images], expected(images)
        for source in sources:
            found = batches(source, split)
            assert [label for batch in found for label in batch["label"].tolist()] == labels
            assert [index for batch in found for index in batch["index"].tolist()] == list(range(len(images)))
            assert torch.equal(SMALL.normalize(torch.cat([batch["image"] for batch in found])), pixels)


def test_the_images_are_of_many_kinds() -> None:
    opened = [Image.open(io.BytesIO(image.content)) for image in SPLITS["train"]]
    assert set(Counter(image.mode for image in opened)) == {"RGB", "L", "CMYK"}
    assert {image.format for image in opened} == {"JPEG", "PNG"}
    assert {image.getexif().get(0x0112) for image in opened} == {None, 6}
    assert len({image.size for image in opened}) > 100
    assert {image.label for image in SPLITS["train"]} == set(range(1000))


def test_the_truncated_image_is_named(tmp_path: Path) -> None:
    splits = SPLITS | {"train": make_images("train", 1003, truncated=True)}
    data = make_data(str(write_folders(tmp_path / "folders", splits)), test_split="train")
    data.setup("test")
    with pytest.raises(UnreadableImageError, match=splits["train"][3].name):
        list(data.test_dataloader())
