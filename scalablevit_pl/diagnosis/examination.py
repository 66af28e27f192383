"""All checks of a fit in their order, none of which hides the others."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from scalablevit_pl.callbacks.run_record import RunRecord
from scalablevit_pl.diagnosis import data, disk, machine, plan, speed
from scalablevit_pl.diagnosis.data_examination import DataExamination
from scalablevit_pl.diagnosis.finding import Finding, found
from scalablevit_pl.explanation import explain
from scalablevit_pl.run_folder import check_resumable

Check = Callable[[], Iterable[Finding]]


class Examination:
    """All checks of a fit, in order; what one of them finds wrong does not keep the others from being made.

    Args:
        fit: The parsed fit.
        start: What it starts from.
        options: As `read_options` gives them.
    """

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
        self.step: speed.StepSpeed | None = None

    def findings(self) -> Iterator[Finding]:
        """Make the checks, and print what they find as they find it."""
        checks: list[tuple[str, Check]] = [
            ("versions", self.look_at_versions),
            ("configuration", self.look_at_configuration),
            ("run folder", self.look_at_run_folder),
            ("devices", self.look_at_devices),
            ("Hub", self.data.look_at_hub),
            ("data disk", self.data.look_at_data_disk),
            ("data", lambda: self.data.look_at_data(self.trainer)),
            ("classes", self.look_at_classes),
            ("test data", self.data.look_at_test_data),
            ("images", self.data.look_at_images),
            ("loaders", self.look_at_machine),
            ("plan", self.look_at_plan),
            ("training step", self.look_at_step),
            ("loader", self.look_at_loader),
        ]
        for what, check in checks:
            for finding in self.made_safe(what, check):
                sys.stdout.write(f"{finding}\n")
                sys.stdout.flush()
                yield finding

    def made_safe(self, what: str, check: Check) -> Iterator[Finding]:
        """Make a check, and further findings of what it warns of and of an error that it ends with."""
        with collected_warnings() as messages:
            try:
                yield from check()
            except Exception as error:
                yield self.finding_of(what, error)
        yield from (found(what, message, "warn") for message in messages)

    def finding_of(self, what: str, error: Exception) -> Finding:
        """Make a finding of an error, with its trace if that is asked for."""
        if self.options.traceback:
            sys.stderr.write("".join(traceback.format_exception(error)))
        sentence = explain(error)
        if sentence is not None:
            return found(what, sentence)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding("FAIL", what, text, "see with --traceback where it comes from")

    def look_at_versions(self) -> Iterator[Finding]:
        """Name the versions."""
        yield machine.check_versions()

    def look_at_configuration(self) -> Iterator[Finding]:
        """Say what was built, and what could not be."""
        for error in self.faults.values():
            yield self.finding_of("configuration", error)
        if self.task is not None:
            count = sum(parameter.numel() for parameter in self.task.parameters())
            name = self.config.get("model.init_args.network.init_args.name") or type(self.task.network).__name__
            yield Finding("ok", "configuration", f"{name}, {count:,} parameters")

    def look_at_run_folder(self) -> Iterator[Finding]:
        """Tell whether the run can be written."""
        folder: Path = self.fit.folder
        if self.start.record is not None:
            check_resumable(self.start.record["config"], self.fit.record())
        finding = disk.check_run_folder(folder, self.start.continues(folder, self.config.ckpt_path))
        yield finding
        if self.task is not None and finding.status == "ok":
            count = sum(parameter.numel() for parameter in self.task.parameters())
            yield disk.check_checkpoint_space(folder, count, averaged=self.config.get("ema.decay") is not None)

    def look_at_devices(self) -> Iterator[Finding]:
        """Build the trainer; without the devices it asks for, go on with what there is."""
        settings = self.config.trainer
        try:
            self.trainer = self.fit.build_trainer()
        except Exception as error:
            finding = self.finding_of("devices", error)
            remedy = machine.device_remedy(str(settings.accelerator), settings.devices)
            yield Finding("FAIL", "devices", f"{finding.text}{finding.remedy and ': '}{finding.remedy}", remedy)
            return
        yield machine.check_devices(self.trainer)
        yield machine.check_precision(str(settings.precision or "32-true"), self.trainer.strategy.root_device)

    def look_at_classes(self) -> Iterator[Finding]:
        """Compare the classes of data, network and checkpoint, and count the images of each."""
        if not self.data.loaded or not self.data.ours:
            return
        names = self.datamodule.class_names
        yield data.check_classes(names, getattr(self.datamodule, "class_order", None) is not None)
        if self.task is not None:
            yield from self.made_safe("classes", self.compare_classes)
        for part, images in self.datamodule.images.items():
            labels = getattr(self.datamodule, "labels", {}).get(images.split)
            if labels is not None:
                yield data.check_histogram(part, labels[images.indices].tolist(), names)

    def compare_classes(self) -> tuple[()]:
        """Compare the data's classes and preprocessing with the network's and a checkpoint's, as a fit does."""
        trainer: Any = SimpleNamespace(datamodule=self.datamodule)
        RunRecord(self.fit.folder, {}, self.start.record).setup(trainer, self.task, "fit")
        return ()

    @property
    def processes(self) -> int:
        """Training processes on this machine."""
        return self.trainer.num_devices if self.trainer is not None else 1

    def look_at_machine(self) -> Iterator[Finding]:
        """Compare loader processes with cores and shared memory."""
        workers = getattr(self.datamodule, "num_workers", None)
        if workers is None:
            return
        yield machine.check_cores(workers, self.processes, machine.core_count())
        batch_bytes = self.datamodule.batch_size * 3 * self.datamodule.preprocessing.input_size**2  # of bytes
        yield from machine.check_shared_memory(workers, self.processes, batch_bytes)

    def look_at_plan(self) -> Iterator[Finding]:
        """Say what the fit will resolve, which takes task, data and devices."""
        if self.data.loaded and self.task is not None and self.trainer is not None:
            yield plan.check_plan(self.task, plan.plan_fit(self.trainer, self.datamodule.train_dataloader()))
        else:
            yield Finding("warn", "plan", "learning rate and steps are not known", "mend what is wrong above")

    def look_at_step(self) -> Iterator[Finding]:
        """Train some steps on random images."""
        if not hasattr(self.task, "num_classes") or not hasattr(self.datamodule, "preprocessing"):
            return
        size, seconds = self.datamodule.preprocessing.input_size, self.options.seconds
        trainer = self.trainer or pl.Trainer(logger=False, devices=1)
        batch_size = self.datamodule.batch_size
        try:
            self.step = speed.time_steps(self.task, trainer, batch_size, size, seconds)
        except torch.OutOfMemoryError:
            text = f"a batch of {batch_size} images does not fit into the GPU's memory"
            yield Finding("FAIL", "training step", text, speed.memory_remedy(batch_size))
            return
        yield speed.check_step(self.step, batch_size)

    def look_at_loader(self) -> Iterator[Finding]:
        """Time the training images as they come."""
        if self.data.loaded:
            rate = speed.time_loader(self.datamodule.train_dataloader(), self.options.seconds)
            workers, cores = self.datamodule.num_workers, machine.core_count()
            yield speed.check_loader(rate, self.step, workers, self.processes, cores)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Give a list to which this package's warnings go in the place of the screen, for the time of a block."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("scalablevit_pl")
    handlers, level = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
