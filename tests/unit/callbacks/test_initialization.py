import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_networks import SIZE, small
from torch import Tensor, nn

from scalablevit_pl.callbacks.initialization import SameStart, StartFromWeights
from scalablevit_pl.models import PretrainedNetwork, ScalableViT
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel

NAMES = ["bag", "boot", "coat"]
SEGMENTATION = "semantic-segmentation"


class Segmenter(PretrainedNetwork):
    """A network of another task on the same backbone."""

    task = SEGMENTATION
    last_layers = ("head",)

    def __init__(self, num_classes: int = 2, **backbone: Any) -> None:
        super().__init__()
        self.backbone = ScalableViT(**SIZE | backbone)
        self.head = nn.Conv2d(8, num_classes, 1)
        self.config = {"backbone": self.backbone.config, "num_classes": num_classes}


def stored_model(network: PretrainedNetwork, names: list[str] | None = None, **tensors: Tensor | None) -> StoredModel:
    changed = network.state_dict() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    weights = {name: tensor.clone() for name, tensor in changed.items() if tensor is not None}
    return StoredModel(Description(network.task, network.config, names or NAMES, Preprocessing()), weights, "here")


def start(
    network: nn.Module, stored: StoredModel, names: list[str], preprocessing: Any = None, stage: str = "fit"
) -> None:
    datamodule = SimpleNamespace(class_names=names, preprocessing=preprocessing or Preprocessing())
    trainer: Any = SimpleNamespace(datamodule=datamodule)
    module: Any = SimpleNamespace(network=network)
    StartFromWeights(stored, "here").setup(trainer, module, stage)


def fresh(num_classes: int = 3, **options: Any) -> Any:
    network = small(num_classes, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    return network


def test_weights_of_the_same_classes_are_all_loaded(caplog: pytest.LogCaptureFixture) -> None:
    network, stored = fresh(), stored_model(small())
    with caplog.at_level(logging.INFO):
        start(network, stored, NAMES)
    assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in network.state_dict().items())
    assert caplog.messages == [f"here: loaded {len(stored.tensors)} of {len(stored.tensors)} tensors"]


@pytest.mark.parametrize("names", [["cat", "dog"], ["bag", "boot", "dress"], ["boot", "bag", "coat"]])
def test_weights_of_other_classes_are_loaded_but_for_the_last_layer(
    names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    network, stored = fresh(len(names)), stored_model(small())
    with caplog.at_level(logging.INFO):
        start(network, stored, names)
    for name, tensor in network.state_dict().items():
        assert (tensor == 7.0).all() if name.startswith("head.fc.") else torch.equal(tensor, stored.tensors[name]), name
    (message,) = [message for message in caplog.messages if "new and random" in message]
    assert message == (
        f"here: the last layer (head.fc) is new and random, for {len(names)} classes ({', '.join(names)}) instead of "
        "3 classes (bag, boot, coat)"
    )


def test_weights_of_another_task_start_the_backbone_alone(caplog: pytest.LogCaptureFixture) -> None:
    network, stored = Segmenter(drop_path_rate=0.2), stored_model(small(drop_path_rate=0.1))
    head = {name: tensor.clone() for name, tensor in network.head.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start(network, stored, ["road", "sky"])
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, stored.tensors[f"backbone.{name}"]), name
    assert all(torch.equal(tensor, network.head.state_dict()[name]) for name, tensor in head.items())
    count = len(network.backbone.state_dict())
    assert caplog.messages == [
        f"here: loaded {count} of {count} tensors",
        "here is for image-classification: its backbone is used, the head is new and random",
    ]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_weights_of_another_task_are_not_evaluated(stage: str) -> None:
    with pytest.raises(ValueError, match="'here' is for image-classification, so the head would be random: train it"):
        start(Segmenter(), stored_model(small()), ["road", "sky"], stage=stage)


def test_the_backbone_of_a_dense_task_starts_a_classifier() -> None:
    network, stored = fresh(), stored_model(Segmenter(), ["road", "sky"])
    start(network, stored, NAMES)
    assert torch.equal(network.backbone.stages[0].peg.conv.weight, stored.tensors["backbone.stages.0.peg.conv.weight"])
    assert (network.head.fc.weight == 7.0).all()


@pytest.mark.parametrize(
    ("argument", "own"), [("window_size", 5), ("embed_dims", (8, 8, 16, 32)), ("depths", (1,) * 4)]
)
def test_a_backbone_of_another_description_is_an_error_that_names_the_argument(argument: str, own: Any) -> None:
    with pytest.raises(ValueError, match=rf"the backbone of 'here' is not the network's: {argument}.* was .* and is"):
        start(Segmenter(**{argument: own}), stored_model(small()), ["road", "sky"])


@pytest.mark.parametrize(
    ("tensor", "problem"), [(None, "1 missing"), (torch.ones(5), "1 of another shape")], ids=["missing", "shape"]
)
def test_a_backbone_that_is_not_whole_is_an_error_that_names_the_tensor(tensor: Tensor | None, problem: str) -> None:
    stored = stored_model(small(), backbone__stages__0__peg__conv__bias=tensor)
    with pytest.raises(ValueError, match=rf"{problem} \(stages\.0\.peg\.conv\.bias"):
        start(Segmenter(), stored, ["road", "sky"])


def test_another_normalization_than_the_backbone_s_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    other = Preprocessing(mean=(0.1, 0.2, 0.3))
    start(Segmenter(), stored_model(small()), ["road", "sky"], other)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the data has mean [0.1, 0.2, 0.3] and here was trained with [0.485, 0.456, 0.406]" in warning
    assert "set --data.preprocessing.mean to the same values" in warning


def test_weights_in_half_precision_become_those_of_the_network() -> None:
    network, trained = fresh(), small().to(torch.bfloat16)
    start(network, stored_model(trained), NAMES)
    assert network.head.fc.weight.dtype == torch.float32
    assert torch.equal(network.head.fc.weight, trained.head.fc.weight.float())


def test_weights_of_another_network_are_refused_with_a_tensor_s_name() -> None:
    with pytest.raises(ValueError, match=r"the tensors of 'here' are not those of the network: .*head\.hidden"):
        start(fresh(head="mlp"), stored_model(small()), NAMES)


def test_weights_without_class_names_start_a_network_of_as_many_classes() -> None:
    description = Description(CLASSIFICATION, small().config)
    network, stored = fresh(), StoredModel(description, small().state_dict(), "here")
    start(network, stored, NAMES)
    assert torch.equal(network.head.fc.weight, small().head.fc.weight)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([("lab/s@1", None), ("lab/s@2", None)], "process 0 starts from 'lab/s@1' and process 1 from 'lab/s@2': give"),
        ([("a.ckpt", 4), ("a.ckpt", 4), (None, None)], "from 'a.ckpt' at step 4 and process 2 from random weights: "),
        ([("a.ckpt", 4), ("a.ckpt", 5)], "from 'a.ckpt' at step 4 and process 1 from 'a.ckpt' at step 5: "),
        ([("a.ckpt", 4), ("a.ckpt", 4)], None),
    ],
)
def test_all_processes_have_to_start_from_the_same_weights(
    starts: list[tuple[str | None, int | None]], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in starts:

        def gather(found: list[Any], start: Any, own: Any = own) -> None:
            assert start == own
            found[:] = starts

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        trainer: Any = SimpleNamespace(world_size=len(starts))
        with pytest.raises(ValueError, match=re.escape(message)) if message else nullcontext():
            SameStart(*own).setup(trainer, pl.LightningModule(), "fit")
