"""Checkpoints of runs, and files that are not checkpoints."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import LABELS, PREPROCESSING, Bomb, checkpoint_of, small
from torch import nn

from scalablevit_pl.models.factory import build_stored
from scalablevit_pl.weights.checkpoint import (
    RECORD_KEY,
    SCHEMA,
    describe_network,
    find_checkpoint,
    load_pickle,
    read_checkpoint,
    read_run,
)

OLD_RUN = Path(__file__).parents[2] / "integration/data/run_0.1.0"
TIMM_SECTION = {
    "class_path": "timm.create_model",
    "init_args": {"model_name": "test_resnet", "num_classes": 3, "pretrained": True},
}


def run_folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return root


def test_a_run_folder_stands_for_its_best_checkpoint_or_else_its_last(tmp_path: Path) -> None:
    last = run_folder(tmp_path, "last.ckpt") / "checkpoints" / "last.ckpt"
    assert find_checkpoint(tmp_path) == last
    best = run_folder(tmp_path, "best.ckpt") / "checkpoints" / "best.ckpt"
    assert find_checkpoint(str(tmp_path)) == best
    assert find_checkpoint(tmp_path, ("last", "best")) == last
    assert find_checkpoint(str(last)) == last


def test_a_folder_without_checkpoint_and_a_missing_file_are_named(tmp_path: Path) -> None:
    run_folder(tmp_path, "epoch=3.ckpt")
    for path in (tmp_path, tmp_path / "missing.ckpt"):
        with pytest.raises(ValueError, match=re.escape(f"'{path}' is neither a checkpoint nor a run folder")):
            find_checkpoint(path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="is a run without a checkpoint yet: wait for the end of its first epoch"):
        find_checkpoint(tmp_path)


def test_the_name_of_a_run_without_its_folder_is_answered_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    with pytest.raises(ValueError, match="did you mean 'runs/first'"):
        find_checkpoint("first")


@pytest.mark.parametrize("url", ["https://example.org/best.ckpt", "hf://somebody/network", "file:///best.ckpt"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=f"'{url}' is a URL: download"):
        find_checkpoint(url)


def test_a_checkpoint_gives_description_and_weights(tmp_path: Path) -> None:
    network = small()
    path = run_folder(tmp_path, "best.ckpt") / "checkpoints" / "best.ckpt"
    torch.save(checkpoint_of(network, describe_network(network)), path)
    for weights in (tmp_path, str(path)):
        stored = read_run(weights)
        assert (stored.description.task, stored.description.config) == ("image-classification", network.config)
        assert (stored.class_names, stored.preprocessing) == (LABELS, PREPROCESSING)
        assert (stored.source, stored.average) == (str(path), "none")
        assert stored.tensors.keys() == network.state_dict().keys()
        assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in network.state_dict().items())


def test_a_checkpoint_of_a_network_outside_the_package_names_its_task_and_class(tmp_path: Path) -> None:
    config = {"backbone": {"depths": [1, 1, 1, 1]}, "num_classes": 3}
    record = {"task": "semantic-segmentation", "network_class": "own.Segmenter"}
    torch.save(checkpoint_of(nn.Linear(2, 3), config, **record), tmp_path / "best.ckpt")
    description = read_run(tmp_path / "best.ckpt").description
    assert (description.task, description.network_class) == ("semantic-segmentation", "own.Segmenter")
    assert (description.config, description.class_names) == (config, LABELS)


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_run_of_the_previous_version_is_read(name: str) -> None:
    stored = read_run(OLD_RUN / f"checkpoints/{name}.ckpt")
    assert stored.description.task == "image-classification"
    network = build_stored(stored)
    assert network.class_names == stored.class_names
    assert network.preprocessing == stored.preprocessing
    assert all(torch.equal(tensor, stored.tensors[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("part", ["", "backbone", "backbone.stages.1"])
def test_weights_of_a_compiled_network_have_their_plain_names(part: str, tmp_path: Path) -> None:
    network, holder = small(), nn.Module()
    holder.network = network
    if part:
        parent, _, name = part.rpartition(".")
        setattr(network.get_submodule(parent), name, torch.compile(network.get_submodule(part)))
    else:
        holder.network = torch.compile(network)
    checkpoint = checkpoint_of(network, network.config) | {"state_dict": holder.state_dict()}
    assert all("_orig_mod." in name for name in checkpoint["state_dict"] if name.startswith(f"network.{part}."))
    torch.save(checkpoint, tmp_path / "best.ckpt")
    tensors, plain = read_run(tmp_path / "best.ckpt").tensors, small().state_dict()
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(("average", "expected"), [(None, 2.0), ("ema", 2.0), ("none", 1.0)])
def test_averaged_weights_are_the_default_if_there_are_any(
    average: str | None, expected: float, tmp_path: Path
) -> None:
    network = small()
    checkpoint = checkpoint_of(network, network.config)
    weights = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("network.")}
    checkpoint["state_dict"] = {name: torch.full_like(tensor, 1.0) for name, tensor in weights.items()}
    checkpoint["ema_state_dict"] = {name: torch.full_like(tensor, 2.0) for name, tensor in weights.items()}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    stored = read_run(tmp_path / "best.ckpt", average)
    assert stored.average == (average or "ema")
    assert all((tensor == expected).all() for tensor in stored.tensors.values())


def test_missing_averaged_weights_are_an_error(tmp_path: Path) -> None:
    torch.save(checkpoint_of(small(), small().config), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="holds no averaged weights: use the raw ones with --average none"):
        read_run(tmp_path / "best.ckpt", "ema")


def test_networks_are_described_by_their_config_or_by_the_section_that_built_them_with_timm() -> None:
    network = small()
    assert describe_network(network) == network.config
    assert describe_network(network, TIMM_SECTION) == network.config
    other = nn.Linear(2, 3)
    assert describe_network(other, TIMM_SECTION) == TIMM_SECTION
    apart = {"class_path": "timm.create_model", "init_args": {"model_name": "a"}, "dict_kwargs": {"num_classes": 3}}
    joined = {"class_path": "timm.create_model", "init_args": {"model_name": "a", "num_classes": 3}}
    assert describe_network(other, apart) == joined
    assert describe_network(other) is None
    assert describe_network(other, {"class_path": "torch.nn.Linear", "init_args": {}}) is None
    assert describe_network(other, {"init_args": TIMM_SECTION["init_args"]}) is None
    other.config = "a string"
    assert describe_network(other, TIMM_SECTION) == TIMM_SECTION


def test_a_network_without_description_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(checkpoint_of(nn.Linear(2, 3), None), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"no description in plain values: use it with its --config instead"):
        read_run(tmp_path / "best.ckpt")


@pytest.mark.parametrize("key", ["network", "class_names", "preprocessing"])
def test_a_record_without_one_of_its_entries_is_refused(tmp_path: Path, key: str) -> None:
    checkpoint = checkpoint_of(small(), small().config)
    del checkpoint[RECORD_KEY][key]
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=f"describes no network that can be rebuilt: .*{key}"):
        read_run(tmp_path / "best.ckpt")


@pytest.mark.parametrize(
    "record",
    [
        {"network": "nano"},
        {"network": {"num_classes": 4}},
        {"class_names": "abc"},
        {"class_names": [1, 2, 3]},
        {"class_names": None},
        {"class_names": ["a", "b"]},
        {"preprocessing": {"input_size": 28}},
        {"preprocessing": PREPROCESSING.to_dict() | {"mean": [10**400, 0, 0]}},
        {"preprocessing": None},
    ],
    ids=lambda record: str(record)[:50],
)
def test_a_record_with_other_values_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    torch.save(checkpoint_of(small(), small().config, **record), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="describes no network that can be rebuilt"):
        read_run(tmp_path / "best.ckpt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99], ids=str)
def test_truncated_files_are_refused(tmp_path: Path, kept: float, legacy: bool) -> None:
    path = tmp_path / "best.ckpt"
    torch.save(checkpoint_of(nn.Linear(50, 50), {}), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint"):
        read_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"weight": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.ones(20).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint: .*checksum"):
        load_pickle(path)


def test_a_torchscript_file_is_refused_without_advice_to_load_it_unsafely(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/constants.pkl", b"")  # by which torch recognizes one
    with pytest.raises(ValueError, match=r"holds code or other objects than tensors and plain values$"):
        load_pickle(path)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint\n", b"seed: 0\nmodel: nano\n", b'{"state_dict": {}}', b"\x89PNG\r\n\x1a\n", b"\n\n"]
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "best.ckpt", tmp_path / "code was run"
    checkpoint = checkpoint_of(nn.Linear(2, 2), {}) | {"hyper_parameters": Bomb(mark)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint"):
        read_run(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_plain_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "best.ckpt", tmp_path / "code was run"
    path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint"):
        read_checkpoint(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"state_dict": {"weight": torch.zeros(1)}},
        {"model": {}, "epoch": 3},
        {"state_dict": {}, RECORD_KEY: {"schema": SCHEMA + 1}},
        {"state_dict": {}, RECORD_KEY: {}},
        {"state_dict": {}, RECORD_KEY: "nano"},
        {RECORD_KEY: {"schema": SCHEMA}},
        [1, 2],
        torch.zeros(2),
    ],
    ids=str,
)
def test_checkpoints_of_other_programs_are_refused(tmp_path: Path, checkpoint: object) -> None:
    path = tmp_path / "best.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=f"'{path}' is not a checkpoint of a scalablevit_pl run of schema {SCHEMA}"):
        read_checkpoint(path)


def test_a_checkpoint_is_read_with_everything_in_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint = checkpoint_of(nn.Linear(2, 2), None) | {"epoch": 4, "callbacks": {"monitor": [0.5, None, True]}}
    torch.save(checkpoint, path)
    read = read_checkpoint(path)
    assert read.keys() == checkpoint.keys()
    assert read[RECORD_KEY] == checkpoint[RECORD_KEY]
    assert (read["epoch"], read["callbacks"]) == (4, {"monitor": [0.5, None, True]})
    torch.testing.assert_close(read["state_dict"], dict(checkpoint["state_dict"]))
