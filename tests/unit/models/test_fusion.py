"""Linear layers and GELUs that oneDNN computes, against torch's own."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model, fuse
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
            weight.add_(0.02 * torch.randn_like(weight))  # biases, too
    return network.eval()


def both(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a network and a fused copy."""
    fused = copy.deepcopy(network)
    fuse(fused)
    return network, fused


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp(6, 24)


def calls_of(network: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Counter[str]]:
    """Return the output, and how often which operator was called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        output = network(*inputs)
    return output, Counter({event.key: event.count for event in seen.key_averages()})


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="no bf16"))]
)
def test_a_fused_network_computes_the_same_in_fewer_calls(dtype: torch.dtype, context: Any) -> None:
    plain = nano().to(dtype)
    fused = copy.deepcopy(plain).fuse()
    linear = sum(isinstance(module, nn.Linear) for module in plain.modules())
    mlps = sum(isinstance(module, Mlp) for module in plain.modules())
    images = torch.randn(2, 3, 224, 224, dtype=dtype)  # of which windows leave nothing over
    with context():
        (expected, before), (found, after) = (calls_of(network, images) for network in (plain, fused))
    close = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **close)
    assert (before[ONE_CALL], after[ONE_CALL]) == (0, linear)
    assert (before["aten::gelu_"], after["aten::gelu_"]) == (mlps, 0)
    assert before["aten::gelu"] == after["aten::gelu"] > 0  # behind a norm, which keeps them apart


@pytest.mark.parametrize("size", [(32, 32), (50, 83)])
def test_the_backbone_is_fused_alone(size: tuple[int, int]) -> None:
    backbone = nano().backbone
    image = IMAGES.new_ones(1, 3, *size).cumsum(-1).sin()
    with torch.no_grad():
        expected = backbone(image)
        assert backbone.fuse() is backbone
        found, calls = calls_of(backbone, image)
    assert calls[ONE_CALL]
    assert isinstance(backbone, ScalableViT)
    for part, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(part, exact, rtol=0, atol=3e-5)


def test_gradients_are_those_of_the_plain_network() -> None:
    gradients = []
    for network in both(nano().train()):
        logits, calls = calls_of(network, IMAGES)
        assert not calls[ONE_CALL]
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1, 3])), [*network.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_what_onednn_does_not_take_is_computed_as_before() -> None:
    plain, fused = both(nano())
    _, calls = calls_of(copy.deepcopy(fused).double(), IMAGES.double())
    assert not calls[ONE_CALL]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(IMAGES)
        found, calls = calls_of(fused, IMAGES)
    assert not calls[ONE_CALL]
    assert torch.equal(found, expected)
    assert fused.to("meta")(IMAGES.to("meta")).shape == (2, 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@torch.no_grad()
def test_types_and_biases_are_those_of_a_linear_layer() -> None:
    layer, fused = both(nn.Linear(6, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(TOKENS)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(fused(TOKENS), expected)
    for network in (layer, fused):
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            network(TOKENS.bfloat16())
    layer, fused = both(nn.Linear(0, 7))
    assert_close(fused(TOKENS[..., :0]), layer(TOKENS[..., :0]))


PARTS: dict[str, dict[str, Tensor]] = {
    "a bias for all": {"bias": torch.tensor(2.0)},
    "a bias with gaps": {"bias": torch.arange(14.0)[::2]},
    "an expanded bias": {"bias": torch.tensor([2.0]).expand(7)},
    "a weight with gaps": {"weight": torch.arange(84.0).sin().view(7, 12)[:, ::2]},
    "an expanded weight": {"weight": torch.arange(6.0).sin().expand(7, 6)},
    "a sparse weight": {"weight": torch.arange(42.0).sin().view(7, 6)},
    "a vector": {"weight": torch.arange(6.0).sin()},
}


@pytest.mark.filterwarnings("ignore:Sparse")  # tensors of that kind are new to torch
@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_weights_of_any_layout_are_taken(parts: str) -> None:
    layer, fused = both(nn.Linear(6, 7, bias=parts != "a vector"))
    for network in (layer, fused):
        for name, part in PARTS[parts].items():
            setattr(network, name, nn.Parameter(part.to_sparse_csr() if parts == "a sparse weight" else part))
    assert_close(fused(TOKENS[0]), layer(TOKENS[0]))


@pytest.mark.parametrize("bias", [torch.zeros(7, device="meta"), torch.zeros(7, dtype=torch.float64)], ids=str)
@torch.no_grad()
def test_what_a_linear_layer_refuses_is_refused(bias: Tensor) -> None:
    layer, fused = both(nn.Linear(6, 7))
    said = []
    for network in (layer, fused):
        network.bias = nn.Parameter(bias)
        with pytest.raises((RuntimeError, TypeError)) as error:
            network(TOKENS)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore:TF32")
@torch.no_grad()
def test_onednn_takes_what_lies_on_a_cpu_while_it_is_enabled() -> None:
    layer = nn.Linear(6, 7)
    assert onednn_takes(TOKENS, layer)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_takes(TOKENS, layer)
    assert not onednn_takes(TOKENS.to("meta"), layer.to("meta"))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_tokens_of_any_shape_and_layout_are_taken(bias: bool) -> None:
    layer, fused = both(nn.Linear(5, 6, bias))
    assert type(fused) is FusedLinear
    for tokens in (
        torch.randn(5),
        torch.randn(0, 5),
        torch.randn(2, 0, 5),
        torch.randn(5, 3, 4).permute(2, 1, 0),
        torch.randn(1, 5).expand(4, 5),
        torch.randn(4, 9)[:, 2:7],
        3.0 * torch.randn(2, 3, 4, 2, 5),
    ):
        found, calls = calls_of(fused, tokens)
        assert calls[ONE_CALL] == 1
        torch.testing.assert_close(found, layer(tokens))


@torch.no_grad()
def test_compilers_exports_and_traces_see_torch_s_own_operators() -> None:
    plain, fused = both(nano())
    graphs: list[Any] = []

    def keep(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend=keep)(IMAGES)
    exported = torch.export.export(fused, (IMAGES,))
    for output in (compiled, exported.module()(IMAGES)):
        assert_close(output, plain(IMAGES))
    small, fused = both(mlp())
    made, symbolic = make_fx(fused)(TOKENS), symbolic_trace(fused)
    for traced in (made, symbolic):
        assert_close(traced(TOKENS), small(TOKENS))
    for code in (graphs[0].code, exported.graph_module.code, made.code, symbolic.code):
        assert "mkldnn" not in code


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit is going
@torch.no_grad()
def test_a_trace_has_torch_s_own_operators() -> None:
    _, fused = both(nn.Linear(6, 7))
    graph = str(torch.jit.trace(fused, TOKENS).inlined_graph)
    assert "aten::linear" in graph
    assert "mkldnn" not in graph


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch itself
def test_transforms_of_functions_are_those_of_the_plain_network(capfd: pytest.CaptureFixture[str]) -> None:
    plain, fused = both(mlp())
    direction = TOKENS.sin()
    with sdpa_kernel(SDPBackend.MATH):
        results = [
            [
                *torch.func.jvp(network, (TOKENS,), (direction,)),
                torch.func.vmap(network)(TOKENS),
                torch.func.jacfwd(network)(TOKENS[0, 0]),
                torch.func.jacrev(network)(TOKENS[0, 0]),
            ]
            for network in (plain, fused)
        ]
        with torch.autograd.forward_ad.dual_level():
            for network, parts in zip((plain, fused), results, strict=True):
                dual = network(torch.autograd.forward_ad.make_dual(TOKENS, direction))
                parts.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected)
    assert "mkldnn::" not in capfd.readouterr().err  # torch warns of operators that its vmap does not know


@torch.no_grad()
def test_operations_are_counted_as_before() -> None:
    counts = []
    for network in both(nano()):
        with FlopCounterMode(display=False) as counter:
            network(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class DoubledLinear(TorchFunctionMode):
    """Has each linear layer count twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return 2.0 * output if func is F.linear else output


@torch.no_grad()
def test_modes_of_functions_see_the_layers() -> None:
    plain, fused = both(mlp())
    with DoubledLinear():
        found, expected = fused(TOKENS), plain(TOKENS)
    assert_close(found, expected)
    assert not torch.allclose(found, plain(TOKENS))


def test_weights_keep_their_names_and_are_saved_as_before(tmp_path: Path) -> None:
    plain, fused = both(nano())
    assert [*fused.state_dict()] == [*plain.state_dict()]
    fused.save_pretrained(tmp_path / "model", license="apache-2.0")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(fused))(IMAGES), fused(IMAGES))
        new = fused.load_state_dict(create_model("scalablevit_nano", num_classes=5).state_dict())
        assert not new.missing_keys
        assert not torch.allclose(fused(IMAGES), plain(IMAGES))


@torch.no_grad()
def test_fusing_twice_is_fusing_once_and_a_new_head_is_plain() -> None:
    network = nano()
    expected = network(IMAGES)
    assert_close(network.fuse().fuse()(IMAGES), expected)
    assert_close(reparameterize_model(nano())(IMAGES), expected)
    network.reset_classifier(3)
    assert type(network.get_classifier()) is nn.Linear
    assert network(IMAGES).shape == (2, 3)


class Doubled(nn.Linear):
    """Computes something else than a linear layer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * super().forward(tokens)


class DoubledMlp(Mlp):
    """Computes something else than an MLP."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * super().forward(tokens)


class Twice(Tensor):
    """Weights that count twice, as quantized ones have a way of their own to be multiplied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return 2.0 * output.as_subclass(Tensor) if func is F.linear else output


def double(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2.0 * output


CHANGES: dict[str, Callable[[Mlp], object]] = {
    "another layer": lambda network: setattr(network, "fc1", nn.Linear(6, 24, bias=False)),
    "a derived layer": lambda network: setattr(network, "fc1", Doubled(6, 24)),
    "a wrapped layer": lambda network: setattr(network, "fc1", nn.Sequential(network.fc1, nn.Linear(24, 24))),
    "another activation": lambda network: setattr(network, "act", nn.ReLU()),
    "a shared layer": lambda network: setattr(
        network, "fc2", nn.Sequential(nn.Linear(24, 6), network.fc1, nn.Linear(24, 6))
    ),
    "a hook": lambda network: network.fc1.register_forward_hook(double),
    "a hook before": lambda network: network.fc1.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0],)),
    "a hook of the activation": lambda network: network.act.register_forward_hook(double),
    "a parametrization": lambda network: register_parametrization(network.fc1, "weight", nn.ReLU()),
    "weights of another kind": lambda network: setattr(
        network.fc1, "weight", nn.Parameter(network.fc1.weight.detach().as_subclass(Twice))
    ),
    "a bias of another kind": lambda network: setattr(
        network.fc1, "bias", nn.Parameter(network.fc1.bias.detach().as_subclass(Twice))
    ),
    "a forward of its own": lambda network: setattr(network.fc1, "forward", lambda tokens: tokens.repeat(1, 1, 4)),
    "an activation's forward": lambda network: setattr(network.act, "forward", torch.relu),
    "other weights": lambda network: network.fc1.weight.data.mul_(2.0),
}


@pytest.mark.parametrize("first", ["fuse", "change"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_before_or_after_counts(change: str, first: str) -> None:
    plain, fused = mlp(), mlp()
    for network in (plain, fused):
        if first == "fuse" and network is fused:
            fuse(network)
        torch.manual_seed(1)
        CHANGES[change](network)
        if first == "change" and network is fused:
            fuse(network)
    assert not torch.allclose(plain(TOKENS), mlp()(TOKENS))
    assert_close(fused(TOKENS), plain(TOKENS))


@torch.no_grad()
def test_derived_mlps_are_left_alone() -> None:
    torch.manual_seed(0)
    plain, fused = both(DoubledMlp(6, 24))
    assert_close(fused(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.no_grad()
def test_hooks_of_all_modules_see_each_of_them(register: Callable[..., Any]) -> None:
    _, fused = both(mlp())
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        fused(TOKENS)
    finally:
        handle.remove()
    assert sorted(set(seen)) == ["Dropout", "FusedLinear", "FusedMlp", "InplaceGELU"]


@torch.no_grad()
def test_layers_of_others_are_fused_too() -> None:
    torch.manual_seed(0)
    plain, fused = both(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval())
    images = torch.randn(2, 3, 32, 32)
    found, calls = calls_of(fused, images)
    assert_close(found, plain(images))
    assert calls[ONE_CALL] == sum(isinstance(module, nn.Linear) for module in plain.modules())
