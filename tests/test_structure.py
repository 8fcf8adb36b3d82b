"""Promises about the tree itself: layers, light imports, documented names."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import ropex

ROOT = Path(ropex.__file__).parent
REPOSITORY = ROOT.parent

# Imports point strictly down, and scaling and kernels never meet.
LAYERS = {
    "_checks": -2,
    "_disk": -2,
    "_version": -2,
    "rotation": -1,
    "draws": 0,
    "scaling": 1,
    "kernels": 1,
    "precision": 2,
    "recommend": 2,
    "rotary": 2,
    "patching": 3,
    "evaluation": 4,
    "__init__": 5,
    "cli": 6,
    "__main__": 7,
}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_strictly_down(path: Path) -> None:
    part = part_of(path)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            names = [f"ropex.{alias.name}" for alias in node.names] if names == ["ropex"] else names
            assert "ropex.*" not in names
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first != "ropex":
                continue
            target = rest.split(".")[0] if rest else "__init__"
            if target in LAYERS and target != part:
                assert LAYERS[target] < LAYERS[part], f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "scaling").glob("*.py")), ids=lambda path: path.name)
def test_strategies_know_each_other_through_base_alone(path: Path) -> None:
    if path.name in ("__init__.py", "registry.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ropex.scaling"):
            assert node.module == "ropex.scaling.base"


@pytest.mark.parametrize("cls", ropex.methods().values(), ids=lambda cls: cls.__name__)
def test_a_strategy_is_short(cls: type) -> None:
    """At most 40 lines; the docstring and blank lines do not count."""
    source = inspect.getsource(cls)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    docstring, source = definition.body[0], source.splitlines()
    code = source[: docstring.lineno - 1] + source[docstring.end_lineno or 0 :]
    assert len([line for line in code if line.strip()]) <= 40


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} == set(LAYERS)


def test_importing_ropex_is_light() -> None:
    code = (
        "import sys, ropex; print([m for m in ('triton', 'transformers', 'matplotlib', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch itself imports triton where it finds one; ropex adds none.
    alone = subprocess.run(
        [sys.executable, "-c", code.replace(", ropex", ", torch")], capture_output=True, text=True, check=True
    )
    assert done.stdout == alone.stdout
    assert "transformers" not in done.stdout


def public_names() -> list[str]:
    names = [f"ropex.{name}" for name in ropex.__all__]
    for part in (ropex.draws, ropex.scaling, ropex.kernels, ropex.evaluation):
        names += [f"{part.__name__}.{name}" for name in part.__all__]
    return names


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if typing.get_origin(value) is None:  # an alias of literals has none to hold
        assert value.__doc__, f"{name} has no docstring"
        assert not value.__doc__.startswith(f"{attribute}("), f"{name} has only the docstring that a dataclass makes"
    pages = "\n".join(page.read_text() for page in (REPOSITORY / "docs" / "api").glob("*.md"))
    assert re.search(rf"`{re.escape(name)}`", pages), f"docs/api does not mention {name}"


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages([str(ROOT)], "ropex.")])
def test_examples_in_docstrings_run(name: str) -> None:
    if name in ("ropex.__main__",):
        return
    module = importlib.import_module(name)
    names = {public: getattr(ropex, public) for public in ropex.__all__}
    results = doctest.testmod(module, extraglobs={"torch": torch, "ropex": ropex, **names})
    assert results.failed == 0
