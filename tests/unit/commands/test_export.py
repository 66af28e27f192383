"""A checkpoint becomes a folder with a card."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_networks import LABELS, PREPROCESSING, checkpoint_of, small
from torch import nn

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands.export import _public_command, export_run
from scalablevit_pl.weights.folder import read_description

OLD_RUN = Path(__file__).parents[2] / "integration/data/run_0.1.0"
METRICS = {
    "monitor": "miou",
    "mode": "max",
    "described": {
        "loss": {"label": "cross-entropy", "hub_type": "loss", "plotted": True},
        "miou": {"label": "mean IoU", "hub_type": "mean_iou", "plotted": True},
    },
}


def write_run(folder: Path, checkpoint: dict[str, Any], /, **report: Any) -> Path:
    """Write a run with one checkpoint, and a test of it."""
    path = folder / "checkpoints/best.ckpt"
    path.parent.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    torch.save(checkpoint | {"epoch": 1, "global_step": 8}, path)
    tested = {"checkpoint": str(path), "global_step": 8, "dataset": "lab/data", "split": "test", "test/samples": 3}
    (folder / "test.json").write_text(json.dumps(tested | report))
    return folder


def test_a_network_of_a_user_s_class_is_exported_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_networks.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    network, config = small(), {"backbone": small().backbone.config, "num_classes": 3, "width": 4}
    record = {"task": "semantic-segmentation", "network_class": "own_networks.Segmenter", "metrics": METRICS}
    checkpoint = checkpoint_of(network, config, **record, config={}, command="scalablevit fit --run a")
    run = write_run(tmp_path / "run", checkpoint, **{"test/loss": 0.5, "test/miou": 0.25, "test/other": 1.0})
    export_run([str(run), str(tmp_path / "model"), "--license", "mit"])
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: raw weights of {run}/checkpoints/best.ckpt\n"
    assert "own_networks" not in sys.modules
    description = read_description(tmp_path / "model")
    assert (description.task, description.network_class) == ("semantic-segmentation", "own_networks.Segmenter")
    assert (description.config, description.class_names) == (config, LABELS)
    assert description.preprocessing == PREPROCESSING
    exported = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in network.state_dict().items())
    card = (tmp_path / "model/README.md").read_text()
    assert "model = Segmenter.from_pretrained" in card
    assert f"| parameters | {sum(p.numel() for p in network.parameters()):,} |" in card
    assert "| data | images | mean IoU | cross-entropy |" in card  # the monitored metric comes first, the loss last
    assert "| lab/data, split `test` | 3 | 0.2500 | 0.5000 |" in card


@pytest.mark.parametrize("average", ["ema", "none"])
def test_a_run_of_the_previous_version_becomes_a_folder_of_schema_2(tmp_path: Path, average: str) -> None:
    export_run([str(OLD_RUN), str(tmp_path / "model"), "--average", average])
    assert json.loads((tmp_path / "model/config.json").read_text())["schema"] == 2
    section = {"ema": "ema_state_dict", "none": "state_dict"}[average]
    weights = torch.load(OLD_RUN / "checkpoints/best.ckpt", weights_only=True)[section]
    model = from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, weights[f"network.{name}"]) for name, tensor in model.state_dict().items())
    assert model.class_names


@pytest.mark.parametrize(
    "report", [{"checkpoint": "elsewhere.ckpt"}, {"global_step": 9}, {"test/samples": None}], ids=str
)
def test_results_of_other_weights_are_omitted_from_the_card(
    tmp_path: Path, report: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = checkpoint_of(small(), small().config, config={}, command="fit")
    run = write_run(tmp_path / "run", checkpoint, **{"test/top1": 0.5} | report)
    if report.get("test/samples", 3) is None:  # of the averaged weights alone
        tested = json.loads((run / "test.json").read_text())
        del tested["test/samples"]
        (run / "test.json").write_text(json.dumps(tested | {"test_ema/samples": 3}))
    export_run([str(run), str(tmp_path / "model")])
    assert "omitted from the card" in caplog.text
    assert "## Results" not in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize("network", [None, {"class_path": "timm.create_model", "init_args": {"model_name": "resnet"}}])
def test_a_network_without_a_scalablevit_backbone_is_not_exported(
    tmp_path: Path, network: dict[str, Any] | None
) -> None:
    run = write_run(tmp_path / "run", checkpoint_of(nn.Linear(2, 3), network, config={}))
    with pytest.raises(ValueError, match=r"holds resnet: only networks with a ScalableViT backbone|has no description"):
        export_run([str(run), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_weights_that_do_not_fit_are_not_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", checkpoint_of(small(4), small().config, config={}))
    with pytest.raises(ValueError, match=r": 2 of another shape \(head\.fc\.weight"):
        export_run([str(run), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_an_existing_model_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", checkpoint_of(small(), small().config, config={}))
    small(4).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"already holds a model: choose another folder, or .* --overwrite"):
        export_run([str(run), str(tmp_path / "model")])
    assert from_pretrained(tmp_path / "model").num_classes == 4
    export_run([str(run), str(tmp_path / "model"), "--overwrite"])
    assert from_pretrained(tmp_path / "model").num_classes == 3


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("scalablevit fit --config a.yaml --run first", "scalablevit fit --config a.yaml --run first"),
        ("scalablevit fit --data.dataset=/home/me/cats", "scalablevit fit --data.dataset=cats"),
        ("scalablevit fit --weights ~/models/a", "scalablevit fit --weights a"),
        ("fit --run '../my runs/a'", "fit --run a"),
        ("fit --weights lab/name@main\n\ntest", "fit --weights lab/name@main\ntest"),
        ("", None),
        (None, None),
    ],
)
def test_paths_of_this_machine_are_omitted_from_commands(command: str | None, public: str | None) -> None:
    assert _public_command(command) == public
