import errno
import json
import os
import re
from pathlib import Path

import pytest

from scalablevit_pl.storage import folder_written_aside, save_json, umask, written_aside


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    with written_aside(tmp_path / "x.txt") as aside:
        aside.write_text("new")
        assert not (tmp_path / "x.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_an_error_keeps_the_previous_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(RuntimeError), written_aside(tmp_path / "x.txt") as aside:  # noqa: PT012
        aside.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "old"


def test_json_is_saved(tmp_path: Path) -> None:
    save_json({"a": 1.5, "b": ["ü"]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": 1.5, "b": ["ü"]}


def test_a_new_folder_appears_with_all_of_its_files(tmp_path: Path) -> None:
    with folder_written_aside(tmp_path / "a" / "b") as aside:
        (aside / "x").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
        assert aside.parent == tmp_path / "a"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "new"


def test_in_an_existing_folder_files_of_the_same_names_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / name).write_text("old")
    with folder_written_aside(folder) as aside:
        for name in ("x", "z"):
            (aside / name).write_text("new")
            assert sorted(path.name for path in folder.iterdir()) == ["x", "y"]
            assert (folder / "x").read_text() == "old"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"x": "new", "y": "old", "z": "new"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_keeps_the_previous_folder_and_leaves_no_temporary_one(
    tmp_path: Path, there: bool, error: type[BaseException]
) -> None:
    folder = tmp_path / "a"
    if there:
        folder.mkdir()
        (folder / "x").write_text("old")
    with pytest.raises(error), folder_written_aside(folder) as aside:  # noqa: PT012
        (aside / "x").write_text("half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.rglob("x")} == ({"x": "old"} if there else {})
    assert list(tmp_path.iterdir()) == ([folder] if there else [])


def test_a_folder_in_the_way_is_noticed_before_any_file_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "y").mkdir(parents=True)
    (folder / "x").write_text("old")
    with (  # noqa: PT012
        pytest.raises(IsADirectoryError, match=re.escape(f"'{folder / 'y'}'")),
        folder_written_aside(folder) as aside,
    ):
        for name in ("x", "y"):
            (aside / name).write_text("new")
    assert (folder / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.ENOSPC}] full: '{tmp_path / 'a'}'")):  # noqa: SIM117
        with folder_written_aside(tmp_path / "a"):
            raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="'its own'"), folder_written_aside(tmp_path / "a"):
        raise OSError(errno.EACCES, "denied", "its own")


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_followed_and_files_are_written_next_to_its_target(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "other disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    if there:
        real.mkdir()
    link.symlink_to(real)
    with folder_written_aside(link) as aside:
        assert aside.parent == real.parent
        (aside / "x").write_text("new")
    assert link.is_symlink()
    assert (real / "x").read_text() == "new"
    assert list(real.parent.iterdir()) == [real]


def test_the_umask_is_read_and_kept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert umask() == umask() == 0o027
        with folder_written_aside(tmp_path / "a") as aside:
            (aside / "x").write_text("new")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750
    finally:
        assert os.umask(before) == 0o027
