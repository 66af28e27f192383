"""Images to labels with a classifier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.folder import annotate

LABELS = ["ant", "bee", "cat", "dog"]
PREPROCESSING = Preprocessing(32, 0.8, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
PIXELS = np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8)


def classifier(num_classes: int = 4, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    options = {"drop_rate": 0.5} | options  # which training mode would show
    model = ImageClassifier(ScalableViT((8, 8, 16, 16), (1, 2, 2, 4), (1, 2, 1, 1), **options), num_classes, "linear")
    torch.nn.init.normal_(model.head.get_parameter("fc.weight")) if num_classes else None
    return model.eval()


@pytest.fixture
def model() -> ImageClassifier:
    model = classifier()
    annotate(model, LABELS, PREPROCESSING)
    return model


def by_hand(model: ImageClassifier, *images: Image.Image) -> Tensor:
    batch = torch.stack([PREPROCESSING(image) for image in images])
    with torch.no_grad():
        return torch.softmax(model.eval()(batch), dim=1)


def assert_predicts(predictions: list[list[tuple[str, float]]], expected: Tensor, labels: list[str] = LABELS) -> None:
    assert len(predictions) == len(expected)
    for row, probabilities in zip(predictions, expected, strict=True):
        order = probabilities.argsort(descending=True).tolist()
        assert [label for label, _ in row] == [labels[index] for index in order][: len(row)]
        assert [p for _, p in row] == pytest.approx(probabilities[order][: len(row)].tolist(), rel=1e-4, abs=1e-6)


def written(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize(
    "give",
    [
        lambda folder: written(folder),
        lambda folder: str(written(folder)),
        lambda folder: written(folder).read_bytes(),
        lambda folder: Image.fromarray(PIXELS),
        lambda folder: PIXELS,
        lambda folder: np.asfortranarray(PIXELS),
        lambda folder: np.concatenate([PIXELS, PIXELS[..., :1]], axis=2),
        lambda folder: Image.fromarray(PIXELS).convert("RGBA"),
    ],
    ids=["path", "string", "bytes", "pil", "rgb", "strided", "rgba", "pil-rgba"],
)
def test_an_image_comes_in_many_forms(model: ImageClassifier, tmp_path: Path, give: Callable[[Path], Any]) -> None:
    source, image = give(tmp_path), Image.fromarray(PIXELS)
    assert torch.equal(model.preprocess(source), PREPROCESSING(image))
    expected = by_hand(model, image)
    for images in (source, [source], (source,)):
        predictions = model.predict(images)
        assert_predicts(predictions, expected)
        assert len(predictions[0]) == 4
        assert sum(probability for _, probability in predictions[0]) == pytest.approx(1.0)


def test_grey_arrays_are_images(model: ImageClassifier) -> None:
    grey = Image.fromarray(PIXELS[..., 0]).convert("RGB")
    assert torch.equal(model.preprocess(PIXELS[..., 0]), PREPROCESSING(grey))
    assert_predicts(model.predict(PIXELS[..., 0]), by_hand(model, grey))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_several_images_go_in_batches_and_keep_their_order(model: ImageClassifier, batch_size: int) -> None:
    arrays = np.stack([np.roll(PIXELS, 40 * shift) // (shift + 1) for shift in range(5)])
    expected = by_hand(model, *(Image.fromarray(array) for array in arrays))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for images in (arrays, list(arrays), tuple(Image.fromarray(array) for array in arrays)):
        sizes.clear()
        assert_predicts(model.predict(images, batch_size=batch_size), expected)
        assert sizes == [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
    assert model.predict([]) == []
    assert model.predict(arrays[:0]) == []


@pytest.mark.parametrize(("top_k", "given"), [(1, 1), (3, 3), (4, 4), (5, 4), (1000, 4)])
def test_so_many_labels_are_given_as_there_are(model: ImageClassifier, top_k: int, given: int) -> None:
    (row,) = model.predict(PIXELS, top_k=top_k)
    assert len(row) == given
    assert_predicts([row], by_hand(model, Image.fromarray(PIXELS)))


def test_five_labels_are_given_by_default() -> None:
    assert len(classifier(7).predict(PIXELS)[0]) == 5


@pytest.mark.parametrize("options", [{"top_k": 0}, {"batch_size": 0}, {"top_k": -1}])
def test_numbers_below_one_are_refused(model: ImageClassifier, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="top_k and batch_size must be at least 1"):
        model.predict(PIXELS, **options)


def test_without_names_a_label_is_the_class_s_index() -> None:
    model = classifier()
    (row,) = model.predict(PIXELS)
    with torch.no_grad():
        probabilities = model(model.preprocess(PIXELS)[None]).softmax(1)
    assert_predicts([row], probabilities, ["0", "1", "2", "3"])
    model.pretrained_cfg["label_names"] = ["one", "two"]  # of other classes
    assert model.predict(PIXELS) == [row]


def test_a_network_without_last_layer_predicts_nothing() -> None:
    assert classifier(0).predict([PIXELS, PIXELS]) == [[], []]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_what_they_were(model: ImageClassifier, fails: bool, tmp_path: Path) -> None:
    expected = by_hand(model, Image.fromarray(PIXELS))
    model.train()
    model.backbone.eval()  # frozen
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(ValueError, match="gone"):
            model.predict(tmp_path / "gone.png")
    else:
        assert_predicts(model.predict(PIXELS), expected)
    assert [module.training for module in model.modules()] == modes
    model.train()
    assert_predicts(model.predict(PIXELS), expected)
    assert all(module.training for module in model.modules())
    model.eval()
    model.predict(PIXELS)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_predicts(model: ImageClassifier, dtype: torch.dtype) -> None:
    expected = by_hand(model, Image.fromarray(PIXELS))
    (row,) = model.to(dtype).predict(PIXELS)
    assert dict(row) == pytest.approx(dict(zip(LABELS, expected[0].tolist(), strict=True)), abs=0.02)
    assert sum(probability for _, probability in row) == pytest.approx(1.0, abs=1e-5)


def test_predictions_hold_no_graph(model: ImageClassifier) -> None:
    model.predict(PIXELS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (np.zeros((4, 4, 3), np.float32), r"an array \(4, 4, 3\) of float32 is not an image"),
        (np.zeros((4, 4, 3), np.int64), r"an array \(4, 4, 3\) of int64 is not an image"),
        (np.zeros((4, 4, 2), np.uint8), r"an array \(4, 4, 2\) of uint8 is not an image"),
        (np.zeros((4, 4, 1), np.uint8), r"an array \(4, 4, 1\) of uint8 is not an image"),
        (np.zeros((3, 4, 5), np.uint8), r"an array \(3, 4, 5\) of uint8 is not an image"),
        (np.zeros(4, np.uint8), r"an array \(4,\) of uint8 is not an image"),
        (np.zeros((0, 4, 3), np.uint8), r"an array \(0, 4, 3\) of uint8 is not an image"),
        (torch.zeros(3, 4, 4), "'Tensor' is not an image"),
        (None, "'NoneType' is not an image"),
        (3, "'int' is not an image"),
        ({"image": 1}, "'dict' is not an image"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_image_is_refused(model: ImageClassifier, source: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: give a path, a PIL image, or an array"):
        model.preprocess(source)
    with pytest.raises(ValueError, match=named):
        model.predict([PIXELS, source])


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_image_that_cannot_be_read_is_named(model: ImageClassifier, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    for images in (path, str(path), [PIXELS, path]):
        with pytest.raises(ValueError, match=r"cannot read .*broken\.png"):
            model.predict(images)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_of_other_channels_takes_no_images(channels: int) -> None:
    model = classifier(in_channels=channels)
    for call in (model.preprocess, model.predict):
        with pytest.raises(ValueError, match=f"images have 3 channels and this network takes {channels}: preprocess"):
            call(PIXELS)


def test_the_preprocessing_is_that_of_the_description(model: ImageClassifier) -> None:
    assert model.preprocessing == PREPROCESSING
    assert create_model("scalablevit_nano").preprocessing == Preprocessing()
    model.pretrained_cfg["crop_mode"] = "squash"
    with pytest.raises(ValueError, match="only square center crops"):
        model.predict(PIXELS)


def test_a_loaded_network_predicts_as_the_saved_one(model: ImageClassifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    (first,), (second,) = model.predict(PIXELS), again.predict(PIXELS)
    assert [label for label, _ in first] == [label for label, _ in second]
    assert [p for _, p in first] == pytest.approx([p for _, p in second])


@pytest.mark.parametrize("path", ["gone", "no/such/folder/here"])
@pytest.mark.parametrize("load", [ImageClassifier.from_pretrained, ScalableViT.from_pretrained])
def test_what_is_neither_folder_nor_repository_is_named(load: Callable[[str], Any], path: str) -> None:
    with pytest.raises(ValueError, match=path):
        load(path)
