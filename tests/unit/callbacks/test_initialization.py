import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from scalablevit_pl.callbacks.initialization import SameStart, StartFromWeights
from scalablevit_pl.models import ImageClassifier, create_model
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.checkpoint import TrainedClassifier

NAMES = ["bag", "boot", "coat"]


def nano(num_classes: int = 3, **arguments: Any) -> ImageClassifier:
    return create_model("scalablevit_nano", num_classes=num_classes, **arguments)


def start(network: ImageClassifier, trained: ImageClassifier, class_names: list[str]) -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(class_names=class_names))
    module: Any = SimpleNamespace(network=network)
    StartFromWeights(TrainedClassifier(trained, NAMES, Preprocessing()), "here").setup(trainer, module, "fit")


def test_the_same_classes_take_all_weights(caplog: pytest.LogCaptureFixture) -> None:
    network, trained = nano(), nano()
    with caplog.at_level(logging.INFO):
        start(network, trained, NAMES)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in trained.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize("names", [["cat", "dog"], ["bag", "boot", "dress"], ["boot", "bag", "coat"]])
def test_other_classes_load_all_but_the_last_layer_and_log_it(
    names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    network, trained = nano(len(names)), nano()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start(network, trained, names)
    for name, tensor in network.state_dict().items():
        expected = before if name in ("head.fc.weight", "head.fc.bias") else trained.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert f"for {len(names)} classes ({', '.join(names)}) instead of 3 (bag, boot, coat)" in caplog.text
    assert "head.fc is new and random" in caplog.text


def test_half_precision_weights_become_those_of_the_network() -> None:
    network, trained = nano(), nano()
    start(network, trained.to(torch.bfloat16), NAMES)
    weight = network.head.fc.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, trained.head.fc.weight.float())


def test_weights_of_another_network_are_refused_with_a_tensors_name() -> None:
    with pytest.raises(ValueError, match=r"the weights of 'here' do not fit the network: .*head\.hidden"):
        start(nano(head="mlp"), nano(), NAMES)


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        ([("lab/s@1", None), ("lab/s@2", None)], "process 0 starts from 'lab/s@1' and process 1 from 'lab/s@2': give"),
        ([("a.ckpt", 4), ("a.ckpt", 4), (None, None)], "from 'a.ckpt' at step 4 and process 2 from random weights: "),
        ([("a.ckpt", 4), ("a.ckpt", 5)], "from 'a.ckpt' at step 4 and process 1 from 'a.ckpt' at step 5: "),
        ([("a.ckpt", 4), ("a.ckpt", 4)], None),
    ],
)
def test_all_processes_start_from_the_same(
    starts: list[tuple[str | None, int | None]], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in starts:

        def gather(found: list[Any], start: Any, own: Any = own) -> None:
            assert start == own
            found[:] = starts

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        trainer: Any = SimpleNamespace(world_size=len(starts))
        with pytest.raises(ValueError, match=re.escape(said)) if said else nullcontext():
            SameStart(*own).setup(trainer, pl.LightningModule(), "fit")
