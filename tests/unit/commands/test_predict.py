from pathlib import Path

import pytest

from scalablevit_pl.commands.predict import _check_out, _parse, find_images


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
        (["--weights", "w", "x.jpg", "--num_workers=-1"], "need --batch_size ≥ 1 and --num_workers ≥ 0, got 32 and -1"),
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
    assert (arguments.out, arguments.batch_size, arguments.num_workers) == (None, 32, 2)


def test_options_may_stand_between_images() -> None:
    arguments = _parse(["a.jpg", "--weights", "w", "b.jpg", "--out", "x.csv", "c.jpg"])
    assert [str(path) for path in arguments.images] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_table_replaces_neither_images_nor_weights_nor_a_folder(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"x")
    for out in (image, tmp_path / "." / "a.jpg", tmp_path, tmp_path / "missing" / "x.csv"):
        with pytest.raises(ValueError, match="--out"):
            _check_out(out, [image])
    _check_out(tmp_path / "x.csv", [image])
