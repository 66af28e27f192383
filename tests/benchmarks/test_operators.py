import pytest
import torch
from benchmark_scripts import load
from torch import nn
from torch.nn import functional as F

from scalablevit_pl.profiling.networks import Setting

operators = load("operators")
LINEAR, Operator = operators.LINEAR, operators.Operator
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
        ("aten::_log_softmax", "other"),
        ("aten::resolve_conj", "other"),
        ("aten::empty", "other"),
        ("AddmmBackward0", "other"),
        ("autograd::engine::evaluate_function: MmBackward0", "other"),
    ],
)
def test_operators_have_a_kind(name: str, kind: str) -> None:
    assert operators.kind_of(name) == kind


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
    steps = [operators.profile_operators(call, CPU) for _ in range(3)]
    counts = {kind: calls for kind, (calls, _) in operators.summarize(steps, lambda operator: operator.kind).items()}
    assert counts.pop("other") > 0
    assert counts == {
        LINEAR: 2,
        "attention": 1,
        "convolutions": 1,
        "GELU": 1,
        "norms": 1,
        "copies and additions": 1,
    }
    products = {
        product: calls for product, (calls, _) in operators.summarize(steps, operators.product_of).items() if product
    }
    assert products == {(16, 16, 32): 1, (16, 32, 16): 1}  # 2 images × 8 channels as rows


def test_calls_of_a_computing_operator_are_part_of_it_except_for_changes_of_type() -> None:
    layer, tokens = nn.Linear(3, 4), torch.randn(2, 3, requires_grad=True)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            layer(tokens)

    call()
    names = [operator.name for operator in operators.profile_operators(call, CPU)]
    # The copy of the bias is part of the product; tokens, weight and bias are converted.
    assert (names.count("aten::addmm"), names.count("aten::copy_")) == (1, 3)


def test_seconds_are_medians_of_sums_and_sorted() -> None:
    calls = [
        [Operator("a", "", [], 1.0), Operator("a", "", [[3]], 1.0), Operator("b", "", [], 9.0)],
        [Operator("a", "", [], 3.0), Operator("a", "", [[3]], 2.0)],
        [Operator("a", "", [], 3.0), Operator("a", "", [[3]], 1.0), Operator("b", "", [], 7.0)],
    ]
    assert [*operators.summarize(calls, lambda operator: operator.name).items()] == [("b", (1, 7.0)), ("a", (2, 4.0))]


def test_products_of_linear_layers_are_found_with_and_without_a_bias() -> None:
    bias, left, right = [4], [2, 3], [3, 4]
    assert operators.product_of(Operator("aten::addmm", LINEAR, [bias, left, right, [], []], 0.0)) == (2, 3, 4)
    assert operators.product_of(Operator("aten::mm", LINEAR, [left, right], 0.0)) == (2, 3, 4)
    assert operators.product_of(Operator("aten::bmm", "attention", [[1, 2, 3], [1, 3, 4]], 0.0)) is None


def test_page_faults_of_steps_are_counted() -> None:
    assert operators.page_faults(Setting("scalablevit_nano", input_size=(32, 32)), 2, warmup=1) >= 0
