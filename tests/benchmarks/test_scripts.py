"""What the scripts in `benchmarks` add to the package."""

import itertools
import json
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import FOLDER, load
from PIL import Image
from torch import nn

from scalablevit_pl.models import create_model
from scalablevit_pl.profiling import measurement
from scalablevit_pl.profiling.measurement import Plan, Result
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.timing import Spread


def measured(setting: Setting, *samples: float) -> Result:
    return Result(setting, "", 1, 1, 0, samples, Spread.of(samples))


def test_a_fallen_ratio_is_an_error_and_a_risen_one_is_reported() -> None:
    compare = load("regression").compare
    lines, good = compare({"a": 0.9, "b": 1.3, "c": 2.0}, {"a": 1.0, "b": 1.0})
    assert lines == ["ok   a: was 1.000, is 0.900", "fast b: was 1.000, is 1.300", "new  c: was -, is 2.000"]
    assert good
    assert compare({"a": 0.84, "b": 1.0}, {"a": 1.0, "b": 1.0}) == (
        ["SLOW a: was 1.000, is 0.840", "ok   b: was 1.000, is 1.000"],
        False,
    )


def test_a_ratio_uses_the_fastest_rounds() -> None:
    regression = load("regression")
    setting = Setting("a")
    assert regression.ratio(measured(setting, 2.0, 10.0, 3.0), measured(setting, 7.0, 30.0, 3.0)) == 1.5
    with pytest.raises(SystemExit, match="a: out of memory"):
        regression.ratio(Result(setting, "out of memory"), measured(setting, 1.0))


@pytest.mark.parametrize(("again", "status"), [(1.0, 0), (2.0, 1)])
def test_a_slow_pair_is_measured_again(
    again: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regression = load("regression")
    slow = regression.PAIRS[1][0]
    asked: list[list[Setting]] = []

    def measure(settings: Iterable[Setting], *_: object) -> list[Result]:
        asked.append([*settings])
        taken = again if len(asked) > 1 else 2.0
        return [measured(setting, taken if setting == slow else 1.0) for setting in asked[-1]]

    names = [regression.name_of(*pair) for pair in regression.PAIRS]
    records = {"this": {"measured_on": "x", "ratios": dict.fromkeys(names, 1.0)}, "other": {}}
    (tmp_path / "x.json").write_text(json.dumps(records))
    monkeypatch.setattr(regression, "processor", lambda: "this")
    monkeypatch.setattr(regression, "measure", measure)
    monkeypatch.setattr(regression, "RECORD", tmp_path / "x.json")
    monkeypatch.setattr("sys.argv", ["regression.py"])
    threads = torch.get_num_threads()
    try:
        assert regression.main() == status
    finally:
        torch.set_num_threads(threads)
    assert asked[1:] == [[*regression.PAIRS[1]]]


def test_the_committed_ratios_match_the_pairs() -> None:
    regression = load("regression")
    names = [regression.name_of(*pair) for pair in regression.PAIRS]
    for record in json.loads((FOLDER / "regression.json").read_text()).values():
        assert [*record["ratios"]] == names


def test_ratios_belong_to_one_kind_of_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regression = load("regression")
    monkeypatch.setattr(regression, "RECORD", tmp_path / "x.json")
    monkeypatch.setattr(regression, "processor", lambda: "this, AVX2")
    monkeypatch.setattr(regression, "measure_pairs", lambda pairs, repeats: {"a": 1.23456})
    monkeypatch.setattr(regression, "PAIRS", [])
    other = {"measured_on": "x", "ratios": {"a": 2.0}}
    monkeypatch.setattr("sys.argv", ["regression.py"])
    with pytest.raises(SystemExit, match="no ratios are known"):
        regression.main()
    (tmp_path / "x.json").write_text(json.dumps({"this, AVX512": other}))
    with pytest.raises(SystemExit, match="no ratios are known of this, AVX2: write those of an earlier commit"):
        regression.main()
    threads = torch.get_num_threads()
    try:
        for words in (["--update"], []):
            monkeypatch.setattr("sys.argv", ["regression.py", *words])
            assert regression.main() == 0
    finally:
        torch.set_num_threads(threads)
    records = json.loads((tmp_path / "x.json").read_text())
    assert records["this, AVX512"] == other
    assert records["this, AVX2"]["ratios"] == {"a": 1.2346}


def test_the_best_batch_is_searched_until_memory_is_exhausted() -> None:
    networks = load("networks")
    asked: list[tuple[str, int]] = []

    def measure(settings: Iterable[Setting]) -> list[Result]:
        results = []
        for setting in settings:
            asked.append((setting.network, setting.batch_size))
            # The first is fastest at 64 and runs out of memory at 256, the second becomes faster with each batch.
            seconds = {"a": {32: 1.0, 64: 1.0, 128: 4.0}, "b": {32: 1.0, 64: 1.5, 128: 2.0, 256: 2.5}}
            taken = seconds[setting.network].get(setting.batch_size)
            results.append(measured(setting, taken) if taken else Result(setting, "out of memory"))
        return results

    settings = [Setting("a", batch_size=32), Setting("b", batch_size=32)]
    best = networks.search_batches(settings, measure, 512)
    assert [result.setting for result in best] == [
        replace(settings[0], batch_size=64),
        replace(settings[1], batch_size=256),
    ]
    assert asked == [(name, batch) for batch in (32, 64, 128, 256) for name in "ab"] + [("b", 512)]
    table = networks.table("title", [best[0], Result(settings[1], "out of memory")], with_batch=True)
    rows = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    assert {len(row) for row in rows} == {len(networks.HEADER)}
    assert re.match(r"\| `a`, batch 64 \| 1 \| .* \| 64.0 \| ", table.splitlines()[5])
    assert "| `b`, batch 32 | out of memory | – |" in table


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--parts inference fused", {(1, "224×224", False), (8, "224×224", False), (8, "224×224", True)}),
        ("--parts sizes", {(1, "448×448", False), (1, "512×512", False), (1, "800×1333", False)}),
        ("--parts fused --batch-sizes 2 4", {(4, "224×224", False), (4, "224×224", True)}),
    ],
)
def test_the_tables_of_networks_have_the_requested_parts(
    words: str, expected: set[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = load("networks")
    asked: list[Setting] = []

    def measure(settings: Iterable[Setting], device: torch.device, plan: Plan) -> list[Result]:
        asked.extend(settings)
        return [measured(setting, 0.5) for setting in settings]

    monkeypatch.setattr(networks, "measure", measure)
    monkeypatch.setattr("sys.argv", ["networks.py", "--device", "cpu", "--networks", "a", "b", *words.split()])
    networks.main()
    assert {(setting.batch_size, setting.size, setting.fused) for setting in asked} == expected
    assert {(setting.mode, setting.precision, setting.compiled) for setting in asked} == {("inference", "32", False)}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == len(asked)
    monkeypatch.setattr("sys.argv", ["networks.py", "--device", "cuda", "--parts", "fused"])
    with pytest.raises(SystemExit):
        networks.main()
    assert sum("`, fused | " in row for row in rows) == sum(setting.fused for setting in asked)


def lines_of(
    name: str, *options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Run a script and return the rows of its tables."""
    script = load(name)
    if hasattr(script, "in_process"):
        monkeypatch.setattr(script, "in_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--device", "cpu", *options])
    script.main()
    return [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (?!---)", line)]


def test_operators_of_a_step_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(measurement.SIDES, "cpu", (64,))
    # Maps of at most seven tokens are one window, so each layer is called once.
    options = ["--mode", "train", "--batch-size", "2", "--input-size", "28", "--repeats", "1"]
    lines = lines_of("operators", "scalablevit_nano", *options, monkeypatch=monkeypatch, capsys=capsys)
    rows = {cells[0].strip("| "): cells for cells in (line.split(" | ") for line in lines)}
    layers = sum(isinstance(module, nn.Linear) for module in create_model("scalablevit_nano").modules())
    assert int(rows["linear layers"][1]) == 3 * layers  # a backward pass has two products where a layer has one
    assert rows["optimizer"][1] == "1"


def test_multiply_adds_of_a_step_are_counted_by_kind() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 5))
    setting = Setting("", "train", batch_size=3, input_size=(8, 8))
    counts = load("operators").multiply_adds(network, setting)
    assert counts == {"convolutions": 3 * 3 * (8 * 4 * 3 * 4 * 4), "linear layers": 3 * 3 * (8 * 4 * 5)}


@pytest.mark.parametrize(("precision", "size"), [("32", 4), ("bf16", 2)])
def test_memory_for_the_backward_pass_is_counted(precision: str, size: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 5))
    setting = Setting("", "train", precision, batch_size=3, input_size=(2, 2))
    each, besides = load("saved").count(network, setting, torch.device("cpu"))
    # The inputs of the linear layers and of GELU; log-probabilities in float32 and the label for the cross entropy.
    assert each == size * (12 + 7 + 7) + 4 * 5 + 8
    # Cross entropy keeps the sum of its weights, and autocast a copy of the weight that a gradient passes.
    assert besides == 4 + (0 if precision == "32" else 2 * 7 * 5)


def test_checkpointing_saves_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of("saved", "scalablevit_nano", "--input-size", "64", monkeypatch=monkeypatch, capsys=capsys)
    for line in lines[1:]:
        plain, checkpointed = (float(cell.removesuffix(" MB")) for cell in line.split(" | ")[2:4])
        assert 0 < checkpointed < plain / 2


def test_ratios_of_sizes_are_medians_of_the_rounds() -> None:
    # Two and four times as slow, and one disturbed round, with four times the work.
    assert load("sizes").ratio([2.0, 40.0, 30.0], [1.0, 10.0, 3.0], 800, 200) == 1.0


def test_sizes_are_relative_to_the_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sizes", "32x32", "32x64", "--repeats", "1"]
    lines = lines_of("sizes", "scalablevit_nano", *options, monkeypatch=monkeypatch, capsys=capsys)
    assert [line.split(" | ")[1] for line in lines] == ["input", "32×32", "32×64"]
    assert lines[1].endswith("| 1.00 | 1.00 |")


def test_each_step_of_timm_s_transform_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, clock = load("loader"), itertools.count()
    (tmp_path / "class").mkdir()
    for number in range(5):
        Image.new("RGB", (20, 16), (number, 0, 0)).save(tmp_path / "class" / f"{number}.jpg")
    monkeypatch.setattr(loader, "BATCH", 2)
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    spent = loader.time_steps(tmp_path)
    batches = spent.pop("collate")
    assert batches == pytest.approx(2 / 5)
    assert {"read and decode", "RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"} < set(spent)
    assert set(spent.values()) == {1.0}


@torch.no_grad()
def test_all_ways_to_compute_a_part_agree() -> None:
    alternatives = load("alternatives")
    torch.manual_seed(0)
    for title, (inputs, ways) in alternatives.parts(torch.device("cpu"), torch.float32, 2).items():
        expected = None
        for name, way in ways.items():
            actual = way(*inputs)
            expected = actual if expected is None else expected
            assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4), (title, name)


def test_ways_are_relative_to_the_first_and_failures_have_a_reason() -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    def late(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return tensor.sin()

    measured, cpu = load("alternatives").rows, torch.device("cpu")
    rows = measured([torch.randn(64, 64)], {"a": torch.sin, "b": late}, cpu, Plan(3, 0.001))
    assert rows[0][2] == "1.00"
    assert float(rows[1][2]) > 1 < float(rows[1][4])
    assert measured([torch.randn(4)], {"c": fail}, cpu, Plan(1, 0.001)) == [
        ["c", "no such kernel", "–", "no such kernel", "–"]
    ]


def test_the_color_histogram_learns_the_most_frequent_class_of_each_color(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"train": ([10, 10, 10, 90, 250], [1, 1, 2, 0, 2]), "test": ([10, 15, 60, 90, 250], [1, 2, 0, 0, 0])}
    for split, (colors, classes) in rows.items():
        for kind, values in (("images", colors), ("masks", classes)):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(np.array([values], np.uint8)).save(tmp_path / split / kind / "1.png")
    monkeypatch.setattr("sys.argv", ["color_histogram.py", str(tmp_path), "--levels", "16"])
    load("color_histogram").main()
    # 60 is nearest to 90; predicted are 1, 1, 0, 0 and 2
    assert capsys.readouterr().out.splitlines() == [
        "| levels | mIoU | accuracy | IoU of class 0 | IoU of class 1 | IoU of class 2 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 16 | 0.3889 | 0.6000 | 0.6667 | 0.5000 | 0.0000 |",
    ]
