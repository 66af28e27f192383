"""Networks by name, by description, and around stored weights."""

import json
import math
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_networks import LABELS, PREPROCESSING, Change, annotate, checkpoint_of, images, rewrite, small
from torch import nn

from scalablevit_pl.models import ImageClassifier, build_classifier, create_model, from_pretrained, list_models
from scalablevit_pl.models.factory import build_stored, check_folder
from scalablevit_pl.models.heads.classification import LinearHead, MlpHead
from scalablevit_pl.models.pretrained import save_network
from scalablevit_pl.weights.checkpoint import describe_network, read_run
from scalablevit_pl.weights.folder import WEIGHTS, write_folder
from scalablevit_pl.weights.stored import Description

RELEASED = Path(__file__).parents[3] / "checkpoints/scalablevit_nano.fashion_mnist"
TIMM_SECTION = {"class_path": "timm.create_model", "init_args": {"model_name": "test_resnet", "num_classes": 3}}


def on_meta(name: str, **kwargs: Any) -> ImageClassifier:
    with torch.device("meta"):
        return create_model(name, **kwargs)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


# By name.


def test_models_are_listed_small_to_large() -> None:
    assert list_models() == ["scalablevit_nano", "scalablevit_s", "scalablevit_b", "scalablevit_l"]
    sizes = [count(on_meta(name)) for name in list_models()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "num_classes", "backbone", "classifier"),
    [
        ("scalablevit_nano", 10, None, 2_761_378),
        ("scalablevit_s", 1000, 25_793_008, 32_000_472),
        ("scalablevit_b", 1000, 74_625_072, 81_881_624),
        ("scalablevit_l", 1000, 100_983_200, 109_288_840),
    ],
)
def test_parameter_counts(name: str, num_classes: int, backbone: int | None, classifier: int) -> None:
    model = on_meta(name, num_classes=num_classes)
    assert count(model) == classifier
    assert backbone is None or count(model.backbone) == backbone


def test_the_published_size_of_s_has_expanded_values() -> None:
    assert count(on_meta("scalablevit_s", expand_value=True)) == 32_381_320


def test_weight_names_and_shapes_of_nano_are_frozen() -> None:
    keys = json.loads((Path(__file__).parent / "nano_keys.json").read_text())
    assert shapes(on_meta("scalablevit_nano", num_classes=10)) == keys


@pytest.mark.parametrize(("name", "rate"), [("nano", 0.0), ("s", 0.2), ("b", 0.5), ("l", 0.5)])
def test_each_size_has_its_own_default_stochastic_depth(name: str, rate: float) -> None:
    assert on_meta(f"scalablevit_{name}").backbone.stages[3].blocks[-1].drop_path.rate == pytest.approx(rate)
    chosen = on_meta(f"scalablevit_{name}", drop_path_rate=0.1)
    assert chosen.backbone.stages[3].blocks[-1].drop_path.rate == pytest.approx(0.1)
    assert on_meta(f"scalablevit_{name}", drop_path_rate=0.0).backbone.config["drop_path_rate"] == 0.0


def test_create_model_forwards_its_arguments() -> None:
    arguments: dict[str, Any] = {"window_pad": "zero", "expand_value": True, "in_channels": 1}
    model = on_meta("scalablevit_nano", num_classes=7, head="mlp", grad_checkpointing=True, **arguments)
    assert isinstance(model.head, MlpHead)
    assert model.num_classes == model.head.fc.out_features == 7
    assert model.backbone.config.items() >= arguments.items()
    assert all(stage.grad_checkpointing for stage in model.backbone.stages)
    assert not any(stage.grad_checkpointing for stage in on_meta("scalablevit_nano").backbone.stages)


def test_create_model_accepts_timms_name_of_the_channels() -> None:
    assert on_meta("scalablevit_nano", in_chans=4).in_chans == 4
    assert on_meta("scalablevit_nano", in_chans=4, in_channels=1).in_chans == 4
    assert on_meta("scalablevit_nano", in_channels=1).in_chans == 1


@pytest.mark.parametrize(
    ("name", "head"), [("scalablevit_nano", LinearHead), ("scalablevit_s", MlpHead), ("scalablevit_l", MlpHead)]
)
def test_each_size_has_its_own_default_head(name: str, head: type[LinearHead]) -> None:
    assert type(on_meta(name).head) is head
    assert type(on_meta(name, head="linear").head) is LinearHead


def test_a_name_of_timm_is_answered_with_timm_s_function() -> None:
    with pytest.raises(ValueError, match=r"; timm's needs .*--model.network.model_name resnet50$"):
        create_model("resnet50")


@pytest.mark.parametrize("name", ["", "network"])
def test_an_unknown_name_is_answered_with_all_names(name: str) -> None:
    with pytest.raises(ValueError, match=", ".join(list_models())):
        create_model(name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"head": "conv"}, "head must be one of ['linear', 'mlp'], got 'conv'"),
        ({"num_classes": -3}, "num_classes must be at least 0, got -3"),
        ({"window_pad": "reflect"}, "got 'reflect'"),
        ({"drop_path_rate": 1.0}, "got 1.0"),
    ],
)
def test_values_that_do_not_fit_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        on_meta("scalablevit_nano", **arguments)


# By description.


@pytest.mark.parametrize("name", list_models())
def test_named_models_are_rebuilt_from_their_description(name: str) -> None:
    model = on_meta(name, num_classes=5)
    assert model.config["name"] == name
    with torch.device("meta"):
        rebuilt = build_classifier(json.loads(json.dumps(model.config)))
    assert rebuilt.config == model.config
    assert shapes(rebuilt) == shapes(model)


def test_a_description_without_pooling_means_averaging() -> None:
    config = {name: value for name, value in small().config.items() if name != "global_pool"}
    assert build_classifier(config).config == small().config
    assert all(stage.grad_checkpointing for stage in build_classifier(config, True).backbone.stages)


@pytest.mark.parametrize("key", ["name", "num_classes", "head", "backbone"])
def test_a_description_without_one_of_its_values_is_refused(key: str) -> None:
    config = {name: value for name, value in small().config.items() if name != key}
    with pytest.raises(ValueError, match=f"does not describe a ScalableViT classifier.*{key}"):
        build_classifier(config)


@pytest.mark.parametrize("config", [{}, [], "scalablevit_s", None], ids=str)
def test_anything_but_a_description_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="does not describe a ScalableViT classifier"):
        build_classifier(config)


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "scalablevit_s"},
        {"backbone": None},
        {"num_classes": "ten"},
        {"num_classes": -1},
        {"global_pool": "max"},
        {"global_pool": None},
        {"head": ["mlp"]},
        {"head": "os.system"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_description_with_other_values_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not describe a ScalableViT classifier|must be"):
        build_classifier(small().config | values)


@pytest.mark.parametrize("values", [{"patch_size": 16}, {"depths": 4}, {"window_size": "seven"}, {"in_channels": None}])
def test_a_description_of_another_backbone_is_refused(values: dict[str, Any]) -> None:
    config = small().config
    with pytest.raises(ValueError, match=r"does not describe a ScalableViT classifier|must be a whole number"):
        build_classifier(config | {"backbone": config["backbone"] | values})


# Around stored weights: which class builds the network.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_network(annotate(small(), LABELS), tmp_path / "model", "# A card")
    return tmp_path / "model"


@torch.no_grad()
def test_from_pretrained_builds_the_network_of_the_folder_s_task(folder: Path) -> None:
    model = from_pretrained(folder, num_classes=None, device="cpu", dtype=torch.float64)
    assert type(model) is ImageClassifier
    assert torch.equal(model(images().double()), small().double()(images().double()))
    assert from_pretrained(folder, num_classes=5).num_classes == 5
    check_folder(folder)


def test_the_released_folder_of_schema_1_is_loaded() -> None:
    model = from_pretrained(RELEASED)
    assert (type(model), model.config["name"], len(model.class_names)) == (ImageClassifier, "scalablevit_nano", 10)


@pytest.mark.parametrize("task", ["semantic-segmentation", "image-classification"])
def test_a_folder_of_a_class_outside_the_package_is_refused_with_the_class_to_use(tmp_path: Path, task: str) -> None:
    config = {"backbone": small().backbone.config, "num_classes": 2}
    description = Description(task, config, network_class="pathlib.Path")
    write_folder(tmp_path, description, small().state_dict(), None)
    message = f"for {task} that is not part of this package: load it with Path.from_pretrained"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)
    check_folder(tmp_path)  # its files are whole


def test_a_folder_of_an_unknown_task_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, Description("depth-estimation", {}), small().state_dict(), None)
    with pytest.raises(ValueError, match="holds a network for depth-estimation that is not part of this package"):
        from_pretrained(tmp_path)


def test_a_folder_that_is_not_whole_fails_the_check(folder: Path) -> None:
    rewrite(folder, lambda config: config["model_args"].update(depths=[2, 2, 1, 2]))
    with pytest.raises(ValueError, match=r"missing \(backbone\.stages\.0\.blocks\.1\."):
        check_folder(folder)


@torch.no_grad()
def test_a_checkpoint_gives_a_network_in_eval_mode_with_labels_and_preprocessing(tmp_path: Path) -> None:
    network = small()
    torch.save(checkpoint_of(network, network.config), tmp_path / "best.ckpt")
    built = build_stored(read_run(tmp_path / "best.ckpt"))
    assert not any(module.training for module in built.modules())
    assert torch.equal(built(images()), network(images()))
    assert (built.class_names, built.preprocessing) == (LABELS, PREPROCESSING)


@pytest.mark.parametrize(
    "change",
    [
        {"network.head.fc.weight": torch.zeros(4, 16)},
        {"network.head.scale": torch.ones(1)},
        {"network.head.norm.bias": None},
    ],
    ids=str,
)
def test_weights_of_a_checkpoint_have_to_fit_strictly(tmp_path: Path, change: dict[str, Any]) -> None:
    path, checkpoint = tmp_path / "best.ckpt", checkpoint_of(small(), small().config)
    weights = {key: tensor for key, tensor in (checkpoint["state_dict"] | change).items() if tensor is not None}
    torch.save(checkpoint | {"state_dict": weights}, path)
    (changed,) = change
    with pytest.raises(ValueError, match=f"the tensors of '{path}' are not .*{changed.removeprefix('network.')}"):
        build_stored(read_run(path))


# timm's networks, which checkpoints describe by the arguments that built them.


@torch.no_grad()
def test_a_trained_timm_network_is_rebuilt_without_its_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model("test_resnet", num_classes=3).eval()
    for parameter in network.parameters():
        parameter.add_(0.01)
    sources = {"checkpoint_path": str(tmp_path / "gone.pth"), "pretrained_cfg": {"url": "https://example.org/a.pth"}}
    section = TIMM_SECTION | {"init_args": TIMM_SECTION["init_args"] | sources | {"pretrained": True}}
    torch.save(checkpoint_of(network, describe_network(network, section)), tmp_path / "best.ckpt")
    for name in ("_builder.load_pretrained", "_factory.load_checkpoint"):
        monkeypatch.setattr(f"timm.models.{name}", lambda *_, **__: pytest.fail("read other weights"))
    built = build_stored(read_run(tmp_path / "best.ckpt"))
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(built(image), network(image))
    assert not built.training


def test_a_class_path_of_another_package_is_not_called(tmp_path: Path) -> None:
    section = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "made"), "model_name": "a"}}
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="describes no network that can be rebuilt"):
        build_stored(read_run(tmp_path / "best.ckpt"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "init_args",
    [{"model_name": "no_such_network"}, {"model_name": "test_resnet", "rate": 1}, {"num_classes": 3}, None],
    ids=str,
)
def test_a_timm_network_that_cannot_be_rebuilt_is_refused(tmp_path: Path, init_args: dict[str, Any] | None) -> None:
    section = {"class_path": "timm.create_model"} | ({} if init_args is None else {"init_args": init_args})
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="describes no network that can be rebuilt"):
        build_stored(read_run(tmp_path / "best.ckpt"))


@pytest.mark.parametrize("source", ["hf-hub:somebody/network", "hf_hub:somebody/network", "local-dir:{folder}"])
def test_a_network_is_not_fetched_from_where_its_checkpoint_says(tmp_path: Path, source: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    section = {"class_path": "timm.create_model", "init_args": {"model_name": source.format(folder=tmp_path)}}
    torch.save(checkpoint_of(nn.Linear(2, 3), section), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=f"timm does not know its network '{source.split(':')[0]}"):
        build_stored(read_run(tmp_path / "best.ckpt"))


# Descriptions that somebody has tampered with.


def refusal(folder: Path) -> str:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        from_pretrained(folder)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    (sentence,) = str(caught.value).splitlines()
    assert len(sentence) < 700
    return sentence


def top(**values: Any) -> Change:
    return lambda config: config.update(values)


def args(**values: Any) -> Change:
    return lambda config: config["model_args"].update(values)


def cfg(**values: Any) -> Change:
    return lambda config: config["pretrained_cfg"].update(values)


def without(name: str) -> Change:
    return lambda config: config.pop(name)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
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
}


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_description_is_refused_at_once(folder: Path, change: Change, schema: int) -> None:
    if schema == 1:
        rewrite(folder, lambda config: (config.update(schema=1), config.pop("task")))
    rewrite(folder, change)
    assert re.search(r"describes no network that can be built|it has no schema|tensors", refusal(folder))


def test_many_empty_tensors_do_not_make_a_deep_network(folder: Path) -> None:
    rewrite(folder, args(depths=[20_000, 1, 1, 1]))
    (folder / WEIGHTS).unlink()
    save_file({f"backbone.{index}": torch.ones(0) for index in range(20_010)}, folder / WEIGHTS)
    start = time.process_time()
    with pytest.raises(ValueError, match="20003 blocks"):
        from_pretrained(folder)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(0)}], ids=["none", "an empty one"])
def test_a_file_without_the_weights_is_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    refusal(folder)


def test_nothing_that_a_description_names_is_called(folder: Path, tmp_path: Path) -> None:
    call = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "made")}}
    rewrite(folder, top(**call, _target_="os.system", auto_map={"AutoModel": "evil.py"}))
    from_pretrained(folder)  # unknown entries are ignored, as timm does
    rewrite(folder, args(backbone=call))
    refusal(folder)
    assert not (tmp_path / "made").exists()
