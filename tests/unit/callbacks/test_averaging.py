import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_tasks import calibration_error
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks.averaging import WeightAverage
from scalablevit_pl.tasks import ClassificationTask

CLASSES = 3


class Small(nn.Module):
    """A network with batch norm, whose statistics are buffers, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = CLASSES
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, CLASSES)
        self.fixed = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(image.flatten(1))) * self.fixed
        return logits


class Recorder(pl.Callback):
    """Keep the weights before and after each optimizer step, and those in validation."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.weights.append(copy.deepcopy(module.network.state_dict()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.weights.append(copy.deepcopy(module.network.state_dict()))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.validated.append(copy.deepcopy(module.network.state_dict()))


def make_batches(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    images = 2.0 * torch.randn(count, 4, 1, 1, generator=generator) + 1.0
    labels = torch.randint(CLASSES, (count,), generator=generator).tolist()
    return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def make_task(network: nn.Module | None = None) -> ClassificationTask:
    return ClassificationTask(network or Small(), partial(SGD, lr=0.5), base_batch_size=None)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    values = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_checkpointing": saving} | quiet | options
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **values)


def average(weights: list[dict[str, Tensor]], decay: float, warmup: bool) -> dict[str, Tensor]:
    """Compute the exponential moving average of recorded weights in double precision."""
    mean = {name: value.double() for name, value in weights[0].items()}
    for step, now in enumerate(weights[1:]):
        kept = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, value in now.items():
            is_buffer = name.startswith("norm.running") or name.endswith("tracked")
            mean[name] = value.double() if is_buffer else kept * mean[name] + (1 - kept) * value.double()
    return mean


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 12), (4, 4)])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.3, True)])
def test_the_average_is_that_of_the_weights_after_each_optimizer_step(
    accumulated: int, steps: int, decay: float, warmup: bool, tmp_path: Path
) -> None:
    ema, recorder = WeightAverage(decay, warmup), Recorder()
    trainer = make_trainer(tmp_path, ema, recorder, accumulate_grad_batches=accumulated)
    trainer.fit(make_task(), DataLoader(make_batches(), batch_size=4))
    assert len(recorder.weights) == 1 + steps
    expected = average(recorder.weights, decay, warmup)
    for name, value in ema.network.state_dict().items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-6, atol=1e-7), name
    moved = recorder.weights[-1]["fc.weight"] - ema.network.fc.weight
    assert moved.abs().max() > 1e-3
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_the_trained_network_is_the_one_without_an_average(tmp_path: Path) -> None:
    trained = []
    for callback in (WeightAverage(0.99), WeightAverage(None)):
        recorder, task = Recorder(), make_task()
        loader = DataLoader(make_batches(), batch_size=4)
        make_trainer(tmp_path, callback, recorder).fit(task, loader, loader)
        assert all(
            torch.equal(recorder.validated[-1][name], value) for name, value in task.network.state_dict().items()
        )
        trained.append(task.state_dict())
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def evaluate_by_loop(network: nn.Module, samples: list[dict[str, Any]]) -> dict[str, float]:
    images = torch.stack([sample["image"] for sample in samples])
    labels = [sample["label"] for sample in samples]
    with torch.no_grad():
        probabilities = network.eval()(images).double().softmax(1)
    rows = list(zip(probabilities.tolist(), labels, strict=True))
    return {
        "loss": -torch.tensor([row[label] for row, label in rows], dtype=torch.float64).log().mean().item(),
        "top1": sum(row.index(max(row)) == label for row, label in rows) / len(rows),
        "ece": calibration_error(probabilities, labels),
        "samples": len(rows),
    }


def test_both_sets_are_evaluated_in_a_fit(tmp_path: Path) -> None:
    samples, ema, task = make_batches(11, seed=2), WeightAverage(0.9), make_task()
    trainer = make_trainer(tmp_path, ema)
    trainer.fit(task, DataLoader(make_batches(), batch_size=4), DataLoader(samples, batch_size=4))
    for part, network in (("val", task.network), ("val_ema", ema.network)):
        for name, value in evaluate_by_loop(copy.deepcopy(network), samples).items():
            assert trainer.callback_metrics[f"{part}/{name}"].item() == pytest.approx(value, rel=1e-5), (part, name)
    assert trainer.callback_metrics["val/loss"] != trainer.callback_metrics["val_ema/loss"]


def fit_and_save(folder: Path, decay: float | None = 0.9) -> tuple[Path, ClassificationTask, WeightAverage]:
    task, ema = make_task(), WeightAverage(decay)
    saving = ModelCheckpoint(folder, "end", save_on_train_epoch_end=True, enable_version_counter=False)
    make_trainer(folder, ema, saving).fit(task, DataLoader(make_batches(), batch_size=4))
    return folder / "end.ckpt", task, ema


@pytest.mark.parametrize("reported", [True, False])
def test_an_evaluation_uses_both_sets_of_the_checkpoint(reported: bool, tmp_path: Path) -> None:
    path, task, trained = fit_and_save(tmp_path)
    samples = make_batches(11, seed=2)

    def answer(method: str, batch_size: int) -> Any:
        ema = WeightAverage()
        ema.reported = reported
        loader, source = DataLoader(samples, batch_size), {"ckpt_path": path, "weights_only": True}
        return getattr(make_trainer(tmp_path, ema), method)(make_task(), loader, **source)

    metrics = {**answer("validate", 4)[0], **answer("test", 4)[0]}
    for name, network in (("", task.network), ("_ema", trained.network)):
        expected = evaluate_by_loop(copy.deepcopy(network), samples)
        for stage in ("val", "test"):
            found = {key: metrics[f"{stage}{name}/{key}"] for key in expected}
            assert found == pytest.approx(expected, rel=1e-5)
    predicted = answer("predict", 11)
    answering = trained.network if reported else task.network
    images = torch.stack([sample["image"] for sample in samples])
    assert torch.allclose(predicted[0], answering.eval()(images).softmax(1))


@pytest.mark.parametrize(("stop", "accumulated"), [(3, 1), (6, 1), (8, 1), (2, 2)])
def test_a_resumed_run_ends_with_equal_weights_and_average(stop: int, accumulated: int, tmp_path: Path) -> None:
    # All batches are the same, so it does not matter with which of them a run continues.
    loader = DataLoader(make_batches(4) * 6, batch_size=4)

    def make(**options: Any) -> tuple[ClassificationTask, WeightAverage]:
        task, ema = make_task(), WeightAverage(0.95)
        saving = ModelCheckpoint(tmp_path, "at-{step}", every_n_train_steps=stop, save_top_k=-1)
        ckpt_path = options.pop("ckpt_path", None)
        trainer = make_trainer(tmp_path, ema, saving, accumulate_grad_batches=accumulated, **options)
        trainer.fit(task, loader, loader, ckpt_path=ckpt_path, weights_only=True)
        return task, ema

    whole, average_of_whole = make()
    path = tmp_path / f"at-step={stop}.ckpt"
    saved = torch.load(path, weights_only=True)
    assert set(saved["ema_state_dict"]) == set(saved["state_dict"])
    resumed, average_of_resumed = make(ckpt_path=path)
    for one, other in ((whole.network, resumed.network), (average_of_whole.network, average_of_resumed.network)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_resume_neither_drops_nor_invents_an_average(tmp_path: Path) -> None:
    loader = DataLoader(make_batches(), batch_size=4)
    with_average, _, _ = fit_and_save(tmp_path / "with")
    without, _, _ = fit_and_save(tmp_path / "without", decay=None)
    assert "ema_state_dict" not in torch.load(without, weights_only=True)
    for path, decay, sentence in (
        (with_average, None, "holds averaged weights, which the resumed run would drop: set --ema.decay"),
        (without, 0.9, "holds no averaged weights to continue with ema.decay=0.9"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_trainer(tmp_path, WeightAverage(decay)).fit(make_task(), loader, ckpt_path=path, weights_only=True)


def test_a_network_compiled_in_place_is_averaged(tmp_path: Path) -> None:
    network = Small()
    network.compile(backend="eager")
    ema, task = WeightAverage(0.9), make_task(network)
    loader = DataLoader(make_batches(), batch_size=4)
    make_trainer(tmp_path, ema).fit(task, loader, loader)
    assert ema.network.state_dict().keys() == Small().state_dict().keys()
    assert not torch.equal(ema.network.fc.weight, Small().fc.weight)


def test_weights_in_half_precision_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, WeightAverage(0.9), precision="bf16-true")
    with pytest.raises(ValueError, match="too coarse for a moving average"):
        trainer.fit(make_task(), DataLoader(make_batches(), batch_size=4))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"ema.decay must be at least 0 and below 1, .* got {decay}"):
        WeightAverage(decay)
