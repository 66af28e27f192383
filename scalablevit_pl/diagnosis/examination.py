"""All checks of a fit in their order, none of which hides the others."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import torch

from scalablevit_pl.callbacks.run_record import RunRecord
from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.data.source import SPLIT_FOLDERS, local_folder
from scalablevit_pl.diagnosis import data, disk, hub, machine, plan, speed
from scalablevit_pl.diagnosis.finding import Finding, found
from scalablevit_pl.explanation import explain
from scalablevit_pl.run_folder import check_resumable

Check = Callable[[], Iterable[Finding]]


class Examination:
    """All checks of a fit, in order; what one of them finds wrong does not keep the others from being made.

    Args:
        fit: The fit.
        options: As `read_options` gives them.
    """

    def __init__(self, fit: Any, options: SimpleNamespace) -> None:
        self.fit = fit
        self.options = options
        self.config: Any = fit.config[fit.subcommand]
        self.task: Any = fit.built.get("model")
        self.datamodule: Any = fit.built.get("data")
        self.trainer: pl.Trainer | None = None
        self.listing: hub.Listing | None = None
        self.space = True  # on the disk, for the data
        self.step: speed.StepSpeed | None = None
        self.loaded = False

    def findings(self) -> Iterator[Finding]:
        """Make the checks, and print what they find as they find it."""
        checks: list[tuple[str, Check]] = [
            ("versions", self.look_at_versions),
            ("configuration", self.look_at_configuration),
            ("run folder", self.look_at_run_folder),
            ("devices", self.look_at_devices),
            ("Hub", self.look_at_hub),
            ("data disk", self.look_at_data_disk),
            ("data", self.look_at_data),
            ("test data", self.look_at_test_data),
            ("images", self.look_at_images),
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
        """Make a check, and of an error that it ends with another finding."""
        try:
            yield from check()
        except Exception as error:
            yield self.finding_of(what, error)

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
        for error in self.fit.faults.values():
            yield self.finding_of("configuration", error)
        if self.task is not None:
            count = sum(parameter.numel() for parameter in self.task.parameters())
            name = self.config.get("model.init_args.network.init_args.name") or type(self.task.network).__name__
            yield Finding("ok", "configuration", f"{name}, {count:,} parameters")

    def look_at_run_folder(self) -> Iterator[Finding]:
        """Tell whether the run can be written."""
        folder: Path = self.fit.folder
        checkpoint, stored = self.config.ckpt_path, self.fit.stored
        resuming = self.fit.restarts or (stored is not None and folder.resolve() in Path(checkpoint).resolve().parents)
        if stored is not None:
            check_resumable(stored["config"], self.fit.config_dump)
        finding = disk.check_run_folder(folder, resuming)
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

    def look_at_hub(self) -> Iterator[Finding]:
        """Tell whether the Hub gives the data, if they come from there."""
        if not self.from_hub():
            return
        token = hub.check_token()
        yield token
        if token.what == "Hub":  # offline
            return
        access, self.listing = hub.check_repository(self.datamodule.dataset, self.datamodule.revision)
        yield from access

    def from_hub(self) -> bool:
        """Tell whether the data lie on the Hub."""
        ours = isinstance(self.datamodule, ClassificationDataModule)
        return ours and local_folder(self.datamodule.dataset) is None

    def look_at_data_disk(self) -> Iterator[Finding]:
        """Compare the space on the disk with what the data will take."""
        if not isinstance(self.datamodule, ClassificationDataModule):
            return
        downloads, copies = hub.cache_folders()
        folder = local_folder(self.datamodule.dataset)
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
            needs = {copies: size} if size else {}
        elif self.listing is not None:
            names = [self.datamodule.train_split, self.datamodule.val_split or "validation", self.datamodule.test_split]
            splits = {name: SPLIT_FOLDERS.get(name, (name,)) for name in names}
            sizes = hub.files_of_splits(self.listing.sizes, splits)
            size = sum(sizes.values())
            missing = hub.missing_bytes(self.datamodule.dataset, self.listing.commit, sizes)
            needs = {downloads: missing, copies: size}
        else:
            return
        prepared = sum(path.stat().st_size for path in copies.rglob("*.arrow")) >= size
        for finding in disk.check_data_space(needs, prepared):
            self.space = self.space and finding.status != "FAIL"
            yield finding

    def look_at_data(self) -> Iterator[Finding]:
        """Load the data as a fit does, unless that would download them, and look at counts and classes."""
        if self.datamodule is None:
            return
        if not self.available():
            yield self.not_fetched()
            return
        self.datamodule.trainer = self.trainer  # says how many processes share the data
        self.datamodule.setup("fit")
        self.loaded = True
        if not isinstance(self.datamodule, ClassificationDataModule):
            yield Finding(
                "warn", "data", f"{type(self.datamodule).__name__} is none of this package's: not looked into"
            )
            return
        yield data.check_counts(self.datamodule.images, self.datamodule.commit)
        yield from self.look_at_classes()

    def available(self) -> bool:
        """Bring the data into the cache, or tell that they are not there and are not to be downloaded."""
        if not self.from_hub() or (self.options.download and self.space):
            if not self.space:
                return False
            with self.progress():
                self.prepare()
            return True
        try:
            with hub.offline():
                self.prepare()
        except (ValueError, OSError):
            return False
        return True

    def prepare(self) -> None:
        """Prepare what a fit needs of the data."""
        self.datamodule.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # says which splits
        try:
            self.datamodule.prepare_data()
        finally:
            self.datamodule.trainer = None

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show how a download goes."""
        if self.options.download:
            datasets.enable_progress_bars()
        yield
        datasets.disable_progress_bars()

    def not_fetched(self) -> Finding:
        """Say why the data were not looked into."""
        if not self.space:
            return Finding("FAIL", "data", "not looked into, since they do not fit on the disk", "make space first")
        text = f"{self.datamodule.dataset} is not in the cache, and its images were not looked at"
        if self.listing is None:
            return Finding("FAIL", "data", text, "mend what keeps them from being fetched")
        remedy = "fetch them and look with --download; a fit fetches them, too"
        return Finding("warn", "data", text, remedy)

    def look_at_classes(self) -> Iterator[Finding]:
        """Compare the classes of data, network and checkpoint, and count the images of each."""
        names = self.datamodule.class_names
        yield data.check_classes(names, self.datamodule.class_order is not None)
        if self.task is not None:
            yield from self.made_safe("classes", self.compare_classes)
        for part, images in self.datamodule.images.items():
            if images.labels is not None:
                yield data.check_histogram(part, data.labels_of(images), names)

    def compare_classes(self) -> tuple[()]:
        """Compare the data's classes and preprocessing with the network's and a checkpoint's, as a fit does."""
        trainer: Any = SimpleNamespace(datamodule=self.datamodule)
        RunRecord(self.fit.folder, {}, self.fit.stored).setup(trainer, self.task, "fit")
        return ()

    def look_at_test_data(self) -> Iterator[Finding]:
        """Load the test images, which training does not need."""
        if not self.loaded:
            return
        try:
            self.datamodule.setup("test")
        except ValueError as error:
            yield found("test data", explain(error) or str(error), "warn")
            return
        if isinstance(self.datamodule, ClassificationDataModule):
            images = self.datamodule.images["test"]
            yield Finding("ok", "test data", f"{len(images):,} images of split {images.split!r}")

    def look_at_images(self) -> Iterator[Finding]:
        """Decode a sample of each part."""
        if self.loaded and isinstance(self.datamodule, ClassificationDataModule):
            for part, images in self.datamodule.images.items():
                if hasattr(images, "rows"):
                    yield data.check_images(part, data.look_at_images(images, self.options.images))

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
        batch_bytes = self.datamodule.batch_size * 3 * self.datamodule.preprocessing.input_size**2 * 4
        yield from machine.check_shared_memory(workers, self.processes, batch_bytes)

    def look_at_plan(self) -> Iterator[Finding]:
        """Say what the fit will resolve, which takes task, data and devices."""
        if self.loaded and self.task is not None and self.trainer is not None:
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
        if self.loaded:
            rate = speed.time_loader(self.datamodule.train_dataloader(), self.options.seconds)
            workers, cores = self.datamodule.num_workers, machine.core_count()
            yield speed.check_loader(rate, self.step, workers, self.processes, cores)
