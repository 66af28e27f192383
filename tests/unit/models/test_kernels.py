"""Kernels against the same arithmetic in plain operators, and the choices between them by device."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalablevit_pl.models.kernels import (
    DepthwiseReduction,
    attend,
    attend_by_window,
    attend_padded,
    cut_windows,
    merge_windows,
    pad_to_multiple,
    sum_patches,
    window_mask,
    window_spans,
)


class OnCuda(Tensor):
    """A CPU tensor that claims to be on a GPU."""

    is_cuda = True


DEVICES = {"cpu": Tensor, "cuda": OnCuda}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def attend_in_windows(windows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend with two heads whose query, key and value are the tokens."""
    heads = windows.unflatten(2, (2, -1)).transpose(1, 2)
    return attend(heads, heads, heads, 0.3, mask=mask), heads


@pytest.mark.parametrize("value_width", [3, 8, 13])
def test_attend_accepts_values_of_any_width(value_width: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, value_width)
    expected = torch.softmax(0.7 * query @ key.transpose(-1, -2), -1) @ value
    assert_close(attend(query, key, value, 0.7), expected)


def test_attend_ignores_masked_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 4)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])[:, None, None]
    whole, part = attend(query, key, value, 0.7, mask=mask)
    assert_close(whole, attend(query[:1], key[:1], value[:1], 0.7)[0])
    kept = [0, 2, 3]
    assert_close(part, attend(query[1:], key[1:, :, kept], value[1:, :, kept], 0.7)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_attend_splits_batches_that_are_too_large_for_kernels(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(7, 3, 5, 8), torch.randn(7, 3, 6, 8), torch.randn(7, 3, 6, 4)
    mask = torch.rand(7, 1, 1, 6) < 0.7 if masked else None
    expected, sizes = attend(query, key, value, 0.7, mask=mask), []
    kernel = F.scaled_dot_product_attention

    def counted(*inputs: Any, **options: Any) -> Tensor:
        sizes.append(len(inputs[0]))
        return kernel(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("scalablevit_pl.models.kernels.LARGEST_BATCH", 3)
    assert_close(attend(query, key, value, 0.7, mask=mask), expected)
    assert sizes == [3, 3, 1]


def test_attend_drops_weights_and_scales_up_the_others() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 30, 8), torch.eye(30).expand(2, 3, 30, 30)
    weights = attend(query, key, value, 0.5)
    dropped = attend(query, key, value, 0.5, dropout=0.25)
    assert_close(dropped, torch.where(dropped == 0, 0.0, weights / 0.75))
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("device", "widths", "expected"),
    [
        ("cpu", (40, 32), (40, 40)),
        ("cuda", (40, 32), (40, 32)),
        ("cuda", (8, 32), (8, 32)),
        ("cuda", (5, 4), (5, 5)),
        ("cuda", (12, 16), (16, 16)),
    ],
)
def test_heads_are_padded_where_kernels_need_equal_widths(
    device: str, widths: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    query, key, value = (
        torch.empty(2, 3, tokens, width).as_subclass(DEVICES[device])
        for tokens, width in ((6, widths[0]), (5, widths[0]), (5, widths[1]))
    )
    assert attend(query, key, value, 1.0).shape == (2, 3, 6, widths[1])
    assert seen == [(expected[0], expected[0], expected[1])]


def test_window_spans_are_full_windows_and_a_rest() -> None:
    assert window_spans(16, 7) == [(0, 14, 7), (14, 16, 2)]
    assert window_spans(14, 7) == [(0, 14, 7)]
    assert window_spans(3, 7) == [(0, 3, 3)]


def test_windows_are_cut_row_by_row_and_merged_again() -> None:
    tokens = torch.arange(2 * 4 * 6 * 10.0).view(2, 4, 6, 10)
    windows = cut_windows(tokens, 2, 3)
    assert windows.shape == (2 * 2 * 2, 2 * 3, 10)
    for index, (top, left) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        assert torch.equal(windows[4 + index], tokens[1, top : top + 2, left : left + 3].flatten(0, 1))
    heads = windows.unflatten(2, (5, 2)).transpose(1, 2)
    assert torch.equal(merge_windows(heads, tokens.shape, 2, 3), tokens)


def test_windows_are_cut_in_the_dtype_of_autocast() -> None:
    tokens = torch.arange(24.0).view(1, 4, 6, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        windows = cut_windows(tokens, 2, 3)
        assert cut_windows(tokens.double(), 2, 3).dtype == torch.float64
    assert windows.dtype == torch.bfloat16
    assert torch.equal(windows.float(), cut_windows(tokens, 2, 3))


def test_the_mask_of_padded_windows_marks_the_real_tokens() -> None:
    tokens = torch.ones(2, 4, 5, 1)
    padded = pad_to_multiple(tokens, 3)
    mask = window_mask(tokens, padded, 3)
    assert mask.shape == (2 * 2 * 2, 1, 1, 9)
    assert torch.equal(mask[:, 0, 0].float(), cut_windows(padded, 3, 3)[..., 0])


@pytest.mark.parametrize("size", [(14, 7), (9, 12), (3, 20), (20, 3), (1, 1), (6, 13)], ids=str)
def test_masked_windows_are_windows_by_region(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, *size, 6)
    by_region = attend_by_window(attend_in_windows, tokens, 7)
    masked = attend_padded(attend_in_windows, tokens, 7, masked=True)
    assert_close(masked[0], by_region[0])
    assert torch.equal(masked[1], tokens)
    assert torch.equal(by_region[1], tokens)


def test_padding_appends_zeros_up_to_the_next_multiple() -> None:
    tokens = torch.ones(2, 4, 6, 3)
    assert pad_to_multiple(tokens, 2) is tokens
    padded = pad_to_multiple(tokens, 5)
    assert torch.equal(padded, F.pad(tokens, (0, 0, 0, 4, 0, 1)))
    assert padded.sum() == tokens.sum()


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_the_explicit_sum_is_the_strided_convolution(ratio: int) -> None:
    torch.manual_seed(0)
    layer, tokens = DepthwiseReduction(6, ratio), torch.randn(2, 3 * ratio, 5 * ratio, 6)
    results = []
    for compute in (layer, lambda image: sum_patches(image, layer.weight, layer.bias)):
        image = tokens.permute(0, 3, 1, 2).requires_grad_()
        reduced = compute(image)
        assert reduced.is_contiguous(memory_format=torch.channels_last)
        weight = torch.arange(reduced.numel()).view_as(reduced).sin()
        results.append([reduced, *torch.autograd.grad((reduced * weight).sum(), [image, *layer.parameters()])])
    for summed, convolved in zip(*results, strict=True):
        torch.testing.assert_close(summed, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "grad", "sums"), [("cpu", True, 0), ("cuda", True, 1), ("cuda", False, 0)])
def test_only_training_on_a_gpu_uses_the_explicit_sum(
    device: str, grad: bool, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        "scalablevit_pl.models.kernels.sum_patches", lambda *inputs: calls.append(inputs) or sum_patches(*inputs)
    )
    layer, image = DepthwiseReduction(6, 2), torch.randn(2, 6, 4, 4)
    with torch.set_grad_enabled(grad):
        reduced = layer(image.as_subclass(DEVICES[device]))
    assert len(calls) == sums
    torch.testing.assert_close(reduced.as_subclass(Tensor), layer(image))
