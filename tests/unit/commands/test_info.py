"""The content of a model's folder as a table."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from small_networks import LABELS, PREPROCESSING, annotate, contents, rewrite, small

from scalablevit_pl.commands.info import show_info
from scalablevit_pl.models import create_model
from scalablevit_pl.weights.folder import CARD, WEIGHTS, write_folder
from scalablevit_pl.weights.stored import Description

RELEASED = Path(__file__).parents[3] / "checkpoints/scalablevit_nano.fashion_mnist"
TENSORS = {"backbone.weight": torch.ones(10, 10), "head.steps": torch.ones(5), "head.bias": torch.ones(())}


def info(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    show_info([str(folder)])
    rows: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80
        name = line[:16].strip() or list(rows)[-1]
        rows[name] = f"{rows.get(name, '')} {line[16:]}".strip()
    return rows


def test_the_released_folder_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    rows = info(RELEASED, capsys)
    assert (rows["task"], rows["model"]) == ("image-classification", "scalablevit_nano, head linear")
    assert rows["parameters"] == "2,761,378"
    assert rows["multiply-adds"].startswith("at 56×56: 0.0")
    assert rows["labels"].startswith("10: T-shirt/top, Trouser, ")
    assert "center crop 56×56" in rows["input"]
    assert "Top-1 accuracy on 10000 images of " in rows["metrics"]
    assert (rows["licence"], rows["commit"]) == ("apache-2.0", "none: this is a local folder")
    assert rows["weights"].replace(" ", "") == sha256((RELEASED / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"class_names": ["road", "sky"], "config": {"num_classes": 2}}, "2: road, sky"),
        ({"config": {"num_classes": 2}}, "2, names unknown"),
        ({}, None),
    ],
)
def test_a_network_of_a_user_s_class_is_described_by_its_files(
    tmp_path: Path, changes: dict[str, Any], labels: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"task": "semantic-segmentation", "config": {}, "network_class": "not_there.Segmenter"}
    write_folder(tmp_path, Description(**values | changes, preprocessing=PREPROCESSING), TENSORS, None)
    rows = info(tmp_path, capsys)
    assert (rows["task"], rows["model"]) == ("semantic-segmentation", "not_there.Segmenter")
    assert rows["parameters"] == "106"
    assert "center crop 64×64" in rows["input"]
    assert rows.get("labels") == labels


def test_parameters_of_a_user_s_class_on_the_hub_need_no_download(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = Description("semantic-segmentation", {}, preprocessing=PREPROCESSING, network_class="not_there.Net")
    write_folder(tmp_path / "model", description, TENSORS, None)
    hub.add_repo("ada/net")
    hub.commit("ada/net", contents(tmp_path / "model"))
    assert info(Path("ada/net"), capsys)["parameters"] == "106"
    assert not [*(tmp_path / "cache").rglob(WEIGHTS)]
    hub.close()
    assert "parameters" not in info(Path("ada/net"), capsys)


def test_many_labels_are_shortened_and_a_missing_card_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        model = create_model("scalablevit_nano", 100)
    names = [f"label{index}" for index in range(100)]
    write_folder(tmp_path, annotate(model, names).describe(), {}, None)
    rows = info(tmp_path, capsys)
    assert rows["labels"].endswith("label19 and 80 more")
    assert rows["metrics"] == "none: there is no card"


@pytest.mark.parametrize(
    ("card", "metrics"),
    [
        ("", "none in the card"),
        ("# Mine\n", "none in the card"),
        ("---\n- a\n---\n", "(repo card metadata block should be a dict)"),
        ("---\nlicense: [\n---\n", "(while parsing a flow node"),
        ("\udcff", "('utf-8' codec can't decode"),
        ("---\na: &a [x]\nlicense: *a\n---\n", "(its metadata hold aliases"),
        (f"---\nlicense: {'[' * 50_000}\n---\n", "or more than 20 levels)"),
        (f"---\nlicense: {'x' * 100_000}\n---\n", "characters: 100,000 are read)"),
        ("---\nmodel_name: a\neval_results: [1]\n---\n", "(Failed to validate eval_results"),
    ],
)
def test_a_card_without_readable_metadata_is_tolerated(
    tmp_path: Path, card: str, metrics: str, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate(small(), LABELS).save_pretrained(tmp_path)
    (tmp_path / CARD).write_bytes(card.encode(errors="surrogateescape"))
    assert metrics in info(tmp_path, capsys)["metrics"]


@pytest.mark.parametrize("depths", [[10**9, 1, 1, 1], [300, 1, 1, 1], [float("inf"), 1, 1, 1]])
def test_a_network_of_too_many_blocks_is_not_built(tmp_path: Path, depths: list[float]) -> None:
    small().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config["model_args"].update(depths=depths))
    with pytest.raises(ValueError, match=r"describes no network that can be built: it has \w+ blocks"):
        show_info([str(tmp_path)])


def test_labels_reach_the_terminal_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate(small(), LABELS).save_pretrained(tmp_path, license="\x1b[31mmit")
    rewrite(tmp_path, lambda config: config.update(label_names=["\x1b[2Jcat", "\ud800", "x" * 3000]))
    shown = info(tmp_path, capsys)
    assert shown["labels"].startswith(r"3: \x1b[2Jcat, \ud800, xxx")
    assert len(shown["labels"]) < 2100
    assert "\x1b" not in shown["licence"]


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder '{name.removeprefix('./')}'"):
        show_info([name])
