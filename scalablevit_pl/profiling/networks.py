"""Networks by name, of this package or of timm, and the steps to time: inference and training."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from scalablevit_pl.models import (
    SemanticSegmenter,
    create_model,
    create_segmenter,
    from_pretrained,
    fuse,
    list_models,
)
from scalablevit_pl.models.attention import WindowPad
from scalablevit_pl.models.scalablevit import STRIDES
from scalablevit_pl.models.segmenter import DecoderName
from scalablevit_pl.weights.folder import CONFIG, WEIGHTS, is_model_folder
from scalablevit_pl.weights.source import locate_model

Mode = Literal["inference", "train"]
Precision = Literal["32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A forward and backward pass cost about three forward passes: for each product of a forward pass, the backward pass
# has two, for the gradients of input and weight.
PASSES = {"inference": 1, "train": 3}
COMPILER = "inductor"
Build = Callable[["Setting"], nn.Module]


@dataclass(frozen=True)
class Setting:
    """One case: a network and how it is run.

    Attributes:
        network: Name of a network of this package or of timm, or the folder or repository of a released model.
        mode: `inference`, or `train` for training steps.
        input_size: Height and width in pixels.
        fused: Fuse linear layers with the following GELU by oneDNN (inference on a CPU).
        head: Head for semantic segmentation; by default that of the classifier.
        window_pad: Of a network of this package that has no weights; so is `expand_value`.
    """

    network: str
    mode: Mode = "inference"
    precision: Precision = "32"
    compiled: bool = False
    batch_size: int = 1
    input_size: tuple[int, int] = (224, 224)
    channels_last: bool = False
    grad_checkpointing: bool = False
    fused: bool = False
    head: DecoderName | None = None
    window_pad: WindowPad = "mask"
    expand_value: bool = False

    @property
    def name(self) -> str:
        """The network with its head, for tables."""
        return self.network if self.head is None else f"{self.network} {self.head}"

    @property
    def size(self) -> str:
        """Height and width as text."""
        return "×".join(map(str, self.input_size))

    @property
    def way(self) -> str:
        """How the network is run, without batch and input size."""
        words = [self.mode, "float32" if self.precision == "32" else self.precision]
        words += ["compiled"] * self.compiled + ["fused"] * self.fused + ["channels-last"] * self.channels_last
        return " ".join(words + ["checkpointing"] * self.grad_checkpointing)

    @property
    def title(self) -> str:
        """Everything but the network."""
        return f"{self.way}, batch {self.batch_size}, {self.size}"


class Case(NamedTuple):
    """An inference or training step, and the tensors that are kept between steps: weights, optimizer state, images."""

    step: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]


def check_networks(names: Iterable[str]) -> dict[str, Path]:
    """Check that networks exist, and return by name the folders of released models.

    A model on the Hugging Face Hub is downloaded into its cache, so that the Hub is asked once.
    """
    folders: dict[str, Path] = {}
    for name in names:
        if "/" in name:
            folders[name] = locate_model(name)
            if not is_model_folder(folders[name]):
                raise ValueError(f"{name!r} holds no model: give a folder with {WEIGHTS} and {CONFIG}")
        elif name not in list_models() and not timm.is_model(name):
            if name and Path(name).is_dir():
                raise ValueError(f"{name!r} is not the name of a network: to use the folder, write ./{name}")
            near = difflib.get_close_matches(name.lower(), [*list_models(), *timm.list_models()], n=3, cutoff=0.0)
            raise ValueError(
                f"unknown network {name!r}, neither of this package nor of timm: did you mean {', '.join(near)}?"
            )
    return folders


def build_network(setting: Setting, folders: Mapping[str, Path] | None = None) -> nn.Module:
    """Build a network on the CPU. A released model has its weights, from `folders` if its name is there."""
    name = setting.network
    network: Any
    if "/" in name:
        network = from_pretrained((folders or {}).get(name, name))
    else:
        variant: dict[str, Any] = {"window_pad": setting.window_pad, "expand_value": setting.expand_value}
        ours = variant if name in list_models() else {}
        if setting.head is not None:
            network = create_segmenter(name, head=setting.head, **ours)
        else:
            network = create_model(name, **ours) if ours else _build_timm(name, setting.input_size)
    if setting.grad_checkpointing:
        network.set_grad_checkpointing(True)
    built: nn.Module = network
    return built


def _build_timm(name: str, input_size: tuple[int, int]) -> Any:
    network: Any = timm.create_model(name, pretrained=False)
    described = network.pretrained_cfg
    if described.get("fixed_input_size") and tuple(described["input_size"][1:]) != input_size:
        # Some refuse the argument but take any size; the others raise when they are run.
        with suppress(TypeError, AssertionError):
            return timm.create_model(name, pretrained=False, img_size=input_size)
    return network


def image_shape(network: nn.Module, setting: Setting) -> tuple[int, int, int]:
    """Return channels, height and width of a network's images."""
    return (int(getattr(network, "in_chans", 3)), *setting.input_size)


def prepare(network: nn.Module, setting: Setting, device: torch.device) -> Case:
    """Move a network to a device and return its step on random images; nothing is run yet.

    Inference has weights and images in the type of the precision. A training step has float32 weights and autocast to
    that type, with a loss scaler for fp16: forward pass, cross entropy with random labels, backward pass, fused AdamW,
    and setting the gradients to None. Images and labels are already on the device.
    """
    classes = int(getattr(network, "num_classes", 1000))
    if setting.mode == "train" and classes < 1:
        raise ValueError("it has no classes, which training steps need: give --mode inference")
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    dtype = DTYPES[setting.precision] if setting.mode == "inference" else torch.float32
    network.to(device=device, dtype=dtype).to(memory_format=layout).train(setting.mode == "train")
    image = torch.randn(setting.batch_size, *image_shape(network, setting), device=device)
    image = image.to(dtype=dtype, memory_format=layout)
    if setting.fused:
        fuse(network)
    if setting.compiled:
        network.compile(backend=COMPILER, dynamic=False)
    state = [*network.parameters(), *network.buffers()]
    if setting.mode == "inference":
        return Case(torch.inference_mode()(lambda: network(image)), lambda: [*state, image])
    sides = [-(-side // STRIDES[0]) for side in setting.input_size] if isinstance(network, SemanticSegmenter) else []
    label = torch.randint(classes, (setting.batch_size, *sides), device=device)
    # A rate of 0 keeps the weights, with the same arithmetic. A network that has memorized the one batch has denormal
    # gradients, which slow processors down several times.
    optimizer = AdamW(network.parameters(), lr=0.0, fused=True)

    def tensors() -> list[Tensor]:
        moments = chain.from_iterable(values.values() for values in optimizer.state.values())
        return [*state, image, label, *(moment for moment in moments if isinstance(moment, Tensor))]

    return Case(_training_step(network, image, label, optimizer, DTYPES[setting.precision]), tensors)


def _training_step(
    network: nn.Module, image: Tensor, label: Tensor, optimizer: AdamW, dtype: torch.dtype
) -> Callable[[], object]:
    device = image.device.type
    mixed = dtype != torch.float32
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step() -> object:
        with torch.autocast(device, dtype=dtype if mixed else None, enabled=mixed):
            loss = F.cross_entropy(network(image), label)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
