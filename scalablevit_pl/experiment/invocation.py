"""The command line of `fit`, `validate`, `test` and `predict`: parsed once, resolved once, rendered once."""

import argparse
import difflib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from scalablevit_pl.run_folder import CONFIG, existing_run, resumable_checkpoints, run_folder

# Next to the package's modules when installed; in a checkout at its top.
CONFIG_FOLDERS = tuple(folder / "configs" for folder in list(Path(__file__).parents)[1:3])
# Options that make sense without a configuration file.
WITHOUT_FILES = ("--data", "--model", "--data.class_path", "--model.class_path", "--print_config")
NULL = "null"  # jsonargparse's word for None


@dataclass(frozen=True)
class Invocation:
    """What the command line asks for.

    Attributes:
        command: `fit`, `validate`, `test` or `predict`.
        configs: Configuration files; later ones override earlier ones.
        run: Name or path of the run.
        weights: What `--weights` names; `null` overrides a configuration that names weights.
        resume: What `--resume` or its synonym `--ckpt_path` names.
        rest: All other options, which override the configuration files.
        automatic: Whether the run was named by `resolve`.
        own: The run's configuration file, if it is used because the command line names none.
    """

    command: str
    configs: tuple[str, ...] = ()
    run: str | None = None
    weights: str | None = None
    resume: str | None = None
    rest: tuple[str, ...] = ()
    automatic: bool = field(default=False, compare=False)
    own: Path | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Parse the command and its options."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--run")
        parser.add_argument("--weights")
        parser.add_argument("--ckpt_path", "--resume", dest="resume")
        try:
            named, rest = parser.parse_known_args(words[1:])
        except argparse.ArgumentError as error:
            raise ValueError(f"{error.argument_name} has no value: write one after it") from error
        return cls(words[0], tuple(named.config), named.run, named.weights, named.resume, tuple(rest))

    def render(self) -> list[str]:
        """Return words that `parse` turns into an equal invocation: for jsonargparse and for child processes."""
        named = {"--run": self.run, "--weights": self.weights, "--ckpt_path": self.resume}
        options = [*(f"--config={config}" for config in self.configs)]
        options += [f"{option}={value}" for option, value in named.items() if value is not None]
        return [self.command, *options, *self.rest]

    def resolve(self) -> Self:
        """Return the same invocation with the run, the configuration files and the commit of the weights filled in.

        Resolving the result again changes nothing, so child processes that parse its words see the same.
        """
        if "--help-all" in self.rest:
            return type(self)(self.command, rest=("--help",))
        if any(word == "--help" or word.partition("=")[0].endswith(".help") for word in self.rest):
            return self  # the parser answers
        return self._continued()._with_pinned_weights()._with_run()._with_configs()

    @property
    def starts_from_weights(self) -> bool:
        """Whether `--weights` names weights."""
        return self.weights not in (None, NULL)

    def _continued(self) -> Self:
        """If the command starts a run from weights, and that run exists, continue it with its own configuration."""
        if self.command != "fit" or self.run is None or self.resume != "auto" or not self.starts_from_weights:
            return self
        folder = run_folder(self.run)
        if not (folder / CONFIG).is_file() or not resumable_checkpoints(folder):
            return self
        # The run's configuration describes the network in full, in other words than those that started it.
        return replace(self, configs=(), weights=None, rest=_without(self.rest, "--model.network"))

    def _with_pinned_weights(self) -> Self:
        """Resolve a name on the Hub to one commit, so that all processes load the same weights."""
        if not self.starts_from_weights:
            # An evaluation ignores the weights that a run's configuration says it started from.
            return self if self.command == "fit" else replace(self, weights=NULL)
        if self.resume not in (None, "auto"):
            raise ValueError("--weights starts a run, and --resume or --ckpt_path continues one: give only one of them")
        from scalablevit_pl.weights.source import pin_weights

        return replace(self, weights=pin_weights(str(self.weights)))

    def _with_run(self) -> Self:
        """Name the run: after the checkpoint's folder, or after the recipe, date and time."""
        run = self.run if self.run is not None else _run_of_checkpoint(self.resume)
        if run is None:
            if any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
                raise ValueError("several processes need a common name for the run: give it with --run")
            recipe = Path(self.configs[0]).stem if self.configs else "run"
            return replace(self, run=f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}", automatic=True)
        # With --weights an evaluation needs no run: the folder only receives the results.
        started = self.command != "fit" and not self.starts_from_weights
        own = (existing_run(run) if started else run_folder(run)) / CONFIG
        if self.configs or not own.is_file():
            return replace(self, run=run)
        return replace(self, run=run, configs=(str(own),), own=own)

    def _with_configs(self) -> Self:
        if not self.configs and not any(word.partition("=")[0] in WITHOUT_FILES for word in self.rest):
            recipe = "a recipe with --config, such as --config recipes/quickstart.yaml"
            remedy = recipe if self.command == "fit" or self.starts_from_weights else "a run with --run"
            raise ValueError(f"there is nothing to start from: give {remedy}")
        return replace(self, configs=tuple(str(find_config(name)) for name in self.configs))


def _without(words: Iterable[str], name: str) -> tuple[str, ...]:
    """Remove an option and those of its parts, with their values."""
    kept: list[str] = []
    skipped = False
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--"):
            skipped = option == name or option.startswith(f"{name}.")
        if not skipped:
            kept.append(word)
    return tuple(kept)


def _run_of_checkpoint(checkpoint: str | None) -> str | None:
    folder = Path(checkpoint or "").resolve().parent
    in_run = checkpoint is not None and folder.name == "checkpoints" and (folder.parent / CONFIG).is_file()
    return str(folder.parent) if in_run else None


def find_config(name: str) -> Path:
    """Return the configuration file of that name: a path, or a file of the package's `configs/`."""
    for candidate in (Path(name), *(folder / name for folder in CONFIG_FOLDERS)):
        if candidate.is_file():
            return candidate
    found = {path.relative_to(folder).as_posix() for folder in CONFIG_FOLDERS for path in folder.glob("recipes/*")}
    near = difflib.get_close_matches(name, sorted(found), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"the package has {', '.join(sorted(found))}"
    raise ValueError(f"there is no configuration {name!r} here or in the package: {hint}")
