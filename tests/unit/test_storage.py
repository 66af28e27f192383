import json
from pathlib import Path

import pytest

from scalablevit_pl.storage import save_json, written_aside


def test_a_file_takes_its_name_once_it_is_whole(tmp_path: Path) -> None:
    with written_aside(tmp_path / "x.txt") as aside:
        aside.write_text("new")
        assert not (tmp_path / "x.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_an_error_leaves_the_earlier_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(RuntimeError), written_aside(tmp_path / "x.txt") as aside:  # noqa: PT012
        aside.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "old"


def test_json_is_read_back(tmp_path: Path) -> None:
    save_json({"a": 1.5, "b": ["ü"]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": 1.5, "b": ["ü"]}
