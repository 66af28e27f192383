"""Stored networks in plain values and tensors: what a file or repository holds, before any network is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalablevit_pl.preprocessing import Preprocessing

CLASSIFICATION = "image-classification"  # the Hub's name; also the task of files that name none
COUNTER = ".num_batches_tracked"  # of a batch norm, the one whole number among the weights
# What a forward pass is computed in, which excludes float8; by safetensors' names.
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Description:
    """Everything about a network except its weights, in plain values; None where it is unknown."""

    task: str  # the Hub's name, such as `image-classification`
    config: dict[str, Any]  # arguments from which the network can be rebuilt
    class_names: list[str] | None = None
    preprocessing: Any | None = None
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)  # further entries in timm's names, of classifiers
    network_class: str | None = None  # import path of a network of another package; it is shown, never imported
    multi_label: bool = False  # whether an image has any number of classes: probabilities are sigmoids of the logits


@dataclass(frozen=True)
class StoredModel:
    """Weights with the description of their network."""

    description: Description
    tensors: dict[str, Tensor]
    source: str  # path or repository, for messages
    average: str | None = None  # of a run: `ema`, averaged over the training, or `none`

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, or their indices if there are none."""
        known = self.description.class_names
        return known or [str(index) for index in range(self.description.config.get("num_classes", 0))]

    @property
    def preprocessing(self) -> Any:
        """Transform of the images; that of ImageNet if unknown."""
        return self.description.preprocessing or Preprocessing()


def same_classes(known: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether two lists name the same classes in the same order.

    Long lists such as ImageNet's spell a few names differently from source to source: up to one in fifty may differ,
    unless it occurs elsewhere in the other list. Classes without names are numbered, and match any list of that length.
    """
    if len(known) != len(names):
        return False
    if list(known) == [str(index) for index in range(len(known))]:
        return True
    differing = [(one, other) for one, other in zip(known, names, strict=True) if one != other]
    moved = any(one in names or other in known for one, other in differing)
    return not moved and len(differing) <= len(known) // 50


def checked_names(names: Any, count: int | None) -> list[str]:
    """Return the names of classes that a file states, after checking that they are text, one for each class."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError("the names of its classes are not a list of text")
    if count is not None and len(names) != count:
        raise ValueError(f"it names {len(names)} classes for a network with {count}")
    return list(names)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that all weights are finite floating-point numbers, apart from the counters of batch norms.

    Raises:
        ValueError: If one is not; it names the tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name} of {source} is not a plain tensor")
        if tensor.dtype == torch.int64 and name.endswith(COUNTER):
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} of {source} holds {tensor.dtype} instead of floating-point weights")
        # A sum runs at the speed of memory. In half precision it may overflow; then each number is checked.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(
                f"{name} of {source} holds NaN or infinite weights: use weights from before training failed"
            )
