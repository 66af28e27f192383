import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalablevit_pl.profiling.memory import page_faults_of_steps
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.operators import LINEAR, Operator, kind_of, observe, product_of, typical

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", LINEAR),
        ("aten.addmm", LINEAR),
        ("aten::mm", LINEAR),
        ("aten::bmm", "attention"),
        ("aten.bmm", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_efficient_attention_forward", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::cudnn_convolution", "convolutions"),
        ("aten::_conv_depthwise2d", "convolutions"),
        ("aten::gelu_", "GELU"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::cudnn_batch_norm", "norms"),
        ("aten::copy_", "copies and additions"),
        ("aten::add", "copies and additions"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax", "the rest"),
        ("aten::resolve_conj", "the rest"),
        ("aten::empty", "the rest"),
        ("AddmmBackward0", "the rest"),
        ("autograd::engine::evaluate_function: MmBackward0", "the rest"),
    ],
)
def test_operators_have_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_operators_of_a_call_are_counted_by_kind() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16)
    )
    image = torch.randn(2, 3, 6, 6)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            tokens = network(image)[:, None]
            return F.scaled_dot_product_attention(tokens, tokens, tokens) + tokens

    call()
    operators = [observe(call, CPU) for _ in range(3)]
    counts = {kind: calls for kind, (calls, _) in typical(operators, lambda operator: operator.kind).items()}
    assert counts.pop("the rest") > 0
    assert counts == {
        LINEAR: 2,
        "attention": 1,
        "convolutions": 1,
        "GELU": 1,
        "norms": 1,
        "copies and additions": 1,
    }
    products = {product: calls for product, (calls, _) in typical(operators, product_of).items() if product}
    assert products == {(16, 16, 32): 1, (16, 32, 16): 1}  # rows are 2 images × 8 channels


def test_what_an_operator_that_computes_calls_is_its_own_but_not_a_change_of_type() -> None:
    layer, tokens = nn.Linear(3, 4), torch.randn(2, 3, requires_grad=True)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            layer(tokens)

    call()
    names = [operator.name for operator in observe(call, CPU)]
    # The bias is copied within the product; tokens, weight and bias are converted.
    assert (names.count("aten::addmm"), names.count("aten::copy_")) == (1, 3)


def test_seconds_are_medians_of_sums_and_the_longest_stand_first() -> None:
    calls = [
        [Operator("a", "", [], 1.0), Operator("a", "", [[3]], 1.0), Operator("b", "", [], 9.0)],
        [Operator("a", "", [], 3.0), Operator("a", "", [[3]], 2.0)],
        [Operator("a", "", [], 3.0), Operator("a", "", [[3]], 1.0), Operator("b", "", [], 7.0)],
    ]
    assert [*typical(calls, lambda operator: operator.name).items()] == [("b", (1, 7.0)), ("a", (2, 4.0))]


def test_the_product_of_a_linear_layer_is_told_with_and_without_a_bias() -> None:
    bias, left, right = [4], [2, 3], [3, 4]
    assert product_of(Operator("aten::addmm", LINEAR, [bias, left, right, [], []], 0.0)) == (2, 3, 4)
    assert product_of(Operator("aten::mm", LINEAR, [left, right], 0.0)) == (2, 3, 4)
    assert product_of(Operator("aten::bmm", "attention", [[1, 2, 3], [1, 3, 4]], 0.0)) is None


def test_page_faults_are_counted_step_by_step() -> None:
    faults = page_faults_of_steps(Setting("scalablevit_nano", input_size=(32, 32)), 2, warmup=1)
    assert len(faults) == 2
    assert min(faults) >= 0
