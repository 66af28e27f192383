"""What the configuration in a run folder may name, since commands read it by default and others may have written it."""

import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType, SimpleNamespace
from typing import Any

from jsonargparse import Namespace
from torch import nn

from scalablevit_pl.explanation import argument_types

FACTORIES = ("scalablevit_pl", "timm", "torch", "torchvision")  # packages whose functions may build networks
UNSPECIFIC = ("builtins", "collections.abc", "types", "typing")  # modules of `object`, `Callable`, `Any` and the like


@contextmanager
def imports_outside(folder: Path) -> Iterator[None]:
    """Refuse to import modules from a folder: a class path imports its module, which runs the code in it."""
    folder = folder.resolve()  # now: the parser changes the working directory

    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin and folder in Path(spec.origin).resolve().parents:
            raise ImportError(f"the module {name} lies in the run folder: move it out if you trust it")

    finder: Any = SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def check_class_paths(value: Any, expected: Any, argument: str, source: Path, typed: Sequence[str]) -> None:
    """Check that what a part of a configuration names fits the annotation of its argument, before anything is built.

    A class must derive from a class in the annotation. A function must be one of `FACTORIES` that returns a network,
    where a network is expected. Words of the command line, `typed`, may name anything.

    Raises:
        ValueError: If something else is named; it names the file, `source`.
    """
    value = _plain(value)
    path, target = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}", value
    if isinstance(value, list | tuple | set):
        for part in value:
            check_class_paths(part, expected, argument, source, typed)
    elif isinstance(value, Mapping):
        kinds, parts = _classes(expected), value
        if "class_path" in value:
            path, target = value["class_path"], resolve_name(value["class_path"])
            kinds, parts = {target}, _plain(value.get("init_args") or {})
        types = {name: kind for each in kinds for name, kind in argument_types(each).items()}
        for name, part in parts.items():
            check_class_paths(part, types.get(name, expected), name, source, typed)
    if callable(target) and not _fits(target, expected) and not any(path in word for word in typed):
        raise ValueError(
            f"{str(source)!r} sets {argument} to {path}, which a run folder cannot name there: if you trust the file, "
            f"give it with --config {source}"
        )


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Namespace) else value


def _fits(target: Any, expected: Any) -> bool:
    """Return whether a class, or the network that a function returns, is of a class in an annotation."""
    kinds = _classes(expected)
    if not isinstance(target, type):
        kinds = {kind for kind in kinds if issubclass(kind, nn.Module)}
        known = isinstance(target, FunctionType) and target.__module__.split(".")[0] in FACTORIES
        target = typing.get_type_hints(target).get("return") if known and kinds else None
    return not kinds.isdisjoint(getattr(target, "__mro__", ()))


def _classes(annotation: Any) -> set[type]:
    """Return the classes in an annotation, such as X of `list[X] | None` and of `Callable[[int], X]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    inner = arguments[-1:] if isinstance(next(iter(arguments), None), list) else arguments
    own = {kind for kind in (annotation, origin) if isinstance(kind, type) and kind.__module__ not in UNSPECIFIC}
    return own.union(*map(_classes, inner))
