"""Find the images in folders and the masks that belong to them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from scalablevit_pl.data.folders import build_splits, describe_files, list_images, loose_files, subfolders
from scalablevit_pl.data.splits import split_named
from scalablevit_pl.text import nfc

# Names of folders, in lower case and in the order of preference.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
MASK_FOLDERS = (
    *("masks", "mask", "annotations", "annotation", "labels", "label"),
    *("segmentations", "segmentation", "segmentationclass", "gtfine", "gt"),
)
# Ends of the names of files, which an image and its mask do not have in common.
IMAGE_ENDS = ("_leftImg8bit", "_image")
TRAIN_IDS = "_gtFine_labelTrainIds"
OTHER_IDS = re.compile("_gtFine_(color|instanceIds|labelIds|instanceTrainIds)$")
MASK_ENDS = (TRAIN_IDS, "_mask", "_masks", "_label", "_labels", "_segmentation", "_seg", "_gt")
LISTS = "ImageSets/Segmentation"  # of VOC
LAYOUT = "images and masks in folders of these names, with or without train, val and test above or below them"
# fmt: off
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# fmt: on
# The classes of data sets whose folders do not name them, by a folder that only they have.
KNOWN_CLASSES = {"SegmentationClass": VOC, "gtFine": CITYSCAPES}

Files = dict[str, Path]  # by the name that an image and its mask have in common


def known_classes(folder: Path) -> list[str] | None:
    """Return the classes of a data set with a known layout, or None."""
    return next((list(names) for name, names in KNOWN_CLASSES.items() if (folder / name).is_dir()), None)


def load_mask_folder(folder: Path) -> tuple[datasets.DatasetDict, str]:
    """Load images with masks from the layouts of ADE20K, VOC and Cityscapes, and similar ones; the files stay in place.

    An image and its mask are at the same place below two folders, with the same name but for its end. The masks of a
    split without any are None.

    Returns:
        The splits with the columns `image` and `mask`, and a description of the files that are left out.

    Raises:
        ValueError: If the layout is unknown, or an image or a mask has no partner.
    """
    left_out: Counter[str] = Counter()
    places = _find_places(folder, left_out)
    _check_train_ids(folder)
    files = {split: _list_files(*found, left_out) for split, found in places.items()}
    if (folder / LISTS).is_dir():
        files = _read_lists(folder / LISTS, *files["train"])
    rows = {split: _pair(split, *found) for split, found in files.items()}
    empty = next((split for split, each in rows.items() if not each), None)
    if empty is not None:
        raise ValueError(f"split {empty!r} of {str(folder)!r} has no images: add some, or delete its folders")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return build_splits(rows, features), describe_files(left_out)


def _find_places(folder: Path, left_out: Counter[str]) -> dict[str, tuple[Path | None, Path | None]]:
    """Return the folders of images and masks of each split."""
    images, masks = _find_folder(folder, IMAGE_FOLDERS), _find_folder(folder, MASK_FOLDERS)
    if images is not None:
        inside, inside_masks = (_split_folders(path, left_out) if path else {} for path in (images, masks))
        if not inside:
            return {"train": (images, masks)}
        return {split: (inside.get(split), inside_masks.get(split)) for split in inside | inside_masks}
    found: dict[str, tuple[Path | None, Path | None]] = {}
    for split, path in _split_folders(folder, Counter()).items():
        images, masks = _find_folder(path, IMAGE_FOLDERS), _find_folder(path, MASK_FOLDERS)
        if images or masks:
            found[split] = images, masks
    if not found:
        raise ValueError(f"{str(folder)!r} contains neither parquet files nor {LAYOUT}: check the path and the layout")
    return found


def _find_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in a folder that has one of some names in any capitalization."""
    inside = {path.name.lower(): path for path in subfolders(folder)}
    return next((inside[name] for name in names if name in inside), None)


def _split_folders(folder: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Return the folders of splits in a folder, and count what else it contains if there are any."""
    named = {split: path for path in subfolders(folder) if (split := split_named(path.name))}
    if named:
        others = [path.name for path in subfolders(folder) if path not in named.values()]
        left_out.update(f"folder {name!r}" for name in others)
        left_out.update(loose_files(folder))
    return named


def _check_train_ids(folder: Path) -> None:
    masks = folder / "gtFine"
    if masks.is_dir() and next(masks.rglob(f"*{TRAIN_IDS}.png"), None) is None:
        raise ValueError(
            f"{str(masks)!r} has no files *{TRAIN_IDS}.png: run csCreateTrainIdLabelImgs of cityscapesscripts"
        )


def _list_files(images: Path | None, masks: Path | None, left_out: Counter[str]) -> tuple[Files, Files]:
    """Return the images and the masks in two folders by the names that they have in common."""
    known: Files = {}
    for path, name in _names(images, left_out):
        name = _without_end(name, IMAGE_ENDS)
        if name in known:
            raise ValueError(f"{str(known[name])!r} and {str(path)!r} have the same name: rename or delete one")
        known[name] = path
    of_mask: Files = {}
    for path, name in _names(masks, left_out):
        if OTHER_IDS.search(name):
            continue
        name = name if name in known else _without_end(name, (*MASK_ENDS, *IMAGE_ENDS))
        if name in of_mask:
            raise ValueError(f"{str(of_mask[name])!r} and {str(path)!r} are masks of the same image: delete one")
        of_mask[name] = path
    return known, of_mask


def _names(folder: Path | None, left_out: Counter[str]) -> list[tuple[Path, str]]:
    """Return the image files in a folder with their path in it, without the suffix."""
    if folder is None:
        return []
    found = list_images(folder)
    left_out.update(found.left_out)
    return [(path, nfc(str(path.relative_to(folder).with_suffix("")))) for path in found.paths]


def _without_end(name: str, ends: Iterable[str]) -> str:
    end = next((end for end in ends if name.lower().endswith(end.lower())), "")
    return name.removesuffix(name[len(name) - len(end) :]) if end else name


def _read_lists(folder: Path, images: Files, masks: Files) -> dict[str, tuple[Files, Files]]:
    """Return the images and masks of the splits that VOC's lists of names define."""
    splits = {}
    for path in sorted(folder.glob("*.txt")):
        names = [nfc(name) for name in path.read_text(encoding="utf-8").split()]
        missing = [name for name in names if name not in images]
        if missing:
            raise ValueError(f"{str(path)!r} lists {len(missing):,} images that do not exist, the first {missing[0]!r}")
        of_mask = {name: masks[name] for name in names if name in masks}
        splits[split_named(path.stem) or path.stem] = {name: images[name] for name in names}, of_mask
    return splits


def _pair(split: str, images: Files, masks: Files) -> list[dict[str, str | None]]:
    """Return the rows of a split."""
    unmasked = [path for name, path in images.items() if name not in masks]
    orphans = [path for name, path in masks.items() if name not in images]
    if orphans:
        raise ValueError(
            f"{len(orphans):,} masks of split {split!r} have no image, the first {str(orphans[0])!r}: add the images, "
            "or delete the masks"
        )
    if masks and unmasked:
        raise ValueError(
            f"{len(unmasked):,} images of split {split!r} have no mask, the first {str(unmasked[0])!r}: add the masks, "
            "or delete the images"
        )
    return [{"image": str(path), "mask": str(masks[name]) if masks else None} for name, path in images.items()]
