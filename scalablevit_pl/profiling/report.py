"""What was measured of networks, as tables for people and as plain values for programs."""

import platform
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch

from scalablevit_pl import __version__
from scalablevit_pl.profiling.measurement import CONVENTIONS, Plan, Result
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.text import shorten

COLUMNS, LONGEST_NAME = 80, 28
FEWEST_SAMPLES = 3  # that have quartiles worth the name
HEADER = ("network", "ms", "±", "images/s", "memory", "of matmul", "ratio")
LEGEND = """\
ms: median time of a call; ±: half the distance of its quartiles; memory: peak;
of matmul: part of the matrix products' pace that is reached, with the multiply-
adds above and those of attention, three times for a training step, over 100 %
where layers are computed by a faster library than torch's products; ratio:
images/s over those of the first network, - where that could not be measured.
"""


def describe(results: Sequence[Result], device: torch.device, plan: Plan) -> dict[str, Any]:
    """Return a record in plain values: what was measured, on what, with which conventions and results."""
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "scalablevit_pl": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
            "threads": torch.get_num_threads(),
        },
        "plan": asdict(plan),
        "conventions": CONVENTIONS,
        "cases": [describe_case(result) for result in results],
    }


def describe_case(result: Result) -> dict[str, Any]:
    """Return a result in plain values."""
    values = asdict(replace(result, error=None))  # of which the note tells
    del values["error"]
    values["images_per_second"] = result.images_per_second
    values["fraction_of_matrix_rate"] = result.fraction_of_matrix_rate
    return {**values.pop("setting"), **values}


def processor() -> str:
    """Return the name of the processor, as far as the system tells, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def headline(record: dict[str, Any]) -> str:
    """Say on what, when and with which versions something was measured."""
    device, versions = record["device"], record["versions"]
    threads = f", {device['threads']} thread(s)" if device["type"] == "cpu" else ""
    return (
        f"{device['name']}{threads}; {record['date'][:10]}\n"
        f"torch {versions['torch']}, timm {versions['timm']}, scalablevit_pl {versions['scalablevit_pl']}\n"
        f"medians of {record['plan']['repeats']} rounds, measured in turns"
    )


def report(results: Sequence[Result], record: dict[str, Any]) -> str:
    """Lay out the results in tables of at most 80 columns: first what is counted, then a table for each way to run."""
    parts = [f"{headline(record)}\n", _costs(results)]
    for way, group in groupby(results, way_of):
        rows = list(group)
        parts.append(f"{way}{_pace(rows)}\n{table(rows)}")
    return "\n".join([*parts, LEGEND])


def way_of(result: Result) -> str:
    """Name all of a setting but the network."""
    setting = result.setting
    words = [setting.mode, "float32" if setting.precision == "32" else setting.precision]
    words += ["compiled"] * setting.compiled + ["fused"] * setting.fused + ["channels-last"] * setting.channels_last
    words += ["checkpointing"] * setting.grad_checkpointing
    return f"{' '.join(words)}, batch {setting.batch_size}, {size_of(setting)}"


def size_of(setting: Setting) -> str:
    """Write height and width."""
    return "×".join(map(str, setting.input_size))


def _pace(results: Sequence[Result]) -> str:
    matrix = next((result.matrix for result in results if result.matrix), None)
    return f"; matrix products {_number(matrix.operations_per_second / 1e9)} Gflop/s" if matrix else ""


def _costs(results: Sequence[Result]) -> str:
    rows = {
        (result.setting.network, size_of(result.setting)): (
            f"{result.parameters:,}",
            _large(result.multiply_adds),
            _large(result.attention_multiply_adds),
        )
        for result in results
        if result.multiply_adds is not None or result.seconds is not None
    }
    header = ("network", "input", "parameters", "mult.-adds", "attention")
    lines = [header, *((name, size, *costs) for (name, size), costs in rows.items())]
    return (
        _columns(lines)
        + "mult.-adds: of convolutions and linear layers for an image, without biases;\n"
        + "attention: those of batched products, such as its two, which come on top\n"
    )


def table(results: Sequence[Result]) -> str:
    """Lay out results of one way to run, the network that others are compared with first; failures say why."""
    lines = [HEADER, *(_line(result, results[0].images_per_second) for result in results if result.seconds)]
    text = _columns(lines) if len(lines) > 1 else ""
    for result in results:
        if result.note:
            text += textwrap.fill(f"{result.setting.network}: {shorten(result.note, 200)}", COLUMNS) + "\n"
        if result.compile_seconds is not None:
            text += f"{shorten(result.setting.network, LONGEST_NAME)}: compiled in {result.compile_seconds:.1f} s\n"
    return text


def _line(result: Result, first: float | None) -> tuple[str, ...]:
    seconds, rate, fraction = result.seconds, result.images_per_second, result.fraction_of_matrix_rate
    spread = seconds if len(result.samples) >= FEWEST_SAMPLES else None
    return (
        result.setting.network,
        _number(1e3 * seconds.median) if seconds else "-",
        f"{100 * spread.relative:.1f}%" if spread else "-",
        _number(rate) if rate else "-",
        _memory(result.peak_memory) if result.peak_memory is not None else "-",
        _percent(fraction) if fraction is not None else "-",
        f"{rate / first:.2f}" if rate and first else "-",
    )


def _percent(fraction: float) -> str:
    """Write two digits, however small a fraction is."""
    return f"{100 * fraction:.2g}%" if fraction < 0.995 else f"{100 * fraction:.0f}%"


def _memory(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def _number(value: float) -> str:
    """Write three digits or more."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:.{digits}f}"


def _large(count: int | None) -> str:
    """Write a count in thousand millions, or where it is small in millions."""
    if count is None:
        return "-"
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Put words in columns, the first to the left, as far as there is room for it, and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    widths[0] = min(widths[0], COLUMNS - sum(2 + width for width in widths[1:]))
    return "".join(
        f"{shorten(line[0], widths[0]):<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        + "\n"
        for line in lines
    )
