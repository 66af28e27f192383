"""A checkpoint of the authors' release becomes a folder."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from golden.network import DATA, TINY, fill

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands.convert import convert_reference

CHECKPOINT = DATA / "tiny_c_official_format.pth"


@pytest.fixture
def arguments(tmp_path: Path) -> str:
    config = TINY["tiny_c"]
    shared = {key: config[key] for key in ("embed_dims", "num_heads", "depths")}
    ratios = {"spatial_ratios": config["sr_ratios"], "channel_ratios": config["c_ratios"]}
    (tmp_path / "arguments.json").write_text(json.dumps(shared | ratios))
    return str(tmp_path / "arguments.json")


def test_a_converted_checkpoint_is_a_folder_whose_card_states_the_origin(
    tmp_path: Path, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    convert_reference([str(CHECKPOINT), str(folder), "--model", arguments])
    model = from_pretrained(folder)
    tensors = len(model.state_dict())
    assert capsys.readouterr().out == f"{folder}: all {tensors} tensors of {CHECKPOINT} as scalablevit_custom\n"
    assert (model.num_classes, model.class_names) == (10, None)
    card = (folder / "README.md").read_text()
    digest = sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert f"from the file `{CHECKPOINT.name}` (sha256 `{digest}`)" in card
    assert "license: other" in card
    assert str(DATA) not in card
    with pytest.raises(ValueError, match=r"already holds a model: choose another folder, or .* --overwrite"):
        convert_reference([str(CHECKPOINT), str(folder), "--model", arguments])
    convert_reference([str(CHECKPOINT), str(folder), "--model", arguments, "--overwrite"])


def test_a_checkpoint_of_1000_classes_has_the_labels_of_imagenet(tmp_path: Path, arguments: str) -> None:
    weights = dict(fill("tiny_c")) | {"head.weight": torch.randn(1000, 128), "head.bias": torch.randn(1000)}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    convert_reference([str(tmp_path / "weights.pth"), str(tmp_path / "model"), "--model", arguments])
    names = from_pretrained(tmp_path / "model").class_names
    assert len(set(names)) == 1000
    assert names[1].startswith("goldfish")
    assert [index for index, name in enumerate(names) if name.startswith("crane")] == [134, 517]


def test_nothing_is_written_if_the_checkpoint_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as scalablevit_nano' are not those of the network"):
        convert_reference([str(CHECKPOINT), str(tmp_path / "model"), "--model", "scalablevit_nano"])
    assert list(tmp_path.iterdir()) == []
