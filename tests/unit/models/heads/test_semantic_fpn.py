"""Semantic FPN against its definition, written with functions and explicit sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scalablevit_pl.models.heads.semantic_fpn import SemanticFPN

CHANNELS = (8, 12, 16, 20)
SIDES = [(24, 40), (12, 20), (6, 10), (3, 5)]


def maps(sides: list[tuple[int, int]] = SIDES, batch: int = 2) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(batch, size, *side, generator=drawn) for size, side in zip(CHANNELS, sides, strict=True)]


def randomized(head: SemanticFPN) -> SemanticFPN:
    """Give batch norms statistics and weights other than their initial ones."""
    torch.manual_seed(1)
    for name, tensor in head.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return head.eval()


def defined(weights: dict[str, Tensor], maps: list[Tensor]) -> Tensor:
    """Compute the logits as the definition has them: scale factors of two, one step after the other."""

    def convolve(image: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(image, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def activated(image: Tensor, name: str) -> Tensor:
        image = convolve(image, f"{name}.conv", 1)
        mean, variance, scale, shift = (
            weights[f"{name}.norm.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (((image - mean) / (variance + 1e-5).sqrt()) * scale + shift).clamp(min=0)

    def doubled(image: Tensor) -> Tensor:
        return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)

    p5 = convolve(maps[3], "laterals.3", 0)
    p4 = convolve(maps[2], "laterals.2", 0) + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p3 = convolve(maps[1], "laterals.1", 0) + p4.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p2 = convolve(maps[0], "laterals.0", 0) + p3.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p2, p3, p4, p5 = (convolve(level, f"outputs.{index}", 1) for index, level in enumerate((p2, p3, p4, p5)))
    total = activated(p2, "levels.0.0")
    total = total + doubled(activated(p3, "levels.1.0"))
    total = total + doubled(activated(doubled(activated(p4, "levels.2.0")), "levels.2.1"))
    p5 = doubled(activated(doubled(activated(p5, "levels.3.0")), "levels.3.1"))
    total = total + doubled(activated(p5, "levels.3.2"))
    return convolve(total, "classifier", 0)


@torch.no_grad()
def test_logits_equal_the_definition() -> None:
    head = randomized(SemanticFPN(CHANNELS, 5, width=24, level_width=16))
    torch.testing.assert_close(head(maps()), defined(dict(head.state_dict()), maps()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_sides_that_do_not_double_are_resized_to_the_finer_map() -> None:
    head = SemanticFPN(CHANNELS, 5, width=24).eval()
    assert head(maps([(19, 11), (10, 6), (5, 3), (3, 2)])).shape == (2, 5, 19, 11)
    assert head(maps([(1, 1)] * 4)).shape == (2, 5, 1, 1)


def test_levels_have_half_the_width_unless_another_is_given() -> None:
    assert SemanticFPN(CHANNELS, 5, width=24).classifier.in_channels == 12
    assert SemanticFPN(CHANNELS, 5, width=24, level_width=7).classifier.in_channels == 7


def test_dropout_drops_whole_channels_before_the_last_layer_in_training() -> None:
    head, seen = SemanticFPN(CHANNELS, 5, width=64, dropout=0.5), []
    head.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head(maps())
    dropped = (seen[0] == 0).flatten(2).all(2)
    assert 0.2 < dropped.float().mean() < 0.8
    head.eval()(maps())
    assert not (seen[1] == 0).flatten(2).all(2).any()


def test_classes_begin_equally_likely() -> None:
    logits = SemanticFPN(CHANNELS, 5, width=64)(maps())
    assert logits.softmax(1).sub(0.2).abs().max() < 0.2
