"""What the networks of all tasks share: a folder and back, a card, and images in many forms."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_networks import LABELS, PREPROCESSING, annotate, contents, images, rewrite, small
from timm.models import adapt_input_conv
from torch import Tensor, nn

from scalablevit_pl.models import ImageClassifier, PretrainedNetwork, ScalableViT
from scalablevit_pl.models.pretrained import card_subject, network_class, save_network
from scalablevit_pl.optim import parameter_groups
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.card import Provenance, write_card
from scalablevit_pl.weights.folder import CARD, FILES, WEIGHTS, read_description

PIXELS = np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8)


class Segmenter(PretrainedNetwork):
    """A network as a user would write one: a map of classes at every fourth pixel."""

    task = "semantic-segmentation"
    last_layers = ("head.1",)

    def __init__(self, backbone: dict[str, Any], num_classes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.backbone = ScalableViT(**backbone)
        self.head = nn.Sequential(nn.Conv2d(self.backbone.channels[0], width, 1), nn.Conv2d(width, num_classes, 1))
        self.num_classes = num_classes
        self.config = {"backbone": self.backbone.config, "num_classes": num_classes, "width": width}

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.head(self.backbone(image)[0])
        return output


def segmenter() -> Segmenter:
    torch.manual_seed(0)
    network = Segmenter(small().backbone.config).eval()
    network.class_names, network.preprocessing = ["road", "sky"], PREPROCESSING
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_network(annotate(small(), LABELS), tmp_path / "model", "# A card")
    return tmp_path / "model"


# A folder and back.


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
def test_a_saved_classifier_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small(**options)
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    channels = model.in_chans
    assert torch.equal(again(images(channels)), model(images(channels)))
    assert again.feature_info == model.feature_info
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(FILES)


@torch.no_grad()
def test_a_network_of_a_user_s_class_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = segmenter()
    model.save_pretrained(tmp_path / "model")
    again = Segmenter.from_pretrained(tmp_path / "model")
    assert (again.config, again.class_names, again.preprocessing) == (model.config, ["road", "sky"], PREPROCESSING)
    assert torch.equal(again(images()), model(images()))
    description = read_description(tmp_path / "model")
    assert description.network_class == f"{__name__}.Segmenter" == network_class(model)
    assert network_class(small()) is None
    backbone = ScalableViT.from_pretrained(tmp_path / "model")
    assert torch.equal(backbone(images())[0], model.backbone(images())[0])
    other = Segmenter.from_pretrained(tmp_path / "model", num_classes=5)
    assert (other.num_classes, other.head[1].out_channels, other.class_names) == (5, 5, None)
    assert other.preprocessing == PREPROCESSING
    assert torch.equal(other.head[0].weight, model.head[0].weight)


def test_the_card_of_a_user_s_network_loads_it_by_its_class(tmp_path: Path) -> None:
    segmenter().save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / CARD).read_text(encoding="utf-8")
    assert f'from {__name__} import Segmenter\n\nmodel = Segmenter.from_pretrained("model")' in card
    assert "multiply-adds at 64×64" in card
    assert "It has 2 classes: road, sky." in card


def test_a_folder_of_another_task_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a network for image-classification, and Segmenter is for semantic-s"):
        Segmenter.from_pretrained(folder)
    segmenter().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="for semantic-segmentation, and ImageClassifier is for image-classification"):
        ImageClassifier.from_pretrained(tmp_path / "other")


def test_labels_and_preprocessing_survive_the_trip(folder: Path) -> None:
    model = ImageClassifier.from_pretrained(folder)
    assert (model.class_names, model.preprocessing) == (LABELS, PREPROCESSING)
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["pool_size"], cfg["num_classes"]) == ((3, 64, 64), (2, 2), 3)
    assert cfg is model.default_cfg
    again = folder.with_name("again")
    model.save_pretrained(again)
    assert contents(again) | {CARD: b""} == contents(folder) | {CARD: b""}


def test_a_model_without_labels_has_none_afterwards(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert ImageClassifier.from_pretrained(tmp_path).class_names is None
    assert ImageClassifier.from_pretrained(tmp_path).preprocessing == Preprocessing()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_other_precisions_are_kept_unless_another_is_requested(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    again = ImageClassifier.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(images().to(dtype)), model(images().to(dtype)))
    wide = ImageClassifier.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.equal(wide(images()), model.float()(images()))


def test_a_network_of_other_shapes_than_its_weights_takes_no_memory(folder: Path) -> None:
    rewrite(folder, lambda config: config["model_args"].update(embed_dims=[10**6] * 4))
    for num_classes in (None, 5):
        with pytest.raises(ValueError, match=r"of another shape \(.* instead of \[1000000, "):
            ImageClassifier.from_pretrained(folder, num_classes=num_classes)


def test_another_number_of_classes_replaces_the_last_layer_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ImageClassifier.from_pretrained(folder, num_classes=5, dtype=torch.bfloat16)
    stored = load_file(folder / WEIGHTS)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head.fc."):
            assert torch.equal(tensor, stored.pop(name).bfloat16()), name
    assert stored.keys() == {"head.fc.weight", "head.fc.bias"}
    assert (model.num_classes, model.head.fc.weight.shape[0], model.class_names) == (5, 5, None)
    assert model.config["num_classes"] == model.pretrained_cfg["num_classes"] == 5
    assert model.preprocessing == PREPROCESSING
    assert model.head.fc.weight.dtype == torch.bfloat16
    assert not any(module.training for module in model.modules())
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert record.getMessage() == "the last layer is new and random: 5 outputs instead of 3"


def test_no_last_layer_is_possible_and_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ImageClassifier.from_pretrained(folder, num_classes=0)
    assert model(images()).shape == (2, 16)
    assert caplog.text == ""


def test_the_same_number_of_classes_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ImageClassifier.from_pretrained(folder, num_classes=3)
    assert torch.equal(model.head.fc.weight, load_file(folder / WEIGHTS)["head.fc.weight"])
    assert model.class_names == LABELS
    assert caplog.text == ""


@torch.no_grad()
def test_a_model_is_saved_where_it_was_loaded_from(folder: Path) -> None:
    expected = small()(images())
    model = ImageClassifier.from_pretrained(folder)
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    assert torch.equal(model(images()), expected)
    assert torch.equal(ImageClassifier.from_pretrained(folder)(images()), expected)
    model.head.fc.bias += 1.0
    model.save_pretrained(folder)
    torch.testing.assert_close(ImageClassifier.from_pretrained(folder)(images()), expected + 1.0)


# Cards and refusals.


def test_a_card_without_weights_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine", encoding="utf-8")
    small().save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "mine"
    assert ImageClassifier.from_pretrained(tmp_path).num_classes == 3


def test_the_card_of_an_existing_model_is_backed_up(folder: Path) -> None:
    small(num_classes=4).save_pretrained(folder)
    assert "It has 4 classes" in (folder / CARD).read_text(encoding="utf-8")
    assert (folder / f"{CARD}.old").read_text(encoding="utf-8") == "# A card"


def test_the_card_of_a_new_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my cat").mkdir()
    monkeypatch.chdir(tmp_path / "my cat")
    small().save_pretrained(".", license="mit")
    expected = write_card(card_subject(small()), "my cat", Provenance(license="mit"))
    assert Path(CARD).read_text(encoding="utf-8") == expected
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["my cat", *FILES])


def test_the_card_of_a_network_that_cannot_run_without_memory_has_no_cost() -> None:
    class Stubborn(Segmenter):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) * float(image.mean())

    subject = card_subject(Stubborn(small().backbone.config))
    assert (subject.multiply_adds, subject.dtype) == ("", "float32")
    assert subject.parameters == sum(parameter.numel() for parameter in segmenter().parameters())


def test_a_compiled_part_is_saved_under_its_plain_names(tmp_path: Path) -> None:
    model = small()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.backbone = torch.compile(model.backbone)
    model.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("pruning", [{"indices": [1]}, {"indices": 1}, {"prune_head": False, "prune_norm": True}])
def test_a_pruned_network_is_not_saved(folder: Path, exists: bool, pruning: dict[str, Any]) -> None:
    before = contents(folder)
    model = small()
    model.prune_intermediate_layers(**pruning)
    target = folder if exists else folder.with_name("new")
    for save in (model.save_pretrained, lambda path: save_network(model, path, "card")):
        with pytest.raises(ValueError, match="a pruned network has no description"):
            save(target)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    before, model = contents(folder), small()
    model.head.fc.weight.data[2, 5] = math.nan
    with pytest.raises(ValueError, match=r"^head\.fc\.weight of the model holds NaN or infinite weights"):
        model.save_pretrained(folder)
    assert contents(folder) == before


# Images.


@pytest.fixture
def model() -> ImageClassifier:
    model = small(drop_rate=0.5)  # which training mode would show
    nn.init.normal_(model.head.fc.weight)
    return annotate(model, LABELS)


def probabilities(model: ImageClassifier, *pictures: Image.Image) -> list[dict[str, float]]:
    batch = torch.stack([PREPROCESSING(picture) for picture in pictures])
    with torch.no_grad():
        rows = torch.softmax(model.eval()(batch), dim=1).tolist()
    return [dict(zip(LABELS, row, strict=True)) for row in rows]


def assert_predicts(predictions: list[list[tuple[str, float]]], expected: list[dict[str, float]]) -> None:
    assert [dict(row) for row in predictions] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in expected]


def written(folder: Path) -> Path:
    Image.fromarray(PIXELS).save(folder / "image.png")
    return folder / "image.png"


@pytest.mark.parametrize(
    "give",
    [
        lambda folder: written(folder),
        lambda folder: str(written(folder)),
        lambda folder: written(folder).read_bytes(),
        lambda folder: Image.fromarray(PIXELS),
        lambda folder: PIXELS,
        lambda folder: np.asfortranarray(PIXELS),
        lambda folder: np.concatenate([PIXELS, PIXELS[..., :1]], axis=2),
        lambda folder: Image.fromarray(PIXELS).convert("RGBA"),
    ],
    ids=["path", "string", "bytes", "pil", "rgb", "strided", "rgba", "pil-rgba"],
)
def test_an_image_may_have_many_forms(model: ImageClassifier, tmp_path: Path, give: Callable[[Path], Any]) -> None:
    source, picture = give(tmp_path), Image.fromarray(PIXELS)
    assert torch.equal(model.preprocess(source), PREPROCESSING(picture))
    for several in (source, [source], (source,)):
        assert_predicts(model.predict(several), probabilities(model, picture))


def test_grey_arrays_are_images(model: ImageClassifier) -> None:
    grey = Image.fromarray(PIXELS[..., 0]).convert("RGB")
    assert torch.equal(model.preprocess(PIXELS[..., 0]), PREPROCESSING(grey))
    assert_predicts(model.predict(PIXELS[..., 0]), probabilities(model, grey))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_several_images_are_batched_and_keep_their_order(model: ImageClassifier, batch_size: int) -> None:
    arrays = np.stack([np.roll(PIXELS, 40 * shift) // (shift + 1) for shift in range(5)])
    expected = probabilities(model, *(Image.fromarray(array) for array in arrays))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for several in (arrays, list(arrays), tuple(Image.fromarray(array) for array in arrays)):
        sizes.clear()
        assert_predicts(model.predict(several, batch_size=batch_size), expected)
        assert sizes == [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
    assert model.predict([]) == []
    assert model.predict(arrays[:0]) == []


def test_images_of_different_sizes_are_batched_with_their_neighbors() -> None:
    network, shapes = segmenter(), []
    network.preprocessing = lambda image: torch.zeros(3, image.height, image.width)
    network.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    sides = (32, 32, 64, 64, 64, 32)
    outputs = network.predict([Image.new("RGB", (side, side)) for side in sides], batch_size=2)
    assert shapes == [(2, 3, 32, 32), (2, 3, 64, 64), (1, 3, 64, 64), (1, 3, 32, 32)]
    assert [tuple(output.shape) for output in outputs] == [(2, side // 4, side // 4) for side in sides]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        network.predict([], batch_size=0)


@pytest.mark.parametrize("fails", [False, True])
def test_prediction_restores_the_modes(model: ImageClassifier, fails: bool, tmp_path: Path) -> None:
    expected = probabilities(model, Image.fromarray(PIXELS))
    model.train()
    model.backbone.eval()  # frozen
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(ValueError, match="gone"):
            model.predict(tmp_path / "gone.png")
    else:
        assert_predicts(model.predict(PIXELS), expected)
    assert [module.training for module in model.modules()] == modes
    model.train()
    assert_predicts(model.predict(PIXELS), expected)
    assert all(module.training for module in model.modules())
    model.eval()
    model.predict(PIXELS)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_predicts(model: ImageClassifier, dtype: torch.dtype) -> None:
    (expected,) = probabilities(model, Image.fromarray(PIXELS))
    (row,) = model.to(dtype).predict(PIXELS)
    assert dict(row) == pytest.approx(expected, abs=0.02)
    assert sum(probability for _, probability in row) == pytest.approx(1.0, abs=1e-5)


def test_predictions_hold_no_graph(model: ImageClassifier) -> None:
    model.predict(PIXELS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert not segmenter().predict(PIXELS)[0].requires_grad


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(3, 4, 4),
        None,
        3,
    ],
    ids=lambda value: str(value)[:30],
)
def test_anything_but_an_image_is_refused(model: ImageClassifier, source: Any) -> None:
    for call in (model.preprocess, lambda image: model.predict([PIXELS, image])):
        with pytest.raises(ValueError, match="give a path, a PIL image, or an array"):
            call(source)


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_an_unreadable_image_is_named(model: ImageClassifier, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    for several in (path, str(path), [PIXELS, path]):
        with pytest.raises(ValueError, match=r"cannot read .*broken\.png"):
            model.predict(several)


def test_folders_and_patterns_are_predicted_like_their_files(model: ImageClassifier, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b/2.png", "a.png", "b/1.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS // (4 * number + 1)).save(path)
    (tmp_path / "b/notes.txt").write_text("")
    two, first, one = ([dict(row) for row in model.predict(path)] for path in paths)
    assert one[0] != pytest.approx(two[0], rel=1e-2)
    assert_predicts(model.predict(tmp_path / "b"), one + two)
    assert_predicts(model.predict(f"{tmp_path}/**/*.png"), first + one + two)
    assert_predicts(model.predict([paths[0], str(tmp_path / "b" / "[12].png")]), two + one + two)
    for missing in ("none.png", "*.gif"):
        with pytest.raises(ValueError, match=f"{re.escape(missing)}' does not exist: give image files or folders"):
            model.predict(tmp_path / missing)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_of_other_channels_takes_images_of_them(channels: int, tmp_path: Path) -> None:
    model = small(in_channels=channels)
    assert model.preprocessing == Preprocessing().with_channels(channels)
    assert model.preprocess(PIXELS).shape == (channels, 224, 224)
    pixels = np.repeat(PIXELS[..., :1], channels, axis=2)
    expected = model.predict(pixels)
    for image in (pixels.transpose(2, 0, 1), torch.from_numpy(pixels), Image.fromarray(pixels.squeeze())):
        assert_predicts(model.predict(image), [dict(row) for row in expected])
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    assert_predicts(again.predict(pixels), [dict(row) for row in expected])


def test_a_network_of_channels_that_images_do_not_have_refuses_them() -> None:
    model = small(in_channels=5)
    for call in (model.preprocess, model.predict):
        with pytest.raises(ValueError, match="images have 3 channels and this network takes 5: preprocess"):
            call(PIXELS)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_a_pretrained_network_is_adapted_to_other_channels_as_by_timm(
    model: ImageClassifier, channels: int, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    other = ImageClassifier.from_pretrained(tmp_path / "model", in_chans=channels)
    assert other.in_chans == other.backbone.in_channels == channels
    ours, theirs = other.state_dict(), model.state_dict()
    first = "backbone.stages.0.patch_embed.proj.weight"
    assert torch.allclose(ours.pop(first), adapt_input_conv(channels, theirs.pop(first)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert other.preprocessing == model.preprocessing.with_channels(channels)
    assert other.class_names == model.class_names
    other.save_pretrained(tmp_path / "other")
    again = ImageClassifier.from_pretrained(tmp_path / "other", in_chans=channels)
    assert (again.in_chans, again.preprocessing) == (channels, other.preprocessing)


def test_a_network_needs_at_least_one_channel(model: ImageClassifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert ImageClassifier.from_pretrained(tmp_path / "model", in_chans=3).preprocessing == model.preprocessing
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        ImageClassifier.from_pretrained(tmp_path / "model", in_chans=0)


def test_a_loaded_network_predicts_like_the_saved_one(model: ImageClassifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    assert_predicts(again.predict(PIXELS), [dict(row) for row in model.predict(PIXELS)])
    assert re.match(r"# model", (tmp_path / "model" / CARD).read_text(encoding="utf-8").partition("\n---\n\n")[2])


# Training.


def test_networks_of_all_tasks_support_the_options_of_a_training() -> None:
    network = segmenter()
    network.set_grad_checkpointing(True)
    assert all(stage.grad_checkpointing for stage in network.backbone.stages)
    assert network.no_weight_decay() == {f"backbone.stages.{stage}.peg.conv.weight" for stage in range(4)}
    rates = {parameter: group["lr_scale"] for group in parameter_groups(network, 0.5) for parameter in group["params"]}
    assert rates[network.head[0].weight] == rates[network.head[1].bias] == 1.0
    blocks = [block for stage in network.backbone.stages for block in stage.blocks]
    scales = [rates[next(block.parameters())] for block in blocks]
    assert scales == [0.5 ** (len(blocks) - position) for position in range(len(blocks))]
