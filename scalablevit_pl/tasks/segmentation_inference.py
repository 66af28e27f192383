"""From images to the class of each pixel of the originals: whole images, sliding windows, scales and mirror images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalablevit_pl.preprocessing.masks import IGNORED
from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
DIVISOR = 32  # stride of the last map: scaled images are padded to multiples of it
AT_ONCE = 2**19  # scores that are computed at a time, which fit into a cache

Size = tuple[int, int]
Network = Callable[[Tensor], Tensor]


class Segmented(NamedTuple):
    """The result for an image: its classes `(H, W)` in uint8 and, with a mask, the sum of the loss over its pixels."""

    classes: Tensor
    loss: Tensor | None


class Scores(NamedTuple):
    """Logits of an image as the network saw it, and where the original is in that.

    Attributes:
        logits: Of each class, `(K, h, w)`.
        padded: Height and width of the network's input.
        resized: Height and width of the original in it, from the upper left corner; the rest is padding.
        mirrored: Whether the original is mirrored in it.
    """

    logits: Tensor
    padded: Size
    resized: Size
    mirrored: bool = False


@dataclass(frozen=True)
class Inference:
    """How a network is run on an image.

    Attributes:
        window: Side of the windows in pixels; None for the whole image.
        stride: Distance of two windows in pixels.
        tta: With `flip`, the mean of the class probabilities of an image and its mirror image counts; with
            `multiscale`, that of both in all `SCALES`.
    """

    window: int | None = None
    stride: int = 1
    tta: str | None = None

    def __call__(self, network: Network, images: Tensor, resized: Sequence[Size]) -> Iterator[list[Scores]]:
        """Yield the scores of each of some padded images `(B, C, H, W)`: one, or with `tta` several.

        Args:
            network: Maps images of any size to logits.
            images: Normalized images of one size.
            resized: For each image, height and width of the original in it.
        """
        if self.window is None and self.tta is None:
            padded = images.shape[-2], images.shape[-1]
            for logits, size in zip(network(images), resized, strict=True):
                yield [Scores(logits, padded, size)]
            return
        scales = SCALES if self.tta == "multiscale" else (1.0,)
        mirrors = (False,) if self.tta is None else (False, True)
        for image, (height, width) in zip(images, resized, strict=True):
            content = image[None, :, :height, :width]
            yield [self._scores(network, content, scale, mirror) for scale in scales for mirror in mirrors]

    def _scores(self, network: Network, image: Tensor, scale: float, mirror: bool) -> Scores:
        height, width = (max(1, round(scale * side)) for side in image.shape[-2:])
        image = _resize(image, (height, width))
        image = image.flip(-1) if mirror else image
        if self.window is not None:
            return Scores(slide(network, image, self.window, self.stride), (height, width), (height, width), mirror)
        image = F.pad(image, (0, -width % DIVISOR, 0, -height % DIVISOR))
        return Scores(network(image)[0], (image.shape[-2], image.shape[-1]), (height, width), mirror)


def slide(network: Network, image: Tensor, window: int, stride: int) -> Tensor:
    """Return the mean over windows of the logits of each pixel `(K, H, W)` of an image `(1, C, H, W)`.

    Windows start every `stride` pixels, and the last ones end with the image. An image that is smaller than a window is
    a window itself in this direction.
    """
    height, width = image.shape[-2:]
    sides = min(window, height), min(window, width)
    total: Any = None
    count = torch.zeros(height, width, device=image.device)
    for top in _starts(height, sides[0], stride):
        for left in _starts(width, sides[1], stride):
            part = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            logits = _resize(network(image[part]).float(), sides)[0]
            total = logits.new_zeros(len(logits), height, width) if total is None else total
            total[part] += logits
            count[part] += 1.0
    averaged: Tensor = total.div_(count)
    return averaged


def _starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})


def segment(scores: Sequence[Scores], size: Size, mask: Tensor | None = None) -> Segmented:
    """Find the most probable class of each pixel of an original image, and the loss of all pixels.

    Logits are resized to the network's input, cropped to the original in it and resized to that, bilinearly. Of several
    scores, the mean of the class probabilities counts. This is done for some rows at a time, so memory does not grow
    with the number of classes times the pixels of the original.

    Args:
        scores: Scores of the image.
        size: Height and width of the original.
        mask: True classes `(H, W)` of the original.
    """
    height, width = size
    device = scores[0].logits.device
    classes = torch.empty(size, dtype=torch.uint8, device=device)
    loss = torch.zeros((), dtype=SUM_DTYPE, device=device)
    at_once = max(1, AT_ONCE // (len(scores[0].logits) * width))
    with torch.autocast(device.type, enabled=False):
        resized = [ResizedLogits(each, size) for each in scores]
        for top in range(0, height, at_once):
            rows = slice(top, top + at_once)
            logits = _mean([each.read(rows) for each in resized])
            best, indices = logits.max(-1)
            classes[rows] = indices.to(torch.uint8)
            if mask is not None:
                loss += _losses(logits, best, mask[rows]).sum(dtype=SUM_DTYPE)
    return Segmented(classes, None if mask is None else loss)


def _mean(logits: Sequence[Tensor]) -> Tensor:
    """Return logits whose class probabilities are the mean of those of others, all `(H, W, K)`."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))


def _losses(logits: Tensor, best: Tensor, truth: Tensor) -> Tensor:
    """Return the cross-entropy of logits `(H, W, K)`, whose maxima are known; 0 for ignored pixels."""
    counted = truth != IGNORED
    own = logits.gather(-1, truth.long().where(counted, 0)[..., None])[..., 0]
    # With the maxima and in place this takes half the time of torch's function.
    losses = (logits - best[..., None]).exp_().sum(-1).log_() + (best - own)
    return losses.where(counted, 0.0)


class ResizedLogits:
    """Logits at the size of the original image, computed for the rows that are read.

    Args:
        scores: Scores of the image.
        size: Height and width of the original.
    """

    def __init__(self, scores: Scores, size: Size) -> None:
        padded, resized = scores.padded, scores.resized
        # Channels last: resizing and the search for the best class read the logits of a pixel together. torch does not
        # recognize this layout if the dimension of the batch is added to (K, h, w), and is three times as slow then.
        maps = scores.logits.float().permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        maps = _resize(maps, (maps.shape[2], padded[1]))[..., : resized[1]]
        maps = _resize(maps.flip(-1) if scores.mirrored else maps, (maps.shape[2], size[1]))
        self.columns = maps[0].permute(1, 2, 0).contiguous()
        # Row i has the weights of the rows of `columns` in row i of the original.
        weights = _resize(torch.eye(maps.shape[2])[None, :, :, None], (padded[0], 1))[:, :, : resized[0]]
        self.weights = _resize(weights, (size[0], 1))[0, :, :, 0].T.contiguous()

    def read(self, rows: slice) -> Tensor:
        """Return logits `(rows, W, K)`."""
        weights = self.weights[rows]
        used = weights.any(0).nonzero()
        band = slice(int(used[0]), int(used[-1]) + 1)
        read = weights[:, band].to(self.columns.device) @ self.columns[band].flatten(1)
        return read.view(-1, *self.columns.shape[1:])


def _resize(maps: Tensor, size: Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
