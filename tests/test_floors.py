"""Who may import whom: read from the source, so that a forbidden import is found even where no test
runs it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    {"common"},
    {"rewards", "model"},
    {"data"},
    {"grpo"},
    {"evaluation"},
    {"training"},
    {"miniature", "planning"},
    {"train.py", "evaluate.py"},
    {"benchmarks"},
)
"""From the ground up. A room may import those of the floors below it; what lies beside it, not."""
APART = {
    "rewards": {
        "model",
        "data",
        "grpo",
    },  # pure Python: anyone can read a rule, and run it anywhere
    "grpo": {"rewards"},  # the method knows rewards as numbers
    "evaluate.py": {"planning", "miniature"},
    "train.py": {"miniature"},
    "planning": {"rewards"},
    "benchmarks": {"miniature", "planning"},
}
"""What a room lies above and yet must not know."""
BELOW = {}
for height, floor in enumerate(FLOORS):
    below = set().union(*FLOORS[:height])
    BELOW |= {
        room: {name.removesuffix(".py") for name in below} - APART.get(room, set())
        for room in floor
    }
"""Folder or file -> what it may import of ours, beside itself. The tests may import everything."""
OURS = {name.removesuffix(".py") for name in BELOW} | {"tests"}
PURE = ("grpo/advantages.py", "grpo/loss.py")
OUTSIDE_MODEL = {"transformers", "PIL", "tokenizers"}


def sources() -> list[str]:
    """Every Python file of the house as a path relative to the repository; what is not built yet
    has none.
    """
    files = [
        file
        for name in sorted(BELOW)
        for file in (sorted((ROOT / name).rglob("*.py")) or [ROOT / name])
    ]
    return [file.relative_to(ROOT).as_posix() for file in files if file.is_file()]


def imports(path: str) -> set[str]:
    """Full dotted names of all that a file imports, at its top or inside a function; relative ones
    resolved.
    """
    return set(_imports(ast.parse((ROOT / path).read_text(encoding="utf-8"), path), path))


def _imports(tree: ast.AST, path: str) -> Iterator[str]:
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", sources())
def test_a_file_imports_only_what_lies_below_it(path: str) -> None:
    floor = path.split("/")[0]
    ours = {top(name) for name in imports(path)} & OURS
    assert ours <= BELOW[floor] | {floor}


@pytest.mark.parametrize("path", [path for path in sources() if path in PURE])
def test_the_formulas_import_torch_and_nothing_else_from_outside(path: str) -> None:
    assert {top(name) for name in imports(path)} - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("path", [path for path in sources() if path.startswith("model/")])
def test_the_model_is_plain_pytorch(path: str) -> None:
    assert not {top(name) for name in imports(path)} & OUTSIDE_MODEL


@pytest.mark.parametrize("path", [path for path in sources() if path.startswith("evaluation/")])
def test_the_evaluation_does_not_know_the_loss(path: str) -> None:
    assert not any(name.startswith("grpo.loss") for name in imports(path))
