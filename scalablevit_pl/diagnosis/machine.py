"""The machine of a run: versions, devices, precision, cores, shared memory."""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from scalablevit_pl.diagnosis.disk import check_space
from scalablevit_pl.diagnosis.finding import Finding
from scalablevit_pl.text import gigabytes, listed

PACKAGES = ("torch", "lightning", "timm", "datasets")
SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches that each loader process makes ahead


def check_versions() -> Finding:
    """Report the versions that the numbers of a run depend on."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    text = ", ".join([f"python {platform.python_version()}", *(" ".join(pair) for pair in versions.items())])
    return Finding("ok", "versions", text)


def device_remedy(accelerator: str, devices: Any) -> str:
    """Return what to do if Lightning cannot build a trainer with these settings."""
    count = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and count == 0:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        return (
            f"run on a machine with a GPU (nvidia-smi lists it; this torch is built {built}), or set "
            "--trainer.accelerator auto"
        )
    if accelerator in ("gpu", "cuda") and isinstance(devices, int | str) and str(devices).isdecimal():
        return f"set --trainer.devices to {count} or less"
    return "correct --trainer.accelerator, --trainer.devices and --trainer.strategy"


def check_devices(trainer: pl.Trainer) -> Finding:
    """Report the devices that a run uses on this machine."""
    kind, count = trainer.strategy.root_device.type, trainer.num_devices
    nodes = f" on each of {trainer.num_nodes} nodes, of which this one was checked" if trainer.num_nodes > 1 else ""
    if kind == "cuda":
        properties = [torch.cuda.get_device_properties(index) for index in trainer.device_ids]
        names = sorted({f"{card.name} ({gigabytes(card.total_memory)})" for card in properties})
        return Finding("ok", "devices", f"{count} × {listed(names)}{nodes}")
    text = f"{count} process(es) on {kind}{nodes}"
    if kind == "cpu" and torch.cuda.is_available():
        return Finding("warn", "devices", f"{text}, although there is a GPU", "set --trainer.accelerator gpu")
    return Finding("ok", "devices", text)


def check_precision(precision: str, device: torch.device) -> Finding:
    """Check that a device supports a precision."""
    text = f"{precision} on {device.type}"
    if precision.startswith("16") and device.type == "cpu":
        remedy = "set --trainer.precision bf16-mixed or 32-true"
        return Finding("warn", "precision", f"{text}: CPUs have no mixed precision with float16", remedy)
    if precision.startswith("bf16") and device.type == "cpu":
        return Finding("warn", "precision", f"{text} may be slower than float32", "set --trainer.precision 32-true")
    if precision.startswith("bf16") and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        text = f"{text}: the device has no bfloat16 and would emulate it slowly"
        return Finding("warn", "precision", text, "set --trainer.precision 16-mixed")
    return Finding("ok", "precision", text)


def check_cores(workers: int, processes: int, cores: int) -> Finding:
    """Compare the loader processes (`workers`) of all training processes on this machine with its cores."""
    text = f"{cores} core(s) for {processes} × {workers} loader process(es)"
    if workers * processes <= cores:
        return Finding("ok", "cores", text)
    remedy = f"set --data.num_workers to {cores // processes}"
    return Finding("warn", "cores", f"{text}, which must share them", remedy)


def check_shared_memory(
    workers: int, processes: int, batch_bytes: int, folder: Path = SHARED_MEMORY
) -> Iterator[Finding]:
    """Compare the shared memory with the batches that loader processes keep there, if the system has its folder."""
    if workers == 0 or not folder.is_dir():
        return
    # Each loader process makes batches ahead, and the training process holds one more.
    needed = processes * (workers * PREFETCHED + 1) * batch_bytes
    remedy = "enlarge it (docker run --shm-size, or --ipc=host), or set --data.num_workers lower: loader processes "
    remedy += "would die with a bus error"
    yield check_space("shared memory", needed, f"of prefetched batches in {folder}", folder, remedy)
