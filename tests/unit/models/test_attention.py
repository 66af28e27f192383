"""Both attentions against plain implementations of the same equations."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention, WindowPad
from scalablevit_pl.models.kernels import OPEN_SIZES

MAPS = [(7, 7), (14, 14), (9, 12), (3, 20), (20, 3), (1, 1), (8, 7), (7, 8), (6, 13)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def iwsa(dim: int = 12, num_heads: int = 3, **kwargs: Any) -> InteractiveWindowSelfAttention:
    torch.manual_seed(0)
    attention = InteractiveWindowSelfAttention(dim, num_heads, **kwargs).eval()
    nn.init.normal_(attention.qkv.bias)  # padded tokens have this bias as value: make it visible
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
    """Compute IWSA for one map `(H, W, C)`, window by window and head by head."""
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
    """Compute SSA for token maps `(B, H, W, C)` with einsum."""
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
def test_iwsa_accepts_windows_of_any_size(window_size: int) -> None:
    attention = iwsa(window_size=window_size)
    tokens = torch.randn(1, 6, 9, 12)
    assert_close(attention(tokens)[0], iwsa_by_hand(attention, tokens[0], 3, window_size, zero=False))


@torch.no_grad()
def test_window_modes_differ_only_in_partial_windows() -> None:
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
def test_ssa_attends_to_a_reduced_map(
    size: tuple[int, int], spatial_ratio: int, channel_ratio: float, expand_value: bool
) -> None:
    torch.manual_seed(0)
    attention = ScalableSelfAttention(16, 2, spatial_ratio, channel_ratio, expand_value).eval()
    nn.init.normal_(attention.norm.weight)  # weights of 1 and 0 would hide a missing norm weight
    nn.init.normal_(attention.norm.bias)
    attention.pointwise.weight.mul_(0.01)  # a map flat enough for the norm's eps to matter
    attention.pointwise.bias.mul_(0.01)
    key_dim = int(16 * channel_ratio)
    assert attention.q.out_features == attention.k.out_features == key_dim
    assert attention.v.out_features == attention.proj.in_features == (key_dim if expand_value else 16)
    tokens = torch.randn(2, *size, 16)
    assert_close(attention(tokens), ssa_by_hand(attention, tokens, 2, spatial_ratio, channel_ratio))


@pytest.mark.parametrize("channel_ratio", [1.0, 1.25, 0.5])
@torch.no_grad()
def test_ssa_without_reduction_keeps_all_channels_and_scales_by_its_ratio(channel_ratio: float) -> None:
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
    assert (first == 0).any() == ("drop_rate" in rates)  # drop_rate drops outputs, attn_drop_rate only weights


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
def test_errors_name_the_bad_argument(kind: type[nn.Module], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**{"dim": 12, "num_heads": 2} | arguments)


@pytest.mark.parametrize("size", [(14, 7), (9, 12), (3, 20)], ids=str)
@pytest.mark.parametrize("kind", ["mask", "zero", "ssa", "ssa without reduction"])
def test_gradients_match_the_plain_formulation(kind: str, size: tuple[int, int]) -> None:
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
        # A key bias adds a constant to all products of a query, so its gradient is only rounding noise.
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-5


open_sizes = pytest.mark.skipif(not OPEN_SIZES, reason="before torch 2.8 the compiler needs several graphs")


@open_sizes
@pytest.mark.parametrize("window_pad", ["mask", "zero"])
@torch.no_grad()
def test_compiled_iwsa_is_one_graph_for_maps_of_all_sizes(window_pad: WindowPad) -> None:
    counter = CompileCounter()
    attention = iwsa(window_pad=window_pad)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for size in [(9, 13), (14, 28), (15, 8), (20, 37)]:  # none is 12, the number of channels
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
def test_iwsa_compiled_for_one_size_uses_a_mask_only_for_partial_windows() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(iwsa(), fullgraph=True, dynamic=False, backend=keep)
    compiled(torch.randn(1, 14, 7, 12))
    compiled(torch.randn(1, 14, 8, 12))
    assert ["arange" in graph.code for graph in graphs] == [False, True]


@pytest.mark.parametrize("attention", [ScalableSelfAttention(8, 2, 2), InteractiveWindowSelfAttention(8, 2, 4)])
def test_autocast_casts_the_tokens_once_with_the_same_result(
    attention: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 8, 8, 8)

    def attend_and_keep() -> tuple[Tensor, int]:
        """Return the output, and how many copies of the tokens are kept for the backward pass."""
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
    for module in ("attention", "kernels"):
        monkeypatch.setattr(f"scalablevit_pl.models.{module}.to_autocast", lambda tokens: tokens)
    expected, _ = attend_and_keep()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
