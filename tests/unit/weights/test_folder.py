"""A model's folder at the level of plain values and tensors: the files that are written, and those that are refused."""

import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_networks import LABELS, PREPROCESSING, Change, annotate, contents, retensor, rewrite, small
from torch import Tensor

from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.folder import (
    CARD,
    CONFIG,
    FILES,
    WEIGHTS,
    check_target,
    count_parameters,
    describe,
    is_model_folder,
    read_config,
    read_description,
    read_folder,
    write_folder,
)
from scalablevit_pl.weights.stored import Description

RELEASED = Path(__file__).parents[3] / "checkpoints/scalablevit_nano.fashion_mnist"
TENSORS = {"backbone.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(3).bfloat16()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = annotate(small(), LABELS)
    write_folder(tmp_path / "model", model.describe(), model.state_dict(), "# A card")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        read_folder(folder)
    (sentence,) = str(caught.value).splitlines()
    assert len(sentence) < 700
    return sentence


def within_a_second_and_without_memory(folder: Path) -> str:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refusal(folder)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    return sentence


# Both schemas.


def user_description(**changes: Any) -> Description:
    values: dict[str, Any] = {
        "task": "semantic-segmentation",
        "config": {"backbone": {"depths": [1, 2]}, "num_classes": 3, "channels": [1.5, None]},
        "class_names": LABELS,
        "preprocessing": PREPROCESSING,
        "network_class": "own.module.Segmenter",
    }
    return Description(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_names": None},
        {"preprocessing": None},
        {"network_class": None},
        {"config": {}, "class_names": None},
        # A classifier of a user's class is described by its own arguments.
        {"task": "image-classification"},
        {"task": "image-classification", "config": {"width": 3}, "class_names": None},
    ],
    ids=str,
)
def test_a_description_of_any_task_survives_the_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    description = user_description(**changes)
    write_folder(tmp_path, description, TENSORS, None)
    stored = read_folder(tmp_path)
    assert stored.description == read_description(tmp_path) == description
    assert stored.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in stored.tensors.items())
    assert [tensor.dtype for tensor in stored.tensors.values()] == [torch.float32, torch.bfloat16]
    assert (stored.source, stored.average) == (str(tmp_path), None)


def test_the_config_of_any_task_names_task_and_class(tmp_path: Path) -> None:
    write_folder(tmp_path, user_description(), TENSORS, None)
    content = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (content["schema"], content["task"]) == (2, "semantic-segmentation")
    assert content["network_class"] == content["architecture"] == "own.module.Segmenter"
    assert (content["num_classes"], content["label_names"]) == (3, LABELS)
    assert content["config"] == user_description().config
    assert content["preprocessing"] == PREPROCESSING.to_dict()


def test_a_classifier_s_config_has_the_entries_of_timm_s_files(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    entries = "schema task architecture num_classes num_features label_names model_args pretrained_cfg"
    assert list(config) == entries.split()
    assert [config[name] for name in entries.split()[:3]] == [2, "image-classification", "scalablevit_custom"]
    assert (config["num_classes"], config["num_features"], config["label_names"]) == (3, 16, LABELS)
    assert config["model_args"]["embed_dims"] == [8, 8, 16, 16]
    assert config["pretrained_cfg"]["first_conv"] == "backbone.stages.0.patch_embed.proj"
    assert config["pretrained_cfg"]["classifier"] == "head.fc"
    assert "url" not in config["pretrained_cfg"]


def test_a_classifier_s_description_survives_the_trip(folder: Path) -> None:
    written, read = annotate(small(), LABELS).describe(), read_description(folder)
    for name in ("task", "config", "class_names", "preprocessing", "network_class"):
        assert getattr(read, name) == getattr(written, name), name
    assert describe(read) | {"pretrained_cfg": None} == describe(written) | {"pretrained_cfg": None}


def test_a_folder_of_schema_1_is_read_as_before_and_not_rewritten(folder: Path) -> None:
    expected = read_description(folder)
    rewrite(folder, lambda config: (config.update(schema=1), config.pop("task")))
    before = contents(folder)
    assert read_folder(folder).description == expected
    assert contents(folder) == before


def test_reading_the_released_folder_leaves_its_files_byte_equal() -> None:
    assert json.loads((RELEASED / CONFIG).read_text(encoding="utf-8"))["schema"] == 1
    before = {name: sha256((RELEASED / name).read_bytes()).hexdigest() for name in FILES}
    stored = read_folder(RELEASED)
    assert (stored.description.config["name"], stored.preprocessing.input_size) == ("scalablevit_nano", 56)
    for tensor in stored.tensors.values():
        tensor.fill_(1.0)
    assert {name: sha256((RELEASED / name).read_bytes()).hexdigest() for name in FILES} == before


def test_a_model_without_labels_and_preprocessing_has_the_defaults_afterwards(tmp_path: Path) -> None:
    write_folder(tmp_path, small().describe(), small().state_dict(), None)
    assert "label_names" not in read_config(tmp_path)
    assert read_description(tmp_path).class_names is None
    assert read_description(tmp_path).preprocessing == Preprocessing()


# Weights.


def test_the_weights_open_in_plain_safetensors(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == small().state_dict().keys()


@pytest.mark.parametrize("padding", range(0, 64, 4))
def test_tensors_of_anybody_s_file_begin_at_multiples_of_64_bytes(tmp_path: Path, padding: int) -> None:
    write_folder(tmp_path, user_description(), TENSORS, None)
    tensors = {"a": torch.ones(padding // 4 + 1), "b": torch.arange(100.0), "c": torch.ones(7)}
    (tmp_path / WEIGHTS).unlink()
    save_file(tensors, tmp_path / WEIGHTS)
    for name, tensor in read_folder(tmp_path).tensors.items():
        assert tensor.data_ptr() % 64 == 0, name
        assert torch.equal(tensor, tensors[name])


def test_weights_go_to_the_requested_device_and_only_those_with_the_prefix(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = []

    def opened(path: Path, framework: str, device: str) -> Any:
        requested.append(device)
        return safe_open(path, framework=framework, device="cpu")

    monkeypatch.setattr("scalablevit_pl.weights.folder.safe_open", opened)
    for device in ("cuda:1", torch.device("cuda", 1), None):
        assert all(name.startswith("head.") for name in read_folder(folder, device, "head.").tensors)
    assert requested == ["cuda:1", "cuda:1", "cpu"]


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.tensor([1.0, math.nan, 1.0]), "holds NaN or infinite"),
        (torch.tensor([1.0, math.inf, -math.inf]), "holds NaN or infinite"),
        (torch.ones(3, dtype=torch.int64), "instead of floating-point"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), "instead of floating-point"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(folder: Path, tensor: Tensor, problem: str) -> None:
    retensor(folder, {"head.fc.bias": tensor})
    sentence = refusal(folder)
    assert f"head.fc.bias of {str(folder / WEIGHTS)!r}" in sentence
    assert problem in sentence
    assert "head.norm.bias" in read_folder(folder, prefix="head.norm.").tensors  # the others are not read


# Writing.


def test_a_replaced_card_is_kept_and_other_files_stay(folder: Path) -> None:
    for name in ("notes.txt", "curves.png"):
        (folder.parent / name).write_text("mine", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "sub").mkdir()
    write_folder(folder, user_description(), TENSORS, "another", [folder.parent / "curves.png"])
    assert (folder / CARD).read_text(encoding="utf-8") == "another"
    assert (folder / f"{CARD}.old").read_text(encoding="utf-8") == "# A card"
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (folder / "curves.png").read_text(encoding="utf-8") == "mine"
    assert (folder / "sub").is_dir()
    assert read_description(folder) == user_description()
    (folder / CARD).unlink()
    write_folder(folder, user_description(), TENSORS, None)
    assert not (folder / CARD).exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007], ids=oct)
def test_files_have_the_usual_permissions(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_folder(tmp_path / "model", user_description(), TENSORS, "card")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~mask
    for name in FILES:
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == 0o666 & ~mask, name


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["save", "save_json"])
def test_an_interrupted_write_leaves_the_old_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str
) -> None:
    before = contents(folder)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(f"scalablevit_pl.weights.folder.{step}", interrupt)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(error):
            write_folder(target, user_description(), TENSORS, "card")
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_written(folder: Path, value: float) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match=r"^head\.bias of the model holds NaN or infinite weights"):
        write_folder(folder, user_description(), TENSORS | {"head.bias": torch.tensor([1.0, value])}, "card")
    assert contents(folder) == before


def test_a_target_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder.parent / "file").write_text("x")
    for target in (folder.parent / "file", folder.parent / "file" / "model", folder.parent / "file" / "a" / "b"):
        with pytest.raises(OSError, match=str(folder.parent / "file")) as caught:
            write_folder(target, user_description(), TENSORS, "card")
        assert caught.value.filename is not None
    assert (folder.parent / "file").read_text() == "x"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["file", "model"]


def test_a_folder_where_a_file_belongs_is_named_and_nothing_is_replaced(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    config = (folder / CONFIG).read_bytes()
    with pytest.raises(IsADirectoryError, match=re.escape(str(folder / WEIGHTS))):
        write_folder(folder, user_description(), TENSORS, "card")
    assert (folder / CONFIG).read_bytes() == config
    assert list(folder.parent.iterdir()) == [folder]


FULL_DISK = """
import resource, sys
from scalablevit_pl.weights.folder import read_folder, write_folder
stored = read_folder(sys.argv[1])
for limit in (50_000, 4000, 1000, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for target in sys.argv[1:]:
        try:
            write_folder(target, stored.description, stored.tensors, "card")
        except OSError as error:
            print(limit, error.filename, error, sep=" :: ")
"""


def test_a_full_disk_leaves_the_old_model_and_is_named(folder: Path) -> None:
    before, targets = contents(folder), [str(folder), str(folder.with_name("new"))]
    command = [sys.executable, "-c", FULL_DISK, *targets]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split(" :: ") for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [limit, target] for limit in ("50000", "4000", "1000", "0") for target in targets
    ]
    for _, target, message in lines:
        assert re.fullmatch(rf"\[Errno \d+\] .*: '{target}'", message)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_target_that_holds_files_is_refused_unless_they_are_to_be_replaced(folder: Path) -> None:
    (folder.parent / "notes.txt").touch()
    for target, what in ((folder, "a model"), (folder.parent, "files")):
        with pytest.raises(ValueError, match=f"already holds {what}: choose another folder, or .* --overwrite"):
            check_target(target, overwrite=False)
        check_target(target, overwrite=True)
    with pytest.raises(ValueError, match=r"cannot be created, .*notes.txt' is a file: choose another folder"):
        check_target(folder.parent / "notes.txt" / "model", overwrite=True)
    check_target(folder.parent / "new", overwrite=False)


# Folders that are not whole.


def test_a_folder_is_known_by_its_files(folder: Path) -> None:
    assert is_model_folder(folder)
    assert is_model_folder(str(folder))
    assert not is_model_folder(folder / WEIGHTS)
    assert not is_model_folder(folder.parent)
    (folder / WEIGHTS).unlink()
    assert is_model_folder(folder)
    (folder / CONFIG).unlink()
    assert not is_model_folder(folder)
    (folder / CONFIG).mkdir()
    assert not is_model_folder(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a dangling link"])
def test_a_missing_file_is_named(folder: Path, name: str, instead: str) -> None:
    (folder / name).unlink()
    if instead == "a folder":
        (folder / name).mkdir()
    elif instead == "a dangling link":
        (folder / name).symlink_to(folder / "gone")
    sentence = refusal(folder)
    assert name in sentence
    assert "give a folder with model.safetensors and config.json" in sentence


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "there is no folder" in refusal(tmp_path / "file")


def test_links_to_files_are_followed(folder: Path) -> None:
    linked = folder.with_name("linked")  # as in the Hub's cache
    linked.mkdir()
    for name in (WEIGHTS, CONFIG):
        (linked / name).symlink_to(folder / name)
    assert read_folder(linked).tensors.keys() == load_file(folder / WEIGHTS).keys()


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, kept: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert f"{str(folder / WEIGHTS)!r} is damaged, not a whole safetensors file" in refusal(folder)


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (3,), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all",
        header(b"{", length=2**63),
        header(b"{}", length=2**40),
        header(b"no json", b"\0" * 12),
        header(b"[" * 100_000),
        header([1]),
        header({"a": 1}),
        header({"a": entry(offsets=(0, 2**60))}, b"\0" * 12),
        header({"a": entry(shape=(2**62, 4))}, b"\0" * 12),
        header({"a": entry(shape=(-3,))}, b"\0" * 12),
        header({"a": entry(offsets=(12, 0))}, b"\0" * 12),
        header({"a": entry(), "b": entry()}, b"\0" * 12),
        header({"a": entry()}, b"\0" * 13),
        header({"a": entry("F31")}, b"\0" * 12),
        header({"a": entry(shape=("3",))}, b"\0" * 12),
        header({"__metadata__": {"a": {"b": 1}}, "a": entry()}, b"\0" * 12),
    ],
    ids=lambda content: repr(content[:50]),
)
def test_hostile_weights_are_refused_at_once(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    within_a_second_and_without_memory(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"NaN",
        b"[]",
        b'"abc"',
        b"\x00\x01",
        b"\xff\xfe{}",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"schema": ' * 100_000,
        b'{"schema": ' + b"9" * 10_000 + b"}",
        b'{"schema": 1, "schema": 3}',
        b'{"schema": 1}',
        b'{"schema": 2}',
        b'{"schema": 1',
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_file_that_is_not_a_config_is_refused_at_once(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    assert CONFIG in within_a_second_and_without_memory(folder)


def top(**values: Any) -> Change:
    return lambda config: config.update(values)


@pytest.mark.parametrize("schema", [0, -1, "1", "2", True, 1.0, 2.0, None, [2]], ids=repr)
def test_a_schema_that_is_not_a_whole_number_is_refused(folder: Path, schema: Any) -> None:
    rewrite(folder, top(schema=schema))
    assert "it has no schema" in refusal(folder)
    rewrite(folder, lambda config: config.pop("schema"))
    assert "it has no schema" in refusal(folder)


def test_a_newer_schema_asks_for_an_update(folder: Path) -> None:
    rewrite(folder, top(schema=7, model_args="of another kind"))
    assert "has schema 7 and this version of scalablevit_pl reads up to 2: update it" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        top(task=3),
        top(task=None),
        top(task=["image-classification"]),
        top(config=None),
        top(config=[]),
        top(config="abc"),
        lambda config: config.pop("config"),
        top(preprocessing="abc"),
        top(preprocessing={"input_size": 3}),
        top(network_class=3),
        top(num_classes=4),
        top(label_names="abc"),
        top(label_names=[1, 2, 3]),
    ],
)
def test_a_description_with_other_values_is_refused(tmp_path: Path, change: Change) -> None:
    write_folder(tmp_path, user_description(), TENSORS, None)
    rewrite(tmp_path, change)
    assert "describes no network that can be built" in refusal(tmp_path)


def test_the_last_of_two_entries_with_one_name_counts(folder: Path) -> None:
    text = (folder / CONFIG).read_text(encoding="utf-8").rstrip()
    (folder / CONFIG).write_text(text[:-1] + ', "num_classes": 4}', encoding="utf-8")
    assert "names 3 classes for a network with 4" in refusal(folder)


def test_parameters_are_counted_without_building_the_network(folder: Path) -> None:
    assert count_parameters(folder) == sum(parameter.numel() for parameter in small().parameters())
    (folder / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged, not a whole safetensors file"):
        count_parameters(folder)
