from pathlib import Path

import pytest

from scalablevit_pl.data.class_names import ClassFile, check_names, find_class_file, read_class_file

WRITTEN = {
    "classes.txt": "sky\n\n  ground floor \nsea\n",
    "lines.TXT": "\ufeffsky\r\nground floor\r\nsea\r\n",
    "data.yaml": "path: x\nnames: [sky, ground floor, sea]\n",
    "by_index.yaml": "names:\n  1: ground floor\n  0: sky\n  2: sea\n",
    "id2label.json": '{"0": "sky", "2": "sea", "1": "ground floor"}',
    "list.json": '["sky", "ground floor", "sea"]',
    "nested.json": '{"id2label": {"0": "sky", "1": "ground floor", "2": "sea"}}',
    "objectInfo150.txt": "Idx\tRatio\tTrain\tVal\tName\n"
    "1\t0.1\t9\t9\tsky\n2\t0.1\t9\t9\tground floor, base\n3\t0.1\t9\t9\tsea, ocean\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_names_are_read_in_the_order_of_their_indices(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(WRITTEN[name], encoding="utf-8", newline="")
    assert read_class_file(tmp_path / name) == ClassFile(["sky", "ground floor", "sea"])


def test_a_palette_may_be_beside_the_names(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [sky, sea]\npalette: [[0, 0, 0], [255, 10, 0]]\n")
    assert read_class_file(tmp_path / "data.yaml").palette == [(0, 0, 0), (255, 10, 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: {0: sky, 2: sea}\n", r"data\.yaml' has no class names: list them as `names`"),
        ("path: x\n", "has no class names"),
        ("", "has no class names"),
        ("names: [sky, sky]\n", r"data\.yaml' names the class 'sky' twice"),
        ("names: []\n", "names 0 classes: masks can have 1 to 255"),
        (f"names: {list(range(256))}\n", "names 256 classes: masks can have 1 to 255"),
        (f"names: {[1] * 100_000}\n", "names 100,000 classes"),  # before names are compared
        ("names: [sky\n", "cannot read the class names in"),
        ("names: [sky]\npalette: [0, 1]\n", "has a palette that is not a list of colors of three numbers"),
    ],
)
def test_files_without_valid_names_are_errors(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_file(tmp_path / "data.yaml")


def test_a_missing_file_and_one_that_is_not_utf_8_are_errors(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    for name in ("names.txt", "missing.txt"):
        with pytest.raises(ValueError, match=f"cannot read the class names in '.*{name}'"):
            read_class_file(tmp_path / name)


def test_the_file_in_a_folder_is_found(tmp_path: Path) -> None:
    assert find_class_file(tmp_path) is None
    for name in ("id2label.json", "data.yaml", "classes.txt"):
        (tmp_path / name).write_text("")
        assert find_class_file(tmp_path) == tmp_path / name


def test_names_that_look_alike_are_one_spelling() -> None:
    assert check_names(["cafe\u0301"], "here") == ["caf\u00e9"]
    with pytest.raises(ValueError, match="here names the class 'caf\u00e9' twice"):
        check_names(["cafe\u0301", "caf\u00e9"], "here")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 5000, "cannot read the class names"),
        ("names: [a, 2001-99-99]", "cannot read the class names"),
        ("names: &a [*a, b]", "has lists among the class names"),
        ("names: [a, {b: c}]", "has lists among the class names"),
    ],
)
def test_structures_that_are_not_names_are_errors(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ValueError, match=problem):
        read_class_file(tmp_path / "data.yaml")


def test_names_that_aliases_multiply_are_not_written_out(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30)]
    (tmp_path / "data.yaml").write_text(f"l0: &l0 x\n{''.join(levels)}names: [*l29]\n")
    with pytest.raises(ValueError, match="has lists among the class names"):
        read_class_file(tmp_path / "data.yaml")
