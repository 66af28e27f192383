"""A classifier in a folder: what is written, what is read back, and what is refused."""

import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor

import scalablevit_pl.timm  # noqa: F401  which gives timm our networks
from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.card import Provenance, write_card
from scalablevit_pl.weights.folder import (
    CARD,
    CONFIG,
    FILES,
    WEIGHTS,
    annotate,
    describe_model,
    is_model_folder,
    load_backbone,
    load_model,
    read_config,
    save_model,
)

LABELS = ["cat", 'a "dog"', "Kröte | 蛙\n"]
PREPROCESSING = Preprocessing(64, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
SIZE = {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 4), "depths": (1, 2, 1, 2)}
ARCHITECTURE = "scalablevit_custom"
Change = Callable[[dict[str, Any]], object]


def small(num_classes: int = 3, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    arguments = {"head": "linear", "name": ARCHITECTURE, "global_pool": "avg"}
    outer = {key: options.pop(key, value) for key, value in arguments.items()}
    model = ImageClassifier(ScalableViT(**SIZE | options), num_classes, **outer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # unlike any initial value
    return model


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 70, 45, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small()
    annotate(model, LABELS, PREPROCESSING)
    save_model(model, tmp_path / "model", "# A card")
    return tmp_path / "model"


def rewrite(folder: Path, change: Change) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def retensor(folder: Path, **tensors: Tensor | None) -> None:
    changed = load_file(folder / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor.clone() for name, tensor in changed.items() if tensor is not None}
    (folder / WEIGHTS).unlink()  # not into the file that is mapped
    save_file(kept, folder / WEIGHTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load_model(folder)
    (sentence,) = str(caught.value).splitlines()
    assert len(sentence) < 700
    return sentence


# --- there and back


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "mlp"},
        {"global_pool": ""},
        {"num_classes": 0},
        {"in_channels": 1, "window_pad": "zero", "window_size": 5, "expand_value": True},
        {"drop_path_rate": 0.3, "drop_rate": 0.1, "attn_drop_rate": 0.2, "mlp_ratio": 1.5, "name": "mine"},
        {"channel_ratios": (2.0, 0.5, 1.0, 1.25), "spatial_ratios": (4, 4, 1, 1)},
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small(**options)
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    channels = model.in_chans
    assert torch.equal(again(image(channels)), model(image(channels)))
    assert again.feature_info == model.feature_info
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("size", "head", "classes", "dtype"),
    [
        ("nano", "linear", 10, torch.float32),
        ("nano", "mlp", 7, torch.float32),
        ("nano", "mlp", 3, torch.float64),
        ("s", "mlp", 3, torch.float32),
    ],
)
@torch.no_grad()
def test_mapped_weights_compute_the_same_bits(
    tmp_path: Path, size: str, head: Any, classes: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = create_model(f"scalablevit_{size}", classes, head).to(dtype).eval()
    save_model(model, tmp_path, None)
    again = load_model(tmp_path)
    for side in (28, 224):
        batch = torch.randn(2, 3, side, side, dtype=dtype)
        assert torch.equal(again(batch), model(batch))
    for name, tensor in again.state_dict().items():
        assert name == "head.fc.bias" or tensor.nbytes % 64 != 0 or tensor.data_ptr() % 64 == 0, name


def test_labels_and_preprocessing_survive_the_trip(folder: Path) -> None:
    model = load_model(folder)
    assert model.class_names == LABELS
    assert model.preprocessing == PREPROCESSING
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["pool_size"], cfg["num_classes"]) == ((3, 64, 64), (2, 2), 3)
    assert cfg is model.default_cfg
    model.save_pretrained(folder.with_name("again"))
    first, second = ({name: path for name, path in contents(each).items() if name != CARD} for each in (
        folder, folder.with_name("again")
    ))  # fmt: skip
    assert first == second


def test_a_model_without_labels_has_none_afterwards(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert "label_names" not in read_config(tmp_path)
    assert load_model(tmp_path).class_names is None
    assert load_model(tmp_path).preprocessing == Preprocessing()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_other_precisions_stay_as_they_are_or_become_what_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    again = load_model(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(image().to(dtype)), model(image().to(dtype)))
    wide = load_model(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.equal(wide(image()), model.float()(image()))


def test_half_precision_whose_sum_overflows_is_finite(tmp_path: Path) -> None:
    model = small().half()
    torch.nn.init.constant_(model.head.fc.weight, 60000.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).head.fc.weight, model.head.fc.weight)


def test_weights_go_to_the_device_that_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(path: Path, framework: str, device: str) -> Any:
        asked.append(device)
        return safe_open(path, framework=framework, device="cpu")

    monkeypatch.setattr("scalablevit_pl.weights.folder.safe_open", opened)
    for device in ("cuda:1", torch.device("cuda", 1), None):
        load_model(folder, device=device)
        load_backbone(folder, device=device)
    assert asked == ["cuda:1"] * 4 + ["cpu"] * 2


def test_another_number_of_classes_replaces_the_last_layer_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ImageClassifier.from_pretrained(folder, num_classes=5, dtype=torch.bfloat16)
    stored = load_file(folder / WEIGHTS)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head.fc."):
            assert torch.equal(tensor, stored.pop(name).bfloat16()), name
    assert stored.keys() == {"head.fc.weight", "head.fc.bias"}
    assert (model.num_classes, model.head.fc.weight.shape[0], model.class_names) == (5, 5, None)
    assert model.head.fc.weight.dtype == torch.bfloat16
    assert not any(module.training for module in model.modules())
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "new and random" in record.getMessage()
    assert "5 outputs instead of the 3" in record.getMessage()


def test_the_same_number_of_classes_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(folder, num_classes=3)
    assert torch.equal(model.head.fc.weight, load_file(folder / WEIGHTS)["head.fc.weight"])
    assert model.class_names == LABELS
    assert caplog.text == ""


@torch.no_grad()
def test_a_loaded_network_trains_and_leaves_its_file_alone(folder: Path) -> None:
    before = contents(folder)
    model = load_model(folder)
    for parameter in model.parameters():
        assert parameter.requires_grad
        parameter.fill_(1.0)
    assert contents(folder) == before


# --- the backbone alone


@torch.no_grad()
def test_the_backbone_comes_without_its_head(folder: Path) -> None:
    backbone = ScalableViT.from_pretrained(folder)
    assert type(backbone) is ScalableViT
    assert not any(module.training for module in backbone.modules())
    for ours, theirs in zip(backbone(image()), load_model(folder).backbone(image()), strict=True):
        assert torch.equal(ours, theirs)
    assert next(ScalableViT.from_pretrained(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_the_backbone_does_not_mind_another_head(folder: Path) -> None:
    retensor(folder, head__fc__weight=torch.full((7, 9), math.nan), head__fc__bias=None, head__extra=torch.ones(1))
    refusal(folder)
    stored = load_file(folder / WEIGHTS)
    for name, tensor in ScalableViT.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, stored[f"backbone.{name}"]), name


@pytest.mark.parametrize(
    ("tensor", "what"),
    [(None, "1 missing"), (torch.ones(5), "1 of another shape"), (torch.full((8,), math.nan), "not finite")],
)
def test_the_backbone_is_taken_strictly(folder: Path, tensor: Tensor | None, what: str) -> None:
    retensor(folder, backbone__stages__0__peg__conv__bias=tensor)
    for load in (load_model, load_backbone):
        with pytest.raises(ValueError, match=rf"{what}|{what}.*") as caught:
            load(folder)
        assert what in str(caught.value)
        assert "stages.0.peg.conv.bias" in str(caught.value)


# --- the files, to others


def test_the_weights_open_in_plain_safetensors(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == small().state_dict().keys()
    load_checkpoint(model := small(), str(folder / WEIGHTS))
    assert torch.equal(model.head.fc.weight, load_file(folder / WEIGHTS)["head.fc.weight"])


@pytest.mark.skipif(
    [int(part) for part in timm.__version__.split(".")[:3]] < [1, 0, 31], reason="this timm reads no folders of ours"
)
@torch.no_grad()
def test_timm_reads_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("scalablevit_nano", 3, head="mlp", window_pad="zero", expand_value=True, in_channels=1).eval()
    annotate(model, LABELS, PREPROCESSING)
    model.save_pretrained(tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(theirs(image(1)), model(image(1)))
    assert theirs.config == model.config
    assert theirs.class_names == LABELS
    data = resolve_model_data_config(theirs)
    assert tuple(data["input_size"]) == (1, 64, 64)
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert (tuple(data["mean"]), tuple(data["std"])) == (PREPROCESSING.mean, PREPROCESSING.std)
    theirs.save_pretrained(tmp_path / "again")
    again = ImageClassifier.from_pretrained(tmp_path / "again")
    assert torch.equal(again(image(1)), model(image(1)))
    assert (again.class_names, again.preprocessing) == (LABELS, PREPROCESSING)


def test_the_config_holds_what_timm_s_do(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert list(config) == [
        "schema", "architecture", "num_classes", "num_features", "label_names", "model_args", "pretrained_cfg"
    ]  # fmt: skip
    assert (config["schema"], config["architecture"]) == (1, ARCHITECTURE)
    assert (config["num_classes"], config["num_features"], config["label_names"]) == (3, 16, LABELS)
    assert config["model_args"]["embed_dims"] == [8, 8, 16, 16]
    assert config["pretrained_cfg"]["first_conv"] == "backbone.stages.0.patch_embed.proj"
    assert config["pretrained_cfg"]["classifier"] == "head.fc"
    assert "url" not in config["pretrained_cfg"]


def test_a_network_with_another_head_is_described_as_it_is(tmp_path: Path) -> None:
    model = small()
    model.reset_classifier(5, "")
    config = describe_model(model)
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 5
    assert config["model_args"]["global_pool"] == ""
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config == model.config


# --- saving


def test_a_card_that_waits_for_its_model_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine", encoding="utf-8")
    small().save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "mine"
    assert load_model(tmp_path).num_classes == small().num_classes


def test_a_part_that_was_compiled_is_saved_under_its_plain_names(tmp_path: Path) -> None:
    model = small()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.backbone = torch.compile(model.backbone)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_the_card_of_another_model_is_kept_aside_and_other_files_stay(folder: Path) -> None:
    (folder / CARD).write_text("mine", encoding="utf-8")
    (folder / "notes.txt").write_text("mine, too", encoding="utf-8")
    (folder / "sub").mkdir()
    small(num_classes=4).save_pretrained(folder)
    assert "It knows 4 classes" in (folder / CARD).read_text(encoding="utf-8")
    assert (folder / f"{CARD}.old").read_text(encoding="utf-8") == "mine"
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine, too"
    assert (folder / "sub").is_dir()
    assert load_model(folder).num_classes == 4
    save_model(small(), folder, "another")
    assert (folder / CARD).read_text(encoding="utf-8") == "another"
    (folder / CARD).unlink()
    save_model(small(), folder, None)
    assert not (folder / CARD).exists()


def test_the_card_of_a_new_folder_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cat").mkdir()
    monkeypatch.chdir(tmp_path / "my cat")
    small().save_pretrained(".", license="mit")
    assert Path(CARD).read_text(encoding="utf-8") == write_card(small(), "my cat", Provenance(license="mit"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["my cat", *FILES])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007], ids=oct)
def test_files_have_the_permissions_that_others_get(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        small().save_pretrained(tmp_path / "model")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~mask
    for name in FILES:
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == 0o666 & ~mask, name


@torch.no_grad()
def test_a_model_is_saved_where_it_was_loaded_from(folder: Path) -> None:
    expected = small()(image())
    model = load_model(folder)
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    assert torch.equal(model(image()), expected)
    assert torch.equal(load_model(folder)(image()), expected)
    model.head.fc.bias += 1.0
    model.save_pretrained(folder)
    torch.testing.assert_close(load_model(folder)(image()), expected + 1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["write_tensors", "save_json"])
def test_an_interrupted_save_leaves_the_old_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str
) -> None:
    before = contents(folder)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(f"scalablevit_pl.weights.folder.{step}", interrupt)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(error):
            small(num_classes=4).save_pretrained(target)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("pruning", [{"indices": [1]}, {"indices": 1}, {"prune_head": False, "prune_norm": True}])
def test_a_pruned_network_is_refused(folder: Path, there: bool, pruning: dict[str, Any]) -> None:
    before = contents(folder)
    model = small()
    model.prune_intermediate_layers(**pruning)
    target = folder if there else folder.with_name("new")
    with pytest.raises(ValueError, match="a pruned network has no description"):
        model.save_pretrained(target)
    with pytest.raises(ValueError, match="a pruned network has no description"):
        save_model(model, target, "card")
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(folder: Path, value: float) -> None:
    before = contents(folder)
    model = small()
    model.head.fc.weight.data[2, 5] = value
    with pytest.raises(ValueError, match=r"^head\.fc\.weight of the model holds numbers that are not finite"):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_opposite_infinities_are_noticed(tmp_path: Path) -> None:
    model = small()
    model.head.norm.bias.data[:2] = torch.tensor([math.inf, -math.inf])
    with pytest.raises(ValueError, match=r"head\.norm\.bias"):
        model.save_pretrained(tmp_path)


def test_a_target_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder.parent / "file").write_text("x")
    for target in (folder.parent / "file", folder.parent / "file" / "model", folder.parent / "file" / "a" / "b"):
        with pytest.raises(OSError, match=str(folder.parent / "file")) as caught:
            small().save_pretrained(target)
        assert caught.value.filename is not None
    assert (folder.parent / "file").read_text() == "x"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["file", "model"]


def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_is_replaced(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    config = (folder / CONFIG).read_bytes()
    with pytest.raises(IsADirectoryError, match=re.escape(str(folder / WEIGHTS))):
        small(num_classes=4).save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() == config
    assert list(folder.parent.iterdir()) == [folder]


FULL_DISK = """
import resource, sys
from scalablevit_pl.models import ImageClassifier
model = ImageClassifier.from_pretrained(sys.argv[1], num_classes=4)
for limit in (50_000, 4000, 1000, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for target in sys.argv[1:]:
        try:
            model.save_pretrained(target)
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


# --- loading what is not whole


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


@torch.no_grad()
def test_links_to_files_are_followed(folder: Path) -> None:
    linked = folder.with_name("linked")  # as in the Hub's cache
    linked.mkdir()
    for name in (WEIGHTS, CONFIG):
        (linked / name).symlink_to(folder / name)
    assert torch.equal(load_model(linked)(image()), small()(image()))


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("head.fc.bias", None, "1 missing (head.fc.bias)"),
        ("head.extra", torch.ones(1), "1 left over (head.extra)"),
        ("backbone.extra", torch.ones(1), "1 left over (backbone.extra)"),
        ("extra", torch.ones(1), "1 left over (extra)"),
        ("head.fc.bias", torch.ones(4), "1 of another shape (head.fc.bias [4] in place of [3])"),
        ("head.fc.bias", torch.ones(3, 1), "1 of another shape (head.fc.bias [3, 1] in place of [3])"),
        ("head.fc.bias", torch.ones(()), "1 of another shape (head.fc.bias [] in place of [3])"),
        ("head.fc.bias", torch.tensor([1.0, math.nan, 1.0]), "head.fc.bias"),
        ("head.fc.bias", torch.tensor([1.0, math.inf, -math.inf]), "head.fc.bias"),
        ("head.fc.bias", torch.ones(3, dtype=torch.int64), "head.fc.bias"),
        ("head.fc.bias", torch.ones(3, dtype=torch.bool), "head.fc.bias"),
        ("head.fc.bias", torch.ones(3, dtype=torch.float8_e4m3fn), "head.fc.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, name: str, tensor: Tensor | None, what: str) -> None:
    retensor(folder, **{name.replace(".", "__"): tensor})
    sentence = refusal(folder)
    assert what in sentence
    assert str(folder / WEIGHTS) in sentence


def test_many_tensors_that_do_not_fit_are_counted(folder: Path) -> None:
    names = [name for name in load_file(folder / WEIGHTS) if ".peg." in name]
    retensor(folder, **{name.replace(".", "__"): None for name in names})
    assert f"8 missing ({', '.join(sorted(names)[:3])}, …)" in refusal(folder)


def test_the_weights_of_another_size_are_refused(folder: Path) -> None:
    other = folder.with_name("other")
    small(embed_dims=(8, 8, 16, 32), depths=(1, 2, 2, 2)).save_pretrained(other)
    (folder / CONFIG).write_bytes((other / CONFIG).read_bytes())
    sentence = refusal(folder)
    assert "missing (backbone.stages.2.blocks.1." in sentence
    assert "head.fc.weight" in sentence or "[16" in sentence


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, kept: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert f"{str(folder / WEIGHTS)!r} is damaged, no whole safetensors file" in refusal(folder)


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
        header({}),
        header({"a": entry(shape=(0,), offsets=(0, 0))}),
    ],
    ids=lambda content: repr(content[:50]),
)
def test_hostile_weights_are_refused_at_once(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    within_a_second_and_without_memory(folder)


# --- configurations


def within_a_second_and_without_memory(folder: Path) -> str:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refusal(folder)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    return sentence


def top(**values: Any) -> Change:
    return lambda config: config.update(values)


def args(**values: Any) -> Change:
    return lambda config: config["model_args"].update(values)


def cfg(**values: Any) -> Change:
    return lambda config: config["pretrained_cfg"].update(values)


def without(name: str) -> Change:
    return lambda config: config.pop(name)


HOSTILE = {
    "a depth of 10**9": args(depths=[10**9, 2, 2, 2]),
    "depths that add up": args(depths=[10**9, 6 - 10**9, 1, 1]),
    "a negative depth": args(depths=[-1, 2, 1, 2]),
    "another depth": args(depths=[2, 2, 1, 2]),
    "nested depths": args(depths=[[1], 2, 1, 2]),
    "depths as a string": args(depths="1212"),
    "depths as strings": args(depths=["1", "2", "1", "2"]),
    "a fractional depth": args(depths=[1.5, 2, 1, 2]),
    "three depths": args(depths=[1, 2, 1]),
    "no depths": lambda config: config["model_args"].pop("depths"),
    "huge channels": args(embed_dims=[10**6] * 4),
    "channels that overflow": args(embed_dims=[2**40] * 4),
    "channels beyond an int64": args(embed_dims=[2**70] * 4),
    "channels of 400 digits": args(embed_dims=[10**400] * 4),
    "fractional channels": args(embed_dims=[8.0, 8, 16, 16]),
    "many heads": args(num_heads=[10**9, 2, 2, 4]),
    "heads as a string": args(num_heads="1224"),
    "mlp_ratio NaN": args(mlp_ratio=math.nan),
    "mlp_ratio infinite": args(mlp_ratio=math.inf),
    "mlp_ratio huge": args(mlp_ratio=1e30),
    "mlp_ratio as a string": args(mlp_ratio="4"),
    "window_size as a string": args(window_size="7"),
    "window_size fractional": args(window_size=7.5),
    "window_size NaN": args(window_size=math.nan),
    "window_size a list": args(window_size=[7, 7]),
    "window_size 0": args(window_size=0),
    "spatial_ratios huge": args(spatial_ratios=[8, 10**9, 2, 1]),
    "channel_ratios NaN": args(channel_ratios=[math.nan] * 4),
    "channel_ratios infinite": args(channel_ratios=[math.inf] * 4),
    "channel_ratios 0": args(channel_ratios=[0] * 4),
    "drop_rate 2": args(drop_rate=2),
    "drop_rate NaN": args(drop_rate=math.nan),
    "in_channels huge": args(in_channels=10**9),
    "in_channels as a string": args(in_channels="3"),
    "window_pad unknown": args(window_pad="reflect"),
    "window_pad a list": args(window_pad=["mask"]),
    "expand_value": args(expand_value=True),
    "another head": args(head="mlp"),
    "a head that is code": args(head="os.system"),
    "a head that is a list": args(head=["mlp"]),
    "global_pool unknown": args(global_pool="max"),
    "an unknown argument": args(class_path="os.system"),
    "model_args a list": top(model_args=[1, 2]),
    "model_args a string": top(model_args="x"),
    "model_args null": top(model_args=None),
    "no model_args": without("model_args"),
    "num_classes huge": top(num_classes=10**12),
    "num_classes huge without labels": top(num_classes=10**12, label_names=None),
    "num_classes as a string": top(num_classes="3"),
    "num_classes negative": top(num_classes=-1),
    "num_classes fractional": top(num_classes=3.0),
    "num_classes null": top(num_classes=None),
    "no num_classes": without("num_classes"),
    "architecture a number": top(architecture=5),
    "architecture a list": top(architecture=["scalablevit_s"]),
    "no architecture": without("architecture"),
    "too few labels": top(label_names=["a", "b"]),
    "too many labels": top(label_names=["a", "b", "c", "d"]),
    "no label": top(label_names=[]),
    "labels in one string": top(label_names="abc"),
    "labels that are numbers": top(label_names=[1, 2, 3]),
    "labels in an object": top(label_names={"a": 1, "b": 2, "c": 3}),
    "pretrained_cfg null": top(pretrained_cfg=None),
    "pretrained_cfg a list": top(pretrained_cfg=[]),
    "pretrained_cfg a string": top(pretrained_cfg="abc"),
    "no pretrained_cfg": without("pretrained_cfg"),
    "input_size huge": cfg(input_size=[3, 10**9, 10**9]),
    "input_size of 400 digits": cfg(input_size=[3, 10**400, 10**400]),
    "input_size negative": cfg(input_size=[3, -1, -1]),
    "input_size 0": cfg(input_size=[3, 0, 0]),
    "input_size as a string": cfg(input_size="3224224"),
    "input_size a number": cfg(input_size=224),
    "input_size of one side": cfg(input_size=[3, 224]),
    "input_size of three sides": cfg(input_size=[3, 224, 224, 224]),
    "input_size empty": cfg(input_size=[]),
    "input_size not square": cfg(input_size=[3, 224, 256]),
    "input_size fractional": cfg(input_size=[3, 224.5, 224.5]),
    "input_size of strings": cfg(input_size=[3, "224", "224"]),
    "input_size true": cfg(input_size=[3, True, True]),
    "input_size nested": cfg(input_size=[3, [224], [224]]),
    "crop_pct 2": cfg(crop_pct=2),
    "crop_pct 0": cfg(crop_pct=0),
    "crop_pct tiny": cfg(crop_pct=1e-9),
    "crop_pct denormal": cfg(crop_pct=1e-320),
    "crop_pct NaN": cfg(crop_pct=math.nan),
    "crop_pct as a string": cfg(crop_pct="1"),
    "crop_mode": cfg(crop_mode="squash"),
    "interpolation unknown": cfg(interpolation="magic"),
    "interpolation a list": cfg(interpolation=["bicubic"]),
    "one mean": cfg(mean=[0.1]),
    "mean NaN": cfg(mean=[math.nan] * 3),
    "mean of strings": cfg(mean="abc"),
    "mean of 400 digits": cfg(mean=[10**400, 0, 0]),
    "std 0": cfg(std=[0, 1, 1]),
    "std a number": cfg(std=1),
    "std of strings": cfg(std=["1", "1", "1"]),
    "pool_size a number": cfg(pool_size=5),
    "a newer schema": top(schema=2),
    "schema 0": top(schema=0),
    "schema as a string": top(schema="1"),
    "schema true": top(schema=True),
    "schema fractional": top(schema=1.0),
    "schema null": top(schema=None),
    "no schema": without("schema"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_configuration_is_refused_at_once(folder: Path, change: Change) -> None:
    rewrite(folder, change)
    assert CONFIG in within_a_second_and_without_memory(folder)


def test_a_newer_schema_asks_for_an_update(folder: Path) -> None:
    rewrite(folder, top(schema=7, model_args="of another kind"))
    sentence = refusal(folder)
    assert "has schema 7 and this version of scalablevit_pl reads up to 1: update it" in sentence


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
        b'{"schema": 1, "schema": 2}',
        b'{"schema": 1}',
        b'{"schema": 1',
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_no_configuration_is_refused_at_once(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    assert CONFIG in within_a_second_and_without_memory(folder)


def test_of_two_entries_of_one_name_the_last_has_to_fit(folder: Path) -> None:
    text = (folder / CONFIG).read_text(encoding="utf-8").rstrip()
    (folder / CONFIG).write_text(text[:-1] + ', "num_classes": 4}', encoding="utf-8")
    assert "names 3 classes for a network with 4" in refusal(folder)


def test_many_empty_tensors_do_not_make_a_deep_network(folder: Path) -> None:
    rewrite(folder, args(depths=[20_000, 1, 1, 1]))
    entries = {f"backbone.{index}": entry(shape=(0,), offsets=(0, 0)) for index in range(20_010)}
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(header(entries))
    start = time.process_time()
    assert "20003 blocks" in refusal(folder)
    assert time.process_time() - start < 2.0


def test_nothing_that_a_configuration_names_is_called(folder: Path, tmp_path: Path) -> None:
    call = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "made")}}
    rewrite(folder, top(**call, _target_="os.system", auto_map={"AutoModel": "evil.py"}))
    load_model(folder)  # what is not known is ignored, as timm does
    rewrite(folder, args(backbone=call))
    refusal(folder)
    assert not (tmp_path / "made").exists()


# --- memory

PEAK = """
import sys
import torch
from scalablevit_pl.weights.folder import load_model
torch.set_num_threads(1)


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


before = status("VmRSS")
model = load_model(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_loading_maps_the_weights_and_takes_no_second_copy(tmp_path: Path) -> None:
    save_model(create_model("scalablevit_s"), tmp_path, None)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 1.2 * size
