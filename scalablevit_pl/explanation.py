"""One sentence for what went wrong, where a user can mend it."""

import dataclasses
import difflib
import importlib
import inspect
import re
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

PACKAGE = Path(__file__).parent
# What torch raises as a RuntimeError that somebody can do something about, and what that is.
REMEDIES = {
    re.compile(r"out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE): (
        "out of memory: take a smaller --data.batch_size, in a fit with a larger --trainer.accumulate_grad_batches so "
        "that the global batch stays, or try --model.network.grad_checkpointing true or --trainer.precision bf16-mixed"
    ),
    re.compile(r"DataLoader timed out after ([\d.]+) seconds"): (
        "no batch came from the loader processes for {} seconds: see whether the disk or network that holds the data "
        "answers, try --data.num_workers 0 to see where it hangs, or allow more time with --data.worker_timeout"
    ),
    re.compile(r"Connection closed by peer|ncclRemoteError"): (
        "another process of this run has ended, for which this one has waited: its own message says why"
    ),
    re.compile(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)", re.DOTALL): (
        "a loader process was killed, mostly because memory or shared memory (/dev/shm) has run out: take a smaller "
        "--data.num_workers or --data.batch_size, or give the machine or container more (docker run --shm-size)"
    ),
}
# Lines of jsonargparse's messages that say where, not what.
STRUCTURE = re.compile(r"Parser key|Problem with given class_path|Does not validate|Subtypes:|Errors:|Given value")
REJECTED = re.compile(
    r"(?:(?:Group '(?P<group>[^']+)'|Subcommand '\w+') does not accept option '([^']+)'"
    r"|Option '([^']+)' is not accepted|unrecognized arguments: (\S+))"
)


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can mend.

    That is one that this package raised on purpose, a file that cannot be read or written, a setting that Lightning
    refuses, a package that is not installed, or loader processes or memory that fail. Anything else is a fault of the
    program: None, and its trace should be seen.

    Args:
        error: What was caught; its causes are looked through, since Lightning and jsonargparse wrap what they catch.
    """
    for cause in _chain(error):
        if _is_ours(cause):
            text = str(cause).strip()
            if text.startswith("Caught "):  # a loader process sends its trace along, the message at its end
                text = text.splitlines()[-1].removeprefix(f"{_qualified_name(cause)}: ")
            return " ".join(text.split())
    for cause in _chain(error):
        remedy = _remedy(cause)
        if remedy is not None:
            return remedy
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    if isinstance(error, MisconfigurationException | ModuleNotFoundError):
        return " ".join(str(error).split())
    return None


def _remedy(error: BaseException) -> str | None:
    """Return the sentence for one of torch's errors that somebody can do something about."""
    matches = ((remedy, pattern.search(str(error))) for pattern, remedy in REMEDIES.items())
    found = next(((remedy, match) for remedy, match in matches if match), None)
    if found is None or not isinstance(error, RuntimeError):
        return None
    return found[0].format(*found[1].groups())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own cause
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    """Tell whether our code raised it, here or in a loader's process, whose errors arrive as text."""
    if not isinstance(error, ValueError):
        return False
    if type(error).__module__.startswith(__package__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).parents


def _qualified_name(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def explain_argument(message: str, parsers: Iterable[ArgumentParser]) -> str:
    """Shorten jsonargparse's message about the command line or a configuration to one sentence.

    Args:
        message: The message, of up to some thousand characters.
        parsers: Know the valid options, to name the nearest.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    rejected = REJECTED.search(message)
    if rejected:
        name = next(text for text in rejected.groups()[-3:] if text).split("=")[0].lstrip("-")
        where = [*keys, rejected["group"]] if rejected["group"] else keys
        return f"unknown option --{'.'.join([*where, name])}{_hint(name, keys, rejected, parsers)}"
    innermost = (
        message[[match.end() for match in re.finditer(r'Parser key "[^"]+":', message)][-1] :] if keys else message
    )
    wrong = _wrong_value(innermost)
    if wrong:
        return f"--{'.'.join(keys)}: {wrong}" if keys else wrong
    valueless = re.fullmatch(r"argument --(data|model|trainer): expected one argument", message.strip())
    if valueless:
        return f"an option that begins with --{valueless[1]}. has no value: write a value behind it"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    leaf = next((line for line in lines if not STRUCTURE.match(line)), lines[0])
    if leaf.startswith("Problems parsing config"):
        return " ".join(lines)
    return f"--{'.'.join(keys)}: {leaf}" if keys else leaf


def _wrong_value(message: str) -> str | None:
    """Say what was expected and what was given, from the part of a message that is about one option."""
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


def _hint(name: str, keys: list[str], rejected: re.Match[str], parsers: Iterable[ArgumentParser]) -> str:
    """Point at what may have been meant by an option that is not accepted."""
    before, after = rejected.string[: rejected.start()], rejected.string[rejected.end() :]
    owners = re.findall(r"Problem with given class_path '([^']+)'", before)
    owners += re.findall(r"^\. Got value: Namespace\(class_path='([^']+)'", after)
    if not owners:
        return _nearest(name, _options(parsers), [])
    if owners[-1] == "timm.create_model":  # passes unknown arguments on to the network
        return f": arguments of the timm network are set with --{'.'.join(keys)}.dict_kwargs.{name}"
    return _nearest(name, _parameters(owners[-1]), keys)


def _options(parsers: Iterable[ArgumentParser]) -> list[str]:
    options = [option for parser in parsers for action in parser._actions for option in action.option_strings]
    return [option.lstrip("-") for option in options]


def _parameters(class_path: str) -> list[str]:
    """List the arguments of a class or function, and as `argument.field` the fields of those that are dataclasses."""
    module, _, name = class_path.rpartition(".")
    called = getattr(importlib.import_module(module), name)
    functions = _constructors(called) if isinstance(called, type) else [called]
    parameters = [
        parameter
        for function in functions
        for parameter in inspect.signature(function).parameters
        if parameter != "self"
    ]
    hints = {name: kind for function in functions for name, kind in typing.get_type_hints(function).items()}
    for parameter in list(parameters):
        for kind in (hints.get(parameter), *typing.get_args(hints.get(parameter))):
            if dataclasses.is_dataclass(kind):
                parameters += [f"{parameter}.{field.name}" for field in dataclasses.fields(kind)]
    return parameters


def _constructors(cls: type) -> list[Callable[..., None]]:
    """Return a class's constructor and, as long as each forwards `**kwargs`, those of its parents."""
    constructors: list[Callable[..., None]] = []
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            constructors.append(vars(owner)["__init__"])
            kinds = {parameter.kind for parameter in inspect.signature(constructors[-1]).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    return constructors


def _nearest(name: str, known: Iterable[str], keys: list[str]) -> str:
    """Return a hint at the option that is most alike, in whole or in its last part."""
    by_ending: dict[str, str] = {}
    for option in known:
        if option != name:  # it is known there, and yet not accepted
            by_ending.setdefault(option.rpartition(".")[2], option)
            by_ending[option] = option
    for text in (name, name.rpartition(".")[2]):
        near = difflib.get_close_matches(text, by_ending, n=1)
        if near:
            return f": did you mean --{'.'.join([*keys, by_ending[near[0]]])}?"
    return ": see --help-all"
