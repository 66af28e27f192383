import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hub_server import HubServer
from huggingface_hub import constants, snapshot_download
from lightning.pytorch.trainer.states import TrainerFn

from scalablevit_pl.data import ClassificationDataModule, Preprocessing
from scalablevit_pl.data.repository import group_shards
from scalablevit_pl.data.source import load_splits
from scalablevit_pl.weights.hub import client

PETS = "datasets/lab/pets"
SIZES = {"train": 5, "validation": 3, "test": 4}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)


def parquet(labels: Sequence[Any], names: Sequence[str] | None = ("cat", "dog"), stem: str = "") -> bytes:
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": PNG, "path": f"{stem}{row}.png"} for row in range(len(labels))]
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"image": images, "label": list(labels)}, features=features).to_parquet(buffer)
    return buffer.getvalue()


def shards(**splits: Sequence[Any]) -> dict[str, bytes]:
    """Store each label of a split in its own file, each different from the others."""
    return {
        f"data/{split}-{number:05}-of-{len(labels):05}.parquet": parquet([label], stem=f"{split}{number}")
        for split, labels in splits.items()
        for number, label in enumerate(labels)
    }


def add_pets(hub: HubServer, gated: bool = False) -> str:
    """Create a repository with labels that differ from row to row; those of the test split are hidden."""
    hub.add_repo(PETS, gated=gated)
    return hub.commit(PETS, shards(train=[0, 1, 1, 0, 1], validation=[1, 0, 0], test=[-1] * 4))


def make_data(**arguments: Any) -> ClassificationDataModule:
    values = {"batch_size": 1, "num_workers": 0, "preprocessing": Preprocessing(8), "augmentation": None} | arguments
    return ClassificationDataModule("lab/pets", **values)


def run(stage: TrainerFn, **arguments: Any) -> ClassificationDataModule:
    """Prepare and set up as the trainer does, with one object that downloads and another that reads."""
    preparing = make_data(**arguments)
    preparing.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), world_size=1, global_rank=0)
    preparing.prepare_data()
    data = make_data(**arguments)
    data.setup(stage)
    return data


def labels(loader: Any) -> list[int]:
    return [label for batch in loader for label in batch["label"].tolist()]


@pytest.mark.parametrize(
    ("stage", "arguments", "splits"),
    [
        (TrainerFn.FITTING, {}, {"train", "validation"}),
        (TrainerFn.FITTING, {"val_split": "test", "train_split": "validation"}, {"validation", "test"}),
        (TrainerFn.VALIDATING, {}, {"validation"}),
        (TrainerFn.PREDICTING, {}, {"test"}),
        (TrainerFn.TESTING, {"test_split": "validation"}, {"validation"}),
    ],
)
def test_only_files_of_the_needed_splits_are_downloaded(
    stage: TrainerFn, arguments: dict[str, Any], splits: set[str], hub: HubServer
) -> None:
    add_pets(hub)
    if "val_split" in arguments:  # labels that are not hidden
        hub.commit(PETS, shards(test=[0, 0, 1, 1]))
    run(stage, **arguments)
    expected = [f"data/{split}-{number:05}-of-{SIZES[split]:05}.parquet" for split in splits for number in range(9)]
    assert sorted(hub.downloads(PETS)) == sorted(name for name in expected if name in hub.files(PETS))


def test_rows_are_in_the_order_of_the_files(hub: HubServer) -> None:
    commit = add_pets(hub)
    data = run(TrainerFn.FITTING)
    assert data.commit == commit
    assert labels(data.val_dataloader()) == [1, 0, 0]
    assert load_splits("lab/pets", commit)["train"]["label"][:] == [0, 1, 1, 0, 1]


def test_setup_sends_no_request_and_uses_the_prepared_commit(hub: HubServer) -> None:
    commit = add_pets(hub)
    run(TrainerFn.VALIDATING)
    hub.commit(PETS, shards(validation=[1, 1, 1]))
    asked = len(hub.requests)
    data = make_data()
    data.setup("validate")
    assert (len(hub.requests), data.commit) == (asked, commit)
    assert labels(data.val_dataloader()) == [1, 0, 0]
    assert run(TrainerFn.VALIDATING).commit == hub.commits(PETS)[0] != commit


def test_a_pinned_commit_ignores_the_branch_and_is_listed_once(hub: HubServer) -> None:
    commit = add_pets(hub)
    hub.commit(PETS, shards(validation=[1, 1, 1]))
    assert labels(run(TrainerFn.VALIDATING, revision=commit).val_dataloader()) == [1, 0, 0]
    asked = len(hub.requests)
    run(TrainerFn.VALIDATING, revision=commit)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("pinned", [False, True])
def test_cached_splits_need_no_network(pinned: bool, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = add_pets(hub) if pinned else (add_pets(hub) and None)
    run(TrainerFn.VALIDATING, revision=revision)
    hub.close()
    assert labels(run(TrainerFn.VALIDATING, revision=revision).val_dataloader()) == [1, 0, 0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert labels(run(TrainerFn.VALIDATING, revision=revision).val_dataloader()) == [1, 0, 0]
    with pytest.raises(ValueError, match=r"5 of 8 files of 'lab/pets' .* not in the cache, and HF_HUB_OFFLINE"):
        run(TrainerFn.FITTING, revision=revision)


def test_files_cached_by_another_program_need_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = add_pets(hub)
    snapshot_download("lab/pets", repo_type="dataset", allow_patterns="data/v*", cache_dir=constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data = run(TrainerFn.VALIDATING)
    assert (data.commit, labels(data.val_dataloader())) == (commit, [1, 0, 0])


def test_undeclared_classes_are_those_of_the_training_split(hub: HubServer) -> None:
    hub.add_repo(PETS)
    files = {"train": ["owl", "cat", "dog"], "test": ["dog", "dog"]}
    hub.commit(PETS, {f"data/{name}-00000-of-00001.parquet": parquet(rows, None) for name, rows in files.items()})
    data = run(TrainerFn.TESTING)
    assert data.class_names == ["cat", "dog", "owl"]
    assert labels(data.test_dataloader()) == [1, 1]


@pytest.mark.parametrize("token", [None, "hf_bob"])
def test_the_error_for_gated_data_names_the_page_with_its_terms(
    token: str | None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_pets(hub, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="is gated") as caught:
        run(TrainerFn.VALIDATING)
    sentence = str(caught.value)
    assert f"accept its terms at {hub.endpoint}/{PETS}" in sentence
    assert "`hf auth login`" in sentence
    assert "\n" not in sentence
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    assert labels(run(TrainerFn.VALIDATING).val_dataloader()) == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"revision": "v2"}, "has no revision 'v2': give an existing branch"),
        ({"revision": "0" * 40}, "has no revision '0000"),
        ({"val_split": "dev"}, "there is no split 'dev': choose among test, train, validation"),
    ],
)
def test_missing_revisions_and_splits_are_named(arguments: dict[str, Any], message: str, hub: HubServer) -> None:
    add_pets(hub)
    with pytest.raises(ValueError, match=message):
        run(TrainerFn.VALIDATING, **arguments)


def test_an_unknown_name_may_be_a_folder_or_a_repository(hub: HubServer) -> None:
    with pytest.raises(ValueError, match=r"no folder 'lab/pets' here; on the Hub: the Hub has no repository .*login"):
        run(TrainerFn.VALIDATING)
    hub.close()
    with pytest.raises(ValueError, match=r"the Hub at .* cannot be reached .*: try again later"):
        run(TrainerFn.VALIDATING)


def test_an_uncached_name_fails_offline() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing' is not in the cache, and HF_HUB_OFFLINE") as caught:
        load_splits("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_an_incomplete_split_is_refused_before_any_download(hub: HubServer) -> None:
    add_pets(hub)
    hub.commit(PETS, {"data/validation-00001-of-00003.parquet": None})
    message = r"1 of the 3 parquet files of split 'validation' are missing, .*validation-00001-of-00003\.parquet"
    with pytest.raises(ValueError, match=message):
        run(TrainerFn.FITTING)
    assert hub.downloads(PETS) == []
    run(TrainerFn.PREDICTING)


def test_a_folder_with_an_incomplete_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(parquet([0]))
    with pytest.raises(ValueError, match=r"1 of the 2 parquet files of split 'train' .*train-00001-of-00002"):
        load_splits(str(tmp_path))


def test_repositories_in_another_layout_are_loaded_by_datasets(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(PETS)
    commit = hub.commit(PETS, {"a.csv": b"label\ncat\n"})
    asked: list[tuple[str, str]] = []
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_dict({"label": ["cat"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: asked.append((name, revision)) or loaded)
    assert list(load_splits("lab/pets")) == ["train"]
    assert asked == [("lab/pets", commit)]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["README.md", "data/a_b-00000-of-00001.parquet"], {"a_b": 1}),
        (["x/train-00001-of-00002.parquet", "x/train-00000-of-00002.parquet"], {"train": 2}),
        (["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"], {}),
        (["train-00000-of-00001.parquet", "test.parquet"], {}),
        (["a.csv"], {}),
    ],
)
def test_files_are_grouped_if_all_names_have_a_split(names: list[str], splits: dict[str, int]) -> None:
    assert {split: len(files) for split, files in group_shards(names).items()} == splits
    assert all(files == sorted(files) for files in group_shards(names).values())
