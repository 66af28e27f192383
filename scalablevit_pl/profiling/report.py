"""Measurements of networks as tables for people and as plain values for programs."""

import importlib.metadata
import platform
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from scalablevit_pl import __version__
from scalablevit_pl.profiling.measurement import Plan, Result
from scalablevit_pl.text import WIDTH, aligned, gigabytes, shorten

LONGEST_NAME = 28
FEWEST_SAMPLES = 3  # for meaningful quartiles
CONVENTIONS = {
    "multiply_adds": "for one image, of convolutions and linear layers, without biases; each is two operations",
    "attention_multiply_adds": "of batched matrix products, all of which count as attention, in addition",
    "norm_multiply_adds": "two for each number that a layer norm or batch norm computes, in addition",
    "precision": "32 is float32 without TF32, in convolutions and in matrix products",
    "seconds": "of a call with a whole batch on the device; a sample per round of all cases, after an untimed call",
    "inference": "weights and images in the type of the precision, under torch.inference_mode",
    "train": "float32 weights, forward pass under autocast, cross entropy, backward pass, fused AdamW at a rate of 0",
    "fraction_of_matrix_rate": "images/s × 2 × all multiply-adds (× 3 for a training step) ÷ matrix_rate, which is the "
    "operations per second of the best square matrix product in the same rounds",
    "peak_memory": "bytes of weights, optimizer state and images, plus the most that a step allocates",
    "compile_seconds": "of the first step, which compiles; less if torch's disk cache is warm",
}
HEADER = ("network", "ms", "±", "images/s", "memory", "of matmul", "ratio")
LEGEND = """\
ms: median time of a call; ±: half its interquartile range; memory: peak;
of matmul: rate of the operations (the multiply-adds above and those of
attention, three times as many for a training step) over that of matrix
products, above 100 % if layers use a faster library; ratio: images/s over those
of the first network, - if that could not be measured.
"""


def environment(*packages: str) -> dict[str, Any]:
    """Return the start of a record: schema, date and versions."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    versions |= {"scalablevit_pl": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {"schema": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions}


def processor() -> str:
    """Return the name of the processor, if the system knows it, and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def describe(results: Sequence[Result], device: torch.device, plan: Plan) -> dict[str, Any]:
    """Return a record of plain values: environment, plan, conventions and results."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return environment("timm") | {
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "plan": asdict(plan),
        "conventions": CONVENTIONS,
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, Any]:
    values = asdict(result)
    for name in ("images_per_second", "matrix_rate", "fraction_of_matrix_rate"):
        values[name] = getattr(result, name)
    return {**values.pop("setting"), **values}


def headline(record: dict[str, Any]) -> str:
    """Return device, date and versions of a record in three lines."""
    device, versions = record["device"], record["versions"]
    threads = f", {device['threads']} thread(s)" if device["type"] == "cpu" else ""
    return (
        f"{device['name']}{threads}; {record['date'][:10]}\n"
        f"torch {versions['torch']}, timm {versions['timm']}, scalablevit_pl {versions['scalablevit_pl']}\n"
        f"medians of {record['plan']['repeats']} interleaved rounds"
    )


def report(results: Sequence[Result], record: dict[str, Any]) -> str:
    """Format results as tables of at most 80 columns: the costs, then one table for each way to run."""
    parts = [f"{headline(record)}\n", _costs(results)]
    for title, group in groupby(results, lambda result: result.setting.title):
        rows = list(group)
        rate = next((row.matrix_rate for row in rows if row.matrix_rate), None)
        products = f"; matrix products {_number(rate / 1e9)} Gflop/s" if rate else ""
        parts.append(f"{title}{products}\n{table(rows)}")
    return "\n".join([*parts, LEGEND])


def _costs(results: Sequence[Result]) -> str:
    rows = {
        (result.setting.name, result.setting.size): (
            f"{result.parameters:,}",
            _count(result.multiply_adds),
            _count(result.attention_multiply_adds),
            _count(result.norm_multiply_adds),
        )
        for result in results
        if result.multiply_adds is not None or result.seconds is not None
    }
    header = ("network", "input", "parameters", "mult.-adds", "attention", "norms")
    return (
        aligned([header, *((*case, *costs) for case, costs in rows.items())])
        + "mult.-adds: of convolutions and linear layers for one image, without biases;\n"
        + "attention: of batched products, such as the two of attention, in addition;\n"
        + "norms: two for each number that a norm computes, in addition\n"
    )


def table(results: Sequence[Result]) -> str:
    """Format results of one way to run; ratios are to the first network, and failures have their reason."""
    lines = [HEADER, *(_line(result, results[0].images_per_second) for result in results if result.seconds)]
    text = aligned(lines) if len(lines) > 1 else ""
    for result in results:
        if result.note:
            text += textwrap.fill(f"{result.setting.name}: {shorten(result.note, 200)}", WIDTH) + "\n"
        if result.compile_seconds is not None:
            text += f"{shorten(result.setting.name, LONGEST_NAME)}: compiled in {result.compile_seconds:.1f} s\n"
    return text


def _line(result: Result, first: float | None) -> tuple[str, ...]:
    seconds, rate, fraction = result.seconds, result.images_per_second, result.fraction_of_matrix_rate
    spread = seconds if len(result.samples) >= FEWEST_SAMPLES else None
    return (
        result.setting.name,
        _number(1e3 * seconds.median) if seconds else "-",
        f"{50 * (spread.upper - spread.lower) / spread.median:.1f}%" if spread else "-",
        _number(rate) if rate else "-",
        gigabytes(result.peak_memory) if result.peak_memory is not None else "-",
        _percent(fraction) if fraction is not None else "-",
        f"{rate / first:.2f}" if rate and first else "-",
    )


def _percent(fraction: float) -> str:
    """Format with two digits, however small the fraction is."""
    return f"{100 * fraction:.2g}%" if fraction < 0.995 else f"{100 * fraction:.0f}%"


def _number(value: float) -> str:
    """Format with at least three digits."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:.{digits}f}"


def _count(count: int | None) -> str:
    """Format a count in billions, or in millions if it is small."""
    if count is None:
        return "-"
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"
