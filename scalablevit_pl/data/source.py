"""Load the splits of a data set from the Hub, a local folder, or a shipped sample."""

import glob
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from scalablevit_pl.data.folders import load_image_folder, subfolders
from scalablevit_pl.data.repository import SHARD, check_shards, fetch_shards, find_commit, list_shards, noted_commit
from scalablevit_pl.data.samples.scenes import load_scenes
from scalablevit_pl.data.splits import split_named
from scalablevit_pl.text import one_line
from scalablevit_pl.weights.hub.client import HubError, Result

SAMPLES = Path(__file__).parent / "samples"
SCENES = SAMPLES / "fashion_scenes_sample"

Wanted = Callable[[Collection[str]], Collection[str]]
FolderReader = Callable[[Path], datasets.DatasetDict]


def find_revision(dataset: str, revision: str | None, ask: bool = True) -> str | None:
    """Return the commit of a data set on the Hub, or None for one on this machine.

    With `ask`, a tag or branch is resolved on the Hub; else what this machine resolved it to last is used, if it did.
    """
    if local_folder(dataset) is not None:
        return None
    if not dataset.strip():
        raise ValueError("--data.dataset is empty: give a folder, or a data set's id on the Hub")
    if Path(dataset).expanduser().exists():
        raise ValueError(f"{dataset!r} is a file: give the folder that contains it")
    if not may_be_hub_id(dataset):
        raise ValueError(f"there is no folder {dataset!r}: check the path")
    noted = None if ask else noted_commit(dataset, revision)
    return noted or _on_hub(dataset, lambda: find_commit(dataset, revision))


def load_splits(
    dataset: str,
    commit: str | None = None,
    wanted: Wanted = list,
    read_folder: FolderReader = lambda folder: load_image_folder(folder)[0],
) -> datasets.DatasetDict:
    """Load splits of a data set without decoding images; from the Hub, fetch only the files of the wanted splits."""
    folder, commit = local_folder(dataset), commit or find_revision(dataset, None)
    if folder is not None and _holds_parquet(folder):
        files = _find_parquet(folder)
    elif commit is not None and (shards := _on_hub(dataset, lambda: list_shards(dataset, commit))):
        names = [name for split in _choose(shards, wanted) for name in shards[split]]
        check_shards(names)  # before they are fetched
        folder = _on_hub(dataset, lambda: fetch_shards(dataset, commit, names))
        files = {split: [folder / name for name in shards[split]] for split in shards}
    else:
        loaded = _load_otherwise(dataset, folder, commit, read_folder)
        return datasets.DatasetDict({split: loaded[split] for split in _choose(loaded, wanted)})
    return _load_parquet(folder, {split: files[split] for split in _choose(files, wanted)})


def find_stream(dataset: str, commit: str | None, split: str) -> list[str]:
    """Return the addresses of the parquet files of a split, for reading them in place."""
    folder = local_folder(dataset)
    if folder is not None:
        files = {name: list(map(str, paths)) for name, paths in _find_parquet(folder).items()}
    else:
        shards = _on_hub(dataset, lambda: list_shards(dataset, commit or ""))
        files = {name: [f"hf://datasets/{dataset}@{commit}/{path}" for path in paths] for name, paths in shards.items()}
    if not files:
        raise ValueError(f"{dataset!r} has no parquet files that can be streamed: set --data.streaming false")
    chosen = files[_choose(files, lambda _: [split])[0]]
    check_shards(chosen)
    return chosen


def _on_hub(dataset: str, call: Callable[[], Result]) -> Result:
    """Return the result of a call to the Hub; an error also mentions the folder that the name may have meant."""
    try:
        return call()
    except HubError as error:
        raise ValueError(f"there is no folder {dataset!r} here; on the Hub: {error}") from error


def _load_otherwise(
    dataset: str, folder: Path | None, commit: str | None, read_folder: FolderReader
) -> datasets.DatasetDict:
    """Load all splits of a folder without parquet files, or of a repository in a layout that only `datasets` knows."""
    if folder is not None:
        return load_scenes() if folder == SCENES else read_folder(folder)
    try:
        return datasets.load_dataset(dataset, revision=commit)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"`datasets` cannot load {dataset!r} from the Hub ({one_line(error)}): for gated data accept its terms "
            "there and log in with `hf auth login`; otherwise fetch it and give a folder"
        ) from error


def _choose(splits: Iterable[str], wanted: Wanted) -> list[str]:
    names = list(splits)
    chosen = wanted(names)
    missing = [name for name in chosen if name not in names]
    if missing:
        raise ValueError(f"there is no split {missing[0]!r}: choose among {', '.join(names)}")
    return [name for name in names if name in chosen]


def local_folder(dataset: str) -> Path | None:
    """Return the folder of a data set on this machine, such as a sample in this package, or None."""
    shipped = SAMPLES / dataset
    folder = shipped if (shipped / "README.md").is_file() else Path(dataset).expanduser()
    return folder if dataset.strip() and folder.is_dir() else None


def may_be_hub_id(dataset: str) -> bool:
    """Return whether a name has the form of an id on the Hub and does not exist on this machine."""
    parts = dataset.split("/")
    formed = len(parts) <= 2 and all(parts) and parts[0] not in (".", "..", "~")
    return formed and local_folder(dataset) is None and not Path(dataset).expanduser().exists()


def _holds_parquet(folder: Path) -> bool:
    """Return whether parquet files lie where data sets have them, not among the images of a class."""
    inside = [path for path in subfolders(folder) if path.name == "data" or split_named(path.name)]
    return any(next(place.glob("*.parquet"), None) for place in [folder, *inside])


def _find_parquet(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            files.setdefault(_split_of(relative), []).append(path)
    return files


def _load_parquet(folder: Path, files: dict[str, list[Path]]) -> datasets.DatasetDict:
    """Load parquet files as splits.

    They are listed one by one so that other files in the folder, such as a data card, cannot change what is loaded.
    """
    check_shards(str(path) for paths in files.values() for path in paths)
    try:
        _check_label_order([path for paths in files.values() for path in paths])
        escaped = {split: [glob.escape(str(path.resolve())) for path in paths] for split, paths in files.items()}
        return datasets.load_dataset("parquet", data_files=escaped)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(
            f"cannot read the parquet files in {str(folder)!r}: {reason}; repair or delete them"
        ) from error


def _split_of(path: Path) -> str:
    """Return the split named in a path such as `train-00000-of-00002.parquet` or `test/0.parquet`; else `train`."""
    words = [word for part in path.with_suffix("").parts for word in re.split(r"[^A-Za-z0-9]+", part)]
    shard = SHARD.fullmatch(path.name)
    other = shard["split"] if shard else "train"
    return next((split for split in map(split_named, words) if split is not None), other)


def _check_label_order(paths: list[Path]) -> None:
    """Check that files declare the same class names: `datasets` would apply those of the first file to all."""
    declared: dict[str, tuple[Path, list[str]]] = {}
    for path in paths:
        for column, feature in datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path)).items():
            if isinstance(feature, datasets.ClassLabel):
                first, names = declared.setdefault(column, (path, feature.names))
                if feature.names != names:
                    raise ValueError(f"{path.name} and {first.name} declare different classes in the column {column!r}")
