"""Imports point down only. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import slmsam2_cli

PACKAGE = Path(slmsam2_cli.__file__).parent
# From the top: what is named in a row may import every row below it, and its own folder.
LAYERS = (
    ("cli",),
    ("commands",),
    ("api",),
    ("report", "pretraining"),
    ("training",),
    ("evaluation",),
    ("inference",),
    ("model",),
    ("planning",),
    ("dataset",),
    ("io",),
    ("parallel", "workspace", "device", "console", "version"),
    ("errors",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = ("cli", "io", "dataset", "planning", "evaluation", "report", "parallel", "workspace", "console", "version", "errors")


def name_of(path: Path) -> str:
    """io/atomic.py -> "io.atomic"; io/__init__.py -> "io"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CODE = [name for name, path in MODULES.items() if path.name != "__init__.py"]


@cache
def imports_of(module: str) -> frozenset[str]:
    """Everything a module imports, as full dotted names; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    inside = {name.removeprefix("slmsam2_cli.") for name in imports_of(module) if name.startswith("slmsam2_cli.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} - {""}


def foreign_imports(module: str) -> set[str]:
    """The top-level packages a module imports."""
    return {name.partition(".")[0] for name in imports_of(module)}


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_its_place_in_the_layers() -> None:
    assert {folder(module) for module in CODE} <= set(RANK)


@pytest.mark.parametrize("module", CODE)
def test_imports_go_from_upper_to_lower_layers(module: str) -> None:
    upwards = {
        used for used in own_imports(module) if folder(used) != folder(module) and RANK.get(folder(used), 99) <= RANK[folder(module)]
    }
    assert not upwards


def test_there_are_no_import_cycles() -> None:
    left = {module: own_imports(module) - {module} for module in MODULES}
    while flatten_plan := [module for module, used in left.items() if not used & set(left)]:
        for module in flatten_plan:
            del left[module]
    assert not left


def test_no_command_imports_another_except_the_demo() -> None:
    commands = [module for module in CODE if folder(module) == "commands" and module != "commands.demo"]
    assert {module: used for module in commands if (used := {name for name in own_imports(module) if folder(name) == "commands"})} == {}


def test_only_the_model_package_imports_sam2() -> None:
    assert {folder(module) for module in CODE if {"sam2", "hydra", "omegaconf"} & foreign_imports(module)} == {"model"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_these_modules_do_not_import_torch(name: str) -> None:
    assert not [module for module in CODE if folder(module) == name and {"torch", "safetensors"} & foreign_imports(module)]


def test_torchvision_is_used_nowhere() -> None:
    assert not [module for module in CODE if "torchvision" in foreign_imports(module)]


def test_init_files_are_empty_except_the_outermost() -> None:
    bodies = {name: ast.parse(path.read_text(encoding="utf-8")).body for name, path in MODULES.items() if path.name == "__init__.py"}
    assert bodies.pop("") and own_imports("") == {"api"}
    (docstring,) = bodies.pop("commands")
    assert isinstance(docstring, ast.Expr)
    assert {name: len(body) for name, body in bodies.items() if body} == {}


def test_every_module_has_a_docstring() -> None:
    assert [name for name in CODE if not ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))] == []
