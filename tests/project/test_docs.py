"""What the documentation promises: short pages, links that resolve, commands, options and names that exist."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest

from scalablevit_pl.callbacks.averaging import WeightAverage
from scalablevit_pl.callbacks.checkpointing import RunCheckpoints
from scalablevit_pl.commands.pages import list_pages, read_page
from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.data.transforms import Augmentation
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import ClassificationTask

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
DECISIONS = sorted(path for path in (ROOT / "docs/decisions").glob("*.md") if path.name != "README.md")
# The changelog also names what is gone.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "checkpoints/README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
EXPERIMENTS = ("fit", "validate", "test", "predict", "doctor", "profile")
# The classes behind the first words of options. What is deeper belongs to a class that the user chooses.
SECTIONS: dict[str, tuple[type, ...]] = {
    "data": (ClassificationDataModule,),
    "data.preprocessing": (Preprocessing,),
    "data.augmentation": (Augmentation,),
    "model": (ClassificationTask,),
    "trainer": (pl.Trainer,),
    "ema": (WeightAverage,),
    "checkpoint": (RunCheckpoints,),
}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def words(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("path", "limit"), [("README.md", 900), ("docs/architecture.md", 1500)])
def test_main_pages_are_short(path: str, limit: int) -> None:
    assert words(ROOT / path) <= limit


@pytest.mark.parametrize("path", DECISIONS, ids=page_name)
def test_each_decision_is_short_and_listed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "**Reason.**" in text
    assert 15 <= words(path) <= 150
    title = text.splitlines()[0].removeprefix("# ")
    assert f"- [{title}]({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Number the lines that are wrapped: neither code nor tables nor pictures."""
    in_code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        in_code ^= fence
        if not in_code and not fence and not line.lstrip().startswith(("|", "![", "#")):
            yield number, line


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_prose_is_wrapped_at_120_columns(path: Path) -> None:
    assert [number for number, line in prose(path) if len(line) > 120] == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_every_relative_link_resolves(path: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        if link.startswith("https://"):
            continue
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(link)
    assert broken == []


def code_spans(path: Path) -> list[str]:
    """Return blocks of code and code within lines, lines that a backslash continues joined."""
    text = path.read_text(encoding="utf-8")
    blocks = [block for _, block in FENCE.findall(text)]
    return [span.replace("\\\n", " ") for span in blocks] + re.findall(r"`([^`]+)`", FENCE.sub("", text))


def commands(path: Path) -> list[tuple[str, str]]:
    """Return the commands of a page, each with its words up to the end of the line."""
    found = []
    for span in code_spans(path):
        for line in span.splitlines() if "\n" in span else [span.replace("\n", " ")]:
            match = re.search(r"(?<!from )\bscalablevit(?:_pl)? ([a-z]+)\b(?!_)(.*)", line.split(" #")[0])
            if match:
                found.append((match[1], match[2]))
    return found


def arguments_of(kinds: tuple[type, ...]) -> set[str]:
    """Return the arguments of constructors, with those that they forward to their parents."""
    classes = [base for kind in kinds for base in kind.__mro__ if base is not object]
    return {name for base in classes for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]


def is_option(command: str, option: str) -> bool:
    """Check an option against the command's page, or against the classes that a fit configures."""
    own = read_page(command) + (read_page("fit") if command in ("doctor", "profile") else "")
    if re.search(rf"{option}(?![\w.-])", own):
        return True
    section, _, name = option.removeprefix("--").rpartition(".")
    if command not in EXPERIMENTS or name == "help":
        return command in EXPERIMENTS
    if section in SECTIONS:
        return name in arguments_of(SECTIONS[section])
    parent, _, argument = section.rpartition(".")
    deeper = re.match(r"model\.(network|optimizer|schedule)", section)
    return bool(deeper) or (parent in SECTIONS and argument in arguments_of(SECTIONS[parent]))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_and_their_options_exist(path: Path) -> None:
    for command, rest in commands(path):
        assert command in list_pages(), f"there is no command {command!r}"
        wrong = [
            option for option in re.findall(r"(?<!\S)\[?(--[a-zA-Z][\w.-]*)", rest) if not is_option(command, option)
        ]
        assert wrong == [], f"scalablevit {command}{rest}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_files_and_make_targets_exist(path: Path) -> None:
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = " ".join(rules).split()
    for span in code_spans(path):
        for target in re.findall(r"\bmake ([a-z-]+)", span):
            assert target in targets, span
        for name in re.findall(r"--config ((?:recipes|debug)/[a-z_]+\.yaml)", span):
            assert (ROOT / "configs" / name).is_file(), span
        for name in re.findall(r"(?<![\w/])(?:benchmarks|tests|docs|configs)/[\w/.-]*\w", span):
            assert (ROOT / name).exists(), span


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_python_code_parses_and_its_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    assert all(exists(f"{node.module}.{alias.name}") for alias in node.names), block
    for name in re.findall(r"\bscalablevit_pl(?:\.\w+)+", text):
        assert exists(name), name


def exists(name: str) -> bool:
    """Import the longest module in a dotted name, and look the rest up in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_the_layout_names_every_part_of_the_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    parts = [path for path in (ROOT / "scalablevit_pl").iterdir() if path.suffix == ".py" or path.is_dir()]
    names = [path.name if path.is_file() else f"{path.name}/" for path in parts if path.name != "__pycache__"]
    assert [name for name in names if f"`{name}" not in text] == []


def test_the_layout_names_only_modules_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for folder, content in re.findall(r"^\| `(\w+)/` \| (.*) \|$", text, re.MULTILINE):
        place = next(path for path in (ROOT / "scalablevit_pl" / folder, ROOT / folder) if path.is_dir())
        for name in re.findall(r"`([a-z_]+)/?`", content):
            assert (place / name).is_dir() or (place / f"{name}.py").is_file(), f"{folder}/{name}"


def test_the_help_lists_every_command() -> None:
    assert [command for command in list_pages() if not re.search(rf"^  {command} ", read_page(), re.MULTILINE)] == []
