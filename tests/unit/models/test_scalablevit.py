"""The backbone and its blocks: sizes, order, rates, gradients and memory."""

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from scalablevit_pl.models import (
    InteractiveWindowSelfAttention,
    ScalableSelfAttention,
    ScalableViT,
    create_model,
    scalablevit_nano,
)
from scalablevit_pl.models.attention import WindowPad
from scalablevit_pl.models.blocks import DropPath, Mlp, PatchEmbed, PositionEncodingGenerator, ScalableViTBlock
from scalablevit_pl.models.cost import peak_memory
from scalablevit_pl.models.kernels import OPEN_SIZES

TINY: dict[str, Any] = {"embed_dims": (4, 8, 12, 16), "num_heads": (1, 2, 3, 4), "depths": (2, 3, 4, 2)}
# A constant added to all keys shifts a whole row of the softmax, which ignores it.
KEY_BIAS = re.compile(r"attn\.(qkv|kv|k)\.bias$")
SIZES = [(1, 1), (3, 5), (7, 7), (28, 28), (31, 33), (32, 32), (100, 37), (223, 225)]


def tiny(**kwargs: Any) -> ScalableViT:
    torch.manual_seed(0)
    # These channel ratios fit the heads of every stage of TINY.
    return ScalableViT(**TINY | {"channel_ratios": (2.0, 0.5, 1.0, 1.0)} | kwargs)


def assert_maps_fit(maps: list[Tensor], model: ScalableViT, batch: int, size: tuple[int, int]) -> None:
    for feature, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert feature.shape == (batch, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert feature.isfinite().all()


@pytest.mark.parametrize("window_pad", ["mask", "zero"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_images_of_any_size_give_four_maps(size: tuple[int, int], window_pad: WindowPad) -> None:
    model = scalablevit_nano(window_pad=window_pad).eval()
    assert_maps_fit(model(torch.randn(2, 3, *size)), model, 2, size)


@torch.no_grad()
def test_an_image_of_detection_size_gives_four_maps() -> None:
    model = scalablevit_nano().eval()
    assert_maps_fit(model(torch.randn(1, 3, 800, 1333)), model, 1, (800, 1333))


def test_channels_and_strides_describe_the_maps() -> None:
    model = scalablevit_nano()
    assert model.channels == (32, 64, 128, 256)
    assert model.strides == (4, 8, 16, 32)


@torch.no_grad()
def test_images_may_have_one_channel() -> None:
    model = scalablevit_nano(in_channels=1).eval()
    assert model.stages[0].patch_embed.proj.in_channels == 1
    assert_maps_fit(model(torch.randn(1, 1, 28, 28)), model, 1, (28, 28))


@torch.no_grad()
def test_maps_are_channels_last_in_memory() -> None:
    for feature in tiny().eval()(torch.randn(2, 3, 75, 64)):
        assert feature.permute(0, 2, 3, 1).is_contiguous()


@torch.no_grad()
def test_patch_embedding_is_a_strided_convolution_and_a_norm() -> None:
    for stage, (kernel, stride) in zip(tiny().stages, [(7, 4), (3, 2), (3, 2), (3, 2)], strict=True):
        conv, norm = stage.patch_embed.proj, stage.patch_embed.norm
        assert (conv.kernel_size, conv.stride, conv.padding) == ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)
        nn.init.normal_(norm.weight)
        image = torch.randn(2, conv.in_channels, 21, 18)
        channels = conv(image)
        centred = channels - channels.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight[:, None, None]
        torch.testing.assert_close(stage.patch_embed(image), expected.permute(0, 2, 3, 1))


@torch.no_grad()
def test_a_block_adds_normalized_attention_then_normalized_mlp() -> None:
    torch.manual_seed(0)
    block = ScalableViTBlock(ScalableSelfAttention(8, 2), 8, mlp_ratio=3.0).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    tokens = torch.randn(2, 5, 4, 8)
    middle = tokens + block.attn(block.norm1(tokens))
    hidden = block.norm2(middle) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    assert hidden.shape[-1] == 24
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(tokens), middle + gelu @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


@torch.no_grad()
def test_peg_adds_a_depthwise_convolution_with_a_zero_border() -> None:
    torch.manual_seed(0)
    peg = PositionEncodingGenerator(3)
    nn.init.ones_(peg.conv.weight)
    nn.init.constant_(peg.conv.bias, 0.5)
    neighbours = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])[None, :, :, None]
    scale = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(peg(scale.expand(1, 3, 3, 3)), scale + scale * neighbours + 0.5)


def test_mlp_ratio_sets_the_width_of_mlps() -> None:
    for model, ratio in ((tiny(), 4), (tiny(mlp_ratio=2.5), 2.5)):
        for stage, dim in zip(model.stages, model.channels, strict=True):
            assert [block.mlp.fc1.out_features for block in stage.blocks] == [dim * ratio] * len(stage.blocks)


def test_blocks_alternate_between_window_and_scalable_attention() -> None:
    model = tiny(window_size=5, window_pad="zero", expand_value=True)
    for index, stage in enumerate(model.stages):
        assert len(stage.blocks) == TINY["depths"][index]
        for block, attention in enumerate(layer.attn for layer in stage.blocks):
            assert attention.num_heads == TINY["num_heads"][index]
            if block % 2 == 0:
                assert isinstance(attention, InteractiveWindowSelfAttention)
                assert (attention.window_size, attention.window_pad) == (5, "zero")
            else:
                assert isinstance(attention, ScalableSelfAttention)
                assert attention.spatial_ratio == (8, 4, 2, 1)[index]
                assert attention.proj.in_features == (8, 4, 12, 16)[index]  # C' where the map is reduced


@torch.no_grad()
def test_each_stage_encodes_positions_after_its_first_block() -> None:
    model = tiny().eval()
    calls: list[str] = []
    previous: list[Tensor] = []

    def record(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not name.endswith("patch_embed"):
            assert inputs[0] is previous[-1]
        calls.append(name)
        previous.append(output)

    for name, module in model.named_modules():
        if isinstance(module, PatchEmbed | ScalableViTBlock | PositionEncodingGenerator):
            module.register_forward_hook(lambda _, inputs, output, name=name: record(name, inputs, output))
    model(torch.randn(1, 3, 32, 32))
    expected = []
    for stage, depth in enumerate(TINY["depths"]):
        names = ["patch_embed", "blocks.0", "peg", *(f"blocks.{block}" for block in range(1, depth))]
        expected += [f"stages.{stage}.{name}" for name in names]
    assert calls == expected


def test_stochastic_depth_grows_linearly_over_all_blocks() -> None:
    model = tiny(drop_path_rate=0.5)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.05 * block for block in range(11)])


def test_stochastic_depth_grows_over_stages_of_one_block() -> None:
    model = tiny(depths=(1, 1, 1, 1), drop_path_rate=0.3)
    assert [stage.blocks[0].drop_path.rate for stage in model.stages] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    drop_path = DropPath(0.25)
    tokens, branch = torch.randint(9, (4000, 2, 3, 4)).float(), torch.randint(1, 9, (4000, 2, 3, 4)).float()
    assert torch.equal(drop_path.eval()(tokens, branch), tokens + branch)
    kept = (drop_path.train()(tokens, branch) - tokens) / branch
    torch.testing.assert_close(kept, torch.where(kept[:, :1, :1, :1] == 0, 0.0, 4 / 3).expand_as(kept))
    assert kept.mean() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(DropPath(0.0).train()(tokens, branch), tokens + branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_branch_in_bfloat16_is_scaled_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, branch = torch.zeros(64, 1, 1, 8, dtype=dtype), torch.randn(64, 1, 1, 8).bfloat16()
    added = DropPath(0.3).train()(tokens, branch)
    assert added.dtype == dtype
    expected = (branch.double() / 0.7).to(dtype)
    torch.testing.assert_close(added[added != 0], expected[added != 0], rtol=1e-6, atol=0)


def test_the_branches_of_a_block_are_dropped_independently() -> None:
    torch.manual_seed(0)
    block = ScalableViTBlock(nn.Identity(), 2, drop_path_rate=0.5).train()
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.constant_(block.mlp.fc2.bias, 100.0)
    tokens = torch.tensor([1.0, -1.0]).expand(400, 1, 1, 2)
    added = (block(tokens) - tokens)[:, 0, 0]
    attended, transformed = added.diff(dim=1).abs()[:, 0] > 1, added.mean(1) > 100
    outcomes = Counter(zip(attended.tolist(), transformed.tolist(), strict=True))
    assert len(outcomes) == 4
    assert min(outcomes.values()) > 60


def test_dropout_follows_embeddings_projections_and_mlps() -> None:
    model = tiny(drop_rate=0.3, attn_drop_rate=0.2)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.3, name
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(torch.randn(1, 3, 32, 32))
    expected = Counter({f"stages.{stage}.drop": 1 for stage in range(4)})
    for stage, depth in enumerate(TINY["depths"]):
        for block in range(depth):
            expected |= {f"stages.{stage}.blocks.{block}.attn.drop": 1, f"stages.{stage}.blocks.{block}.mlp.drop": 2}
            assert model.stages[stage].blocks[block].attn.attn_drop_rate == 0.2
    assert calls == expected


@pytest.mark.parametrize("argument", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
@torch.no_grad()
def test_networks_are_random_in_training_only(argument: str) -> None:
    model, plain = tiny(**{argument: 0.5}), tiny()
    image = torch.randn(4, 3, 64, 64)
    for feature, expected in zip(model.eval()(image), plain.train()(image), strict=True):
        assert torch.equal(feature, expected)
    assert not torch.equal(model.train()(image)[-1], model(image)[-1])


def test_weights_are_initialized_by_kind_of_layer() -> None:
    torch.manual_seed(0)
    seen = Counter()
    for name, module in create_model("scalablevit_nano", num_classes=10, head="mlp").named_modules():
        match module:
            case nn.Linear():
                std = 0.02
            case nn.Conv2d():
                std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels / module.groups))
            case nn.LayerNorm():
                std = 0.0
                assert (module.weight == 1).all(), name
            case _:
                continue
        seen[nn.Conv2d if isinstance(module, nn.Conv2d) else type(module)] += 1
        assert (module.bias == 0).all(), name
        tolerance = 5 * std / math.sqrt(2 * module.weight.numel())  # five standard errors
        assert module.weight.std().item() == pytest.approx(std, abs=tolerance), name
        if std:
            assert module.weight.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(module.weight.numel())), name
    # Convolutions: 5 LIMs, 3 reductions of two each, 4 patch embeddings, 4 PEGs.
    assert seen == {nn.Linear: 5 * 4 + 3 * 6 + 5 + 2, nn.Conv2d: 5 + 3 * 2 + 4 + 4, nn.LayerNorm: 4 + 9 * 2 + 3 + 2}


def test_norms_have_an_eps_of_1e_6_but_1e_5_in_the_reduction() -> None:
    model = create_model("scalablevit_nano", num_classes=10, head="mlp")
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {"head.norm": 1e-6, "head.hidden_norm": 1e-6}
    for stage, depth in enumerate((2, 2, 3, 2)):
        prefix = f"backbone.stages.{stage}"
        expected |= {f"{prefix}.patch_embed.norm": 1e-6}
        for block in range(depth):
            expected |= {f"{prefix}.blocks.{block}.norm1": 1e-6, f"{prefix}.blocks.{block}.norm2": 1e-6}
        if stage < 3:
            expected |= {f"{prefix}.blocks.1.attn.norm": 1e-5}
    assert eps == expected


@pytest.mark.parametrize("window_pad", ["mask", "zero"])
def test_every_parameter_except_key_biases_gets_a_gradient(window_pad: WindowPad) -> None:
    torch.manual_seed(0)
    model = create_model("scalablevit_nano", num_classes=10, head="mlp", window_pad=window_pad).double()
    image, weights = torch.randn(1, 3, 224, 224, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    (model(image) * weights).sum().backward()
    key_biases = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        if match := KEY_BIAS.search(name):
            key_biases += 1
            parts = gradient.chunk(len(match[1]))  # one letter each for query, key and value
            assert parts[match[1].index("k")].abs().max() < 1e-15, name
            gradient = torch.cat([part for part, of in zip(parts, match[1], strict=True) if of != "k"] or [weights])
        assert gradient.abs().max() > 1e-7, name
        assert (gradient != 0).all(), name
    assert key_biases == 9


@torch.no_grad()
def test_a_sample_has_the_same_maps_in_any_batch() -> None:
    model = scalablevit_nano().eval()
    images = torch.randn(3, 3, 60, 50)
    for index in range(3):
        for feature, alone in zip(model(images), model(images[index : index + 1]), strict=True):
            torch.testing.assert_close(feature[index : index + 1], alone)


@pytest.mark.parametrize("window_pad", ["mask", "zero"])
def test_samples_of_a_batch_are_independent(window_pad: WindowPad) -> None:
    model = tiny(window_pad=window_pad).train()
    images = torch.randn(3, 3, 60, 50, requires_grad=True)
    for index, feature in enumerate(model(images)[:3]):
        (gradient,) = torch.autograd.grad(
            (feature[index] * torch.randn_like(feature[index])).sum(), images, retain_graph=True
        )
        assert [(sample != 0).any().item() for sample in gradient] == [sample == index for sample in range(3)]


def test_gradient_checkpointing_computes_the_same_and_runs_each_block_twice() -> None:
    model = tiny(drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3).train()
    image = torch.randn(2, 3, 40, 36)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ScalableViTBlock | PositionEncodingGenerator | PatchEmbed):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))

    def step() -> tuple[list[Tensor], dict[str, Tensor], Counter[str]]:
        calls.clear()
        model.zero_grad()
        torch.manual_seed(1)  # the recomputation must drop the same values
        maps = model(image)
        (maps[-1].square().sum() + maps[1].sum()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return maps, gradients, calls.copy()

    maps, gradients, once = step()
    model.set_grad_checkpointing()
    maps_again, gradients_again, twice = step()
    model.set_grad_checkpointing(False)
    *_, off = step()
    assert set(once.values()) == {1}
    assert twice == {name: 2 if "blocks" in name else 1 for name in once}
    assert off == once
    assert len(gradients) == len(list(model.parameters()))
    torch.testing.assert_close(maps_again, maps)
    torch.testing.assert_close(gradients_again, gradients)


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (5, 3, 32), (2, 3, 4, 32, 32), (2, 1, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0)], ids=str
)
def test_errors_state_the_shape_of_unsuitable_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"(B, 3, H, W), got {shape}")):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("argument", ["embed_dims", "num_heads", "depths", "spatial_ratios", "channel_ratios"])
@pytest.mark.parametrize("length", [3, 5])
def test_errors_name_sequences_without_four_entries(argument: str, length: int) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{argument} must have four entries, one for each stage, got {[2] * length}")
    ):
        tiny(**{argument: [2] * length})


@pytest.mark.parametrize("argument", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_errors_name_rates_out_of_range(argument: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .* got {rate}"):
        tiny(**{argument: rate})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"depths": (2, 0, 2, 2)}, "got [2, 0, 2, 2]"),
        ({"num_heads": (1, 3, 3, 4)}, "num_heads=3 must divide dim=8"),
        ({"spatial_ratios": (8, 0, 2, 1)}, "got [8, 0, 2, 1]"),
        ({"window_pad": "reflect"}, "got 'reflect'"),
        ({"window_size": 0}, "got 0"),
        ({"window_size": 7.5}, "got 7.5"),
    ],
)
def test_errors_name_arguments_that_do_not_fit_together(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        tiny(**arguments)


def test_mlps_compute_the_same_with_and_without_gradients() -> None:
    torch.manual_seed(0)
    mlp, tokens = Mlp(6, 24), 3.0 * torch.randn(2, 5, 6)
    hidden = tokens @ mlp.fc1.weight.T + mlp.fc1.bias
    expected = (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(tokens), expected, rtol=0, atol=1e-5)
    kept = tokens.clone()
    with torch.no_grad():
        torch.testing.assert_close(mlp(tokens), expected, rtol=0, atol=1e-5)
        assert peak_memory(lambda: mlp(tokens), torch.device("cpu")) == 4 * (2 * 5 * 24 + 2 * 5 * 6)
    assert torch.equal(tokens, kept)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("recomputing", "eager"),
        pytest.param("train", "aot_eager", marks=pytest.mark.slow),
        pytest.param("recomputing", "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_network_is_one_graph_with_the_same_gradients(mode: str, backend: str) -> None:
    model = tiny().train()
    model.set_grad_checkpointing(mode == "recomputing")
    image = torch.randn(2, 3, 40, 36)
    plain = torch.autograd.grad(model(image)[-1].square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    ours = torch.autograd.grad(compiled(image)[-1].square().sum(), list(model.parameters()))
    for gradient, reference in zip(ours, plain, strict=True):
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not OPEN_SIZES, reason="before torch 2.8 the compiler needs several graphs")
@torch.no_grad()
def test_the_network_is_one_graph_for_images_of_any_size() -> None:
    model = tiny(depths=(2, 2, 1, 2)).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in [(256, 320), (300, 401), (448, 672), (512, 288)]:
        image = torch.randn(2, 3, *size)
        for ours, plain in zip(compiled(image), model(image), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=3e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_network_can_be_exported() -> None:
    model, image = tiny().eval(), torch.randn(2, 3, 40, 36)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), model(image), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not OPEN_SIZES, reason="before torch 2.8 an exported program has one size")
@torch.no_grad()
def test_the_network_can_be_exported_for_images_of_any_size() -> None:
    from torch.export import Dim
    from torch.fx.experimental import _config

    model, sides = tiny(depths=(2, 2, 1, 2)).eval(), {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    with _config.patch(backed_size_oblivious=True):  # or torch limits the program to some sizes
        program = torch.export.export(model, (torch.randn(2, 3, 256, 288),), dynamic_shapes=(sides,))
    exported = program.module()
    for size in [(2, 3, 256, 288), (3, 3, 300, 401), (2, 3, 448, 672), (2, 3, 333, 417)]:
        image = torch.randn(size)
        for ours, plain in zip(exported(image), model(image), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=3e-5)


def test_gradient_checkpointing_keeps_the_activations_of_one_block() -> None:
    model = tiny().train()
    image = torch.randn(2, 3, 64, 64)

    def kept() -> int:
        """Count the bytes kept for the backward pass, without weights."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = model(image)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert maps[-1].requires_grad
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    everything = kept()
    model.set_grad_checkpointing()
    assert kept() < 0.25 * everything
