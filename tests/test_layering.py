"""Data flows down: every module imports only from those above it, and what must be light does not import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "headwater"
FILES = sorted(SOURCE.rglob("*.py"))
# Top to bottom; a package stands for its modules, which may import each other unless they have a line of their own.
ORDER = [
    "types",
    "overrides",
    "methods",
    "arms",
    "execution",
    "config",
    "spec",
    "ledger",
    "flops",
    "meter",
    "device",
    "mesh",
    "assets",
    "grading",
    "tasks",
    "models",
    "rollouts",
    "scoring.scores",
    "scoring.advantages",
    "scoring.weights",
    "losses",
    "scoring.log_probs",
    "update",
    "checkpoint",
    "store",
    "trackers",
    "run",
    "evals",
    "monitors",
    "probe",
    "stages",
    "plan",
    "doctor",
    "study",
    "report",
    "export",
    "messages",
    "cli",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def place(module: str) -> int | None:
    """Line of a module in ORDER: its own, or that of a package it is in; None when it has none."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in ORDER:
            return ORDER.index(name)
    return None


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "headwater":
                inside = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                yield next((module for module in inside if module in MODULES), "")


def test_every_module_has_a_place():
    # The package itself and scoring's docstring import nothing.
    missing = [m for m in MODULES if place(m) is None and m not in ("", "scoring")]
    assert not missing, f"give {missing} a line in ORDER, where its imports allow"
    for package in ("", "scoring"):
        assert not list(imported(MODULES[package]))


@pytest.mark.parametrize("module", [m for m in MODULES if place(m) is not None])
def test_imports_point_up(module: str):
    own = place(module)
    for other in imported(MODULES[module]):
        found = place(other)
        if other:  # "" is the package's own version
            assert found is not None and own is not None
            assert found <= own, f"{module} imports {other}, which is below it"


def test_an_import_that_points_down_is_found(tmp_path: Path):
    (tmp_path / "bad.py").write_text("def f():\n    from headwater.study import run\n    import headwater.cli\n")
    assert list(imported(tmp_path / "bad.py")) == ["study.run", "cli"]


LIGHT = [
    m
    for m in MODULES
    if m.split(".")[0] in ("types", "tasks", "grading", "config", "execution", "spec", "assets")
    and m != "tasks.environments"  # imports an extra, and is imported where its tasks are asked for
]


def test_light_modules_import_no_torch():
    """Graders start in milliseconds and plans on machines without torch."""
    code = f"import sys\nfor m in {[f'headwater.{m}' for m in LIGHT]}: __import__(m)\n"
    code += "print([m for m in ('torch', 'transformers', 'reasoning_gym') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_bad_recipes_answer_without_torch():
    code = "import sys, headwater.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sizes():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {m: n for m, n in lines.items() if n > 400} == {}
    assert sum(lines.values()) <= 18_420
