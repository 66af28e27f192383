"""All checks of a fit, in order; a failure in one does not prevent the others."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from scalablevit_pl.callbacks.run_record import check_data
from scalablevit_pl.diagnosis import disk, machine, plan, speed
from scalablevit_pl.diagnosis.data import DataExamination
from scalablevit_pl.diagnosis.finding import Finding, from_sentence
from scalablevit_pl.explanation import explain
from scalablevit_pl.profiling.timing import core_count, measure_throughput
from scalablevit_pl.run_folder import check_resumable
from scalablevit_pl.text import one_line, visible

Check = Callable[[], Iterable[Finding]]


class Examination:
    """All checks of a fit."""

    def __init__(self, fit: Any, start: Any, options: SimpleNamespace) -> None:
        self.fit = fit
        self.start = start
        self.options = options
        self.config: Any = fit.config
        built, self.faults = fit.build_parts()
        self.task: Any = built.get("model")
        self.datamodule: Any = built.get("data")
        self.trainer: pl.Trainer | None = None
        self.data = DataExamination(self.datamodule, options)
        self.batch: dict[str, Any] | None = None
        self.step: speed.StepSpeed | None = None

    def findings(self) -> Iterator[Finding]:
        """Run the checks, and print each finding at once."""
        checks: list[tuple[str, Check]] = [
            ("versions", lambda: [machine.check_versions()]),
            ("configuration", self.check_configuration),
            ("devices", self.check_devices),
            ("Hub token", self.data.check_token),
            ("Hub access", self.data.check_access),
            ("data disk", self.data.check_disk),
            ("data", lambda: self.data.check_splits(self.trainer.world_size if self.trainer else 1)),
            ("classes", self.compare_classes),
            ("classes", self.data.check_classes),
            ("run folder", self.check_run_folder),
            ("test data", self.data.check_test_split),
            ("images", self.data.check_images),
            ("batch", self.load_batch),
            ("loaders", self.check_machine),
            ("plan", self.check_plan),
            ("training step", self.check_step),
            ("loader", self.check_loader),
        ]
        for what, check in checks:
            for finding in self.run_check(what, check):
                sys.stdout.write(visible(f"{finding}\n"))
                sys.stdout.flush()
                yield finding

    def run_check(self, what: str, check: Check) -> Iterator[Finding]:
        """Run a check; its warnings and its exception also become findings."""
        with collected_warnings() as records:
            try:
                yield from check()
            except Exception as error:
                yield self.finding_of(what, error)
        yield from (from_sentence(what, record.getMessage(), "warn") for record in records)

    def finding_of(self, what: str, error: Exception) -> Finding:
        """Turn an exception into a finding, and print its traceback if requested."""
        if self.options.traceback:
            sys.stderr.write("".join(traceback.format_exception(error)))
        bug = f"{type(error).__name__}: {one_line(error)}: see its origin with --traceback"
        return from_sentence(what, explain(error) or bug)

    def check_configuration(self) -> Iterator[Finding]:
        """Report what was built, and what could not be."""
        for error in self.faults.values():
            yield self.finding_of("configuration", error)
        if self.task is not None:
            name = self.config.get("model.init_args.network.init_args.name") or type(self.task.network).__name__
            size = "for the classes of the data" if self.fit.classes_open else f"{self.parameters:,} parameters"
            yield Finding("ok", "configuration", f"{name}, {size}")

    @property
    def parameters(self) -> int:
        """Number of weights of the task."""
        return sum(parameter.numel() for parameter in self.task.parameters())

    def check_run_folder(self) -> Iterator[Finding]:
        """Check that the run can be written or resumed."""
        folder: Path = self.fit.folder
        if self.start.record is not None:
            check_resumable(self.start.record["config"], self.fit.record())
        finding = disk.check_run_folder(folder, self.start.continues(folder, self.config.ckpt_path))
        yield finding
        if self.task is not None and finding.status == "ok":
            averaged = self.config.get("ema.decay") is not None
            yield disk.check_checkpoint_space(folder, self.parameters, averaged)

    def check_devices(self) -> Iterator[Finding]:
        """Build the trainer; if its devices are missing, the later checks use the available ones."""
        settings = self.config.trainer
        try:
            self.trainer = self.fit.build_trainer()
        except Exception as error:
            remedy = machine.device_remedy(str(settings.accelerator), settings.devices)
            yield Finding("FAIL", "devices", explain(error) or one_line(error), remedy)
            return
        yield machine.check_devices(self.trainer)
        yield machine.check_precision(str(settings.precision or "32-true"), self.trainer.strategy.root_device)

    def compare_classes(self) -> Iterator[Finding]:
        """Build a network that takes its classes from the data, and compare the data with network and checkpoint."""
        if not self.data.examinable or self.task is None:
            return
        if self.fit.classes_open:
            self.fit.set_classes(len(self.datamodule.class_names))
            self.task = self.fit.build("model").model
            yield Finding("ok", "network", f"{self.parameters:,} parameters")
        check_data(self.datamodule, self.task, self.start.record, self.fit.classes_option)
        if hasattr(self.task, "check_data"):
            self.task.check_data(self.datamodule, "fit")

    @property
    def processes(self) -> int:
        """Training processes on this machine."""
        return self.trainer.num_devices if self.trainer is not None else 1

    def load_batch(self) -> Iterable[Finding]:
        """Load a training batch, or make one up if the datamodule can do that without data."""
        example = getattr(self.datamodule, "example_batch", None)
        if example is not None:
            labels = {"multi_label": True} if getattr(self.task, "multi_label", False) else {}
            self.batch = example(getattr(self.task, "num_classes", None) or 2, **labels)
        elif self.data.examinable:
            batch = next(iter(self.datamodule.train_dataloader()))
            self.batch = self.datamodule.on_before_batch_transfer(batch, 0)
        return ()

    def check_machine(self) -> Iterator[Finding]:
        """Compare loader processes with cores and shared memory."""
        workers = getattr(self.datamodule, "num_workers", None)
        if workers is None:
            return
        yield machine.check_cores(workers, self.processes, core_count())
        if self.batch is not None:
            tensors = (value for value in self.batch.values() if isinstance(value, torch.Tensor))
            yield from machine.check_shared_memory(workers, self.processes, sum(value.nbytes for value in tensors))

    def check_plan(self) -> Iterator[Finding]:
        """Report what the fit will resolve to, which requires task, data and devices."""
        if self.data.loaded and self.task is not None and self.trainer is not None:
            shape = plan.planned_shape(self.trainer, self.datamodule.train_dataloader())
            yield plan.check_plan(self.task, shape)
        else:
            yield Finding("warn", "plan", "learning rate and steps are unknown", "fix the problems above")

    def check_step(self) -> Iterator[Finding]:
        """Time some training steps."""
        if self.batch is None or self.task is None:
            return
        trainer = self.trainer or pl.Trainer(logger=False, devices=1)
        batch = self.datamodule.on_after_batch_transfer(dict(self.batch), 0)
        batch_size = len(batch["image"])
        try:
            self.step = speed.time_steps(self.task, trainer, batch, self.options.seconds)
        except torch.OutOfMemoryError:
            text = f"a batch of {batch_size} images does not fit into the GPU's memory"
            yield Finding("FAIL", "training step", text, speed.memory_remedy(batch_size))
            return
        yield speed.check_step(self.step, batch_size)

    def check_loader(self) -> Iterator[Finding]:
        """Measure the throughput of the training loader."""
        if self.data.loaded:
            rate = measure_throughput(self.datamodule.train_dataloader(), self.options.seconds)
            workers = getattr(self.datamodule, "num_workers", 0)
            yield speed.check_loader(rate, self.step, workers, self.processes, core_count())


@contextmanager
def collected_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect this package's warnings inside the block instead of printing them."""
    handler = BufferingHandler(capacity=sys.maxsize)
    logger = logging.getLogger("scalablevit_pl")
    handlers, level = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)
    try:
        yield handler.buffer
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
