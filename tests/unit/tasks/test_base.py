"""What all tasks share: evaluation and resume of a small regression, and options of networks."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from small_tasks import STILL, Scores, make_images, make_samples, nano, swin, twins
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric

from scalablevit_pl.models import ImageClassifier, ScalableViT
from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import BaseTask, ClassificationTask, MetricInfo, Report, ReportData
from scalablevit_pl.tasks.base import without_fillers

MakeTrainer = Callable[..., pl.Trainer]


class Brightness(nn.Module):
    """The mean of an image, times a weight."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[weight]]))

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((1, 2, 3)) * self.weight[0, 0]


class Errors(Metric):
    """Mean and greatest distance from the target."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("distances", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("worst", torch.zeros(()), dist_reduce_fx="max")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, distances: Tensor) -> None:
        self.distances = self.distances + distances.sum()
        self.worst = torch.maximum(self.worst, distances.max())
        self.count = self.count + len(distances)

    def compute(self) -> dict[str, Tensor]:
        return {"error": self.distances / self.count, "worst": self.worst}


class Regression(BaseTask):
    """Predict the brightness of an image; every batch that a hook gets is recorded."""

    monitor = "error"
    mode = "min"
    described: ClassVar = {"error": MetricInfo("mean distance", "mae", plotted=True)}
    shown = ("error",)

    def __init__(self, network: nn.Module | None = None, **options: Any) -> None:
        super().__init__(network or Brightness(), **STILL | options)
        self.seen: list[tuple[str, list[int]]] = []

    def loss(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        self.seen.append(("loss", batch["index"].tolist()))
        return (output - batch["target"]) ** 2

    def metrics(self, part: str) -> dict[str, Metric]:
        return {"bias": MeanMetric()} if part == "train" else {"errors": Errors(), "largest": MeanMetric()}

    def update(self, metrics: Mapping[str, Any], output: Tensor, batch: dict[str, Any]) -> None:
        self.seen.append(("update", batch["index"].tolist()))
        if "bias" in metrics:
            metrics["bias"].update(output - batch["target"])
        else:
            metrics["errors"].update((output - batch["target"]).abs())
            metrics["largest"].update(output.max())

    def predict(self, output: Tensor) -> Tensor:
        self.seen.append(("predict", [len(output)]))
        return 10.0 * output


def samples(count: int = 10, fillers: int = 0) -> list[dict[str, Any]]:
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = [
        {"image": image, "target": float(index % 3), "index": index, "path": f"{index}.png"}
        for index, image in enumerate(images)
    ]
    return rows + [rows[0] | {"image": rows[0]["image"] * math.nan, "index": -1} for _ in range(fillers)]


def distances(weight: float = 1.0) -> list[float]:
    return [abs(weight * sample["image"].mean().item() - sample["target"]) for sample in samples()]


# Evaluation.


@pytest.mark.parametrize("part", ["val", "test"])
def test_metrics_that_return_dictionaries_are_logged_under_their_keys(part: str, make_trainer: MakeTrainer) -> None:
    trainer, task = make_trainer(), Regression()
    run = {"val": trainer.validate, "test": trainer.test}[part]
    (metrics,) = run(task, DataLoader(samples(), batch_size=4), verbose=False)
    values = distances()
    assert metrics.keys() == {f"{part}/{name}" for name in ("error", "worst", "largest", "samples")}
    assert metrics[f"{part}/error"] == pytest.approx(sum(values) / 10, rel=1e-6)
    assert metrics[f"{part}/worst"] == pytest.approx(max(values), rel=1e-6)
    assert metrics[f"{part}/samples"] == 10


@pytest.mark.parametrize("part", ["val", "test"])
def test_fillers_do_not_reach_the_hooks(part: str, make_trainer: MakeTrainer) -> None:
    mixed = [*samples()[:3], *samples(fillers=1)[-1:], *samples()[3:], *samples(fillers=6)[-6:]]
    results, seen = [], []
    for given in (samples(), mixed):  # the last batch of the second one holds fillers alone
        trainer, task = make_trainer(), Regression()
        run = {"val": trainer.validate, "test": trainer.test}[part]
        results += run(task, DataLoader(given, batch_size=4), verbose=False)
        seen.append(task.seen)
    assert results[0] | {f"{part}/largest": 0} == pytest.approx(results[1] | {f"{part}/largest": 0}, rel=1e-6)
    assert [indices for hook, indices in seen[1] if hook == "update"] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]
    assert [size for hook, (size, *_) in seen[1] if hook == "predict"] == [3, 4, 3]


def test_fillers_are_not_predicted(make_trainer: MakeTrainer) -> None:
    task = Regression()
    predicted = make_trainer().predict(task, DataLoader(samples(6, fillers=5), batch_size=4))
    assert [None if values is None else len(values) for values in predicted] == [4, 2, None]
    expected = [10.0 * sample["image"].mean().item() for sample in samples(6)]
    assert torch.cat(predicted[:2]).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_fillers_is_returned_unchanged() -> None:
    batch = {"image": torch.zeros(2, 3), "index": torch.tensor([0, 1]), "path": ["a", "b"]}
    assert without_fillers(batch) is batch
    assert without_fillers({"image": torch.zeros(2, 3)}).keys() == {"image"}
    kept = without_fillers({**batch, "index": torch.tensor([-1, 5])})
    assert (kept["image"].shape, kept["index"].tolist(), kept["path"]) == ((1, 3), [5], ["b"])


def test_a_process_without_samples_evaluates_without_a_warning(make_trainer: MakeTrainer) -> None:
    task = Regression()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*compute.* method of metric .* was called before")
        fillers = samples(1, fillers=3)[1:]
        (metrics,) = make_trainer().validate(task, DataLoader(fillers, batch_size=2), verbose=False)
    assert metrics["val/samples"] == 0
    assert task.seen == []


def test_further_networks_are_evaluated_on_the_same_batches(make_trainer: MakeTrainer) -> None:
    for reported, factor in ((False, 10.0), (True, 5.0)):
        task, trainer = Regression(), make_trainer()
        task.setup("test")
        task.add_network("half", Brightness(0.5), reported=reported)
        outputs: list[Tensor] = []
        task.on_test_batch_end = lambda output, *_, outputs=outputs: outputs.append(output)
        (metrics,) = trainer.test(task, DataLoader(samples(), batch_size=4), verbose=False)
        assert metrics["test/error"] == pytest.approx(sum(distances()) / 10, rel=1e-6)
        assert metrics["test_half/error"] == pytest.approx(sum(distances(0.5)) / 10, rel=1e-6)
        assert metrics["test/samples"] == metrics["test_half/samples"] == 10
        expected = [factor * sample["image"].mean().item() for sample in samples()]
        assert torch.cat(outputs).tolist() == pytest.approx(expected, rel=1e-6)
        predicted = make_trainer().predict(task, DataLoader(samples(), batch_size=4))
        assert torch.cat(predicted).tolist() == pytest.approx(expected, rel=1e-6)
    assert [name for name, _ in task.named_parameters()] == ["network.weight"]
    assert not [name for name in task.state_dict() if "half" in name]


def test_every_epoch_counts_from_zero(make_trainer: MakeTrainer) -> None:
    loader, seen = DataLoader(samples(), batch_size=4), []
    for epochs in (1, 3):
        trainer = make_trainer(max_epochs=epochs, num_sanity_val_steps=2)
        trainer.fit(Regression(), loader, loader)
        seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert seen[0] == seen[1]
    assert seen[0]["val/samples"] == 10
    assert seen[0]["train/loss"] == pytest.approx(sum(value**2 for value in distances()) / 10, rel=1e-6)
    assert seen[0]["train/step_loss"] == pytest.approx(sum(value**2 for value in distances()[8:]) / 2, rel=1e-6)


class Whole(Regression):
    """Return the mean loss of the batch, not one value for each sample."""

    def loss(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        return super().loss(output, batch).mean()


def test_a_loss_of_the_whole_batch_is_averaged_over_samples(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(Whole(), DataLoader(samples(), batch_size=4))
    expected = sum(value**2 for value in distances()) / 10
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_nan_loss_makes_the_average_nan(make_trainer: MakeTrainer) -> None:
    rows, trainer = samples(), make_trainer()
    rows[5]["target"] = math.nan
    trainer.fit(Regression(), DataLoader(rows, batch_size=4))
    assert trainer.callback_metrics["train/loss"].isnan()


def test_double_precision_trains_and_evaluates(make_trainer: MakeTrainer) -> None:
    loader, metrics = DataLoader(make_samples(11), batch_size=4), []
    for precision in ("32-true", "64-true"):
        trainer = make_trainer(precision=precision)
        trainer.fit(ClassificationTask(Scores(), partial(SGD, lr=0.1)), loader, loader)
        metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_a_task_without_a_report_of_its_own_has_an_empty_one(tmp_path: Path) -> None:
    report = Regression().report(ReportData([], 3, None))
    assert type(report) is Report
    report.add({}, torch.zeros(3))
    report.gather()
    report.write(tmp_path, "title")
    report.write_predictions(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("monitor", "distance"), ("described", {"error": MetricInfo("mean distance", "mae")})]
)
def test_a_task_has_to_describe_its_monitored_metric_and_plot_one(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Regression, name, value)
    with pytest.raises(ValueError, match=r"Regression\.described needs the monitored metric '\w+', and one that is"):
        Regression()


def test_a_network_may_have_no_number_of_classes() -> None:
    assert Regression().num_classes is None
    assert Regression(Scores()).num_classes == 7


# Resume.


@pytest.mark.parametrize(
    ("world", "rank", "expected"), [(2, 0, [1.0, 4.0]), (2, 1, [2.0, 5.0]), (1, 0, [3.0, 9.0]), (3, 1, [0.0, 0.0])]
)
def test_the_sums_of_an_unfinished_epoch_are_restored(
    world: int, rank: int, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Regression()
    task.setup("fit")
    monkeypatch.setattr(Regression, "trainer", SimpleNamespace(world_size=world, callbacks=[]))
    monkeypatch.setattr(Regression, "global_rank", rank)
    sums = {"mean_value": torch.tensor([1.0, 2.0]), "weight": torch.tensor([4.0, 5.0])}
    task.on_load_checkpoint({"train_averages": {"bias": sums}})
    bias: Any = task.averages["bias"]
    assert [bias.mean_value.item(), bias.weight.item()] == expected
    task.on_load_checkpoint({})
    assert bias.weight.item() == expected[1]


def test_the_sums_of_an_unfinished_epoch_are_saved_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Regression()
    task.setup("fit")
    task.averages["loss"].update(torch.tensor([1.0, 2.0, 6.0]), 1.0)
    monkeypatch.setattr(Regression, "trainer", SimpleNamespace(world_size=2))
    monkeypatch.setattr(task, "all_gather", lambda value: torch.stack([value, 2 * value]))
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    loss = checkpoint["train_averages"]["loss"]
    assert {name: value.tolist() for name, value in loss.items()} == {"mean_value": [9.0, 18.0], "weight": [3.0, 6.0]}
    assert checkpoint["train_averages"].keys() == {"loss", "bias"}


def test_random_numbers_of_a_network_depend_on_seed_epoch_batch_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int, epoch: int, batch: int, rank: int) -> float:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        monkeypatch.setattr(Regression, "current_epoch", epoch)
        monkeypatch.setattr(Regression, "global_rank", rank)
        Regression().on_train_batch_start(None, batch)
        return torch.rand(1).item()

    drawn = [draw(*numbers) for numbers in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    assert len(set(drawn)) == 5
    torch.rand(7)
    assert drawn[0] == draw(0, 0, 0, 0)


# Compiled, channels-last and recomputed networks.


def short() -> nn.Module:
    sizes = {"embed_dims": (8, 16, 32, 64), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 2)}
    return ImageClassifier(ScalableViT(**sizes), 7, "linear")


@pytest.mark.parametrize("build", [short, pytest.param(swin, marks=pytest.mark.slow)])
def test_a_compiled_network_learns_the_same_under_the_same_names(
    build: Callable[..., nn.Module], make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, network = [], build()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def train(network: nn.Module, compiled: bool) -> tuple[ClassificationTask, pl.Trainer]:
        torch.manual_seed(0)
        # Compiled windows are masked instead of cut, which rounds differently. Where a gradient is only rounding, as
        # those of keys' biases, AdamW would make whole steps of it.
        schedule = partial(WarmupCosineSchedule, warmup_epochs=0, min_lr=0.01)
        task = ClassificationTask(network, partial(SGD, lr=0.1), schedule, None, compile=compiled)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(task, DataLoader(make_images(6), batch_size=2))
        return task, trainer

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options, backend=backend))
    plain, _ = train(copy.deepcopy(network), compiled=False)
    assert not graphs
    assert any(not torch.equal(*pair) for pair in zip(plain.network.parameters(), network.parameters(), strict=True))
    task, trainer = train(network, compiled=True)
    assert graphs
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    names = [name for name in saved if name.startswith("network.")]
    assert names == [f"network.{name}" for name in plain.network.state_dict()]
    for name, tensor in plain.network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert task.resolved["compile"] is True


@pytest.mark.parametrize("build", [nano, twins])
def test_channels_last_computes_the_same(build: Callable[..., nn.Module]) -> None:
    network = build().eval()
    other = copy.deepcopy(network)
    image, seen = torch.stack([sample["image"] for sample in make_images(2)]), []
    task = ClassificationTask(other, channels_last=True)
    other.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    expected, actual = network(image), task(image)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    convolutions = [part.weight for part in other.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for ours, theirs in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_training_batches_are_channels_last(make_trainer: MakeTrainer) -> None:
    network, formats = nano(), []
    network.register_forward_pre_hook(
        lambda module, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    task = ClassificationTask(network, channels_last=True)
    make_trainer().fit(task, DataLoader(make_images(4), batch_size=2))
    assert formats == [True, True]
    assert task.resolved["channels_last"] is True


def gradients(task: ClassificationTask) -> dict[str, Tensor]:
    torch.manual_seed(5)
    batch = next(iter(DataLoader(make_images(6), batch_size=6)))
    nn.functional.cross_entropy(task.train()(batch["image"]), batch["label"]).backward()
    return {name: p.grad for name, p in task.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("build", "freeze"), [(nano, []), (swin, []), (swin, ["patch_embed"]), (swin, ["patch_embed", "layers.0"])]
)
def test_recomputed_activations_drop_the_same_paths(build: Callable[..., nn.Module], freeze: list[str]) -> None:
    network = build(drop_path_rate=0.5)
    copies = [copy.deepcopy(network) for _ in range(3)]
    kept = gradients(ClassificationTask(copies[0], freeze=freeze))
    recomputed = gradients(ClassificationTask(copies[1], freeze=freeze, grad_checkpointing=True))
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], gradient) for name, gradient in recomputed.items())
    # Without dropped paths the gradients differ.
    for part in copies[2].modules():
        for name in {"rate", "drop_prob"} & vars(part).keys():
            if type(part).__name__ == "DropPath":
                setattr(part, name, 0.0)
    whole = gradients(ClassificationTask(copies[2], freeze=freeze))
    assert not all(torch.equal(kept[name], gradient) for name, gradient in whole.items())


@pytest.mark.parametrize("enable", [False, True])
def test_activations_are_recomputed_only_if_asked_for(enable: bool) -> None:
    calls: list[int] = []
    task = ClassificationTask(swin(), grad_checkpointing=enable)
    task.network.layers[2].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(task)
    assert len(calls) == 1 + enable


@pytest.mark.parametrize("build", [twins, Scores])
def test_networks_that_cannot_recompute_are_named(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"(Twins|Scores) does not support grad_checkpointing: switch it off"):
        ClassificationTask(build(), grad_checkpointing=True)
