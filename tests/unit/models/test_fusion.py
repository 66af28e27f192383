"""Fused networks against the plain ones."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scalablevit_pl.models import ImageClassifier, create_model, fuse
from scalablevit_pl.models.blocks import Mlp
from scalablevit_pl.models.fusion import FusedLinear, onednn_takes

ONE_CALL = "mkldnn::_linear_pointwise"
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
IMAGES = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def nano() -> ImageClassifier:
    torch.manual_seed(0)
    network = create_model("scalablevit_nano", num_classes=5, drop_path_rate=0.0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn_like(weight))  # biases are not zero
    return network.eval()


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp(6, 24)


def with_fused(network: Any) -> tuple[Any, Any]:
    """Return a network and a fused copy."""
    fused = copy.deepcopy(network)
    fuse(fused)
    return network, fused


def count_calls(network: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Counter[str]]:
    """Return the output, and how often each operator was called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        output = network(*inputs)
    return output, Counter({event.key: event.count for event in seen.key_averages()})


class Wrapper(Tensor):
    """A subclass that only the dispatcher knows, such as a distributed tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="no bf16"))]
)
def test_a_fused_network_computes_the_same_with_fewer_calls(dtype: torch.dtype, context: Any) -> None:
    plain, fused = with_fused(nano().to(dtype))
    linear = sum(isinstance(module, nn.Linear) for module in plain.modules())
    mlps = sum(isinstance(module, Mlp) for module in plain.modules())
    images = torch.randn(2, 3, 224, 224, dtype=dtype)  # full windows only, so each layer runs once
    with context():
        (expected, before), (found, after) = (count_calls(network, images) for network in (plain, fused))
    close = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **close)
    assert (before[ONE_CALL], after[ONE_CALL]) == (0, linear)
    assert (before["aten::gelu_"], after["aten::gelu_"]) == (mlps, 0)
    assert before["aten::gelu"] == after["aten::gelu"] > 0  # a norm separates these from the linear layer


def test_gradients_are_those_of_the_plain_network() -> None:
    gradients = []
    for network in with_fused(nano().train()):
        logits, calls = count_calls(network, IMAGES)
        assert not calls[ONE_CALL]
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1, 3])), [*network.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_autocast_and_unsupported_dtypes_and_devices_use_torch() -> None:
    plain, fused = with_fused(nano())
    _, calls = count_calls(copy.deepcopy(fused).double(), IMAGES.double())
    assert not calls[ONE_CALL]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(IMAGES)
        found, calls = count_calls(fused, IMAGES)
    assert not calls[ONE_CALL]
    assert torch.equal(found, expected)
    assert fused.to("meta")(IMAGES.to("meta")).shape == (2, 5)


@torch.no_grad()
def test_autocast_casts_float32_tokens() -> None:
    layer, fused = with_fused(nn.Linear(6, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = layer(TOKENS), fused(TOKENS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:TF32")
@torch.no_grad()
def test_modes_subclasses_and_a_disabled_onednn_are_respected() -> None:
    layer = nn.Linear(6, 7)
    assert onednn_takes(TOKENS, layer)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_takes(TOKENS, layer)
    with BaseTorchFunctionMode():
        assert not onednn_takes(TOKENS, layer)
    assert not onednn_takes(TOKENS.as_subclass(Wrapper), layer)


PARTS: dict[str, dict[str, Tensor | None]] = {
    "scalar bias": {"bias": torch.tensor(2.0)},
    "strided bias": {"bias": torch.arange(14.0)[::2]},
    "expanded bias": {"bias": torch.tensor([2.0]).expand(7)},
    "strided weight": {"weight": torch.arange(84.0).sin().view(7, 12)[:, ::2]},
    "expanded weight": {"weight": torch.arange(6.0).sin().expand(7, 6)},
    "sparse weight": {"weight": torch.arange(42.0).sin().view(7, 6)},
    "empty weight": {"weight": torch.empty(7, 0)},
    "vector": {"weight": torch.arange(6.0).sin(), "bias": None},
}


@pytest.mark.filterwarnings("ignore:Sparse")  # a beta feature of torch
@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_weights_may_have_any_layout(parts: str) -> None:
    layer, fused = with_fused(nn.Linear(6, 7))
    for network in (layer, fused):
        for name, part in PARTS[parts].items():
            part = part.to_sparse_csr() if parts == "sparse weight" else part
            setattr(network, name, None if part is None else nn.Parameter(part))
    tokens = TOKENS[0, :, : layer.weight.shape[-1]]
    assert_close(fused(tokens), layer(tokens))


@pytest.mark.parametrize("bias", [torch.zeros(7, device="meta"), torch.zeros(7, dtype=torch.float64)], ids=str)
@torch.no_grad()
def test_errors_are_those_of_a_linear_layer(bias: Tensor) -> None:
    errors = []
    for network in with_fused(nn.Linear(6, 7)):
        network.bias = nn.Parameter(bias)
        with pytest.raises((RuntimeError, TypeError)) as error:
            network(TOKENS)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_tokens_may_have_any_shape_and_layout(bias: bool) -> None:
    layer, fused = with_fused(nn.Linear(5, 6, bias))
    for tokens in (
        torch.randn(5),
        torch.randn(0, 5),
        torch.randn(5, 3, 4).permute(2, 1, 0),
        torch.randn(1, 5).expand(4, 5),
        torch.randn(4, 9)[:, 2:7],
        3.0 * torch.randn(2, 3, 4, 2, 5),
    ):
        found, calls = count_calls(fused, tokens)
        assert calls[ONE_CALL] == 1
        torch.testing.assert_close(found, layer(tokens))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit is deprecated
@torch.no_grad()
def test_compilers_exports_and_traces_see_the_operators_of_torch() -> None:
    plain, fused = with_fused(mlp())
    graphs: list[Any] = []

    def keep(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend=keep)
    exported = torch.export.export(fused, (TOKENS,))
    made, symbolic, traced = make_fx(fused)(TOKENS), symbolic_trace(fused), torch.jit.trace(fused, TOKENS)
    for network in (compiled, exported.module(), made, symbolic, traced):
        assert_close(network(TOKENS), plain(TOKENS))
    for code in (graphs[0].code, exported.graph_module.code, made.code, symbolic.code, str(traced.inlined_graph)):
        assert "linear" in code or "addmm" in code
        assert "mkldnn" not in code


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised by torch itself
def test_function_transforms_are_those_of_the_plain_network(capfd: pytest.CaptureFixture[str]) -> None:
    direction, results = TOKENS.sin(), []
    for network in with_fused(mlp()):
        with sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
            dual = network(torch.autograd.forward_ad.make_dual(TOKENS, direction))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        results.append(
            [
                tangent,
                *torch.func.jvp(network, (TOKENS,), (direction,)),
                torch.func.vmap(network)(TOKENS),
                torch.func.jacrev(network)(TOKENS[0, 0]),
            ]
        )
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected)
    assert "mkldnn::" not in capfd.readouterr().err  # torch warns about operators that vmap does not know


@torch.no_grad()
def test_the_same_operations_are_counted() -> None:
    counts = []
    for network in with_fused(nano()):
        with FlopCounterMode(display=False) as counter:
            network(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_weights_keep_their_names_and_are_saved_and_loaded() -> None:
    plain, fused = with_fused(nano())
    assert [*fused.state_dict()] == [*plain.state_dict()]
    assert torch.equal(pickle.loads(pickle.dumps(fused))(IMAGES), fused(IMAGES))
    other = create_model("scalablevit_nano", num_classes=5).eval()
    fused.load_state_dict(other.state_dict())
    assert_close(fused(IMAGES), other(IMAGES))


@torch.no_grad()
def test_fusing_twice_is_harmless_and_a_new_head_is_plain() -> None:
    plain, fused = with_fused(nano())
    fuse(fused)
    assert_close(fused(IMAGES), plain(IMAGES))
    fused.reset_classifier(3)
    assert type(fused.get_classifier()) is nn.Linear
    assert fused(IMAGES).shape == (2, 3)


class Doubled(nn.Linear):
    """A derived linear layer with another result."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * super().forward(tokens)


class DoubledMlp(Mlp):
    """A derived MLP with another result."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * super().forward(tokens)


class Twice(Tensor):
    """Weights with a multiplication of their own, as quantized ones have."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return 2.0 * output.as_subclass(Tensor) if func is F.linear else output


def twice(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().as_subclass(Twice))


def double(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2.0 * output


CHANGES: dict[str, Callable[[Mlp], object]] = {
    "another layer": lambda network: setattr(network, "fc1", nn.Linear(6, 24, bias=False)),
    "a derived layer": lambda network: setattr(network, "fc1", Doubled(6, 24)),
    "another activation": lambda network: setattr(network, "act", nn.ReLU()),
    "a hook": lambda network: network.fc1.register_forward_hook(double),
    "a hook before": lambda network: network.fc1.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0],)),
    "a hook of the activation": lambda network: network.act.register_forward_hook(double),
    "a parametrization": lambda network: register_parametrization(network.fc1, "weight", nn.ReLU()),
    "a weight of another type": lambda network: setattr(network.fc1, "weight", twice(network.fc1.weight)),
    "a bias of another type": lambda network: setattr(network.fc1, "bias", twice(network.fc1.bias)),
    "a forward of its own": lambda network: setattr(network.fc1, "forward", lambda tokens: tokens.repeat(1, 1, 4)),
    "an activation's forward": lambda network: setattr(network.act, "forward", torch.relu),
    "other weights": lambda network: network.fc1.weight.data.mul_(2.0),
}


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_layers_compute_what_they_should(change: str, fused_first: bool) -> None:
    plain, fused = mlp(), mlp()
    if fused_first:
        fuse(fused)
    for network in (plain, fused):
        torch.manual_seed(1)
        CHANGES[change](network)
    if not fused_first:
        fuse(fused)
    assert not torch.allclose(plain(TOKENS), mlp()(TOKENS))
    assert_close(fused(TOKENS), plain(TOKENS))


@torch.no_grad()
def test_derived_mlps_are_left_alone() -> None:
    torch.manual_seed(0)
    plain, fused = with_fused(DoubledMlp(6, 24))
    assert_close(fused(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.no_grad()
def test_global_hooks_see_each_module(register: Callable[..., Any]) -> None:
    _, fused = with_fused(mlp())
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        fused(TOKENS)
    finally:
        handle.remove()
    assert sorted(set(seen)) == ["Dropout", "FusedLinear", "FusedMlp", "InplaceGELU"]


@torch.no_grad()
def test_the_layers_of_other_networks_are_fused() -> None:
    torch.manual_seed(0)
    plain, fused = with_fused(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval())
    images = torch.randn(2, 3, 32, 32)
    found, calls = count_calls(fused, images)
    assert_close(found, plain(images))
    assert calls[ONE_CALL] == sum(isinstance(module, nn.Linear) for module in plain.modules())
    assert sum(isinstance(module, FusedLinear) for module in fused.modules()) == calls[ONE_CALL]
