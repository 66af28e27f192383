"""Weights from the reference release and from our own runs, and files that are neither."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden.network import DATA, SIZES, TINY, build
from torch import Tensor, nn

from scalablevit_pl.models import ImageClassifier, create_model
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.checkpoint import (
    RECORD_KEY,
    SCHEMA,
    convert_reference_state_dict,
    describe_network,
    find_checkpoint,
    load_trained_classifier,
    read_checkpoint,
    read_reference_checkpoint,
    same_classes,
)

PREPROCESSING = Preprocessing(input_size=28, crop_pct=1.0, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
TIMM_SECTION = {
    "class_path": "timm.create_model",
    "init_args": {"model_name": "test_resnet", "num_classes": 3, "pretrained": True},
}
# Our names, part by part, and what the reference calls them.
REFERENCE_NAMES = [
    (r"^head\.norm\.", "norm."),
    (r"^head\.hidden\.", "head.0."),
    (r"^head\.hidden_norm\.", "head.1."),
    (r"^backbone\.stages\.(\d)\.patch_embed\.", r"patch_embeds.\1."),
    (r"^backbone\.stages\.(\d)\.peg\.conv\.", r"pos_block.\1.proj.0."),
    (r"^backbone\.stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.lim\.", ".lim_func."),
    (r"\.depthwise\.", ".reduction.0."),
    (r"\.pointwise\.", ".reduction.1."),
    (r"\.attn\.norm\.", ".attn.norm_act.0."),
]


def reference(name: str) -> dict[str, Tensor]:
    shapes = json.loads((DATA / f"{name}_keys.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def classifier(name: str) -> ImageClassifier:
    with torch.device("meta"):
        return build(name)


def nano() -> ImageClassifier:
    torch.manual_seed(0)
    return create_model("scalablevit_nano", num_classes=3)


def checkpoint_of(network: nn.Module, description: dict[str, Any] | None) -> dict[str, Any]:
    state_dict = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    record = {
        "schema": SCHEMA,
        "network": description,
        "class_names": ["ant", "bee", "cat"],
        "preprocessing": PREPROCESSING.to_dict(),
    }
    return {"state_dict": state_dict | {"loss.weight": torch.ones(3)}, RECORD_KEY: record}


def run_folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return root


class Bomb:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [*SIZES, *TINY])
def test_reference_weights_get_our_names_one_each(name: str) -> None:
    theirs = reference(name)
    ours = convert_reference_state_dict(theirs)
    model = classifier(name)
    model.load_state_dict(ours, assign=True)
    for key, tensor in ours.items():
        original = key.replace("head.fc", "head.3" if "head.hidden.weight" in ours else "head")
        for pattern, replacement in REFERENCE_NAMES:
            original = re.sub(pattern, replacement, original)
        assert theirs.pop(original) is tensor, key
    assert not theirs


@pytest.mark.parametrize(
    "key",
    [
        "norm.bias",
        "head.3.weight",
        "head.1.bias",
        "patch_embeds.2.proj.weight",
        "pos_block.3.proj.0.bias",
        "stages.1.0.attn.lim_func.weight",
        "stages.1.1.attn.reduction.1.bias",
        "stages.2.2.mlp.fc2.weight",
        "stages.3.1.attn.q.bias",
    ],
)
def test_a_missing_reference_weight_is_named(key: str) -> None:
    theirs = reference("tiny_a")
    del theirs[key]
    with pytest.raises(ValueError, match=re.escape(f"missing ['{key}'], unknown none")):
        convert_reference_state_dict(theirs)


@pytest.mark.parametrize(
    "key",
    [
        "extra",
        "head.4.weight",
        "patch_embeds.4.proj.weight",
        "stages.4.0.norm1.weight",
        "stages.0.x.norm1.weight",
        "stages.0.0.attn.k.weight",
        "stages.0.1.attn.relative_position_bias_table",
    ],
)
def test_an_unknown_reference_weight_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"missing none, unknown ['{key}']")):
        convert_reference_state_dict(reference("tiny_a") | {key: torch.empty(1)})


def test_a_missing_block_is_named() -> None:
    theirs = {key: tensor for key, tensor in reference("tiny_a").items() if not key.startswith("stages.2.1.")}
    with pytest.raises(ValueError, match=r"missing \['stages.2.1.attn.k.bias', .*unknown none"):
        convert_reference_state_dict(theirs)


def test_our_own_names_are_not_the_reference_s() -> None:
    with pytest.raises(ValueError, match=r"missing \['head.bias', .*unknown \['backbone.stages.0.blocks.0"):
        convert_reference_state_dict(classifier("tiny_a").state_dict())


def test_a_run_folder_stands_for_its_best_checkpoint_or_else_its_last(tmp_path: Path) -> None:
    last = run_folder(tmp_path, "last.ckpt") / "checkpoints" / "last.ckpt"
    assert find_checkpoint(tmp_path) == last
    best = run_folder(tmp_path, "best.ckpt") / "checkpoints" / "best.ckpt"
    assert find_checkpoint(str(tmp_path)) == best
    assert find_checkpoint(str(last)) == last


def test_a_folder_without_checkpoint_and_a_missing_file_are_named(tmp_path: Path) -> None:
    run_folder(tmp_path, "epoch=3.ckpt")
    for path in (tmp_path, tmp_path / "missing.ckpt"):
        with pytest.raises(ValueError, match=re.escape(f"'{path}' is neither a checkpoint nor a run folder")):
            find_checkpoint(path)


@pytest.mark.parametrize("key", ["stages.0.1000000000.norm1.weight", f"stages.3.{10**30}.norm1.weight"])
def test_a_hostile_number_of_blocks_takes_no_time(key: str) -> None:
    with pytest.raises(ValueError, match="these are not the weights of a reference ScalableViT"):
        convert_reference_state_dict(reference("tiny_a") | {key: torch.ones(3)})


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="not all names are text"):
        convert_reference_state_dict(reference("tiny_a") | {7: torch.ones(3)})  # type: ignore[dict-item]


@pytest.mark.parametrize("url", ["https://example.org/best.ckpt", "hf://somebody/network", "file:///best.ckpt"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=f"'{url}' is a URL: download"):
        find_checkpoint(url)


@torch.no_grad()
def test_a_trained_classifier_comes_back_whole(tmp_path: Path) -> None:
    network = nano().eval()
    for parameter in network.parameters():
        parameter.add_(0.01)  # unlike any initial value
    path = run_folder(tmp_path, "best.ckpt") / "checkpoints" / "best.ckpt"
    torch.save(checkpoint_of(network, describe_network(network)), path)
    image = torch.randn(2, 3, 28, 28)
    for weights in (tmp_path, str(path)):
        trained = load_trained_classifier(weights)
        assert not any(module.training for module in trained.network.modules())
        assert torch.equal(trained.network(image), network(image))
        assert trained.class_names == ["ant", "bee", "cat"]
        assert trained.preprocessing == PREPROCESSING


@pytest.mark.parametrize("part", ["", "backbone", "backbone.stages.1"])
def test_a_compiled_network_comes_back_as_a_plain_one(part: str, tmp_path: Path) -> None:
    network, holder = nano(), nn.Module()
    holder.network = network
    if part:
        parent, _, name = part.rpartition(".")
        setattr(network.get_submodule(parent), name, torch.compile(network.get_submodule(part)))
    else:
        holder.network = torch.compile(network)
    checkpoint = checkpoint_of(nano(), network.config) | {"state_dict": holder.state_dict()}
    assert all("_orig_mod." in name for name in checkpoint["state_dict"] if name.startswith(f"network.{part}."))
    torch.save(checkpoint, tmp_path / "best.ckpt")
    trained = load_trained_classifier(tmp_path / "best.ckpt").network
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(("average", "expected"), [(None, 2.0), ("ema", 2.0), ("none", 1.0)])
def test_averaged_weights_are_taken_if_there_are_any_unless_raw_ones_are_asked_for(
    average: str | None, expected: float, tmp_path: Path
) -> None:
    network = nano()
    checkpoint = checkpoint_of(network, network.config)
    weights = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("network.")}
    checkpoint["state_dict"] = {name: torch.full_like(tensor, 1.0) for name, tensor in weights.items()}
    checkpoint["ema_state_dict"] = {name: torch.full_like(tensor, 2.0) for name, tensor in weights.items()}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    trained = load_trained_classifier(tmp_path / "best.ckpt", average)
    assert trained.average == (average or "ema")
    assert all((tensor == expected).all() for tensor in trained.network.state_dict().values())


def test_averaged_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    torch.save(checkpoint_of(nano(), nano().config), tmp_path / "best.ckpt")
    assert load_trained_classifier(tmp_path / "best.ckpt").average == "none"
    with pytest.raises(ValueError, match="holds no averaged weights: take the raw ones with --average none"):
        load_trained_classifier(tmp_path / "best.ckpt", "ema")


@torch.no_grad()
def test_a_trained_timm_network_comes_back_without_its_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model("test_resnet", num_classes=3).eval()
    for parameter in network.parameters():
        parameter.add_(0.01)
    sources = {"checkpoint_path": str(tmp_path / "gone.pth"), "pretrained_cfg": {"url": "https://example.org/a.pth"}}
    section = TIMM_SECTION | {"init_args": TIMM_SECTION["init_args"] | sources}
    torch.save(checkpoint_of(network, describe_network(network, section)), tmp_path / "best.ckpt")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights are those of the checkpoint, nothing else is to be read")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("timm.models._factory.load_checkpoint", refuse)
    trained = load_trained_classifier(tmp_path / "best.ckpt")
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(trained.network(image), network(image))
    assert not trained.network.training


def test_networks_are_described_by_their_config_or_the_timm_section_that_made_them() -> None:
    network = nano()
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
    with pytest.raises(ValueError, match=r"no description.*use it with its --config"):
        load_trained_classifier(tmp_path / "best.ckpt")


def test_a_class_path_of_somebody_else_is_not_called(tmp_path: Path) -> None:
    section = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "made")}}
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="no description of a ScalableViT classifier"):
        load_trained_classifier(tmp_path / "best.ckpt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "init_args",
    [{"model_name": "no_such_network"}, {"model_name": "test_resnet", "rate": 1}, {"num_classes": 3}, None],
    ids=str,
)
def test_a_timm_network_that_cannot_be_rebuilt_is_refused(tmp_path: Path, init_args: dict[str, Any] | None) -> None:
    section = {"class_path": "timm.create_model"} | ({} if init_args is None else {"init_args": init_args})
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="network"):
        load_trained_classifier(tmp_path / "best.ckpt")


@pytest.mark.parametrize("source", ["hf-hub:somebody/network", "hf_hub:somebody/network", "local-dir:{folder}"])
def test_a_network_is_not_fetched_from_where_its_checkpoint_says(tmp_path: Path, source: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    section = {"class_path": "timm.create_model", "init_args": {"model_name": source.format(folder=tmp_path)}}
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=f"network '{source.split(':')[0]}.* is not one that timm knows"):
        load_trained_classifier(tmp_path / "best.ckpt")


@pytest.mark.parametrize("key", ["network", "class_names", "preprocessing"])
def test_a_record_without_one_of_its_entries_is_refused(tmp_path: Path, key: str) -> None:
    network = nano()
    checkpoint = checkpoint_of(network, network.config)
    del checkpoint[RECORD_KEY][key]
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=key):
        load_trained_classifier(tmp_path / "best.ckpt")


def test_weights_have_to_fit_strictly(tmp_path: Path) -> None:
    path, network = tmp_path / "best.ckpt", nano()
    complete = checkpoint_of(network, network.config)
    for change in (
        {"network.head.fc.weight": torch.zeros(4, 256)},
        {"network.head.scale": torch.ones(1)},
        {"network.head.norm.bias": None},
    ):
        (changed,) = change
        weights = {key: tensor for key, tensor in (complete["state_dict"] | change).items() if tensor is not None}
        torch.save(complete | {"state_dict": weights}, path)
        with pytest.raises(ValueError, match=f"(?s){path}' do not fit.*{changed.removeprefix('network.')}"):
            load_trained_classifier(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99], ids=str)
def test_truncated_files_are_refused(tmp_path: Path, kept: float, legacy: bool) -> None:
    path = tmp_path / "best.ckpt"
    checkpoint = checkpoint_of(nn.Linear(50, 50), {})
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"cannot read '{path}' as a checkpoint"):
        read_checkpoint(path)


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
        load_trained_classifier(path)
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


def test_a_checkpoint_is_read_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint = checkpoint_of(nn.Linear(2, 2), None) | {"epoch": 4, "callbacks": {"monitor": [0.5, None, True]}}
    torch.save(checkpoint, path)
    read = read_checkpoint(path)
    assert read.keys() == checkpoint.keys()
    assert read[RECORD_KEY] == checkpoint[RECORD_KEY]
    assert (read["epoch"], read["callbacks"]) == (4, {"monitor": [0.5, None, True]})
    torch.testing.assert_close(read["state_dict"], dict(checkpoint["state_dict"]))


def test_a_reference_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    weights = read_reference_checkpoint(DATA / "tiny_c_official_format.pth")
    assert weights.keys() == build("tiny_c").state_dict().keys()
    for content in ({"state": {}}, [1], {"model": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="no checkpoint of the reference release"):
            read_reference_checkpoint(tmp_path / "other.pth")


def test_the_first_of_the_wanted_checkpoints_is_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "last"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").write_bytes(b"")
    assert find_checkpoint(tmp_path).stem == "best"
    assert find_checkpoint(tmp_path, ("last", "best")).stem == "last"


MANY = [f"class {index}" for index in range(100)]


@pytest.mark.parametrize(
    ("known", "names", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["b", "a"], False),
        (["a", "b"], ["a", "c"], False),
        (["a", "b"], ["a", "b", "c"], False),
        (["0", "1"], ["a", "b"], True),
        (["0", "1"], ["a", "b", "c"], False),
        (MANY, [*MANY[:98], "crane", "crane2"], True),
        (MANY, [*MANY[:97], "one", "two", "three"], False),
        (MANY, [*MANY[:98], MANY[99], MANY[98]], False),
        (MANY, [*MANY[:99], MANY[0]], False),
    ],
)
def test_classes_are_the_same_if_they_stand_at_the_same_places(known: list[str], names: list[str], same: bool) -> None:
    assert same_classes(known, names) == same
