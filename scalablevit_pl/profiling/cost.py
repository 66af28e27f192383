"""What a network costs: parameters and multiply-adds."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from scalablevit_pl.models import build_classifier


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs for one image.

    Attributes:
        parameters: Number of weights.
        multiply_adds: Of convolutions and linear layers, as the paper counts them, without biases.
        attention_multiply_adds: Of the products of query and key and of attention and value, which come on top.
        input_size: Side of the image in pixels.
    """

    parameters: int
    multiply_adds: int
    attention_multiply_adds: int
    input_size: int


def measure_cost(config: Mapping[str, Any], input_size: int) -> NetworkCost:
    """Count the parameters, and the multiply-adds for one image `(C, input_size, input_size)`.

    Nothing is computed: the network is followed on torch's meta device.

    Args:
        config: What `ImageClassifier.config` says of a network.
        input_size: Side of the image in pixels.
    """
    with torch.device("meta"):
        network = build_classifier(config).eval()
    multiply_adds, attention = count_multiply_adds(network, (config["backbone"]["in_channels"], input_size, input_size))
    return NetworkCost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=multiply_adds,
        attention_multiply_adds=attention,
        input_size=input_size,
    )


def count_multiply_adds(network: nn.Module, image: tuple[int, int, int]) -> tuple[int, int]:
    """Count the multiply-adds of any network for one image: of convolutions and linear layers, and of attention.

    Biases, norms and activations are not counted. Nothing is computed, and the network stays as it is.

    Args:
        network: On any device, and in the mode that is to be counted.
        image: Channels, height and width.
    """
    counts = count_by_operator(network, image)
    attention = sum(count for name, count in counts.items() if "bmm" in name or "attention" in name)
    return sum(counts.values()) - attention, attention


def count_by_operator(network: nn.Module, image: tuple[int, int, int]) -> dict[str, int]:
    """Count the multiply-adds for one image as `count_multiply_adds`, by torch's operators such as `aten.addmm`."""
    state = {name: tensor.to("meta") for name, tensor in chain(network.named_parameters(), network.named_buffers())}
    # Where nothing is computed, torch takes attention apart into the batched products that are told apart here.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, state, (torch.empty(1, *image, device="meta"),))
    # torch counts a multiply-add as two operations.
    return {str(operator): count // 2 for operator, count in counter.get_flop_counts()["Global"].items()}
