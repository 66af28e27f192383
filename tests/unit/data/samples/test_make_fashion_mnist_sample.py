"""The Fashion-MNIST sample that ships with the package, and the script that made it."""

import gzip
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Image, load_dataset

from scalablevit_pl.data import samples
from scalablevit_pl.data.samples.make_fashion_mnist_sample import make_sample

SAMPLE = Path(samples.__file__).parent / "fashion_mnist_sample"
SCRIPT = Path(samples.__file__).parent / "make_fashion_mnist_sample.py"
ORIGINAL = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
PREFIXES = {"train": "train", "test": "t10k"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    return load_dataset(str(SAMPLE), cache_dir=str(tmp_path_factory.mktemp("cache")))


def read_original(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a split of 28×28 IDX images without the code under test."""
    images = gzip.decompress((folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(images, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


def pack_idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def first_per_class(labels: np.ndarray, count: int) -> list[int]:
    """List the indices of the first `count` images of each class, by counting along the file."""
    seen: Counter[int] = Counter()
    kept = []
    for index, label in enumerate(labels.tolist()):
        seen[label] += 1
        if seen[label] <= count:
            kept.append(index)
    return kept


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def assert_is_cut_of(split: DatasetDict, images: np.ndarray, labels: np.ndarray, count: int) -> None:
    """Compare every row with the original: labels, pixels, order and the index in the image's name."""
    kept = first_per_class(labels, count)
    assert split["label"][:] == labels[kept].tolist()
    assert np.array_equal(np.stack([np.asarray(image) for image in split["image"]]), images[kept])
    named = [row["path"] for row in split.cast_column("image", Image(decode=False))["image"]]
    assert named == [f"{index:05d}.png" for index in kept]


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """Four tiny IDX files: 50 training and 40 test images of noise, each class at least twice."""
    folder = tmp_path / "idx"
    folder.mkdir()
    generator = np.random.default_rng(7)
    for prefix, count in (("train", 50), ("t10k", 40)):
        labels = generator.permutation(np.concatenate([np.repeat(np.arange(10), 2), np.arange(count - 20) % 7]))
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(pack_idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(pack_idx(labels.astype(np.uint8)))
    return folder


def test_sample_has_the_splits_and_features(sample: DatasetDict) -> None:
    assert set(sample) == {"train", "test"}
    for split in sample.values():
        assert split.features == {"image": Image(), "label": ClassLabel(names=CLASSES)}


def test_sample_is_balanced(sample: DatasetDict) -> None:
    assert Counter(sample["train"]["label"]) == dict.fromkeys(range(10), 1000)
    assert Counter(sample["test"]["label"]) == dict.fromkeys(range(10), 200)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_images_are_grayscale_png_of_28_by_28(sample: DatasetDict, split: str) -> None:
    assert {(image.format, image.mode, image.size) for image in sample[split]["image"]} == {("PNG", "L", (28, 28))}


def test_sample_is_small_and_includes_its_license() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 7_000_000
    assert "2017 Zalando SE" in (SAMPLE / "LICENSE").read_text(encoding="utf-8")


def test_sample_equals_the_original(sample: DatasetDict) -> None:
    if not ORIGINAL.is_dir():
        pytest.skip("the original Fashion-MNIST files (Debian package dataset-fashion-mnist) are not installed")
    for split, count in (("train", 1000), ("test", 200)):
        assert_is_cut_of(sample[split], *read_original(ORIGINAL, split), count)


def test_script_cuts_the_first_of_each_class(idx: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = run_python(SCRIPT, "--idx", idx, "--out", out, "--train-per-class", 2, "--test-per-class", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet"]
    made = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert_is_cut_of(made["train"], *read_original(idx, "train"), 2)
    assert_is_cut_of(made["test"], *read_original(idx, "test"), 1)


@pytest.mark.slow  # importing the package around it takes far longer than the script
def test_script_runs_as_a_module() -> None:
    done = run_python("-m", "scalablevit_pl.data.samples.make_fashion_mnist_sample", "--help")
    assert done.returncode == 0
    assert "--idx FOLDER" in done.stdout


def test_script_is_deterministic(idx: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_sample(idx, tmp_path / name, train_per_class=2, test_per_class=2)
    for file in ("train.parquet", "test.parquet"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_script_explains_a_missing_file_in_one_sentence(idx: Path, tmp_path: Path) -> None:
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    done = run_python(SCRIPT, "--idx", idx, "--out", tmp_path / "out", "--train-per-class", 2, "--test-per-class", 2)
    assert done.returncode == 1
    assert re.fullmatch(r".*t10k-labels-idx1-ubyte\.gz is missing: [^\n]*\.\n", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda labels: labels[:-12], "is not a whole IDX file"),
        (gzip.decompress, "is not a whole IDX file"),
        (lambda labels: gzip.compress(b"\0\0"), "is not a whole IDX file"),
        (lambda labels: gzip.compress(gzip.decompress(labels)[:-1]), "is not a whole IDX file"),
        (lambda labels: pack_idx(np.zeros(41, np.uint8)), "holds 40 t10k images and 41 labels"),
        (lambda labels: pack_idx(np.arange(40, dtype=np.uint8) % 9), "a class has 0 images: ask for 1 to 0"),
    ],
    ids=["cut off", "not gzip", "no header", "short", "other length", "rare class"],
)
def test_invalid_labels_are_rejected_before_anything_is_written(
    idx: Path, tmp_path: Path, damage: Callable[[bytes], bytes], sentence: str
) -> None:
    labels = idx / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(damage(labels.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_sample(idx, tmp_path / "out", train_per_class=2, test_per_class=2)
    assert not (tmp_path / "out").exists()
