"""Inference against torch's resizes of whole maps, one image at a time."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scalablevit_pl.tasks import segmentation_inference
from scalablevit_pl.tasks.segmentation_inference import SCALES, Inference, Scores, segment, slide

CLASSES, IGNORED = 5, 255


class Coarse(nn.Module):
    """Logits of stride 4 that depend on the neighborhood, the border and the position of a pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.Tanh(), nn.Conv2d(8, CLASSES, 4, stride=4))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        return 3.0 * self.layers(functional.pad(image, (0, -width % 4, 0, -height % 4)))


NETWORK = Coarse().eval().requires_grad_(requires_grad=False)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def draw(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def draw_mask(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(CLASSES, size, generator=generator, dtype=torch.uint8)
    return mask.where(torch.rand(size, generator=generator) > 0.2, IGNORED)


# Size of the original, of the image in the network's input, and of the input.
SIZES = [((40, 24), (40, 24), (40, 24)), ((37, 51), (37, 51), (64, 64)), ((90, 61), (43, 29), (64, 32))]
SIZES += [((13, 9), (46, 32), (64, 32)), ((1, 1), (32, 32), (32, 32)), ((5, 200), (1, 40), (32, 64))]


@pytest.mark.parametrize(("size", "resized", "padded"), SIZES)
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_logits_are_resized_cropped_and_resized_again(
    size: tuple[int, int],
    resized: tuple[int, int],
    padded: tuple[int, int],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmentation_inference, "AT_ONCE", at_once)
    logits = NETWORK(draw(*padded))[0]
    mask = draw_mask(size)
    found = segment([Scores(logits, padded, resized)], size, mask)
    whole = resize(resize(logits[None], padded)[:, :, : resized[0], : resized[1]], size)
    assert found.classes.dtype == torch.uint8
    assert torch.equal(found.classes.long(), whole[0].argmax(0))
    expected = functional.cross_entropy(whole.double(), mask[None].long(), ignore_index=IGNORED, reduction="sum")
    assert found.loss is not None
    assert found.loss.dtype == torch.float64
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert segment([Scores(logits, padded, resized)], size).loss is None


def test_an_ignored_image_has_no_loss() -> None:
    logits = torch.full((CLASSES, 2, 2), 1e30)
    loss = segment([Scores(logits, (8, 8), (8, 8))], (8, 8), torch.full((8, 8), IGNORED, dtype=torch.uint8)).loss
    assert loss == 0.0


def test_the_first_of_equal_classes_is_predicted() -> None:
    logits = torch.zeros(CLASSES, 2, 2)
    logits[0] = -1.0
    assert segment([Scores(logits, (8, 8), (7, 8))], (7, 8)).classes.unique().tolist() == [1]


@pytest.mark.parametrize("tta", ["flip", "multiscale"])
def test_probabilities_of_scales_and_mirror_images_are_averaged(tta: str) -> None:
    size, resized, padded = (50, 37), (35, 26), (64, 32)
    image = draw(*padded)
    content = image[:, :, : resized[0], : resized[1]]
    total, count = torch.zeros(CLASSES, *size), 0
    for scale, mirror in product(SCALES if tta == "multiscale" else [1.0], [False, True]):
        height, width = round(scale * resized[0]), round(scale * resized[1])
        view = resize(content, (height, width))
        view = torch.flip(view, [3]) if mirror else view
        view = functional.pad(view, (0, -width % 32, 0, -height % 32))
        logits = resize(NETWORK(view), tuple(view.shape[-2:]))[:, :, :height, :width]
        logits = torch.flip(logits, [3]) if mirror else logits
        total += resize(logits, size)[0].softmax(0)
        count += 1
    mask = draw_mask(size)
    (scores,) = Inference(tta=tta)(NETWORK, image, [resized])
    found = segment(scores, size, mask)
    assert len(scores) == count == (2 if tta == "flip" else 12)
    assert torch.equal(found.classes.long(), total.argmax(0))
    logs = (total / count).log()[None]
    expected = functional.cross_entropy(logs, mask[None].long(), ignore_index=IGNORED, reduction="sum")
    assert found.loss is not None
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((40, 56), 24, 16), ((40, 56), 24, 24), ((33, 17), 16, 5), ((20, 90), 32, 7)]
)
def test_windows_cover_the_image_and_their_logits_are_averaged(size: tuple[int, int], window: int, stride: int) -> None:
    image = draw(*size)
    height, width = (min(window, side) for side in size)
    # The positions of the windows as mmsegmentation computes them.
    rows, columns = (max(side - each + stride - 1, 0) // stride + 1 for side, each in zip(size, (height, width)))  # noqa: B905
    total, count = torch.zeros(CLASSES, *size), torch.zeros(size)
    for row, column in product(range(rows), range(columns)):
        bottom, right = min(row * stride + height, size[0]), min(column * stride + width, size[1])
        part = (..., slice(bottom - height, bottom), slice(right - width, right))
        total[part] += resize(NETWORK(image[part]), (height, width))[0]
        count[part] += 1
    assert count.min() >= 1
    torch.testing.assert_close(slide(NETWORK, image, window, stride), total / count)


def test_windows_leave_out_the_padding_and_combine_with_mirror_images() -> None:
    image, resized = draw(64, 64), (50, 40)
    content = image[:, :, : resized[0], : resized[1]]
    (scores,) = Inference(window=32, stride=20)(NETWORK, image, [resized])
    torch.testing.assert_close(scores[0].logits, slide(NETWORK, content, 32, 20))
    found = segment(scores, (50, 40))
    assert torch.equal(found.classes.long(), slide(NETWORK, content, 32, 20).argmax(0))
    (both,) = Inference(window=32, stride=20, tta="flip")(NETWORK, image, [resized])
    mirrored = slide(NETWORK, content.flip(-1), 32, 20).flip(-1)
    mean = slide(NETWORK, content, 32, 20).softmax(0) + mirrored.softmax(0)
    assert torch.equal(segment(both, (50, 40)).classes.long(), mean.argmax(0))
