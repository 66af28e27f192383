"""Weights into networks: strictly, or with an error that names the tensors."""

import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import LABELS, annotate, images, retensor, small
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model
from scalablevit_pl.models.loading import build_module, load_tensors
from scalablevit_pl.models.pretrained import save_network
from scalablevit_pl.weights.folder import WEIGHTS
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_network(annotate(small(), LABELS), tmp_path / "model", None)
    return tmp_path / "model"


def equal(module: torch.nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())


def test_every_tensor_is_loaded_and_their_number_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    network, trained = create_model("scalablevit_nano", 3), create_model("scalablevit_nano", 3)
    with caplog.at_level(logging.INFO):
        load_tensors(network, trained.state_dict(), "here")
    assert equal(network, trained.state_dict())
    assert caplog.messages == [f"here: loaded {len(trained.state_dict())} of {len(trained.state_dict())} tensors"]


def test_tensors_take_the_type_of_the_network_unless_they_are_assigned() -> None:
    network, trained = small(), small().bfloat16()
    load_tensors(network, trained.state_dict(), "here")
    assert network.head.fc.weight.dtype == torch.float32
    assert torch.equal(network.head.fc.weight, trained.head.fc.weight.float())
    load_tensors(network, trained.state_dict(), "here", assign=True)
    assert network.head.fc.weight.dtype == torch.bfloat16
    assert network.head.fc.weight.data_ptr() == trained.head.fc.weight.data_ptr()


def test_excepted_parts_keep_their_own_weights() -> None:
    network = small(5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors = {name: torch.full_like(tensor, 2.0) for name, tensor in small(7).state_dict().items()}
    load_tensors(network, tensors, "here", except_for=("head.fc",))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.fc.") else tensors[name]), name


def test_only_tensors_with_the_prefix_are_loaded() -> None:
    backbone, tensors = ScalableViT(**small().backbone.config), small().state_dict()
    load_tensors(backbone, tensors | {"head.extra": torch.ones(1)}, "here", prefix="backbone.")
    assert equal(backbone, small().backbone.state_dict())


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("head.fc.bias", None, "1 missing (head.fc.bias)"),
        ("head.extra", torch.ones(1), "1 left over (head.extra)"),
        ("backbone.extra", torch.ones(1), "1 left over (backbone.extra)"),
        ("extra", torch.ones(1), "1 left over (extra)"),
        ("head.fc.bias", torch.ones(4), "1 of another shape (head.fc.bias [4] instead of [3])"),
        ("head.fc.bias", torch.ones(3, 1), "1 of another shape (head.fc.bias [3, 1] instead of [3])"),
        ("head.fc.bias", torch.ones(()), "1 of another shape (head.fc.bias [] instead of [3])"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(
    name: str, tensor: Tensor | None, problem: str
) -> None:
    network = small()
    ones = {key: torch.ones_like(value) for key, value in network.state_dict().items()}
    tensors = {key: value for key, value in {**ones, name: tensor}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(f"the tensors of 'here' are not those of the network: {problem}")):
        load_tensors(network, tensors, "here")
    assert equal(network, small().state_dict())


def test_many_tensors_that_do_not_fit_are_counted() -> None:
    names = [name for name in small().state_dict() if ".peg." in name]
    tensors = {name: tensor for name, tensor in small().state_dict().items() if name not in names}
    with pytest.raises(ValueError, match=re.escape(f"8 missing ({', '.join(sorted(names)[:3])} and 5 more)")):
        load_tensors(small(), tensors, "here")


# Mapped weights.


@pytest.mark.parametrize(
    ("size", "head", "classes", "dtype"),
    [
        ("nano", "linear", 10, torch.float32),
        ("nano", "mlp", 7, torch.float32),
        ("nano", "mlp", 3, torch.float64),
        ("s", "mlp", 3, torch.float32),
    ],
)
@torch.no_grad()
def test_mapped_weights_compute_the_same_bits(
    tmp_path: Path, size: str, head: str, classes: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = create_model(f"scalablevit_{size}", classes, head).to(dtype).eval()
    save_network(model, tmp_path, None)
    again = ImageClassifier.from_pretrained(tmp_path)
    for side in (28, 224):
        batch = torch.randn(2, 3, side, side, dtype=dtype)
        assert torch.equal(again(batch), model(batch))


@torch.no_grad()
def test_a_loaded_network_trains_and_leaves_its_file_alone(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    for parameter in ImageClassifier.from_pretrained(folder).parameters():
        assert parameter.requires_grad
        parameter.fill_(1.0)
    assert (folder / WEIGHTS).read_bytes() == before


MEMORY = """
import sys
import torch
import scalablevit_pl.weights.source
from scalablevit_pl.models import from_pretrained
torch.set_num_threads(1)


def allocated():  # without pages of files, which the system can drop at any time
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


models = []
for folder in sys.argv[1:]:
    before = allocated()
    models.append(from_pretrained(folder))
    print(allocated() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_weights_are_mapped_or_else_copied_once(tmp_path: Path) -> None:
    network = create_model("scalablevit_s")
    folders = {True: tmp_path / "aligned", False: tmp_path / "shifted"}
    for aligned, folder in folders.items():
        save_network(network, folder, None)
        path = folder / WEIGHTS
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")  # of the tensors, a multiple of eight
        padding = "x" * (((0 if aligned else 8) - start - len('"x":"",')) % 64)
        save_file(network.state_dict(), path, {"format": "pt", "x": padding})
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == (0 if aligned else 8)
    size = path.stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", MEMORY, *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, copied = map(int, result.stdout.split())
    assert mapped <= 0.5 * size
    assert 0.8 * size <= copied <= 1.2 * size


# The backbone alone.


@torch.no_grad()
def test_the_backbone_is_loaded_without_its_head(folder: Path) -> None:
    backbone = ScalableViT.from_pretrained(folder)
    assert type(backbone) is ScalableViT
    assert not any(module.training for module in backbone.modules())
    for ours, theirs in zip(backbone(images()), small().backbone(images()), strict=True):
        assert torch.equal(ours, theirs)
    assert next(ScalableViT.from_pretrained(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_the_backbone_is_loaded_whatever_the_head(folder: Path) -> None:
    retensor(
        folder,
        {"head.fc.weight": torch.full((7, 9), math.nan), "head.fc.bias": None, "head.extra": torch.ones(1)},
    )
    with pytest.raises(ValueError, match="model"):
        ImageClassifier.from_pretrained(folder)
    stored = load_file(folder / WEIGHTS)
    for name, tensor in ScalableViT.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, stored[f"backbone.{name}"]), name


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [(None, "1 missing"), (torch.ones(5), "1 of another shape"), (torch.full((8,), math.nan), "NaN or infinite")],
)
def test_the_backbone_is_loaded_strictly(folder: Path, tensor: Tensor | None, problem: str) -> None:
    retensor(folder, {"backbone.stages.0.peg.conv.bias": tensor})
    for kind in (ImageClassifier, ScalableViT):
        with pytest.raises(ValueError, match=problem) as caught:
            kind.from_pretrained(folder)
        assert "stages.0.peg.conv.bias" in str(caught.value)


@pytest.mark.parametrize("path", ["gone", "no/such/folder/here"])
@pytest.mark.parametrize("kind", [ImageClassifier, ScalableViT])
def test_a_name_that_is_neither_folder_nor_repository_is_named(kind: type[ScalableViT], path: str) -> None:
    with pytest.raises(ValueError, match=path):
        kind.from_pretrained(path)


# Building.


def stored(config: dict[str, object], tensors: int) -> StoredModel:
    weights = {str(index): torch.ones(1) for index in range(tensors)}
    return StoredModel(Description(CLASSIFICATION, config), weights, "here")


@pytest.mark.parametrize(
    ("depths", "tensors", "limit"), [([1, 2, 1, 7], 10, 10), ([100, 100, 1, 0], 2000, 200), ([10**9], 0, 200)]
)
def test_a_network_deeper_than_its_tensors_allow_is_not_built(depths: list[int], tensors: int, limit: int) -> None:
    with pytest.raises(ValueError, match=f"it has {sum(depths)} blocks, more than its {limit} tensors allow"):
        build_module(lambda: pytest.fail("built"), stored({"backbone": {"depths": depths}}, tensors))


@pytest.mark.parametrize("config", [{}, {"backbone": {}}, {"backbone": "resnet50"}, {"backbone": None}], ids=str)
def test_a_network_with_another_backbone_is_built_without_memory(config: dict[str, object]) -> None:
    assert build_module(lambda: torch.nn.Linear(10**6, 10**6), stored(config, 1)).weight.is_meta


@pytest.mark.parametrize("error", [KeyError("depths"), TypeError("a\nb"), OverflowError("big"), RuntimeError("meta")])
def test_an_error_while_building_is_one_sentence_that_names_the_source(error: Exception) -> None:
    def build() -> torch.nn.Module:
        raise error

    with pytest.raises(ValueError, match=r"^'here' describes no network that can be built: .+") as caught:
        build_module(build, stored({}, 1))
    assert len(str(caught.value).splitlines()) == 1
