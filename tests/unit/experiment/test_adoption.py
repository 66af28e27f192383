"""The networks that recipes and weights of other tasks make together."""

from typing import Any

import pytest
from jsonargparse import Namespace

from scalablevit_pl.experiment.adoption import BUILD, CREATE, FROM_WEIGHTS, adopt_weights
from scalablevit_pl.models import create_model
from scalablevit_pl.weights.stored import Description, StoredModel

BACKBONE = create_model("scalablevit_nano").backbone.config | {"depths": [1, 1, 1, 1]}
SEGMENTER = StoredModel(Description("semantic-segmentation", {"num_classes": 7, "backbone": BACKBONE}), {}, "here")


def adopted(stored: StoredModel, class_path: str, **arguments: Any) -> dict[str, Any]:
    network = Namespace(class_path=class_path, init_args=Namespace(**arguments))
    config = Namespace()
    config["model.init_args.network"] = network
    adopt_weights(config, stored, "here", "fit", ())
    return dict(config["model.init_args.network"].as_dict())


def test_a_recipe_without_a_network_gets_a_classifier_on_the_backbone_of_another_task() -> None:
    network = adopted(SEGMENTER, CREATE, name=FROM_WEIGHTS, num_classes=3, drop_path_rate=0.2, head=None)
    assert network["class_path"] == BUILD
    config = network["init_args"]["config"]
    assert (config["num_classes"], config["head"]) == (3, "linear")
    assert config["backbone"] == BACKBONE | {"drop_path_rate": 0.2}


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        (CREATE, {"name": "scalablevit_nano", "num_classes": 3}),
        (BUILD, {"config": create_model("scalablevit_nano", 3).config}),
        ("own.Classifier", {"width": 3}),
    ],
)
def test_a_network_that_the_recipe_names_is_built_for_weights_of_another_task(
    class_path: str, arguments: dict[str, Any]
) -> None:
    assert adopted(SEGMENTER, class_path, **arguments) == {"class_path": class_path, "init_args": arguments}
