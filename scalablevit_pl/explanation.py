"""Errors that a user can fix, in one sentence."""

import dataclasses
import difflib
import importlib
import inspect
import re
import traceback
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from scalablevit_pl.text import one_line

PACKAGE = Path(__file__).parent
# RuntimeErrors of torch that a user can do something about, with the remedy.
REMEDIES = {
    re.compile(r"out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE): (
        "out of memory: reduce --data.batch_size (in a fit, raise --trainer.accumulate_grad_batches to keep the global "
        "batch), or try --model.network.grad_checkpointing true or --trainer.precision bf16-mixed"
    ),
    re.compile(r"DataLoader timed out after ([\d.]+) seconds"): (
        "the loader processes returned no batch for {} seconds: check the disk or network that holds the data, try "
        "--data.num_workers 0 to see where it hangs, or raise --data.worker_timeout"
    ),
    re.compile(r"Connection closed by peer|Connection reset by peer|ncclRemoteError"): (
        "another process of this run has ended while this one was waiting for it: see its own message"
    ),
    re.compile(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)", re.DOTALL): (
        "a loader process was killed, usually because memory or shared memory (/dev/shm) ran out: reduce "
        "--data.num_workers or --data.batch_size, or give the machine or container more (docker run --shm-size)"
    ),
}
# What options of other programs are called here.
SYNONYMS = {
    "epochs": "trainer.max_epochs",
    "batch_size": "data.batch_size",
    "workers": "data.num_workers",
    "lr": "model.optimizer.lr",
    "seed": "seed_everything",
}
# Lines of jsonargparse's messages that locate the problem without describing it.
STRUCTURE = re.compile(r"Parser key|Problem with given class_path|Does not validate|Subtypes:|Errors:|Given value")
REJECTED = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option '([^']+)'"
    r"|Option '([^']+)' is not accepted|unrecognized arguments: (\S+))"
)


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can fix.

    Such an error is raised by this package on purpose, or is a file that cannot be read or written, a setting that
    Lightning refuses, a missing package, or loader processes or memory that fail. Anything else is a bug: the result is
    None, and the traceback should be shown. Causes are searched, because Lightning and jsonargparse wrap what they
    catch.
    """
    for cause in _chain(error):
        if _is_ours(cause):
            text = str(cause).strip()
            if text.startswith("Caught "):  # from a loader process: its traceback, which ends with the message
                text = text.splitlines()[-1].removeprefix(f"{type(cause).__module__}.{type(cause).__qualname__}: ")
            return one_line(text, None)
    for cause in _chain(error):
        for pattern, remedy in REMEDIES.items():
            if isinstance(cause, RuntimeError) and (match := pattern.search(str(cause))):
                return remedy.format(*match.groups())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    if isinstance(error, MisconfigurationException | ModuleNotFoundError):
        return one_line(error, None)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error can be its own cause
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised the error, here or in a loader process, whose errors arrive as text."""
    if not isinstance(error, ValueError):
        return False
    if type(error).__module__.startswith(__package__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).parents


def explain_construction(error: BaseException) -> str | None:
    """Return one sentence for an error inside a class or function of another package that jsonargparse has called.

    The result is None for other errors, and for those that `explain` explains.
    """
    called: dict[str, Any] = {}
    causes = list(_chain(error))
    for cause in causes:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            if frame.f_code.co_name == "default_class_instantiator":
                called, reason = frame.f_locals, cause
            elif frame.f_code.co_name == "raise_union_unexpected_value":  # which fails itself if a message is empty
                causes += frame.f_locals["exceptions"][:1]
    module = getattr(called.get("class_type"), "__module__", __package__)
    if module.startswith(__package__) or explain(error) is not None:
        return None
    plain = {name: value for name, value in called["kwargs"].items() if isinstance(value, str | bool | int | float)}
    arguments = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    text = one_line(f"{type(reason).__name__}: {reason}").rstrip(": .")
    name = f"{module.partition('.')[0]}.{called['class_type'].__qualname__}"
    return f"{name}({arguments}) failed with {text}: check its arguments, or see --traceback"


def explain_argument(message: str, parser: ArgumentParser) -> str:
    """Shorten jsonargparse's message, which can be very long, to one sentence that names the nearest option."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = f"--{'.'.join(keys)}: " if keys else ""
    rejected = REJECTED.search(message)
    if rejected:
        word = next(text for text in rejected.groups()[-3:] if text)
        if "unrecognized" in rejected[0] and not word.startswith("-"):
            return f"{word!r} belongs to no option: quote a value that has spaces or brackets"
        name = word.split("=")[0].lstrip("-")
        where = [*keys, rejected["group"]] if rejected["group"] else keys
        return f"unknown option --{'.'.join([*where, name])}{_hint(name, keys, rejected, parser)}"
    wrong = _wrong_value(re.split(r'Parser key "[^"]+":', message)[-1])
    if wrong:
        return option + wrong
    valueless = re.fullmatch(r"argument --(data|model|trainer): expected one argument", message.strip())
    if valueless:
        return f"an option that begins with --{valueless[1]}. has no value: write one after it"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    leaf = next((line for line in lines if not STRUCTURE.match(line)), lines[0])
    if leaf.startswith("No module named"):
        leaf += ": install it, or add the folder that contains it to PYTHONPATH"
    return " ".join(lines) if leaf.startswith("Problems parsing config") else option + leaf


def _wrong_value(message: str) -> str | None:
    """Return what was expected and what was given, from the part of a message that is about one option."""
    given = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    path = re.search(r"Expected a dot import path string: (.*)$", message, re.MULTILINE)
    before = message[: given.start()] if given else message
    kinds: list[str] = []
    for kind in re.findall(r"Expected an? (.+?)\.?\s*$", before, re.MULTILINE):
        literal = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        if not kind.startswith(("path but", "dot import path")):
            kinds += literal[1].split(", ") if literal else [re.sub(r"<class '(.+)'>", r"\1", kind)]
    kinds = ["null" if kind == "NoneType" else kind for kind in dict.fromkeys(kinds)]
    if path and not set(kinds) - {"null"}:
        return f"expected the import path of a class or function, such as torch.optim.AdamW, got {path[1]!r}"
    if set(kinds) - {"null"} and given:
        return f"expected {' or '.join(filter(None, [', '.join(kinds[:-1]), kinds[-1]]))}, got {given[1]!r}"
    return None


def _hint(name: str, keys: list[str], rejected: re.Match[str], parser: ArgumentParser) -> str:
    """Return what may have been meant by an option that is not accepted."""
    before, after = rejected.string[: rejected.start()], rejected.string[rejected.end() :]
    owners = re.findall(r"Problem with given class_path '([^']+)'", before)
    owners += re.findall(r"^\. Got value: Namespace\(class_path='([^']+)'", after)
    if not owners:
        if name in SYNONYMS:
            return f": did you mean --{SYNONYMS[name]}?"
        options = [option for action in parser._actions for option in action.option_strings]
        return _nearest(name, (option.lstrip("-") for option in options), [])
    if owners[-1] == "timm.create_model":  # it passes unknown arguments on to the network
        return f": arguments of the timm network are set with --{'.'.join(keys)}.dict_kwargs.{name}"
    return _nearest(name, _parameters(owners[-1]), keys)


def _parameters(class_path: str) -> Iterator[str]:
    """Yield the arguments of a class or function, and `argument.field` for the fields of dataclasses."""
    module, _, name = class_path.rpartition(".")
    for parameter, annotation in argument_types(getattr(importlib.import_module(module), name)).items():
        yield parameter
        for kind in (annotation, *typing.get_args(annotation)):
            if dataclasses.is_dataclass(kind):
                yield from (f"{parameter}.{field.name}" for field in dataclasses.fields(kind))


def argument_types(called: Any) -> dict[str, Any]:
    """Return the annotation of each argument of a class or function, None where there is none that can be read.

    Arguments that a class passes on as `**kwargs` are those of its base classes.
    """
    types: dict[str, Any] = {}
    bases = called.__mro__ if isinstance(called, type) else ()
    for function in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [called]:
        try:
            hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters.values()
        except (NameError, TypeError, ValueError):  # names that only type checkers import, or a builtin
            break
        names = [parameter.name for parameter in parameters if parameter.name not in ("self", "args", "kwargs")]
        types = {name: hints.get(name) for name in names} | types
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return types


def _nearest(name: str, known: Iterable[str], keys: list[str]) -> str:
    """Return a hint at the most similar option, compared in whole or by its last part."""
    by_ending: dict[str, str] = {}
    for option in known:
        if option != name:  # the option exists there but is not accepted here
            by_ending.setdefault(option.rpartition(".")[2], option)
            by_ending[option] = option
    for text in (name, name.rpartition(".")[2]):
        near = difflib.get_close_matches(text, by_ending, n=1)
        if near:
            return f": did you mean --{'.'.join([*keys, by_ending[near[0]]])}?"
    return ": see --help-all"
