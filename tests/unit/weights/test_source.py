"""The weights that a name or a path stands for."""

from pathlib import Path

import pytest
import torch
from small_networks import LABELS, annotate, small

from scalablevit_pl.weights.source import load_weights, pin_weights, weights_path


def test_a_folder_gives_its_description_and_weights(tmp_path: Path) -> None:
    model = annotate(small(), LABELS)
    model.save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "model", str(tmp_path / "model")):
        stored = load_weights(folder)
        assert stored.class_names == LABELS
        assert (stored.description.config, stored.preprocessing) == (model.config, model.preprocessing)
        assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in model.state_dict().items())
        assert stored.average is None
    assert pin_weights(str(tmp_path / "model")) == str(tmp_path / "model")
    assert weights_path(tmp_path / "model") == tmp_path / "model"


def test_a_folder_holds_one_set_of_weights(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds one set of weights: remove --average ema"):
        load_weights(tmp_path, "ema")


@pytest.mark.parametrize("weights", ["nowhere", "/no/such/folder", "a/b/c", "./x", "runs/frist"])
def test_a_path_to_nothing_is_named(weights: str) -> None:
    with pytest.raises(ValueError, match="is neither a checkpoint nor a run folder"):
        weights_path(weights)


def test_a_name_that_may_be_a_repository_is_looked_up_on_the_hub() -> None:
    # The tests' environment forbids requests to the Hub.
    with pytest.raises(ValueError, match=r"no file or folder 'owner/frist' here; on the Hub: .*HF_HUB_OFFLINE"):
        load_weights("owner/frist")
