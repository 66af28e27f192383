"""Accuracies that papers report. None of them was measured here."""

from typing import NamedTuple


class Published(NamedTuple):
    """What a paper reports of a network that was trained on ImageNet-1k alone.

    Attributes:
        top1: ImageNet-1k accuracy in percent, at 224×224.
        source: The paper's number on arXiv.
    """

    top1: float
    source: str


SCALABLEVIT, SWIN, TWINS = "2203.10790", "2103.14030", "2104.13840"
CONVNEXT, DEIT = "2201.03545", "2012.12877"
# Ours and timm's names. A name with a tag behind a dot may stand for other weights, so it has no entry.
PUBLISHED = {
    "scalablevit_s": Published(83.1, SCALABLEVIT),
    "scalablevit_b": Published(84.1, SCALABLEVIT),
    "scalablevit_l": Published(84.4, SCALABLEVIT),
    "swin_tiny_patch4_window7_224": Published(81.3, SWIN),
    "swin_small_patch4_window7_224": Published(83.0, SWIN),
    "swin_base_patch4_window7_224": Published(83.5, SWIN),
    "twins_svt_small": Published(81.7, TWINS),
    "twins_svt_base": Published(83.2, TWINS),
    "twins_svt_large": Published(83.7, TWINS),
    "convnext_tiny": Published(82.1, CONVNEXT),
    "convnext_small": Published(83.1, CONVNEXT),
    "convnext_base": Published(83.8, CONVNEXT),
    "deit_tiny_patch16_224": Published(72.2, DEIT),
    "deit_small_patch16_224": Published(79.8, DEIT),
    "deit_base_patch16_224": Published(81.8, DEIT),
}
