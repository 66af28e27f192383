"""Networks by name, ours and timm's, and what is timed of them: inference and training steps."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from scalablevit_pl.models import ImageClassifier, create_model, fuse, list_models
from scalablevit_pl.weights.folder import CONFIG, WEIGHTS, is_model_folder
from scalablevit_pl.weights.source import locate_model

Mode = Literal["inference", "train"]
Precision = Literal["32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A network's forward and backward pass cost about as much as three forward passes: one, and two products where a
# layer has one, for the gradients of its input and of its weight.
PASSES = {"inference": 1, "train": 3}
COMPILER = "inductor"
Build = Callable[["Setting"], nn.Module]


@dataclass(frozen=True)
class Setting:
    """One case: a network, and in which way it is run.

    Attributes:
        network: Name, ours or timm's, or the folder or repository of a model of ours.
        mode: `inference`, or `train` for training steps.
        precision: `32`, `bf16` or `fp16`.
        compiled: Run through `torch.compile`.
        batch_size: Images of a call.
        input_size: Height and width in pixels.
        channels_last: Lay images and convolutions' weights out channels-last.
        grad_checkpointing: Recompute activations in the backward pass.
        fused: Let oneDNN compute linear layers, with the GELUs behind them, in inference on a CPU.
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


@dataclass
class Case:
    """A network that is ready to be timed.

    Attributes:
        step: One inference or training step on images that are there already.
        tensors: What is held between steps: weights, the optimizer's state, images and labels.
    """

    step: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]

    @property
    def held(self) -> int:
        """Bytes that are held between steps."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def check_networks(names: Iterable[str]) -> dict[str, Path]:
    """See that there are such networks, and return by name the folders of those that have one.

    A model on the Hugging Face Hub is brought into its cache, so that the Hub is asked once.

    Raises:
        ValueError: If a name is neither ours nor timm's, of which it names the nearest, or there is no such model.
    """
    folders: dict[str, Path] = {}
    for name in names:
        if "/" in name:
            folders[name] = locate_model(name)
            if not is_model_folder(folders[name]):
                raise ValueError(f"{name!r} holds no model: give a folder with {WEIGHTS} and {CONFIG}")
        elif name not in list_models() and not timm.is_model(name):
            if name and Path(name).is_dir():
                raise ValueError(f"{name!r} is no network's name, but a folder is called so: give it as ./{name}")
            near = difflib.get_close_matches(name.lower(), [*list_models(), *timm.list_models()], n=3, cutoff=0.0)
            raise ValueError(
                f"unknown network {name!r}, which is neither ours nor timm's: did you mean {_either(near)}?"
            )
    return folders


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def build_network(setting: Setting, folders: Mapping[str, Path] | None = None) -> nn.Module:
    """Build a network on the CPU; one that is named by a folder or repository has its weights, others are random.

    Args:
        setting: Names the network.
        folders: Where models lie, by name; what is not among them is looked for.

    Raises:
        ValueError: If there is no such network.
    """
    if setting.network in list_models():
        return create_model(setting.network, grad_checkpointing=setting.grad_checkpointing)
    network: Any
    if "/" in setting.network:
        network = ImageClassifier.from_pretrained((folders or {}).get(setting.network, setting.network))
    else:
        network = _build_timm(setting.network, setting.input_size)
    if setting.grad_checkpointing:
        network.set_grad_checkpointing(True)
    built: nn.Module = network
    return built


def _build_timm(name: str, input_size: tuple[int, int]) -> nn.Module:
    network: Any = timm.create_model(name, pretrained=False)
    described = network.pretrained_cfg
    if described.get("fixed_input_size") and tuple(described["input_size"][1:]) != input_size:
        # Some do not take that argument and yet any size; those that do not will say so when they are run.
        with suppress(TypeError, AssertionError):
            network = timm.create_model(name, pretrained=False, img_size=input_size)
    built: nn.Module = network
    return built


def image_shape(network: nn.Module, setting: Setting) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a network is run on."""
    return (int(getattr(network, "in_chans", 3)), *setting.input_size)


def prepare(network: nn.Module, setting: Setting, device: torch.device) -> Case:
    """Make a network ready to be timed on random images; nothing is run yet.

    Inference has weights and images in the precision's type. A training step has weights in float32 and computes in
    that type under autocast, with a loss scaler for fp16: forward pass, cross entropy with random labels, backward
    pass, AdamW's step (fused), and gradients let go. Images and labels lie on the device beforehand.

    Args:
        network: Is moved and changed.
        setting: In which way it is run.
        device: What computes.

    Raises:
        ValueError: If a network without classes is to be trained.
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
    state = list(chain(network.parameters(), network.buffers()))
    if setting.mode == "inference":
        return Case(_inference_step(network, image), lambda: [*state, image])
    label = torch.randint(classes, (setting.batch_size,), device=device)
    # With a rate of 0 the arithmetic is the same and the weights stay as they are. A network that has learned the one
    # batch by heart has gradients so small (denormal) that processors take several times as long.
    optimizer = AdamW(network.parameters(), lr=0.0, fused=True)

    def tensors() -> list[Tensor]:
        moments = [value for values in optimizer.state.values() for value in values.values()]
        return [*state, image, label, *(moment for moment in moments if isinstance(moment, Tensor))]

    return Case(_training_step(network, image, label, optimizer, DTYPES[setting.precision]), tensors)


def _inference_step(network: nn.Module, image: Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return network(image)

    return step


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
