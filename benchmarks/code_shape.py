"""The shape of the code: how many modules, how small, how they import each other, and the way of one volume through them.

python benchmarks/code_shape.py          prints the table; exit code 1 when a bound is broken

A hop is a function of one module that calls a function of another one, counted once for each such pair of functions, while one volume
goes from NIfTI file to mask. The network (slmsam2_cli/model) is left out: what a stranger follows is how the volume gets there and back.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel
import numpy as np

import slmsam2_cli
from slmsam2_cli.commands import predict as command
from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.inference.segment import Segmenter

PACKAGE = Path(slmsam2_cli.__file__).parent
NETWORK = PACKAGE / "model"
LAYERS = (
    ("errors",),
    ("parallel", "workspace", "device", "console", "version"),
    ("io",),
    ("dataset",),
    ("planning",),
    ("model",),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("report", "pretraining"),
    ("api",),
    ("commands",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FEW_LINES, MOST_PARAMETERS = 100, 6
WITH_OPTIONS = ("commands", "cli")  # a command has as many parameters as options


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name below slmsam2_cli, number of lines, syntax tree."""

    name: str
    lines: int
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def read_modules() -> dict[str, Module]:
    """Read every module that is not an empty __init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        text = path.read_text(encoding="utf-8")
        if path.name != "__init__.py":
            found[name] = Module(name, len(text.splitlines()), ast.parse(text))
    return found


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, inside functions too."""
    graph = {}
    for module in modules.values():
        names = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        graph[module.name] = {name.removeprefix("slmsam2_cli.") for name in names} & set(modules) - {module.name}
    return graph


def in_a_cycle(graph: dict[str, set[str]]) -> set[str]:
    """The names that are part of a cycle, or reach one."""
    left = dict(graph)
    while flatten_plan := [name for name, used in left.items() if not used & set(left)]:
        for name in flatten_plan:
            del left[name]
    return set(left)


def package_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Top-level package or module -> those that it imports."""
    packages: dict[str, set[str]] = defaultdict(set)
    for name, used in graph.items():
        packages[name.partition(".")[0]] |= {other.partition(".")[0] for other in used} - {name.partition(".")[0]}
    return packages


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a package that stands higher, or beside the importer, in LAYERS."""
    return [
        f"{name} -> {other}"
        for name, used in graph.items()
        for other in used
        if name.partition(".")[0] != other.partition(".")[0] and RANK[other.partition(".")[0]] >= RANK[name.partition(".")[0]]
    ]


def lonely_modules(modules: dict[str, Module], graph: dict[str, set[str]]) -> list[str]:
    """Modules of fewer than FEW_LINES lines with exactly one importer."""
    importers = {name: [other for other, used in graph.items() if name in used] for name in modules}
    return [name for name, users in importers.items() if len(users) == 1 and modules[name].lines < FEW_LINES]


def crowded_functions(modules: dict[str, Module]) -> list[str]:
    """Functions outside the commands with more than MOST_PARAMETERS parameters; self and cls do not count."""
    found = []
    for module in modules.values():
        for function in module.functions():
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            if module.package not in WITH_OPTIONS and len([n for n in names if n not in ("self", "cls")]) > MOST_PARAMETERS:
                found.append(f"{module.name}.{function.name}")
    return found


def dice_formulas(modules: dict[str, Module]) -> list[str]:
    """Where 2 x / (a + b) is computed; soft Dice losses, which add 1 to both, are not meant."""
    return [f"{module.name}:{node.lineno}" for module in modules.values() for node in ast.walk(module.tree) if _is_dice(node)]


def _is_dice(node: ast.AST) -> bool:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
        return False
    top = node.left
    doubled = isinstance(top, ast.BinOp) and isinstance(top.op, ast.Mult) and getattr(top.left, "value", None) in (2, 2.0)
    return doubled and "log" not in ast.unparse(node)


def bounding_boxes(modules: dict[str, Module]) -> list[str]:
    """Functions that find the first and the last index at which a mask holds anything."""
    found = []
    for module in modules.values():
        for function in module.functions():
            text = ast.unparse(function)
            if ".any(" in text and any(call in text for call in ("flatnonzero(", ".nonzero(", "argmax(", "argwhere(")):
                found.append(f"{module.name}.{function.name}")
    return found


class Trace:
    """Follows one volume from file to mask: modules entered, hops between them, and what read_nifti was given."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.hops: set[tuple[str, str, str, str]] = set()
        self.reads: list[str] = []

    def __enter__(self) -> Trace:
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        name = _module_of(frame) if event == "call" else None
        if name is None or frame.f_code.co_name.startswith(("<", "__")):
            return
        if frame.f_code.co_name == "read_nifti":
            self.reads.append(str(frame.f_locals["path"]))
        caller = frame.f_back
        while caller is not None and NETWORK not in Path(caller.f_code.co_filename).parents and _is_no_function_of_ours(caller):
            caller = caller.f_back
        if name not in self.modules:
            self.modules.append(name)
        origin = _module_of(caller) if caller is not None else None
        if caller is not None and origin is not None and origin != name:
            self.hops.add((origin, caller.f_code.co_name, name, frame.f_code.co_name))


def _is_no_function_of_ours(frame: FrameType) -> bool:
    return _module_of(frame) is None or frame.f_code.co_name.startswith("<")


def _module_of(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE) or path.is_relative_to(NETWORK):
        return None
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def trace_one_volume() -> tuple[Trace, Trace]:
    """Predict one synthetic phantom from one annotated slice, in a folder without a plan, and again with the plan that was made.

    Returns the trace of the whole first run, whose reads count the planning too, and the trace of the case alone in the second.
    """
    run_case, trace, whole = command._Runner.run_case, Trace(), Trace()

    def traced(runner: command._Runner, case: Case, segmenter: Segmenter) -> list[str]:
        with trace:
            return run_case(runner, case, segmenter)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom_dataset(folder, cases=1, test_cases=0, shape=(8, 40, 40))
        prompts = folder / "prompts"
        prompts.mkdir()
        (label,) = (folder / "labelsTr").iterdir()
        volume = nibabel.load(label)
        sparse = np.zeros_like(full := np.asarray(volume.dataobj))
        middle = int(np.median(np.flatnonzero(full.any(axis=(0, 1)))))
        sparse[..., middle] = full[..., middle]
        nibabel.save(nibabel.Nifti1Image(sparse, volume.affine, volume.header), prompts / label.name)
        options: dict[str, Any] = {"prompts": prompts, "weights": "auto", "device": "cpu", "report": False}
        with whole:
            command.predict(folder / "imagesTr", folder / "masks", **options)
        (mask,) = (folder / "masks").glob("*.nii.gz")
        mask.unlink()  # so that it is made again, by the plan that is there now
        command._Runner.run_case = traced  # type: ignore[method-assign]
        try:
            command.predict(folder / "imagesTr", folder / "masks", **options)
        finally:
            command._Runner.run_case = run_case  # type: ignore[method-assign]
    return whole, trace


def main() -> int:
    """Print every measure beside its bound."""
    modules = read_modules()
    graph = import_graph(modules)
    lines, functions = sum(m.lines for m in modules.values()), sum(1 for m in modules.values() for _ in m.functions())
    rows: list[tuple[str, float, float, list[str]]] = [
        ("modules", len(modules), 140, []),
        ("functions per 1,000 lines", round(1000 * functions / lines, 1), 55, []),
        ("modules under 100 lines with one importer", len(found := lonely_modules(modules, graph)), 15, found),
        ("functions with more than 6 parameters, outside commands", len(found := crowded_functions(modules)), 0, found),
        ("modules in an import cycle", len(found := sorted(in_a_cycle(graph))), 0, found),
        ("packages in an import cycle", len(found := sorted(in_a_cycle(package_graph(graph)))), 0, found),
        ("upward imports", len(found := upward_imports(graph)), 0, found),
        ("places that compute Dice", len(found := dice_formulas(modules)), 1, found),
        ("places that compute a bounding box", len(found := bounding_boxes(modules)), 1, found),
    ]
    whole, case = trace_one_volume()
    most_reads = max(whole.reads.count(name) for name in whole.reads)
    rows += [
        ("modules on the way of one volume", len(case.modules), 16, case.modules),
        ("hops on the way of one volume", len(case.hops), 35, [f"{a}.{f} -> {b}.{g}" for a, f, b, g in sorted(case.hops)]),
        ("reads of NIfTI files for one case, with verification", len(case.reads), 3, case.reads),
        ("reads of one NIfTI file in a run without a plan", most_reads, 1, whole.reads),
    ]
    broken = False
    for name, value, bound, where in rows:
        bad = value > bound
        broken |= bad
        print(f"{'TOO MANY' if bad else 'ok':8}  {value:>7g}  (at most {bound:g})  {name}" + (f": {', '.join(where)}" if bad else ""))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
