import csv
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps
from small_networks import annotate, small
from small_tasks import CLASSES, SCENE, Coarse, make_scene

from scalablevit_pl.commands import predict
from scalablevit_pl.commands.arguments import check_output, check_output_folder
from scalablevit_pl.commands.predict import _parse, predict_files
from scalablevit_pl.data.folders import find_images
from scalablevit_pl.models import create_model


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.jpg",
        "b/1.PNG",
        "b/5.gif",
        "b/0.bmp",
        "b/deep/3.webp",
        "b/notes.txt",
        "a/4.jpeg",
        "empty/notes.txt",
        "x.data",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_images_are_found_below_folders_and_taken_as_given(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found_by_system = Path.rglob  # in an order of its own
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: sorted(found_by_system(path, pattern), reverse=True))
    sources = [Path(name) for name in ("x.data", "b", "a/4.jpeg", "b/2.jpg")]
    found = [str(path) for path in find_images(sources)]
    assert found == ["x.data", "b/0.bmp", "b/1.PNG", "b/2.jpg", "b/5.gif", "b/deep/3.webp", "a/4.jpeg", "b/2.jpg"]


def test_files_that_are_left_out_are_logged(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "b/gone.jpg").symlink_to("nowhere")
    find_images([Path("b"), Path("a")])
    assert caplog.messages == ["left out of b: 1 dangling link, 1 .txt"]


@pytest.mark.parametrize(("source", "problem"), [("missing.jpg", "does not exist"), ("empty", "holds no images")])
def test_a_source_without_images_is_named(source: str, problem: str, photos: Path) -> None:
    with pytest.raises(ValueError, match=f"'{source}' {problem}: give image files or folders"):
        find_images([Path("b"), Path(source)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "w", "x.jpg", "--batchsize=3"], "unknown option --batchsize: did you mean --batch_size?"),
        (["--weigths", "w", "x.jpg"], "unknown option --weigths: did you mean --weights?"),
        (["--weights", "w", "x.jpg", "--batch_size=many"], "--batch_size: invalid int value: 'many'"),
        (["--weights", "w", "x.jpg", "--batch_size=0"], "need --batch_size ≥ 1 and --num_workers ≥ 0, got 0 and 2"),
        (
            ["--weights", "w", "x.jpg", "--num_workers=-1"],
            "need --batch_size ≥ 1 and --num_workers ≥ 0, got None and -1",
        ),
        (["--weights", "w", "x.jpg", "--accelerator=tpu"], "--accelerator: invalid choice: 'tpu'"),
        (["--weights", "w"], "images"),
        (["x.jpg"], "--weights"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        _parse(options)


def test_the_defaults_are_those_of_the_help_page() -> None:
    arguments = _parse(["a.jpg", "b.jpg", "--weights=w"])
    assert arguments.images == [Path("a.jpg"), Path("b.jpg")]
    assert (arguments.out, arguments.batch_size, arguments.num_workers) == (None, None, 2)


def test_options_may_stand_between_images() -> None:
    arguments = _parse(["a.jpg", "--weights", "w", "b.jpg", "--out", "x.csv", "c.jpg"])
    assert [str(path) for path in arguments.images] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("strict", [False, True])
def test_an_image_that_cannot_be_read_does_not_cost_the_rows_of_the_others(
    strict: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("scalablevit_pl"), "propagate", True)  # a test may have shown the log
    model = create_model("scalablevit_nano", num_classes=2)
    model.pretrained_cfg["input_size"] = (3, 28, 28)
    model.save_pretrained(tmp_path / "model")
    names = ["1.png", "2.png", "3.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("L", (28, 28)).save(tmp_path / name)
    (tmp_path / "2.png").write_bytes(b"no image")
    words = [
        "--weights",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "x.csv"),
        "--batch_size=1",
        "--num_workers=0",
    ]
    words += ["--accelerator=cpu", *(["--strict"] if strict else []), "--", *(str(tmp_path / name) for name in names)]
    if strict:
        with pytest.raises(ValueError, match=r"cannot read .*2\.png"):
            predict_files(words)
        assert not (tmp_path / "x.csv").exists()
        return
    assert predict_files(words) == 1
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["1.png", "3.png", r"\udcff.png"]
    assert f"cannot read {tmp_path / '2.png'}: it is not an image" in caplog.text
    assert capsys.readouterr().err.endswith("1 of 4 images cannot be read and have no row\n")


def test_flip_averages_the_probabilities_of_both_images(tmp_path: Path) -> None:
    model = create_model("scalablevit_nano", num_classes=3)
    model.pretrained_cfg["input_size"] = (3, 28, 28)
    model.save_pretrained(tmp_path / "model")
    image = Image.effect_noise((28, 28), 90).convert("RGB")
    image.save(tmp_path / "1.png")
    words = ["--weights", str(tmp_path / "model"), "--out", str(tmp_path / "x.csv"), "--num_workers=0"]
    assert predict_files([*words, "--accelerator=cpu", "--tta=flip", str(tmp_path / "1.png")]) == 0
    both = [dict(row) for row in model.predict([image, ImageOps.mirror(image)], top_k=3)]
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    for rank in (1, 2, 3):
        mean = sum(probabilities[row[f"label_{rank}"]] for probabilities in both) / 2
        assert float(row[f"probability_{rank}"]) == pytest.approx(mean, abs=2e-6)
        assert abs(both[0][row[f"label_{rank}"]] - mean) > 1e-5


@pytest.mark.parametrize("terminal", [True, False])
def test_labels_are_escaped_for_a_terminal_alone(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(small(), ["\x1b[2Jcat"] * 3).save_pretrained(tmp_path / "model")
    Image.new("L", (64, 64)).save(tmp_path / "1.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    predict_files(["--weights", str(tmp_path / "model"), "--accelerator=cpu", str(tmp_path / "1.png")])
    shown = r"\x1b[2Jcat" if terminal else "\x1b[2Jcat"
    assert f",{shown}," in capsys.readouterr().out


def test_a_table_replaces_neither_images_nor_weights_nor_a_folder(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"x")
    for out in (image, tmp_path / "." / "a.jpg", tmp_path, tmp_path / "missing" / "x.csv"):
        with pytest.raises(ValueError, match="--out"):
            check_output("--out", out, inputs=[image])
    check_output("--out", tmp_path / "x.csv", inputs=[image])


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words that predict two of three images of different sizes by a segmenter; the third is not an image."""
    description = SimpleNamespace(task="semantic-segmentation", multi_label=False)
    names = [f"class {index}" for index in range(CLASSES)]
    stored = SimpleNamespace(description=description, class_names=names, preprocessing=SCENE)
    for name, result in (
        ("pin_weights", "w"),
        ("weights_path", tmp_path / "w"),
        ("load_weights", stored),
        ("build_stored", Coarse()),
    ):
        monkeypatch.setattr(predict, name, lambda *given, result=result: result)
    (tmp_path / "photos").mkdir()
    for index in (0, 2):
        make_scene(index)[0].save(tmp_path / f"photos/{index}.png")
    (tmp_path / "photos/1.png").write_bytes(b"no image")
    return ["--weights=w", "--num_workers=0", "--accelerator=cpu", str(tmp_path / "photos")]


@pytest.mark.parametrize("overlay", [False, True])
def test_a_segmenter_writes_masks_shares_and_overlays(overlay: bool, segmenter: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new/masks"
    assert predict_files([*segmenter, f"--out={out}", *(["--overlay"] if overlay else [])]) == 1  # one is not an image
    overlays = ["0_overlay.jpg", "2_overlay.jpg"] if overlay else []
    assert sorted(path.name for path in out.iterdir()) == sorted(["0.png", "2.png", "shares.csv", *overlays])
    assert [path.name for path in out.parent.iterdir()] == ["masks"]
    for index in (0, 2):
        with Image.open(out / f"{index}.png") as mask:
            assert mask.size == make_scene(index)[0].size
    with (out / "shares.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["mask"] for row in rows] == ["0.png", "2.png"]
    assert [row["path"] for row in rows] == [str(tmp_path / f"photos/{index}.png") for index in (0, 2)]


@pytest.mark.parametrize("tta", ["flip", "multiscale"])
def test_a_segmenter_averages_scales_and_mirror_images(tta: str, segmenter: list[str], tmp_path: Path) -> None:
    plain, averaged = [], []
    for words, found in (([], plain), ([f"--tta={tta}"], averaged)):
        predict_files([*segmenter, *words, f"--out={tmp_path / 'masks'}"])
        found += [np.asarray(Image.open(tmp_path / f"masks/{index}.png")) for index in (0, 2)]
    assert any((one != other).any() for one, other in zip(plain, averaged, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the predictions are masks, one file for each image: name a folder for them with --out"),
        (["--out={photos}"], "--out '.*photos' holds images or weights that could be replaced: choose another folder"),
        (["--out={photos}/0.png"], "--out '.*0.png' must be the name of a folder that is new or writable"),
    ],
)
def test_masks_need_a_folder_of_their_own(words: list[str], message: str, segmenter: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        predict_files([*segmenter, *(word.format(photos=tmp_path / "photos") for word in words)])
    assert sorted(tmp_path.rglob("*")) == before


def test_incomplete_masks_are_removed(segmenter: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        predict_files([*segmenter, "--strict", "--batch_size=1", f"--out={tmp_path / 'masks'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlay"], "--overlay draws masks over images, and this network predicts none: omit it"),
        (["--tta=multiscale"], "tta must be flip for a classifier, got 'multiscale'"),
    ],
)
def test_options_of_segmenters_are_errors_for_classifiers(words: list[str], message: str, tmp_path: Path) -> None:
    annotate(small(), ["a", "b", "c"]).save_pretrained(tmp_path / "model")
    Image.new("L", (64, 64)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        predict_files(["--weights", str(tmp_path / "model"), *words, str(tmp_path / "1.png")])


def test_a_folder_for_files_is_new_or_holds_no_inputs(tmp_path: Path) -> None:
    check_output_folder("--out", tmp_path / "a/b", inputs=[tmp_path / "x.png"])
    check_output_folder("--out", tmp_path, inputs=[tmp_path / "a/x.png"])
    with pytest.raises(ValueError, match="holds images or weights"):
        check_output_folder("--out", tmp_path / "a/..", inputs=[tmp_path / "x.png"])
