from pathlib import Path
from typing import Any

import pytest
import torch

from scalablevit_pl.models import build_classifier, create_model
from scalablevit_pl.weights.source import adopt_network, load_weights, pin_weights, weights_path

STORED = create_model("scalablevit_nano", num_classes=10, drop_path_rate=0.3).config


def section(**arguments: Any) -> dict[str, Any]:
    given = {"name": "scalablevit_nano", "num_classes": 4, "head": None, "drop_path_rate": None, "window_pad": "mask"}
    return {"class_path": "scalablevit_pl.models.create_model", "init_args": {**given, **arguments}}


@pytest.mark.parametrize("name", ["scalablevit_nano", "from_weights"])
def test_the_network_is_that_of_the_weights_with_the_recipes_number_of_classes(name: str) -> None:
    adopted = adopt_network(section(name=name), STORED)
    assert adopted["class_path"] == "scalablevit_pl.models.build_classifier"
    network = build_classifier(**adopted["init_args"])
    assert network.config == {**STORED, "num_classes": 4}


def test_the_recipe_chooses_how_the_network_is_trained() -> None:
    arguments = adopt_network(section(drop_path_rate=0.1, grad_checkpointing=True), STORED)["init_args"]
    assert arguments["config"]["backbone"] == {**STORED["backbone"], "drop_path_rate": 0.1}
    assert arguments["grad_checkpointing"] is True
    assert STORED["backbone"]["drop_path_rate"] == 0.3


def test_an_adopted_network_can_be_adopted_again() -> None:
    once = adopt_network(section(drop_path_rate=0.1), STORED)
    assert adopt_network(once, STORED) == once


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "scalablevit_s"}, "name is 'scalablevit_s' in the recipe and 'scalablevit_nano' in the weights"),
        ({"head": "mlp"}, "head is 'mlp' in the recipe and 'linear' in the weights"),
        ({"window_pad": "zero"}, "window_pad is 'zero' in the recipe and 'mask' in the weights"),
        ({"expand_value": True}, "expand_value is True in the recipe and False in the weights"),
        ({"in_channels": 1}, "in_channels is 1 in the recipe and 3 in the weights"),
    ],
)
def test_another_network_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        adopt_network(section(**arguments), STORED)


def test_another_description_is_refused() -> None:
    other = adopt_network(section(), STORED)
    other["init_args"]["config"]["backbone"] = {**STORED["backbone"], "window_size": 5}
    with pytest.raises(ValueError, match="window_size is 5 in the recipe and 7 in the weights"):
        adopt_network(other, STORED)


def test_a_network_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"and not by timm\.create_model"):
        adopt_network({"class_path": "timm.create_model", "init_args": {"model_name": "resnet18"}}, STORED)


def test_a_model_folder_gives_its_classifier(tmp_path: Path) -> None:
    model = create_model("scalablevit_nano", num_classes=3)
    model.pretrained_cfg["label_names"] = ["a", "b", "c"]
    model.save_pretrained(tmp_path / "model")
    trained = load_weights(tmp_path / "model")
    assert trained.class_names == ["a", "b", "c"]
    assert torch.equal(trained.network.state_dict()["head.fc.weight"], model.head.fc.weight)
    assert pin_weights(str(tmp_path / "model")) == str(tmp_path / "model")
    assert weights_path(tmp_path / "model") == tmp_path / "model"


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    create_model("scalablevit_nano", num_classes=3).save_pretrained(tmp_path / "model")
    assert load_weights(tmp_path / "model").class_names == ["0", "1", "2"]


@pytest.mark.parametrize("weights", ["nowhere", "/no/such/folder", "a/b/c", "./x", "runs/frist"])
def test_what_is_nowhere_is_said_to_be(weights: str) -> None:
    with pytest.raises(ValueError, match="is neither a checkpoint nor a run folder"):
        weights_path(weights)


def test_what_may_be_on_the_hub_is_looked_for_there() -> None:
    # The tests' environment forbids to ask the Hub.
    with pytest.raises(ValueError, match=r"no file or folder 'owner/frist' here; on the Hub: .*HF_HUB_OFFLINE"):
        load_weights("owner/frist")
