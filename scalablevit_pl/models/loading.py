"""Load weights: read them, build a module from their description, and put them in, strictly."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from scalablevit_pl.text import listed, one_line

if TYPE_CHECKING:  # `import scalablevit_pl.models` needs only torch
    from scalablevit_pl.weights.stored import StoredModel

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)
MAX_BLOCKS = 200  # a network with more would take longer to build than it is worth


class LoadOptions(TypedDict, total=False):
    """Where and how `from_pretrained` loads weights.

    Attributes:
        revision: Branch, tag or commit hash on the Hub.
        token: Access token, or False for none; by default the one that `hf auth login` has stored.
        cache_dir: Folder for downloads; by default the Hub client's cache.
        local_files_only: Use the cache, and no network.
        force_download: Download cached files again.
        device: Device of the weights; by default the CPU.
        dtype: Type to convert the weights to; by default they stay as stored.
        in_chans: For another number of channels than the model's, the weights of the first layer are summed or
            repeated, and the averages of the preprocessing's mean and std are used.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    device: str | torch.device | None
    dtype: torch.dtype | None
    in_chans: int | None


def read_pretrained(name_or_path: str | Path, prefix: str = "", **options: Unpack[LoadOptions]) -> "StoredModel":
    """Read a network's description, and the weights whose names begin with a prefix, from a folder or from the Hub."""
    from scalablevit_pl.weights.folder import read_folder
    from scalablevit_pl.weights.source import locate_model

    device, dtype, channels = options.pop("device", None), options.pop("dtype", None), options.pop("in_chans", None)
    stored = _adapt_channels(read_folder(locate_model(name_or_path, **options), device, prefix), channels)
    if dtype is None:
        return stored
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in stored.tensors.items()}
    return replace(stored, tensors=tensors)


def _adapt_channels(stored: "StoredModel", channels: int | None) -> "StoredModel":
    """Return a stored network for images of another number of channels; None or its own number changes nothing.

    The first layer's weights are summed for one channel, else repeated and scaled, as in timm.

    Raises:
        ValueError: If there is no such number.
    """
    description = stored.description
    name, backbone = "backbone.stages.0.patch_embed.proj.weight", description.config.get("backbone", {})
    if channels is None or not isinstance(backbone, dict) or channels == backbone.get("in_channels", 3):
        return stored
    if name not in stored.tensors:
        raise ValueError(
            f"{stored.source!r} holds a network of timm, which keeps its channels: remove in_chans={channels}"
        )
    if channels < 1:
        raise ValueError(f"in_chans must be at least 1, got {channels}")
    weight = stored.tensors[name]
    count = weight.shape[1]
    repeated = weight.repeat(1, -(-channels // count), 1, 1)[:, :channels] * (count / channels)
    adapted = weight.float().sum(1, keepdim=True).to(weight.dtype) if channels == 1 else repeated
    changed = replace(
        description,
        config=description.config | {"backbone": backbone | {"in_channels": channels}},
        pretrained_cfg={},  # its statistics are of the other channels; the preprocessing has the new ones
        preprocessing=description.preprocessing and description.preprocessing.with_channels(channels),
    )
    return replace(stored, description=changed, tensors=stored.tensors | {name: adapted})


def build_module(build: Callable[[], Module], stored: "StoredModel", device: str = "meta") -> Module:
    """Build the network, or a part of it, that a description describes; on the meta device nothing takes memory.

    Raises:
        ValueError: If it describes none, or one that is deeper than the number of tensors allows.
    """
    try:
        backbone = stored.description.config.get("backbone")
        blocks = sum(backbone.get("depths", [])) if isinstance(backbone, dict) else 0
        limit = min(len(stored.tensors) or MAX_BLOCKS, MAX_BLOCKS)
        if blocks > limit:  # a hostile depth would take too long to build
            raise ValueError(f"it has {blocks} blocks, more than its {limit} tensors allow")
        with torch.device(device):
            return build()
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{stored.source!r} describes no network that can be built: {one_line(error)}") from error


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    prefix: str = "",
    except_for: Sequence[str] = (),
    assign: bool = False,
) -> None:
    """Load weights strictly: every tensor of the module, and no other.

    Args:
        module: Changed in place.
        tensors: Weights by name.
        source: Name of the weights, for messages.
        prefix: Use only the tensors whose names begin with it; it is removed from their names.
        except_for: Submodules that keep their own weights.
        assign: Use the tensors themselves instead of copying them.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape; it names them.
    """
    loaded = matching_tensors(module, tensors, source, prefix, except_for)
    module.load_state_dict(module.state_dict() | loaded, assign=assign)
    count = sum(name.startswith(prefix) for name in tensors)
    logger.info("%s: loaded %d of %d tensors", source, len(loaded), count)


def matching_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, prefix: str = "", except_for: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the weights that `load_tensors` loads; arguments and errors are the same."""
    kept = tuple(f"{part}." for part in except_for)
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    loaded = {name: tensor for name, tensor in inner.items() if not name.startswith(kept)}
    _compare({name: own for name, own in module.state_dict().items() if not name.startswith(kept)}, loaded, source)
    return loaded


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    differing = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    names = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{n} {list(found[n].shape)} instead of {list(expected[n].shape)}" for n in differing],
    }
    problems = [f"{len(each)} {what} ({listed(each, 3)})" for what, each in names.items() if each]
    if problems:
        raise ValueError(f"the tensors of {source!r} are not those of the network: {'; '.join(problems)}")
