"""Small models to put on a Hub, and the checks that the Hub's tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scalablevit_pl.models import build_classifier
from scalablevit_pl.weights.folder import WEIGHTS
from scalablevit_pl.weights.hub.client import HubError

REPO = "ada/vit"


def save_small_model(folder: Path, seed: int = 0, dim: int = 8) -> Path:
    """Save a small classifier, for which `seed` is the most probable class of any image."""
    backbone = {"embed_dims": [dim] * 4, "num_heads": [1] * 4, "depths": [1] * 4, "spatial_ratios": [8, 4, 2, 1]}
    config = {"name": "small", "num_classes": 3, "head": "linear", "global_pool": "avg"}
    torch.manual_seed(seed)
    network = build_classifier({**config, "backbone": {**backbone, "channel_ratios": [1.0] * 4}})
    with torch.no_grad():
        network.head.fc.bias[seed] = 100.0
    network.save_pretrained(folder, license="mit")
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(network: nn.Module, folder: Path) -> bool:
    """Return whether a network has exactly the weights in a folder."""
    stored, found = load_file(folder / WEIGHTS), network.state_dict()
    return found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)


@contextmanager
def hub_error(*expected: str) -> Iterator[None]:
    """Expect a `HubError` of one sentence that contains some texts."""
    with pytest.raises(HubError) as error:
        yield
    sentence = str(error.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    for text in expected:
        assert text in sentence
