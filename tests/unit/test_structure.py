import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scalablevit_pl"
# What each part may import of the others; what is not named may import nothing of ours.
ALLOWED = {
    "arguments": set(),
    "pages": set(),
    "wording": set(),
    "imagenet": set(),
    "preprocessing": set(),
    "randomness": set(),
    "storage": set(),
    "plotting": {"storage", "wording"},
    "run_folder": {"storage"},
    "explanation": {"checkpoint"},
    # What loads and shares a network is imported where it is used, so that `models` needs torch alone.
    "models": {"hub", "model_card", "model_folder", "preprocessing"},
    "timm": {"models"},
    "checkpoint": {"models", "preprocessing"},
    "optim": {"models"},
    "profiling": {"data", "hub", "model_folder", "models", "plotting", "preprocessing", "randomness", "wording"},
    "model_folder": {"models", "preprocessing", "storage"},
    "hub": {"model_folder", "storage"},
    "model_card": {"hub", "models", "profiling"},
    "conversion": {"checkpoint", "imagenet", "model_folder", "models", "preprocessing"},
    "weights": {"checkpoint", "hub", "model_folder", "run_folder"},
    "tasks": {"models", "optim", "checkpoint", "randomness"},
    "data": {"hub", "imagenet", "preprocessing", "randomness"},
    "callbacks": {"models", "checkpoint", "optim", "plotting", "run_folder", "storage"},
    "prediction": {"arguments", "callbacks", "data", "preprocessing", "tasks", "weights"},
    "experiment": {"callbacks", "checkpoint", "explanation", "models", "preprocessing", "run_folder", "weights"},
    "release": {
        "arguments",
        "checkpoint",
        "conversion",
        "hub",
        "model_card",
        "model_folder",
        "models",
        "preprocessing",
        "profiling",
        "run_folder",
        "storage",
    },
    "profile": {"arguments", "profiling", "storage"},
    "profile_data": {"arguments", "data", "fit_plan", "profiling", "storage"},
    "comparison": {"arguments", "callbacks", "plotting", "run_folder"},
    "fit_plan": {"experiment"},
    "diagnosis": {"callbacks", "data", "explanation", "hub", "preprocessing", "profiling", "run_folder"},
    "doctor": {"arguments", "diagnosis", "fit_plan"},
    "cli": {
        "doctor",
        "callbacks",
        "comparison",
        "experiment",
        "explanation",
        "pages",
        "prediction",
        "profile",
        "profile_data",
        "release",
        "run_folder",
        "weights",
    },
    "__main__": {"cli"},
    "__init__": {"models", "tasks", "data"},
}


def imported_parts(path: Path) -> set[str]:
    """Return the parts that a module imports, wherever it does so."""
    return parts_in(ast.walk(ast.parse(path.read_text())))


def parts_in(nodes: Iterable[ast.AST]) -> set[str]:
    parts = set()
    for node in nodes:
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        parts |= {module.split(".")[1] for module in modules if module.startswith("scalablevit_pl.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_parts(path) - {part} <= ALLOWED[part]


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


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").rglob("*.py")), ids=lambda path: path.stem)
def test_importing_the_networks_imports_nothing_else_of_ours(path: Path) -> None:
    top = ast.parse(path.read_text()).body
    assert parts_in(top) <= {"models"}


@pytest.mark.parametrize(
    "option", ["--help", "--version", "fit --help", "test --help", "predict --help", "push --help", "profile --help"]
)
def test_help_and_version_do_not_import_torch(option: str) -> None:
    code = (
        "import sys; from scalablevit_pl.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'torch' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *option.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    ["", "fit", "validate", "test", "predict", "plot", "profile", "export", "convert", "push", "pull", "info"],
)
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    words = [sys.executable, "-m", "scalablevit_pl", *command.split(), "--help"]
    page = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert max(len(line) for line in page.splitlines()) <= 80
    assert len(page.splitlines()) <= 60


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, scalablevit_pl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = [line for line in (ROOT / "tests/oldest.txt").read_text().splitlines() if not line.startswith("#")]
    assert pinned == [re.sub(r"\[.*\]", "", bound).replace(">=", "==") for bound in bounds]
