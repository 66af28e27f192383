import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scalablevit_pl.commands import main as cli
from scalablevit_pl.commands import profile_data
from scalablevit_pl.commands.pages import read_page
from scalablevit_pl.commands.profile import profile, read_options, settings_of
from scalablevit_pl.profiling import measurement
from scalablevit_pl.profiling.measurement import Plan, Result
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.report import CONVENTIONS, describe, report, table
from scalablevit_pl.profiling.timing import Spread

SWIN = "swin_tiny_patch4_window7_224"
CORES = os.cpu_count() or 1
QUICK = ["--repeats", "3", "--seconds", "0", "--warmup", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(measurement.SIDES, "cpu", (16, 32))
    monkeypatch.setattr(cli, "show_log", lambda: None)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result(network: str, seconds: float, **others: Any) -> Result:
    setting = Setting(network, batch_size=8)
    spread = Spread(seconds, 0.9 * seconds, 1.1 * seconds, 0.8 * seconds, seconds * 2)
    products = {1000: 0.02}  # 10¹¹ operations per second
    counts = (28_288_354, 4_350_425_088, 140_141_568)
    return replace(Result(setting, "", *counts, [seconds] * 3, spread, 345_000_000, None, products), **others)


def test_profile_writes_table_record_and_figure(capsys: pytest.CaptureFixture[str]) -> None:
    words = "profile scalablevit_nano resnet10t --batch-size 1 --input-size 32x31 --threads 1 --mode inference,train"
    assert cli.main([*words.split(), *QUICK, "--json", "x.json", "--plot", "x.png"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^scalablevit_nano +32×31 +3,015,808 +\d+\.\d\d M +\d\.\d\d M +\d\.\d\d M$", text, re.MULTILINE)
    headings = re.findall(r"^(?:inference|train) float32, batch 1, 32×31; matrix products [\d.]+ Gflop/s$", text, re.M)
    assert len(headings) == 2
    # The batch norm of resnet10t raises it.
    assert "resnet10t: Expected more than 1 value" in text
    record = json.loads(Path("x.json").read_text())
    assert {"schema", "date", "versions", "device", "plan", "conventions", "cases"} == set(record)
    assert record["device"]["threads"] == 1
    assert record["plan"] == {"repeats": 3, "seconds": 0.0, "warmup": 1}
    assert len(record["cases"]) == 4
    measured = [case for case in record["cases"] if not case["note"]]
    assert len(measured) == 3
    for case in measured:
        assert len(case["samples"]) == 3
        median = sorted(case["samples"])[1]
        assert case["seconds"]["median"] == median
        assert case["images_per_second"] == pytest.approx(case["batch_size"] / median)
        assert case["fraction_of_matrix_rate"] > 0.0
        assert case["input_size"] == [32, 31]
    with Image.open("x.png") as picture:
        assert picture.format == "PNG"


def test_a_record_on_the_screen_replaces_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    profile(["resnet10t", "--batch-size", "1", "--input-size", "32", *QUICK, "--json", "-"])
    assert [case["network"] for case in json.loads(capsys.readouterr().out)["cases"]] == ["resnet10t"]
    assert not list(Path().iterdir())


def test_lists_of_options_give_all_cases() -> None:
    words = "a b --batch-size 1,8 --input-size 224,32x48 --precision 32,bf16 --mode inference,train"
    words += " --compile false,true --grad-checkpointing --channels-last --device cpu"
    settings = settings_of(read_options(words.split()))
    assert len(settings) == len(set(settings)) == 2**6
    assert {setting.input_size for setting in settings} == {(224, 224), (32, 48)}
    for setting in settings:
        assert setting.channels_last
        assert setting.grad_checkpointing == (setting.mode == "train")
    assert len({setting.network for setting in settings[:2]}) == 2
    words = "a --batch-size 8 --mode inference,train --compile false,true --fuse false,true --device cpu"
    fused = settings_of(read_options(words.split()))
    assert [(setting.mode, setting.compiled, setting.fused) for setting in fused] == [
        ("inference", False, False),
        ("inference", False, True),
        ("inference", True, False),
        ("train", False, False),
        ("train", True, False),
    ]
    [default] = settings_of(read_options(["a", "--device", "cpu", "--batch-size", "1"]))
    assert default == Setting("a")
    words = "scalablevit_s scalablevit_b --head semantic_fpn,upernet --window-pad zero --expand-value --batch-size 1"
    heads = settings_of(read_options([*words.split(), "--device", "cpu"]))
    assert [setting.name for setting in heads] == [
        "scalablevit_s semantic_fpn",
        "scalablevit_s upernet",
        "scalablevit_b semantic_fpn",
        "scalablevit_b upernet",
    ]
    assert {(setting.window_pad, setting.expand_value) for setting in heads} == {("zero", True)}


def test_the_table_fits_80_columns_and_compares_with_the_first() -> None:
    failed = Result(Setting("some_network_with_a_name_that_is_long", batch_size=8), "out of memory")
    text = table([result(SWIN, 0.8), result("scalablevit_s", 0.4), failed])
    lines = text.splitlines()
    assert lines[0].split() == ["network", "ms", "±", "images/s", "memory", "of", "matmul", "ratio"]
    assert lines[1].split() == [SWIN, "800.0", "10.0%", "10.00", "345", "MB", "90%", "1.00"]
    assert lines[2].split() == ["scalablevit_s", "400.0", "10.0%", "20.00", "345", "MB", "180%", "2.00"]
    assert lines[3] == "some_network_with_a_name_that_is_long: out of memory"
    large = result(SWIN, 123.4567, peak_memory=123_456_000_000)
    text = table([large, result("scalablevit_s", 0.4), failed])
    assert max(map(len, text.splitlines())) <= 80
    assert " 123 GB " in text


def test_the_table_has_dashes_for_unknown_values() -> None:
    failed = Result(Setting(SWIN, batch_size=8), "out of memory")
    two = result("scalablevit_s", 0.4, samples=[0.4, 0.4], matrix_seconds={1000: 2e-6})
    # No spread of two samples, a small rate that is not 0, and no ratio to a network that failed.
    line = table([failed, two]).splitlines()[1].split()
    assert line == ["scalablevit_s", "400.0", "-", "20.00", "345", "MB", "0.018%", "-"]
    uncounted = result("scalablevit_s", 0.4, multiply_adds=None, attention_multiply_adds=None)
    record = describe([uncounted], torch.device("cpu"), Plan())
    assert re.search(r"^scalablevit_s +224×224 +28,288,354 +- +- +-$", report([uncounted], record), re.MULTILINE)


def test_the_record_has_notes_and_the_rate_of_products() -> None:
    both = [Result(Setting(SWIN), "out of memory"), result("scalablevit_s", 0.4)]
    failed, case = json.loads(json.dumps(describe(both, torch.device("cpu"), Plan())))["cases"]
    assert (failed["note"], failed["matrix_rate"]) == ("out of memory", None)
    assert (case["note"], case["matrix_rate"], case["matrix_seconds"]) == ("", pytest.approx(1e11), {"1000": 0.02})


def test_the_conventions_define_what_is_not_obvious() -> None:
    assert "float32 without TF32" in CONVENTIONS["precision"]
    assert "batched matrix products" in CONVENTIONS["attention_multiply_adds"]
    assert "disk cache" in CONVENTIONS["compile_seconds"]


def test_a_compiled_case_reports_the_time_of_compiling() -> None:
    compiled = result(SWIN, 0.8, compile_seconds=12.34)
    assert f"{SWIN}: compiled in 12.3 s\n" in table([compiled])


def test_titles_have_everything_but_the_network() -> None:
    setting = Setting("a", "train", "bf16", True, 8, (32, 48), True, True)
    assert setting.title == "train bf16 compiled channels-last checkpointing, batch 8, 32×48"
    assert Setting("a", fused=True).title == "inference float32 fused, batch 1, 224×224"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet10x"], "unknown network 'resnet10x'.*did you mean resnet10t"),
        ([], "arguments are required: MODEL"),
        (["resnet10t", "--batch-sizes", "1"], "unknown option --batch-sizes: did you mean --batch-size"),
        (["resnet10t", "--batch-size", "1,0"], "--batch-size: '0' is not a whole number of at least 1"),
        (["resnet10t", "--input-size", "1x2x3"], "--input-size: '1x2x3' is neither a side nor HEIGHTxWIDTH"),
        (["resnet10t", "--precision", "8"], "--precision: '8' is not one of 32, bf16, fp16"),
        (["resnet10t", "--precision", "32,fp16"], "fp16 needs a GPU: on a CPU give 32 or bf16"),
        (["resnet10t", "--grad-checkpointing"], "--grad-checkpointing is for training steps: also give --mode train"),
        (["resnet10t", "--mode", "test"], "--mode: 'test' is not one of inference, train"),
        (["resnet10t", "--compile", "maybe"], "--compile: 'maybe' is not one of false, true"),
        (["resnet10t", "--fuse", "yes"], "--fuse: 'yes' is not one of false, true"),
        (["resnet10t", "--fuse", "true", "--mode", "train"], "--fuse true is for uncompiled inference"),
        (["resnet10t", "--fuse", "true", "--compile", "true"], "also give --mode inference and --compile false"),
        (["resnet10t", "--seconds=-1"], "--seconds must be between 0 and 3600, got -1"),
        (["resnet10t", "--seconds", "nan"], "--seconds must be between 0 and 3600, got nan"),
        (["resnet10t", "--plot", "x.jpg"], "'x.jpg' must be the name of a .png"),
        (["resnet10t", "--json", "nowhere/x.json"], "'nowhere/x.json' must be the name of a file in a folder"),
        ([*map(str, range(9)), "--plot", "x.png"], "distinguish at most 8 networks, got 9"),
        (["nowhere/x"], "no file or folder 'nowhere/x' here"),
        (["./typo"], r"'\./typo' is neither a folder nor a repository name"),
        (["a", "--batch-size", "-1"], "--batch-size: '-1' is not a whole number of at least 1"),
        (["a", "--batch-size", "-1,8"], "--batch-size: '-1' is not a whole number of at least 1"),
        (["a", "--seconds", "-1"], "--seconds must be between 0 and 3600, got -1"),
        (["a", "--threads", str(CORES + 1)], f"--threads must be at most {CORES}, .*got {CORES + 1}"),
        (["./a", "--head", "upernet"], "--head builds a head on an untrained backbone: omit it for a model's folder"),
        (["a", "--head", "unet"], "--head: 'unet' is not one of semantic_fpn, upernet"),
        (["a", "--window-pad", "zero"], "--window-pad and --expand-value are for scalablevit_nano, scalablevit_s"),
        (["a", "--json", "."], r"--json '\.' must be the name of a file in a folder that exists and is writable"),
        (["a", "--plot", "nowhere/x.png"], "--plot 'nowhere/x.png' must be the name of a file in a folder"),
    ],
)
def test_mistakes_are_explained_in_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile([*words, "--device", "cpu"])


def test_if_nothing_is_measured_each_network_has_reason_and_remedy() -> None:
    words = ["resnet10t", "resnet18", "--mode", "train", "--batch-size", "1", "--input-size", "32"]
    said = "Expected more than 1 value .*: give another --input-size, --batch-size or --mode"
    with pytest.raises(ValueError, match=f"nothing could be measured: resnet10t: {said}; resnet18: {said}"):
        profile([*words, *QUICK])


def test_a_damaged_model_does_not_suggest_another_size(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{")
    with pytest.raises(
        ValueError, match=r"config\.json' is damaged, it does not hold JSON.*: use an intact copy of it$"
    ):
        profile([str(tmp_path), *QUICK])


@pytest.mark.slow
def test_matplotlib_is_imported_for_figures_only() -> None:
    code = "import sys, scalablevit_pl.commands.profile; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"torch finds no GPU for --device cuda: give --device cpu"):
        profile(["resnet10t", "--device", "cuda"])


def test_fused_layers_are_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--fuse true is for a CPU: give --device cpu, or --compile true on a GPU"):
        read_options(["a", "--fuse", "true"])


def test_every_option_of_the_help_page_is_an_option() -> None:
    page = read_page("profile").split("\ndata: ")[0]
    values = {"INTS": "1,8", "SIZES": "224,800x1333", "INT": "2", "FLOAT": "0.5", "FILE|-": "-", "FILE": "x.png"}
    lists = {"--precision": "32,bf16", "--mode": "inference,train", "--device": "cpu"}
    lists |= {"--head": "upernet", "--window-pad": "zero"}
    lists |= {"--threads": "1", "--compile": "false", "--fuse": "true"}  # for one core, and within one figure
    words: list[str] = []
    for option, kind in re.findall(r"^  (--[a-z-]+)(?: ([A-Z|-]+|auto\S+|mask\S+))?", page, re.MULTILINE):
        words += [option] if not kind else [option, lists.get(option) or values[kind]]
    options = vars(read_options(["scalablevit_nano", *words]))
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert set(options) - {"networks"} == given


def test_data_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(profile_data, "profile_data", given.append)
    assert cli.main(["profile", "data", "--config", "recipes/quickstart.yaml", "--workers", "0,1"]) == 0
    assert given == [["--config", "recipes/quickstart.yaml", "--workers", "0,1"]]
