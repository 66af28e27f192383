"""The doctor finds each fault that is planted, and none where there is none."""

import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fake_imagenet import make_images, put_on_hub
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from torch.utils.data import DataLoader

from scalablevit_pl.commands.main import main
from scalablevit_pl.diagnosis import data, disk, hub, machine, speed
from scalablevit_pl.diagnosis.finding import Finding, found, gigabytes

Doctor = Callable[..., tuple[int, str]]
QUICK = ["--images=8", "--seconds=0.1", "--data.num_workers=0", "--data.batch_size=4"]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run the command in a folder of its own, and return its exit status and its table without line ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["scalablevit"])
        status = main(["doctor", "--config=recipes/quickstart.yaml", *QUICK, *words])
        table = capsys.readouterr().out
        assert max(map(len, table.splitlines())) <= 80
        return status, " ".join(table.split())

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            image = Image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{index}.jpg")
    return tmp_path / "photos"


def test_a_sound_fit_has_no_finding_and_leaves_nothing_behind(doctor: Doctor, tmp_path: Path) -> None:
    status, table = doctor()
    assert (status, table.count("FAIL")) == (0, 1)  # in the line that counts them
    assert "0 warn, 0 FAIL" in table
    for row in (
        "ok configuration scalablevit_nano, 2,761,378 parameters",
        "ok run disk 333 MB for the run and up to 4 checkpoints",
        "ok splits images: train 9,000, val 1,000",
        "ok train labels from 889 to 915 images of each of the 10 classes",
        "ok test data 2,000 images of split 'test'",
        "ok train images 8 of them decoded, 8 greyscale among them",
        "ok plan batch of 4 (4 × 1 accumulated × 1 process(es)), learning rate 0.002, 27,000 steps",
        "ok training step",
        "times what the training step takes",
    ):
        assert row in table
    assert not (tmp_path / "runs").exists()


def test_faults_of_data_and_network_are_found_together(doctor: Doctor, photos: Path, tmp_path: Path) -> None:
    for path in (photos / "cat").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])  # truncated
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/resolved.json").write_text("{}")
    status, table = doctor(f"--data.dataset={photos}", "--run=first", "--data.val_fraction=0.2")
    assert status == 1
    assert "FAIL run folder runs/first already holds a run → choose another name with --run" in table
    assert "FAIL classes the data has 2 classes but the network has num_classes=10 → set --model.network" in table
    assert "of 8 that were looked at cannot be read:" in table
    assert "0.jpg" in table
    assert table.count("→ mend or remove") >= 2
    assert "warn test data there is no split 'test' → choose among train" in table
    assert "ok configuration" in table
    assert "ok training step" in table


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["--trainer.accelerator=gpu"], "→ run on a machine with a GPU"),
        (["--data.split_sizes={train: 7}"], "split 'train' has 10000 images, but --data.split_sizes requires 7"),
        (["--data.class_order=imagenet"], "FAIL data "),
        (["--data.dataset=photoz"], "images were not looked at → unset HF_HUB_OFFLINE"),
        (["--data.dataset=./photoz"], "FAIL data there is no folder './photoz' → check the path"),
        (["--data.val_split=nothing"], "there is no split 'nothing' → choose among"),
        (["--data.label_column=nothing"], "FAIL data label_column 'nothing' is none of the columns"),
        (["--trainer.precision=bf16-mixed"], "warn precision bf16-mixed on cpu may be slower than float32"),
        (["--run", "a/file/run"], "file is a file"),
        (["--trainer.accumulate_grad_batches=7"], "ok plan batch of 28 (4 × 7 accumulated × 1 process(es)), learning"),
        (["--trainer.accumulate_grad_batches=7"], "rate 0.002, 3,864 steps, 322 of them warm-up"),
        (["--ema.decay=0.9"], "ok run disk 377 MB for the run"),
        (["--model.base_batch_size=512"], "the recipe's rate is for a batch of 512, and scaled by 0.007812"),
        (["--model.label_smoothing=2"], "FAIL configuration label_smoothing must be at least 0 and below 1, got 2.0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="plants the lack of a GPU")
def test_each_planted_fault_is_found(
    words: list[str], row: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    status, table = doctor(*words)
    assert row in table
    assert status == (0 if row.startswith(("ok", "warn")) or "rate" in row else 1)


def test_a_resume_is_looked_at(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config=recipes/quickstart.yaml", "--run=begun", *QUICK[2:], *limits]) == 0
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    status, table = doctor("--run=begun", "--resume=auto")
    assert (status, "ok run folder runs/begun goes on" in table) == (0, True)
    status, table = doctor("--run=begun", "--resume=auto", "--model.label_smoothing=0.3")
    assert status == 1
    assert "FAIL run folder the run cannot be resumed with other values: model.init_args.label_smoothing was" in table


def test_a_batch_that_does_not_fit_into_memory_is_found(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> speed.StepSpeed:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "time_steps", run_out)
    status, table = doctor()
    assert status == 1
    assert (
        "FAIL training step a batch of 4 images does not fit into the GPU's memory → set --data.batch_size 2" in table
    )


def test_what_a_fit_warns_of_is_a_row(doctor: Doctor) -> None:
    logger = logging.getLogger("scalablevit_pl")
    before = (logger.level, list(logger.handlers))
    _, table = doctor("--model.base_batch_size=5000")
    assert (logger.level, logger.handlers) == before
    assert "warn plan the learning rate 1.6e-06 is below min_lr 1e-05" in table
    assert table.count("below min_lr") == 1  # and not of the batch that is measured


def test_images_of_other_kinds_are_counted_beside_unreadable_ones(doctor: Doctor, photos: Path) -> None:
    Image.new("CMYK", (9, 9)).save(photos / "dog/0.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    for index in (1, 2):
        Image.new("RGB", (9, 9)).save(photos / f"dog/{index}.jpg", exif=turned)
    (photos / "dog/3.jpg").write_bytes(b"no image")
    own = [f"--data.dataset={photos}", "--data.val_split=train", "--images=24", "--model.network.num_classes=2"]
    status, table = doctor(*own)
    assert status == 1
    assert "FAIL train images 1 of 24 that were looked at cannot be read: row " in table
    assert "the others were decoded, 2 EXIF-rotated, 1 CMYK among them" in table


def test_a_sample_is_spread_over_all_images() -> None:
    assert list(data.spread(10, 4)) == [0, 3, 6, 9]
    assert list(data.spread(3, 4)) == [0, 1, 2]
    assert list(data.spread(5, 1)) == [0]


def test_a_class_without_images_is_found() -> None:
    finding = data.check_histogram("val", [0, 0, 2], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("warn", "1 of 3 classes have no image: dog")
    finding = data.check_histogram("val", [0, 0, 2, 1], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("ok", "from 1 to 2 images of each of the 3 classes")


def test_an_option_that_is_none_is_answered_as_by_fit(doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config=recipes/quickstart.yaml", "--data.batchsize=3"]) == 2
    assert "unknown option --data.batchsize: did you mean --data.batch_size?" in capsys.readouterr().err
    assert main(["doctor", "--config=recipes/quickstart.yaml", "--images=0"]) == 2
    assert "--images must be at least 1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    finding = disk.check_run_folder(tmp_path / "runs/first", resuming=False)
    assert (finding.status, finding.text) == ("FAIL", f"{tmp_path} cannot be written (Permission denied)")


def test_precision_without_support_on_a_cpu_is_found() -> None:
    finding = machine.check_precision("16-mixed", torch.device("cpu"))
    assert (finding.status, finding.remedy) == ("warn", "set --trainer.precision bf16-mixed or 32-true")
    assert machine.check_precision("32-true", torch.device("cpu")).status == "ok"


def test_only_files_that_are_not_in_the_cache_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda _, name, **__: "here" if name == "a" else None)
    assert hub.missing_bytes("lab/pets", "1" * 40, {"a": 5, "b": 7}) == 7


def test_a_lack_of_space_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10e9))
    # Four checkpoints of weights and two moments, four bytes each: 4.8 GB, with averaged weights 6.4.
    assert disk.check_checkpoint_space(tmp_path, 100_000_000, averaged=False).status == "ok"
    finding = disk.check_checkpoint_space(tmp_path, 200_000_000, averaged=True)
    assert (finding.status, finding.text[:7]) == ("FAIL", "13 GB f")
    needs = {tmp_path / "hub": 6_000_000_000, tmp_path / "arrow": 6_000_000_000}  # on one disk
    assert [row.status for row in disk.check_data_space(needs, prepared=False)] == ["FAIL"]
    assert [row.status for row in disk.check_data_space(needs, prepared=True)] == ["warn"]
    assert [row.status for row in disk.check_data_space({tmp_path: 9_000_000_000}, prepared=False)] == ["ok"]


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(method="GET", url="https://hub"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: GatedRepoError("gated", response=answer(403)), "accept"),
        (lambda: RepositoryNotFoundError("none", response=answer(404)), "has no repository"),
    ],
)
def test_a_hub_that_gives_nothing_is_a_finding(
    error: Callable[[], Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(hub, "retry", lambda call: call())
    (finding,), listing = hub.check_repository("ILSVRC/imagenet-1k", None)
    assert (finding.status, listing) == ("FAIL", None)
    assert said in str(finding).lower()


def test_terms_that_are_not_accepted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(sha="1" * 40, gated="manual", private=False, siblings=[])
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(hub, "retry", lambda call: call())

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise GatedRepoError("gated", response=answer(403))

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    (finding,), _ = hub.check_repository("ILSVRC/imagenet-1k", "1" * 40)
    assert finding.status == "FAIL"
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    assert [row.status for row in hub.check_repository("ILSVRC/imagenet-1k", "1" * 40)[0]] == ["ok"]
    (finding,), _ = hub.check_repository("ILSVRC/imagenet-1k", "main")
    assert (finding.status, finding.remedy) == ("warn", f"pin it with --data.revision {'1' * 40}")


def test_gated_data_on_the_hub_are_looked_at_step_by_step(
    doctor: Doctor, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_images("train", 1003), "validation": make_images("validation", 41)}
    commit = put_on_hub(hub, "lab/imagenet", splits)
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    own = ["--data.dataset=lab/imagenet", "--data.class_order=imagenet", "--model.network.num_classes=1000"]

    status, table = doctor(*own)
    assert status == 1
    assert "ok Hub token none, which does for data that are neither gated nor private" in table
    assert "FAIL Hub access " in table
    assert "FAIL data lab/imagenet is not in the cache, and its images were not looked at → mend what keeps" in table

    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    status, table = doctor(*own)
    assert status == 1
    assert "FAIL Hub token " in table

    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    status, table = doctor(*own)
    assert status == 0
    assert "ok Hub token of ada" in table
    assert f"commit {commit}; no revision is asked for, which may move on → pin it with --data.revision {commit}" in (
        table.replace(f"{commit[:20]} {commit[20:]}", commit)
    )
    assert "warn data lab/imagenet is not in the cache, and its images were not looked at → fetch them" in table
    assert "ok splits" not in table
    assert not datasets.are_progress_bars_disabled()

    own += [f"--data.revision={commit}", "--download"]
    with monkeypatch.context() as small:
        small.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=400e3))
        status, table = doctor(*own)
    assert status == 1
    assert "FAIL data disk " in table
    assert "FAIL data not looked into, since they do not fit on the disk → make space first" in table

    status, table = doctor(*own)
    assert status == 0
    assert "ok splits images: train 1,003, val 41" in table
    assert "ok classes 1,000, in the order asked for" in table
    assert "ok train images 8 of them decoded" in table


def test_only_the_files_of_the_wanted_splits_are_counted() -> None:
    sizes = {"data/train-00000-of-00001.parquet": 7, "data/test-00000-of-00001.parquet": 5, "README.md": 1}
    assert hub.files_of_splits(sizes, {"train": ("train",)}) == {"data/train-00000-of-00001.parquet": 7}


def test_the_machine_is_compared_with_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_cores(4, 2, 8).status == "ok"
    assert machine.check_cores(4, 4, 8).remedy == "set --data.num_workers to 2"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert [row.status for row in machine.check_shared_memory(2, 1, 20, tmp_path)] == ["ok"]  # five batches
    assert [row.status for row in machine.check_shared_memory(2, 1, 21, tmp_path)] == ["FAIL"]
    assert list(machine.check_shared_memory(0, 1, 21, tmp_path)) == []
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda _: "2.6.3")
    assert machine.check_versions().status == "FAIL"


class Slow(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.005)
        return {"image": torch.zeros(1)}


def test_a_slow_loader_is_found() -> None:
    rate = speed.time_loader(DataLoader(Slow(), batch_size=4), seconds=0.3)
    assert 50.0 < rate < 200.0  # five milliseconds an image
    step = speed.StepSpeed(4 * rate, 4, torch.device("cpu"))
    finding = speed.check_loader(rate, step, workers=1, processes=1, cores=16)
    assert (finding.status, finding.remedy) == ("warn", "about --data.num_workers 4 would do")
    finding = speed.check_loader(rate, step, workers=1, processes=8, cores=16)
    assert "which takes 32 cores and there are 16" in finding.remedy
    assert speed.check_loader(5 * rate, step, workers=1, processes=1, cores=16).status == "ok"


def test_a_row_fits_into_80_columns_and_has_its_remedy_on_a_line_of_its_own() -> None:
    row = str(Finding("FAIL", "data", "word " * 40, "do " * 40))
    assert max(map(len, row.splitlines())) <= 80
    assert sum("→" in line for line in row.splitlines()) == 1
    assert found("data", "it is broken: mend it") == Finding("FAIL", "data", "it is broken", "mend it")
    assert found("data", "a: no; mend it") == Finding("FAIL", "data", "a: no", "mend it")
    assert [gigabytes(size) for size in (1.23e10, 4.56e9, 12e6, 3e3)] == ["12 GB", "4.6 GB", "12 MB", "3 kB"]
