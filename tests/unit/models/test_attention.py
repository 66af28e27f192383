"""Both attentions against the same arithmetic written another way."""

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from scalablevit_pl.models.attention import (
    OPEN_SIZES,
    DepthwiseReduction,
    InteractiveWindowSelfAttention,
    ScalableSelfAttention,
    WindowPad,
    attend,
    pad_to_multiple,
    sum_patches,
)

MAPS = [(7, 7), (14, 14), (9, 12), (3, 20), (20, 3), (1, 1), (8, 7), (7, 8), (6, 13)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def iwsa(dim: int = 12, num_heads: int = 3, **kwargs: Any) -> InteractiveWindowSelfAttention:
    torch.manual_seed(0)
    attention = InteractiveWindowSelfAttention(dim, num_heads, **kwargs).eval()
    nn.init.normal_(attention.qkv.bias)  # the values of padded tokens are this bias, so it has to be seen
    nn.init.normal_(attention.qkv.weight, std=0.5)
    return attention


def without_lim(attention: InteractiveWindowSelfAttention) -> InteractiveWindowSelfAttention:
    nn.init.zeros_(attention.lim.weight)
    nn.init.zeros_(attention.lim.bias)
    return attention


def depthwise_by_hand(image: Tensor, conv: nn.Conv2d) -> Tensor:
    height, width, _ = image.shape
    output = conv.bias.expand(height, width, -1).clone()
    for row in range(height):
        for column in range(width):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        output[row, column] += (
                            conv.weight[:, 0, down + 1, right + 1] * image[row + down, column + right]
                        )
    return output


def iwsa_by_hand(
    attention: InteractiveWindowSelfAttention, image: Tensor, heads: int, window: int, zero: bool
) -> Tensor:
    """Loop over the windows and heads of one map `(H, W, C)`."""
    height, width, dim = image.shape
    rows, columns = (math.ceil(side / window) * window if zero else side for side in (height, width))
    padded = image.new_zeros(rows, columns, dim)
    padded[:height, :width] = image
    query, key, value = (padded @ attention.qkv.weight.T + attention.qkv.bias).split(dim, dim=-1)
    attended = torch.full((rows, columns, dim), torch.nan)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            for head in range(heads):
                channels = slice(head * dim // heads, (head + 1) * dim // heads)
                part = (slice(top, top + window), slice(left, left + window), channels)
                q, k, v = (tensor[part].flatten(0, 1) for tensor in (query, key, value))
                weights = (q @ k.T / math.sqrt(dim / heads)).softmax(-1)
                attended[part] = (weights @ v).view(attended[part].shape)
    mixed = attended[:height, :width] + depthwise_by_hand(value[:height, :width], attention.lim)
    return mixed @ attention.proj.weight.T + attention.proj.bias


def ssa_by_hand(
    attention: ScalableSelfAttention, tokens: Tensor, heads: int, spatial_ratio: int, channel_ratio: float
) -> Tensor:
    batch, height, width, dim = tokens.shape
    if spatial_ratio > 1:
        s, rows, columns = spatial_ratio, math.ceil(height / spatial_ratio), math.ceil(width / spatial_ratio)
        padded = tokens.new_zeros(batch, rows * s, columns * s, dim)
        padded[:, :height, :width] = tokens
        patches = padded.view(batch, rows, s, columns, s, dim)
        reduced = torch.einsum("brycxd,dyx->brcd", patches, attention.depthwise.weight[:, 0]) + attention.depthwise.bias
        reduced = torch.einsum("brcd,ed->brce", reduced, attention.pointwise.weight[:, :, 0, 0])
        reduced = reduced + attention.pointwise.bias
        variance, mean = torch.var_mean(reduced, -1, keepdim=True, correction=0)
        reduced = (reduced - mean) / (variance + 1e-5).sqrt() * attention.norm.weight + attention.norm.bias
        reduced = 0.5 * reduced * (1 + torch.erf(reduced / math.sqrt(2)))
        key = reduced @ attention.k.weight.T + attention.k.bias
        value = reduced @ attention.v.weight.T + attention.v.bias
    else:
        key, value = (
            tokens @ attention.kv.weight[half].T + attention.kv.bias[half] for half in (slice(dim), slice(dim, None))
        )
    query = tokens @ attention.q.weight.T + attention.q.bias
    q, k, v = (tensor.flatten(1, 2).unflatten(-1, (heads, -1)) for tensor in (query, key, value))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(channel_ratio * dim / heads)).softmax(-1)
    output = torch.einsum("bhnm,bmhe->bnhe", weights, v).reshape(batch, height, width, -1)
    return output @ attention.proj.weight.T + attention.proj.bias


def multihead(dim: int, heads: int, in_weight: Tensor, in_bias: Tensor, proj: nn.Linear) -> nn.MultiheadAttention:
    plain = nn.MultiheadAttention(dim, heads, batch_first=True).eval()
    plain.load_state_dict(
        {
            "in_proj_weight": in_weight,
            "in_proj_bias": in_bias,
            "out_proj.weight": proj.weight,
            "out_proj.bias": proj.bias,
        }
    )
    return plain


@pytest.mark.parametrize("window_pad", ["mask", "zero"])
@pytest.mark.parametrize("size", MAPS, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_iwsa_is_attention_in_each_window_plus_lim(size: tuple[int, int], window_pad: WindowPad) -> None:
    attention = iwsa(window_pad=window_pad)
    tokens = torch.randn(2, *size, 12)
    expected = [iwsa_by_hand(attention, image, 3, 7, window_pad == "zero") for image in tokens]
    assert_close(attention(tokens), torch.stack(expected))


@pytest.mark.parametrize("window_size", [1, 2, 5, 100])
@torch.no_grad()
def test_iwsa_takes_windows_of_any_size(window_size: int) -> None:
    attention = iwsa(window_size=window_size)
    tokens = torch.randn(1, 6, 9, 12)
    assert_close(attention(tokens)[0], iwsa_by_hand(attention, tokens[0], 3, window_size, zero=False))


@torch.no_grad()
def test_window_modes_differ_only_where_windows_are_not_full() -> None:
    mask, zero = without_lim(iwsa(window_pad="mask")), without_lim(iwsa(window_pad="zero"))
    tokens = torch.randn(1, 9, 14, 12)
    masked, zeroed = mask(tokens), zero(tokens)
    assert_close(masked[:, :7], zeroed[:, :7])
    assert (masked - zeroed)[:, 7:].abs().amax(-1).min() > 1e-3
    assert_close(mask(tokens[:, :7]), zero(tokens[:, :7]))


@torch.no_grad()
def test_iwsa_without_lim_is_plain_attention_inside_windows() -> None:
    attention = without_lim(iwsa())
    plain = multihead(12, 3, attention.qkv.weight, attention.qkv.bias, attention.proj)
    tokens = torch.randn(2, 9, 12, 12)
    output = attention(tokens)
    for rows in (slice(0, 7), slice(7, 9)):
        for columns in (slice(0, 7), slice(7, 12)):
            window = tokens[:, rows, columns].flatten(1, 2)
            assert_close(output[:, rows, columns].flatten(1, 2), plain(window, window, window, need_weights=False)[0])


@pytest.mark.parametrize("window_pad", ["mask", "zero"])
@pytest.mark.parametrize("lim", [False, True], ids=["without LIM", "with LIM"])
@torch.no_grad()
def test_a_token_reaches_its_window_and_through_lim_its_neighbours(lim: bool, window_pad: WindowPad) -> None:
    attention = iwsa(window_pad=window_pad)
    if not lim:
        without_lim(attention)
    tokens = torch.randn(1, 16, 10, 12)
    perturbed = tokens.clone()
    perturbed[0, 6, 7] += 1.0
    reached = torch.zeros(16, 10, dtype=torch.bool)
    reached[:7, 7:] = True
    if lim:
        reached[5:8, 6:9] = True
    assert torch.equal((attention(tokens) != attention(perturbed)).any(-1)[0], reached)


@pytest.mark.parametrize("expand_value", [False, True])
@pytest.mark.parametrize("channel_ratio", [1.25, 0.25, 2.0, 1.0])
@pytest.mark.parametrize(
    ("size", "spatial_ratio"), [((8, 8), 4), ((9, 10), 4), ((3, 20), 8), ((1, 1), 2), ((7, 6), 2)], ids=str
)
@torch.no_grad()
def test_ssa_asks_a_reduced_map(
    size: tuple[int, int], spatial_ratio: int, channel_ratio: float, expand_value: bool
) -> None:
    torch.manual_seed(0)
    attention = ScalableSelfAttention(16, 2, spatial_ratio, channel_ratio, expand_value).eval()
    nn.init.normal_(attention.norm.weight)  # at 1 and 0 a forgotten norm weight would not show
    nn.init.normal_(attention.norm.bias)
    attention.pointwise.weight.mul_(0.01)  # a map so flat that the norm's eps counts
    attention.pointwise.bias.mul_(0.01)
    key_dim = int(16 * channel_ratio)
    assert attention.q.out_features == attention.k.out_features == key_dim
    assert attention.v.out_features == attention.proj.in_features == (key_dim if expand_value else 16)
    tokens = torch.randn(2, *size, 16)
    assert_close(attention(tokens), ssa_by_hand(attention, tokens, 2, spatial_ratio, channel_ratio))


@pytest.mark.parametrize("channel_ratio", [1.0, 1.25, 0.5])
@torch.no_grad()
def test_ssa_that_reduces_nothing_has_all_channels_and_the_ratios_scale(channel_ratio: float) -> None:
    torch.manual_seed(0)
    attention = ScalableSelfAttention(16, 4, 1, channel_ratio, expand_value=True).eval()
    assert {name: tuple(weight.shape) for name, weight in attention.named_parameters()} == {
        "q.weight": (16, 16),
        "q.bias": (16,),
        "kv.weight": (32, 16),
        "kv.bias": (32,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
    }
    tokens = 3.0 * torch.randn(2, 5, 4, 16)
    assert_close(attention(tokens), ssa_by_hand(attention, tokens, 4, 1, channel_ratio))


def test_channels_of_query_and_key_are_rounded_down() -> None:
    attention = ScalableSelfAttention(6, 1, spatial_ratio=2, channel_ratio=1.25)
    assert attention.q.out_features == attention.k.out_features == attention.norm.normalized_shape[0] == 7


@torch.no_grad()
def test_ssa_with_ratios_of_one_is_plain_attention() -> None:
    torch.manual_seed(0)
    attention = ScalableSelfAttention(12, 3).eval()
    in_weight = torch.cat([attention.q.weight, attention.kv.weight])
    in_bias = torch.cat([attention.q.bias, attention.kv.bias])
    plain = multihead(12, 3, in_weight, in_bias, attention.proj)
    tokens = 3.0 * torch.randn(2, 5, 4, 12)
    flat = tokens.flatten(1, 2)
    assert_close(attention(tokens).flatten(1, 2), plain(flat, flat, flat, need_weights=False)[0])


@pytest.mark.parametrize("value_width", [3, 8, 13])
def test_attend_takes_values_of_any_width(value_width: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, value_width)
    expected = torch.softmax(0.7 * query @ key.transpose(-1, -2), -1) @ value
    assert_close(attend(query, key, value, 0.7), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_takes_more_samples_than_kernels_do(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(7, 3, 5, 8), torch.randn(7, 3, 6, 8), torch.randn(7, 3, 6, 4)
    mask = torch.rand(7, 1, 1, 6) < 0.7 if masked else None
    expected, sizes = attend(query, key, value, 0.7, mask=mask), []
    kernel = F.scaled_dot_product_attention

    def counted(*inputs: Any, **options: Any) -> Tensor:
        sizes.append(len(inputs[0]))
        return kernel(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("scalablevit_pl.models.attention.LARGEST_BATCH", 3)
    assert_close(attend(query, key, value, 0.7, mask=mask), expected)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_drops_weights_and_scales_the_others_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 30, 8), torch.eye(30).expand(2, 3, 30, 30)
    query, key, value = (part.to(dtype) for part in (query, key, value))
    weights = attend(query, key, value, 0.5)
    dropped = attend(query, key, value, 0.5, dropout=0.25)
    close = assert_close if dtype == torch.float32 else torch.testing.assert_close
    close(dropped, torch.where(dropped == 0, 0.0, weights / 0.75))
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)


def test_another_device_takes_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append(query)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    tokens = torch.empty(2, 3, 6, 8, dtype=torch.bfloat16, device="meta")
    attend(tokens, tokens, tokens, 1.0)
    assert len(calls) == 1
    monkeypatch.setattr("scalablevit_pl.models.attention.sum_patches", None)
    reduction = DepthwiseReduction(3, 2).to("meta", torch.bfloat16)
    assert reduction(tokens.new_empty(2, 3, 6, 8)).shape == (2, 3, 3, 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("keys", "dtype", "fused"), [(64, torch.bfloat16, 0), (65, torch.bfloat16, 1), (9, None, 1)])
def test_a_cpu_attends_to_few_keys_in_bfloat16_without_its_kernel(
    keys: int, dtype: torch.dtype | None, fused: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = ((4, 3, 7, 10), (4, 3, keys, 10), (4, 3, keys, 6))
    query, key, value = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    mask = torch.rand(4, 1, 1, keys) < 0.7 if masked else None
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(*inputs: Any, **options: Any) -> Tensor:
        calls.append(inputs)
        return kernel(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    attended = attend(query, key, value, 0.7, mask=mask)
    assert len(calls) == fused
    wide = [part.detach().double().requires_grad_() for part in (query, key, value)]
    products = 0.7 * wide[0] @ wide[1].transpose(-1, -2)
    products = products if mask is None else products.where(mask, -torch.inf)
    expected = torch.softmax(products, -1) @ wide[2]
    weight = torch.arange(expected.numel()).view_as(expected).sin()
    found = [attended, *torch.autograd.grad((attended * weight).sum(), (query, key, value))]
    right = [expected, *torch.autograd.grad((expected * weight).sum(), wide)]
    for part, exact in zip(found, right, strict=True):
        assert part.dtype == (dtype or torch.float32)
        error = (part.double() - exact).norm() / exact.norm()
        assert error < (1e-2 if dtype else 1e-6)


@pytest.mark.parametrize("rates", [{"attn_drop_rate": 0.5}, {"drop_rate": 0.5}], ids=str)
@pytest.mark.parametrize("kind", [InteractiveWindowSelfAttention, ScalableSelfAttention])
@torch.no_grad()
def test_attention_drops_in_training_only(kind: type[nn.Module], rates: dict[str, float]) -> None:
    torch.manual_seed(0)
    attention, plain = kind(8, 2, **rates), kind(8, 2)
    plain.load_state_dict(attention.state_dict())
    tokens = torch.randn(1, 7, 7, 8)
    assert torch.equal(attention.eval()(tokens), plain(tokens))
    first, second = attention.train()(tokens), attention(tokens)
    assert not torch.equal(first, second)
    assert (first == 0).any() == ("drop_rate" in rates)  # the one drops outputs, the other only weights


def test_padding_appends_zeros_to_the_next_multiple_and_leaves_fitting_maps_alone() -> None:
    tokens = torch.ones(2, 4, 6, 3)
    assert pad_to_multiple(tokens, 2) is tokens
    padded = pad_to_multiple(tokens, 5)
    assert padded.shape == (2, 5, 10, 3)
    assert torch.equal(padded, F.pad(tokens, (0, 0, 0, 4, 0, 1)))
    assert padded.sum() == tokens.sum()


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (ScalableSelfAttention, {"num_heads": 5}, "num_heads=5 must divide dim=12"),
        (ScalableSelfAttention, {"spatial_ratio": 2, "channel_ratio": 1.25}, "the 15 channels"),
        (ScalableSelfAttention, {"spatial_ratio": 2, "channel_ratio": 0.01}, "the 0 channels"),
        (ScalableSelfAttention, {"spatial_ratio": 0}, "got 0 and 1.0"),
        (ScalableSelfAttention, {"channel_ratio": -0.5}, "got 1 and -0.5"),
        (ScalableSelfAttention, {"channel_ratio": 0.0}, "got 1 and 0.0"),
        (InteractiveWindowSelfAttention, {"num_heads": 5}, "num_heads=5 must divide dim=12"),
        (InteractiveWindowSelfAttention, {"window_size": 0}, "got 0"),
        (InteractiveWindowSelfAttention, {"window_pad": "reflect"}, "got 'reflect'"),
    ],
)
def test_bad_arguments_are_named(kind: type[nn.Module], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**{"dim": 12, "num_heads": 2} | arguments)


@pytest.mark.parametrize("size", [(14, 7), (9, 12), (3, 20)], ids=str)
@pytest.mark.parametrize("kind", ["mask", "zero", "ssa", "ssa without reduction"])
def test_gradients_are_those_of_the_plain_formulation(kind: str, size: tuple[int, int]) -> None:
    tokens = torch.randn(2, *size, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if kind in ("mask", "zero"):
        attention: nn.Module = iwsa(window_pad=cast("WindowPad", kind))
        expected = torch.stack([iwsa_by_hand(cast("Any", attention), image, 3, 7, kind == "zero") for image in tokens])
    else:
        torch.manual_seed(0)
        ratio, channel_ratio = (2, 1.25) if kind == "ssa" else (1, 1.0)
        attention = ScalableSelfAttention(12, 3, ratio, channel_ratio)
        expected = ssa_by_hand(attention, tokens, 3, ratio, channel_ratio)
    inputs = [tokens, *attention.parameters()]
    direction = torch.randn_like(expected)
    plain = torch.autograd.grad((expected * direction).sum(), inputs)
    ours = torch.autograd.grad((attention(tokens) * direction).sum(), inputs)
    for gradient, reference in zip(ours, plain, strict=True):
        # A key's bias adds the same to all of a query's products, so that its gradient is nothing but rounding.
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-5


open_sizes = pytest.mark.skipif(not OPEN_SIZES, reason="before torch 2.8 each kind of size has a graph of its own")


@open_sizes
@pytest.mark.parametrize("window_pad", ["mask", "zero"])
@torch.no_grad()
def test_compiled_iwsa_is_one_graph_for_maps_of_all_sizes(window_pad: WindowPad) -> None:
    counter = CompileCounter()
    attention = iwsa(window_pad=window_pad)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for size in [(9, 13), (14, 28), (15, 8), (20, 37)]:  # none of them 12, the channels
        tokens = torch.randn(2, *size, 12)
        expected = [iwsa_by_hand(attention, image, 3, 7, window_pad == "zero") for image in tokens]
        assert_close(compiled(tokens), torch.stack(expected))
    assert counter.frame_count == 1


@open_sizes
@torch.no_grad()
def test_compiled_ssa_is_one_graph_for_maps_of_all_sizes() -> None:
    counter = CompileCounter()
    torch.manual_seed(0)
    attention = ScalableSelfAttention(16, 2, 4, 1.25).eval()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for size in [(9, 13), (16, 28), (15, 6), (20, 37)]:
        tokens = torch.randn(2, *size, 16)
        assert_close(compiled(tokens), ssa_by_hand(attention, tokens, 2, 4, 1.25))
    assert counter.frame_count == 1


@torch.no_grad()
def test_iwsa_compiled_for_one_size_needs_no_mask_where_windows_are_full() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(iwsa(), fullgraph=True, dynamic=False, backend=keep)
    compiled(torch.randn(1, 14, 7, 12))
    compiled(torch.randn(1, 14, 8, 12))
    assert ["arange" in graph.code for graph in graphs] == [False, True]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_reduction_written_out_is_the_convolution(ratio: int) -> None:
    torch.manual_seed(0)
    layer, tokens = DepthwiseReduction(6, ratio), torch.randn(2, 3 * ratio, 5 * ratio, 6)
    results = []
    for compute in (layer, lambda image: sum_patches(image, layer.weight, layer.bias)):
        image = tokens.permute(0, 3, 1, 2).requires_grad_()
        reduced = compute(image)
        assert reduced.is_contiguous(memory_format=torch.channels_last)
        weight = torch.arange(reduced.numel()).view_as(reduced).sin()
        results.append([reduced, *torch.autograd.grad((reduced * weight).sum(), [image, *layer.parameters()])])
    for written, convolved in zip(*results, strict=True):
        torch.testing.assert_close(written, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "grad", "written_out"), [("float32", True, 0), ("bfloat16", True, 1), ("bfloat16", False, 0)]
)
def test_a_cpu_writes_a_reduction_out_to_train_in_bfloat16(
    dtype: str, grad: bool, written_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        "scalablevit_pl.models.attention.sum_patches", lambda *inputs: calls.append(inputs) or sum_patches(*inputs)
    )
    layer, image = DepthwiseReduction(6, 2), torch.randn(2, 6, 4, 4)
    with torch.set_grad_enabled(grad):
        reduced = layer.to(getattr(torch, dtype))(image.to(getattr(torch, dtype)))
    assert len(calls) == written_out
    torch.testing.assert_close(reduced.float(), layer.float()(image), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("attention", [ScalableSelfAttention(8, 2, 2), InteractiveWindowSelfAttention(8, 2, 4)])
def test_autocast_casts_the_tokens_once_and_computes_what_it_did(attention: nn.Module, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(DepthwiseReduction, "forward", nn.Conv2d.forward)  # it would choose by the type that it sees
    tokens = torch.randn(2, 8, 8, 8)

    def attend_and_keep() -> tuple[Tensor, int]:
        """Return the output, and how often the tokens wait for the backward pass."""
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        held = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with held, torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention(tokens)
        values = tokens.bfloat16().flatten().sort().values
        return output, sum(
            tensor.numel() == values.numel() and torch.equal(tensor.bfloat16().flatten().sort().values, values)
            for tensor in kept.values()
        )

    output, copies = attend_and_keep()
    assert copies == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend="eager")(tokens)
    torch.testing.assert_close(compiled, output)
    monkeypatch.setattr("scalablevit_pl.models.attention.to_autocast", lambda tokens: tokens)
    expected, _ = attend_and_keep()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


class OnCuda(Tensor):
    """A tensor that says to be on a GPU."""

    is_cuda = True


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
def test_widths_are_padded_where_kernels_want_one(
    device: str, widths: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    kind = OnCuda if device == "cuda" else Tensor
    query, key, value = (
        torch.empty(2, 3, tokens, width).as_subclass(kind)
        for tokens, width in ((6, widths[0]), (5, widths[0]), (5, widths[1]))
    )
    assert attend(query, key, value, 1.0).shape == (2, 3, 6, widths[1])
    assert seen == [(expected[0], expected[0], expected[1])]
