import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler

from scalablevit_pl.commands import main as cli
from scalablevit_pl.commands import profile_data
from scalablevit_pl.commands.profile_data import read_options
from scalablevit_pl.data import Augmentation, ClassificationDataModule, Preprocessing
from scalablevit_pl.data.images import collate
from scalablevit_pl.data.transforms import BatchMix, PatchDraw, reference_transform
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.profiling import loader
from scalablevit_pl.profiling.loader import STAGES, Loaders, Source, compare, time_stages
from scalablevit_pl.profiling.loading_report import report
from scalablevit_pl.profiling.timing import Spread
from scalablevit_pl.randomness import seed_generators

QUICK = ["--config", "recipes/quickstart.yaml", "--workers=0", "--seconds=0.05", "--rounds=2", "--data.batch_size=4"]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["scalablevit"])


def run(*words: str) -> int:
    return cli.run("profile", ["data", *QUICK, *words])


def make_images(folder: Path, streamed: bool) -> Path:
    pixels, rows = np.random.RandomState(0), []
    for number in range(24):
        path = folder / ("train" if not streamed else "files") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        rows.append({"bytes": path.read_bytes(), "path": None})
    if not streamed:
        return folder
    names = datasets.ClassLabel(names=["class0", "class1"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    table = datasets.Dataset.from_dict({"image": rows, "label": [number % 2 for number in range(24)]}, features)
    (folder / "parquet").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(str(folder / "parquet" / f"{split}.parquet"))
    return folder / "parquet"


def make_data(folder: Path, augmentation: Augmentation | None) -> ClassificationDataModule:
    data = ClassificationDataModule(
        str(folder), batch_size=4, num_workers=0, preprocessing=Preprocessing(8, 1.0), augmentation=augmentation
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("streamed", [False, True])
def test_the_record_holds_rates_and_stages(streamed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    folder = make_images(tmp_path / "data", streamed)
    more = [f"--data.dataset={folder}", f"--data.streaming={str(streamed).lower()}", "--images=12"]
    assert run(*more, "--json", "out.json") == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert all(stage in table for stage in STAGES)
    record: dict[str, Any] = json.loads(Path("out.json").read_text())
    assert set(record) >= {"schema", "date", "versions", "machine", "settings", "images_per_second"}
    assert record["settings"]["images"] == 12
    (rates,) = record["images_per_second"]
    assert rates["workers"] == 0
    for way in ("ours", "theirs", "ratio"):
        assert 0.0 < rates[way]["least"] <= rates[way]["median"] <= rates[way]["most"]
    assert set(record["seconds_per_image"]) == set(STAGES)
    assert all(0.0 < spread["median"] < 1.0 for spread in record["seconds_per_image"].values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("runs")) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=1,x", "'x' is not a whole number from 0 to 256"),
        ("--workers=22222", "'22222' is not a whole number from 0 to 256"),
        ("--worker=2", "unknown option --worker: did you mean --workers"),
        ("--jsn", "unknown option --jsn: did you mean --json"),
        ("--seconds=0", "--seconds must be above 0"),
        ("--rounds=0", "--rounds and --images must be at least 1, got 0 and 1024"),
        ("--json=missing/out.json", "'missing/out.json' must be the name of a file in a folder that exists and"),
        ("--json=.", "must be the name of a file"),
    ],
)
def test_options_out_of_range_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options([option])


def test_a_mistake_in_the_recipe_is_the_same_error_as_in_a_fit() -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        run("--data.dataset=./missing")


@pytest.mark.parametrize("streamed", [False, True])
def test_loading_errors_come_before_any_measurement(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_data, "compare", lambda *_: pytest.fail("measured"))
    (tmp_path / "data").mkdir()
    more = [f"--data.dataset={make_images(tmp_path / 'data', streamed)}", f"--data.streaming={str(streamed).lower()}"]
    with pytest.raises(ValueError, match=r"do not fill (one|a) batch of 64"):
        run(*more, "--data.batch_size=64")
    if streamed:
        with pytest.raises(ValueError, match=r"1 parquet files .* × 2 worker.*: choose --workers and "):
            run(*more, "--workers=0,1,2")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_unreadable_image_is_named_as_in_a_fit(streamed: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda _, path: path.write_bytes(b"no image"))
        folder = make_images(tmp_path / "data", streamed)
    name = "row 0 of split 'train'" if streamed else r"data/train/class0/\d+\.png"
    with pytest.raises(ValueError, match=f"cannot read .*{name}: it is no image of a known format; mend or remove it"):
        run(f"--data.dataset={folder}", f"--data.streaming={str(streamed).lower()}")


def test_stages_are_timed_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its own time; their sum is that of the loader."""
    (tmp_path / "data").mkdir()
    data = make_data(make_images(tmp_path / "data", False), Augmentation(auto_augment=None))
    (tmp_path / "tree").mkdir()
    source, seen, clock = Source(data, 12, tmp_path / "tree"), list[str](), iter(range(10**6))
    decode, mix, normalize = loader.decode_image, BatchMix.__call__, Preprocessing.normalize
    monkeypatch.setattr(loader, "decode_image", lambda content: (seen.append("decode"), decode(content))[1])
    monkeypatch.setattr(BatchMix, "__call__", lambda *values: (seen.append("mix"), mix(*values))[1])
    monkeypatch.setattr(Preprocessing, "normalize", lambda *values: (seen.append("normalize"), normalize(*values))[1])
    monkeypatch.setattr(loader, "collate", lambda samples: (seen.append("collate"), collate(samples))[1])
    draw = PatchDraw.__call__
    monkeypatch.setattr(PatchDraw, "__call__", lambda patch: (seen.append("patch"), draw(patch))[1])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
    stages = time_stages(source, 1)
    assert seen == [*["decode", "patch"] * 12, "collate", "normalize", "mix"] * 2  # the first is discarded
    # Readings of the clock for each image: one after read, decode, crop and collate, two for augment.
    expected = {"read": 1, "decode": 1, "crop": 1, "augment": 2, "collate": 13 / 12, "transfer": 1 / 12}
    assert {stage: spread.median for stage, spread in stages.items()} == pytest.approx(expected)


def test_ratios_are_of_one_round_and_the_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both:
        ours, theirs = (staticmethod(lambda workers, way=way: (way, workers)) for way in ("ours", "theirs"))

    seen, rates = list[Any](), iter([10.0, 30.0, 80.0, 20.0, 50.0, 100.0])
    monkeypatch.setattr(
        loader, "measure_throughput", lambda made, seconds: (seen.append((*made, seconds)), next(rates))[1]
    )
    found = compare(Both(), 3, 3, 0.5)  # type: ignore[arg-type]
    order = ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert seen == [(way, 3, 0.5) for way in order]
    assert found.workers == 3
    assert (found.ours, found.theirs) == (Spread.of([30.0, 80.0, 100.0]), Spread.of([10.0, 20.0, 50.0]))
    assert found.ratio == Spread.of([2.0, 3.0, 4.0])


def test_sigterm_removes_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    folder, temporary = make_images(tmp_path / "data", False), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = signal.getsignal(signal.SIGTERM)

    def stopped(*_: Any) -> None:
        assert list(temporary.iterdir()) != []
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(profile_data, "compare", stopped)
    with pytest.raises(SystemExit) as caught:
        run(f"--data.dataset={folder}")
    assert caught.value.code == 128 + signal.SIGTERM
    assert list(temporary.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_both_loaders_use_the_same_images_and_augmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    data = make_data(make_images(tmp_path / "data", False), Augmentation(random_erasing=0.0))
    images = data.images["train"]
    assert len(images) == 22  # a tenth is validated on
    chosen = [images.reader.stored_image(index, row).path for index, row in list(images.stored_rows())[:20:2]]
    (tmp_path / "tree").mkdir()
    source = Source(data, 10, tmp_path / "tree")
    loaders = Loaders(source)
    files = [(int(path.parent.name), path.read_bytes()) for path in sorted((tmp_path / "tree").glob("*/*"))]
    expected = sorted((int("class1" in path), Path(path).read_bytes()) for path in chosen)
    assert sorted(files) == expected == sorted((label, stored.read()) for stored, label in source.stored(99))
    samples = [sample for batch in loaders.ours(0) for sample in batch["path"]]
    assert len(set(samples)) == 8  # of two whole batches of four
    assert set(samples) <= set(chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for made in (loaders.ours(2), loaders.theirs(2)):
        assert (made.num_workers, made.batch_size, made.drop_last, made.pin_memory) == (2, 4, True, True)
        assert made.worker_init_fn is spare_worker
    assert isinstance(loaders.theirs(0).sampler, RandomSampler)
    image = Image.open(chosen[0])
    seed_generators(1)
    theirs = loaders.images.transform(image)
    seed_generators(1)
    assert torch.equal(theirs, reference_transform(data.preprocessing, data.augmentation)(image))
    data.augmentation = None
    assert torch.equal(Loaders(source).images.transform(image), data.preprocessing(image))


def test_at_least_one_batch_is_used(tmp_path: Path) -> None:
    for folder in ("data", "tree"):
        (tmp_path / folder).mkdir()
    assert len(Source(make_data(make_images(tmp_path / "data", False), None), 1, tmp_path / "tree").encoded) == 4


def test_the_first_round_is_discarded_and_one_thread_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, seen = [3], list[int]()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def passed(source: Any, number: int) -> list[float]:
        seen.append(threads[-1])
        seed_generators(number)
        return [float(number)] * len(STAGES)

    monkeypatch.setattr(loader, "_pass_stages", passed)
    state = torch.get_rng_state()
    stages = time_stages(None, 3)  # type: ignore[arg-type]
    assert stages == dict.fromkeys(STAGES, Spread.of([1.0, 2.0, 3.0]))
    assert (seen, threads[-1]) == ([1] * 4, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_has_images_a_second_and_milliseconds() -> None:
    spread = {"median": 2.0, "least": 1.0, "most": 3.0}
    rates = {
        "workers": 2,
        "ours": {"median": 1200.4, "least": 900.0, "most": 1300.0},
        "theirs": spread,
        "ratio": spread,
    }
    table = report(
        {
            "date": "2026-11-26T00:00:00",
            "machine": {"cores": 2, "processor": "P", "device": "cpu"},
            "versions": dict.fromkeys(("torch", "torchvision", "timm", "pillow"), "1"),
            "settings": {"images": 1024, "mean_bytes": 31_450.0, "batch_size": 64, "rounds": 5},
            "images_per_second": [rates],
            "seconds_per_image": {stage: {name: value / 1e3 for name, value in spread.items()} for stage in STAGES},
        }
    )
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "1,024 images of 31.4 kB, batches of 64, 5 interleaved rounds" in lines
    assert "2 1,200 (900-1,300) 2 (1-3) 2.00 (1.00-3.00)" in lines
    assert "decode 2.00 (1.00-3.00)" in lines
    assert "all but transfer 10.00" in lines  # five stages
