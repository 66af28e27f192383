import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from scalablevit_pl.data.images import ImageFiles
from scalablevit_pl.explanation import explain, explain_argument
from scalablevit_pl.models import create_model
from scalablevit_pl.preprocessing import Preprocessing, UnreadableImageError, decode_image
from scalablevit_pl.storage import save_json

UNKNOWN = "unknown model 'x'"


def raise_our_error() -> None:
    create_model("x")


def caught(call: Any) -> BaseException:
    with pytest.raises(Exception) as info:  # noqa: PT011  any kind is wanted
        call()
    return info.value


def wrapped(call: Any, kind: type[Exception] = RuntimeError, explicit: bool = True) -> BaseException:
    """Catch an error and raise another because of it, or while handling it."""

    def outer() -> None:
        try:
            call()
        except Exception as error:
            if explicit:
                raise kind("something failed") from error
            raise kind("something failed")  # noqa: B904

    return caught(outer)


def test_an_error_of_the_package_is_explained_by_its_message() -> None:
    sentence = explain(caught(raise_our_error))
    assert sentence is not None
    assert sentence.startswith(UNKNOWN)
    assert "\n" not in sentence


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
def test_an_error_of_the_package_is_found_among_the_causes(kind: type[Exception], explicit: bool) -> None:
    def inner() -> None:
        raise wrapped(raise_our_error, kind, explicit)

    assert explain(wrapped(raise_our_error, kind, explicit)).startswith(UNKNOWN)
    assert explain(wrapped(inner, kind, explicit)).startswith(UNKNOWN)


@pytest.mark.parametrize(
    "call",
    [
        lambda: int("x"),
        lambda: torch.zeros(2).expand(3),
        lambda: torch.nn.Linear(2, 3)(torch.zeros(1, 5)),
        lambda: re.compile("("),
        lambda: create_model("scalablevit_nano").head(torch.zeros(1)),
        lambda: Preprocessing()(None),
        lambda: DataLoader([], batch_size=0),
        lambda: save_json({}, Path()),  # a ValueError of pathlib
    ],
)
def test_a_bug_is_not_explained(call: Any) -> None:
    assert explain(caught(call)) is None
    assert explain(wrapped(call)) is None


def test_an_error_without_traceback_is_not_explained() -> None:
    assert explain(ValueError("no trace")) is None


def test_the_outer_error_of_the_package_is_explained() -> None:
    assert explain(caught(lambda: decode_image(b"", "row 3"))).startswith("cannot read row 3")


def test_an_error_of_a_loader_process_is_found_in_its_text(tmp_path: Any) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    loader = DataLoader(ImageFiles([tmp_path / "bad.jpg"], Preprocessing()), num_workers=1)
    error = caught(lambda: list(loader))
    assert isinstance(error, UnreadableImageError)
    assert "Traceback" in str(error)
    sentence = explain(error)
    assert sentence is not None
    assert sentence.startswith(f"cannot read {tmp_path}/bad.jpg: it is not an image of a known format")
    assert sentence.endswith("repair or delete it")


def test_the_lines_of_a_message_are_joined() -> None:
    def call() -> None:
        decode_image(b"", "row 3\nof a table")

    assert explain(caught(call)).startswith("cannot read row 3 of a table: ")


def nested(section: str, class_path: str, inner: str) -> str:
    """Write jsonargparse's message about an argument of a class, as it comes from the command line."""
    return f"""\
Parser key "{section}":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path '{class_path}':
        {inner}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='x', val='y')"""


def optional(key: str, kind: str, value: str) -> str:
    return f"""Parser key "{key}":
          Does not validate against any of the Union subtypes
          Subtypes: [{kind}, <class 'NoneType'>]
          Errors:
            - Expected a {kind}
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: {value}"""


DATA = "scalablevit_pl.data.ClassificationDataModule"
TASK = "scalablevit_pl.tasks.ClassificationTask"
FACTORY = "Problem with given class_path 'scalablevit_pl.models.create_model'"
INTERPOLATION = "Expected a typing.Literal['bilinear', 'bicubic']. Got value: foo"
TIMM = "Problem with given class_path 'timm.create_model'"
ADAMW = "Got value: Namespace(class_path='torch.optim.AdamW', init_args=Namespace(lrr='1'))"
CALLABLE = "Type collections.abc.Callable[[typing.Any], torch.optim.Optimizer] expects a function or a callable class"


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser()
    for option in ("--trainer.max_epochs", "--trainer.devices", "--run", "--config", "--seed_everything"):
        parser.add_argument(option)
    return parser


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            "Group 'trainer' does not accept option 'max_epoch'",
            "unknown option --trainer.max_epoch: did you mean --trainer.max_epochs?",
        ),
        ("Option 'runs' is not accepted", "unknown option --runs: did you mean --run?"),
        (
            nested("model", TASK, "Option 'frezze' is not accepted"),
            "unknown option --model.frezze: did you mean --model.freeze?",
        ),
        (
            "unrecognized arguments: --trainer.max_epoch=3 --trainer.x=1",
            "unknown option --trainer.max_epoch: did you mean --trainer.max_epochs?",
        ),
        ("unrecognized arguments: b]", "'b]' belongs to no option: quote a value that has spaces or brackets"),
        ("unrecognized arguments: --max_epochs=3", "unknown option --max_epochs: did you mean --trainer.max_epochs?"),
        ("unrecognized arguments: --epochs=3", "unknown option --epochs: did you mean --trainer.max_epochs?"),
        ("unrecognized arguments: --lr", "unknown option --lr: did you mean --model.optimizer.lr?"),
        ("unrecognized arguments: --zzzzzzzz", "unknown option --zzzzzzzz: see --help-all"),
        (
            nested("data", DATA, "Option 'batchsize' is not accepted"),
            "unknown option --data.batchsize: did you mean --data.batch_size?",
        ),
        (
            nested("data", DATA, "Option 'batch_siz' is not accepted"),  # of the base class
            "unknown option --data.batch_siz: did you mean --data.batch_size?",
        ),
        (
            nested("data", DATA, "Group 'preprocessing' does not accept option 'croppct'"),
            "unknown option --data.preprocessing.croppct: did you mean --data.preprocessing.crop_pct?",
        ),
        (
            nested("model", TASK, f"Parser key \"network\":\n {FACTORY}:\n Option 'nam' is not accepted"),
            "unknown option --model.network.nam: did you mean --model.network.name?",
        ),
        (
            nested("data", DATA, "Parser key \"batch_size\":\n  Expected a <class 'int'>. Got value: many"),
            "--data.batch_size: expected int, got 'many'",
        ),
        (
            nested("data", DATA, f'Parser key "preprocessing.interpolation":\n  {INTERPOLATION}'),
            "--data.preprocessing.interpolation: expected 'bilinear' or 'bicubic', got 'foo'",
        ),
        (optional("trainer.max_epochs", "<class 'int'>", "x"), "--trainer.max_epochs: expected int or null, got 'x'"),
        ('Parser key "run":\n  Expected an existing file. Got value: x', "--run: expected existing file, got 'x'"),
        (
            nested("model", TASK, 'Parser key "network":\n  the following arguments are required: name'),
            "--model.network: the following arguments are required: name",
        ),
        (
            "Parser key \"model\":\n  No module named 'segmentation'",
            "--model: No module named 'segmentation': install it, or add the folder that contains it to PYTHONPATH",
        ),
        ("Problems parsing config: line 3\n  did not find ']'", "Problems parsing config: line 3 did not find ']'"),
        ("argument --run: expected one argument", "argument --run: expected one argument"),
        (
            "argument --data: expected one argument",
            "an option that begins with --data. has no value: write one after it",
        ),
        (
            nested("model", TASK, f"Parser key \"optimizer\":\n {CALLABLE}: Option 'lrr' is not accepted. {ADAMW}"),
            "unknown option --model.optimizer.lrr: did you mean --model.optimizer.lr?",
        ),
        (
            nested("model", TASK, 'Parser key "optimizer":\n\n  - Expected a dot import path string: AdamV'),
            "--model.optimizer: expected the import path of a class or function, such as torch.optim.AdamW, "
            "got 'AdamV'",
        ),
        (
            nested("model", TASK, f"Parser key \"network\":\n {TIMM}:\n Option 'num_classes' is not accepted"),
            "unknown option --model.network.num_classes: arguments of the timm network are set with "
            "--model.network.dict_kwargs.num_classes",
        ),
    ],
)
def test_a_message_about_an_option_is_shortened(message: str, sentence: str, parser: ArgumentParser) -> None:
    assert explain_argument(message, parser) == sentence


@pytest.mark.parametrize(
    ("message", "given", "noise"),
    [
        (nested("model", TASK, optional("base_batch_size", "<class 'int'>", "many")), "'many'", "NestedArg"),
        (
            nested("model", TASK, "Parser key \"label_smoothing\":\n  Expected a <class 'float'>. Got value: "),
            "expected float",
            "NestedArg",
        ),
        (
            nested(
                "model", TASK, f'Parser key "optimizer":\n {CALLABLE}: Parser key "lr":\n Expected a x. Got value: y'
            ),
            "--model.optimizer.lr: ",
            "Callable",
        ),
    ],
)
def test_a_message_about_a_nested_option_is_shortened(
    message: str, given: str, noise: str, parser: ArgumentParser
) -> None:
    sentence = explain_argument(message, parser)
    assert given in sentence
    assert noise not in sentence


def test_errors_of_files_settings_and_missing_packages_are_explained() -> None:
    assert explain(PermissionError(13, "Permission denied", "runs/x")) == "Permission denied: 'runs/x'"
    assert explain(MisconfigurationException("no such\n  accelerator")) == "no such accelerator"
    assert explain(ModuleNotFoundError("No module named 'wandb'")) == "No module named 'wandb'"
    assert explain(OSError("without a file")) is None
    assert explain(RuntimeError("a bug")) is None


class Troubled(Dataset[int]):
    """Hang, or kill the process that reads."""

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if self.trouble == "sleep":
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [("sleep", ["for 1 seconds", "--data.worker_timeout"]), ("kill", ["was killed", "/dev/shm", "--data.num_workers"])],
)
def test_failing_loader_processes_are_explained(trouble: str, expected: list[str]) -> None:
    limit = 1 if trouble == "sleep" else 600
    error = caught(lambda: list(DataLoader(Troubled(trouble), num_workers=1, timeout=limit)))
    for text in expected:
        assert text in (explain(error) or "")
        assert text in (explain(wrapped(lambda: (_ for _ in ()).throw(error))) or "")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
        caught(lambda: torch.empty(2**60)),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["gpu", "cpu", "cublas"],
)
def test_out_of_memory_names_the_options_that_save_memory(error: BaseException) -> None:
    sentence = explain(error) or ""
    options = (
        "--data.batch_size",
        "--trainer.accumulate_grad_batches",
        "grad_checkpointing true",
        "precision bf16-mixed",
    )
    for text in options:
        assert text in sentence
    assert "\n" not in sentence
    assert explain(ValueError(str(error))) is None


@pytest.mark.parametrize("problem", ["Connection closed by peer [127.0.0.1]:17818", "Connection reset by peer"])
def test_a_lost_connection_refers_to_the_other_process(problem: str) -> None:
    gloo = f"[gloo/transport/tcp/pair.cc:561] {problem}. This is typically caused by"
    assert (explain(RuntimeError(gloo)) or "").startswith("another process of this run has ended")
