import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scalablevit_pl"
# The parts of the package from top to bottom, each with the parts that it imports, at the top of a file or inside a
# function. A part imports only parts below it. A missing permission fails, and so does one that nothing uses.
ALLOWED: dict[str, set[str]] = {
    "__main__": {"commands"},
    "commands": {
        "__init__",
        "callbacks",
        "data",
        "diagnosis",
        "experiment",
        "explanation",
        "models",
        "plotting",
        "profiling",
        "run_folder",
        "storage",
        "tasks",
        "text",
        "weights",
    },
    "diagnosis": {
        "callbacks",
        "data",
        "explanation",
        "preprocessing",
        "profiling",
        "run_folder",
        "tasks",
        "text",
        "weights",
    },
    "experiment": {"callbacks", "explanation", "models", "preprocessing", "run_folder", "weights"},
    "profiling": {"__init__", "data", "models", "plotting", "preprocessing", "randomness", "text", "weights"},
    "timm": {"models"},
    "callbacks": {"models", "plotting", "run_folder", "storage", "tasks", "text", "weights"},
    "__init__": {"data", "models", "tasks"},
    "models": {"data", "preprocessing", "text", "weights"},
    "data": {"preprocessing", "randomness", "storage", "text", "weights"},
    "tasks": {"optim", "plotting", "preprocessing", "randomness", "storage", "text"},
    "weights": {"preprocessing", "run_folder", "storage", "text"},
    "plotting": {"storage", "text"},
    "explanation": {"text"},
    "run_folder": {"storage", "text"},
    "optim": set(),
    "randomness": set(),
    "preprocessing": set(),
    "text": set(),
    "storage": set(),
}


def modules() -> dict[str, Path]:
    """Map the dotted name of each module to its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_modules(name: str) -> set[str]:
    """Return the modules of the package that a module imports anywhere: at its top, in a function, for type checks."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {module if module in MODULES else node.module for module in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found = {module for module in found if module in MODULES}
    # Importing a module runs its packages' __init__ first. Those around the importing module have run already.
    parents = {".".join(module.split(".")[:depth]) for module in found for depth in range(1, module.count(".") + 1)}
    return (found | {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}) - {name}


def part_of(module: str) -> str:
    """Return the top-level part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("part", sorted({part_of(module) for module in MODULES}))
def test_each_part_imports_what_it_may_and_no_permission_is_unused(part: str) -> None:
    used = {part_of(other) for module in MODULES if part_of(module) == part for other in imported_modules(module)}
    assert used - {part} == ALLOWED[part]


def test_permissions_point_down_the_table() -> None:
    order = list(ALLOWED)
    upwards = [
        (part, other) for part, others in ALLOWED.items() for other in others if order.index(other) <= order.index(part)
    ]
    assert upwards == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported_modules(module) for module in MODULES}
    sorter = TopologicalSorter(graph)
    sorter.prepare()  # raises CycleError, which lists the modules of a circle


def test_the_package_has_few_parts() -> None:
    parts = {part_of(module) for module in MODULES} - {"__init__", "__main__"}
    assert len(parts) <= 18


def test_nothing_prints_or_loads_pickles_that_run_code() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "print", path
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                for name in ("weights_only", "strict"):
                    value = keywords.get(name)
                    in_zip = getattr(node.func, "id", "") == "zip"
                    assert in_zip or not (isinstance(value, ast.Constant) and value.value is False), f"{path}: {name}"


def test_importing_the_networks_imports_torch_and_no_other_library() -> None:
    code = "import sys, scalablevit_pl.models; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    loaded = set(done.stdout.split())
    parts = {module.split(".")[1] for module in loaded if module.startswith("scalablevit_pl.")}
    assert parts == {"models", "text"}
    others = {"lightning", "datasets", "jsonargparse", "timm", "torchvision", "huggingface_hub", "safetensors", "PIL"}
    assert loaded & others == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_has_more_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "option", ["--help", "--version", "fit --help", "test --help", "predict --help", "push --help", "profile --help"]
)
def test_help_and_version_do_not_import_torch(option: str) -> None:
    code = (
        "import sys; from scalablevit_pl.commands.main import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'torch' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *option.split()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    ["", "fit", "validate", "test", "predict", "plot", "profile", "export", "convert", "push", "pull", "info"],
)
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    words = [sys.executable, "-m", "scalablevit_pl", *command.split(), "--help"]
    page = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600).stdout
    assert max(len(line) for line in page.splitlines()) <= 80
    assert len(page.splitlines()) <= 60


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, scalablevit_pl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = [line for line in (ROOT / "tests/oldest.txt").read_text().splitlines() if not line.startswith("#")]
    assert pinned == [re.sub(r"\[.*\]", "", bound).replace(">=", "==") for bound in bounds]


UNIT_TESTS = sorted((ROOT / "tests/unit").rglob("test_*.py"))


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_unit_tests_mirror_the_package(path: Path) -> None:
    module = path.relative_to(ROOT / "tests/unit").with_name(path.name.removeprefix("test_"))
    assert (PACKAGE / module).is_file()


def test_no_test_imports_from_another_test_file() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in paths if path.stem.startswith("test_")}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.split(".")[-1] in tests for module in modules), path


def test_test_files_of_different_kinds_have_different_names() -> None:
    def names(folder: str) -> set[str]:
        return {path.stem.rstrip("s") for path in (ROOT / "tests" / folder).rglob("test_*.py")}

    kinds = ["unit", "integration", "golden", "gpu", "benchmarks", "project"]
    assert [(a, b, names(a) & names(b)) for a, b in combinations(kinds, 2) if names(a) & names(b)] == []
