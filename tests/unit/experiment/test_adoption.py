"""The network and the preprocessing that a recipe and weights determine together."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from jsonargparse import Namespace

from scalablevit_pl.experiment.adoption import BUILD, CREATE, FROM_WEIGHTS, adopt_network, adopt_weights
from scalablevit_pl.models import ScalableViT, build_classifier, create_model
from scalablevit_pl.preprocessing import DensePreprocessing, Preprocessing
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel

BACKBONE = create_model("scalablevit_nano").backbone.config | {"depths": [1, 1, 1, 1]}
NETWORK = create_model("scalablevit_nano", num_classes=10, drop_path_rate=0.3)
NANO, TENSORS = NETWORK.config, NETWORK.state_dict()
CLASSIFIER = StoredModel(Description(CLASSIFICATION, NANO, preprocessing=Preprocessing(28, 1.0)), TENSORS, "here")
SEGMENTER = StoredModel(
    Description("semantic-segmentation", {"num_classes": 7, "backbone": BACKBONE}),
    {f"backbone.{name}": tensor for name, tensor in ScalableViT(**BACKBONE).state_dict().items()},
    "here",
)


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


# Weights of a classifier.


def section(**arguments: Any) -> dict[str, Any]:
    given = {"name": "scalablevit_nano", "num_classes": 4, "head": None, "drop_path_rate": None, "window_pad": "mask"}
    return {"class_path": CREATE, "init_args": {**given, **arguments}}


@pytest.mark.parametrize("name", ["scalablevit_nano", FROM_WEIGHTS])
def test_the_network_is_that_of_the_weights_with_the_recipe_s_number_of_classes(name: str) -> None:
    network = adopt_network(section(name=name), CLASSIFIER)
    assert network["class_path"] == BUILD
    assert build_classifier(**network["init_args"]).config == {**NANO, "num_classes": 4}


def test_the_recipe_chooses_how_the_network_is_trained() -> None:
    arguments = adopt_network(section(drop_path_rate=0.1, grad_checkpointing=True), CLASSIFIER)["init_args"]
    assert arguments["config"]["backbone"] == {**NANO["backbone"], "drop_path_rate": 0.1}
    assert arguments["grad_checkpointing"] is True
    assert NANO["backbone"]["drop_path_rate"] == 0.3


def test_an_adopted_network_can_be_adopted_again() -> None:
    once = adopt_network(section(drop_path_rate=0.1), CLASSIFIER)
    assert adopt_network(once, CLASSIFIER) == once


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "scalablevit_s"}, "name is 'scalablevit_s' in the recipe and 'scalablevit_nano' in the weights"),
        ({"head": "mlp"}, "head is 'mlp' in the recipe and 'linear' in the weights"),
        ({"window_pad": "zero"}, "window_pad is 'zero' in the recipe and 'mask' in the weights"),
        ({"expand_value": True}, "expand_value is True in the recipe and False in the weights"),
        ({"in_channels": 1}, "in_channels is 1 in the recipe and 3 in the weights"),
        ({"in_chans": 1}, "in_channels is 1 in the recipe and 3 in the weights"),
    ],
)
def test_a_recipe_for_another_network_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        adopt_network(section(**arguments), CLASSIFIER)


def test_another_description_is_refused() -> None:
    other = adopt_network(section(), CLASSIFIER)
    other["init_args"]["config"]["backbone"] = {**NANO["backbone"], "window_size": 5}
    with pytest.raises(ValueError, match="window_size is 5 in the recipe and 7 in the weights"):
        adopt_network(other, CLASSIFIER)


def test_weights_and_recipes_of_timm_s_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not one built by timm\.create_model"):
        adopted(CLASSIFIER, "timm.create_model", model_name="resnet18")
    config = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18"}}
    with pytest.raises(ValueError, match="with a ScalableViT backbone, but 'here' holds resnet18"):
        adopted(StoredModel(Description(CLASSIFICATION, config), {}, "here"), CREATE, **section()["init_args"])


# The preprocessing of the weights.


def preprocessing(command: str, class_path: str = "scalablevit_pl.data.ClassificationDataModule", **given: Any) -> Any:
    config = Namespace()
    config["data.class_path"] = class_path
    if given:
        config["data.init_args.preprocessing"] = Namespace(**asdict(Preprocessing()) | given)
    adopt_weights(config, CLASSIFIER, "here", command, tuple(given))
    return config.get("data.init_args.preprocessing")


def test_the_data_gets_the_preprocessing_of_the_weights() -> None:
    assert Preprocessing(**preprocessing("test").as_dict()) == Preprocessing(28, 1.0)
    assert preprocessing("test", "own.DataModule") is None


def test_a_fit_may_choose_another_size_and_an_evaluation_may_not() -> None:
    chosen = Preprocessing(**preprocessing("fit", input_size=32).as_dict())
    assert chosen == Preprocessing(32, 1.0)
    with pytest.raises(ValueError, match=r"trained on other images: preprocessing\.input_size was 28 and is 32"):
        preprocessing("test", input_size=32)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_another_normalization_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match=r"trained on other images: preprocessing\.mean was .*: remove --data\.prep"):
        preprocessing(command, mean=(0.0, 0.0, 0.0))


def dense(stored: StoredModel, command: str = "fit", named: tuple[str, ...] = (), **given: Any) -> DensePreprocessing:
    config = Namespace()
    config["data.class_path"] = "scalablevit_pl.data.SegmentationDataModule"
    if given:
        config["data.init_args.preprocessing"] = Namespace(**asdict(DensePreprocessing()) | given)
    adopt_weights(config, stored, "here", command, named)
    return DensePreprocessing(**config["data.init_args.preprocessing"].as_dict())


def test_a_dense_task_gets_the_statistics_of_a_classifier_and_keeps_its_own_size() -> None:
    gray = replace(CLASSIFIER.description, preprocessing=Preprocessing(28, 1.0, mean=(0.3,) * 3, std=(0.4,) * 3))
    stored = replace(CLASSIFIER, description=gray)
    assert dense(stored) == DensePreprocessing(mean=(0.3,) * 3, std=(0.4,) * 3)
    assert dense(stored, short_side=96) == DensePreprocessing(96, mean=(0.3,) * 3, std=(0.4,) * 3)
    with pytest.raises(ValueError, match=r"trained on other images: preprocessing\.std was .*: remove --data\.prep"):
        dense(stored, std=(0.5,) * 3)


def test_a_dense_task_gets_all_of_another_s_preprocessing() -> None:
    theirs = DensePreprocessing(96, 192, mean=(0.3,) * 3)
    stored = replace(SEGMENTER, description=replace(SEGMENTER.description, preprocessing=theirs))
    assert dense(stored, "test") == theirs
    assert dense(stored, named=("short_side",), short_side=128) == replace(theirs, short_side=128)
    with pytest.raises(ValueError, match=r"trained on other images: preprocessing\.short_side was 96 and is 128"):
        dense(stored, "test", named=("short_side",), short_side=128)


def test_a_description_of_other_shapes_than_the_weights_is_refused_before_it_is_built() -> None:
    config = NANO | {"backbone": NANO["backbone"] | {"embed_dims": [10**6] * 4}}
    stored = StoredModel(Description(CLASSIFICATION, config), TENSORS, "here")
    with pytest.raises(ValueError, match=r"of another shape \(.* instead of \[1000000, "):
        adopted(stored, CREATE, **section(name=FROM_WEIGHTS)["init_args"])
