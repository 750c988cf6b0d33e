"""Only io/atomic.py opens files for writing, so that a final name never holds a partial file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slmsam2_cli

PACKAGE = Path(slmsam2_cli.__file__).parent
WRITER = "io/atomic.py"
# They fill the temporary file of io/volume.py, in formats that only their libraries write.
FORMAT_WRITERS = {"io/itk.py", "io/raster.py"}
WRITERS = {"WriteImage", "to_filename", "tofile", "save", "savez", "savez_compressed", "savetxt", "save_file", "save_pretrained"}
WRITERS |= {"write_text", "write_bytes", "NamedTemporaryFile", "mkstemp", "copy2", "copyfile", "copytree", "move"}
OPENERS = {"open", "fdopen", "memmap", "open_memmap", "ZipFile", "TarFile", "GzipFile"}


def writers_in(source: str) -> list[str]:
    """The calls in a module that write files without io/atomic.py."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and writes(node)]


def writes(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute):
        owner, name = ast.unparse(function.value), function.attr
    else:
        owner, name = "", getattr(function, "id", "")
    if owner == "atomic" or ast.unparse(call).startswith("gzip.GzipFile('',"):  # packs into a file that is open already
        return False
    if name in ("save", "ZipFile") and ast.unparse(call.args[0] if call.args else call) == "memory":  # by that name, an io.BytesIO
        return False
    if name in WRITERS:
        return bool(owner) or name != "save"  # safetensors' bare save() returns bytes
    if owner == "os" and name == "open":
        return any(flag in ast.unparse(call) for flag in ("O_CREAT", "O_TRUNC", "O_APPEND", "O_RDWR"))
    return name in OPENERS and any(
        is_writing_mode(argument) for argument in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    )


def is_writing_mode(argument: ast.expr) -> bool:
    mode = argument.value if isinstance(argument, ast.Constant) else None
    return isinstance(mode, str) and set(mode) <= set("rwxabt+") and bool(set(mode) & set("wxa+"))


@pytest.mark.parametrize(
    "name", sorted({path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {WRITER, *FORMAT_WRITERS})
)
def test_no_other_module_opens_a_file_for_writing(name: str) -> None:
    assert writers_in((PACKAGE / name).read_text(encoding="utf-8")) == []


def test_writers_of_other_formats_are_called_by_the_volume_module_alone() -> None:
    def callers(function: str) -> set[str]:
        return {
            path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if f"{function}(" in path.read_text(encoding="utf-8")
        }

    assert callers("write_itk") == {"io/itk.py", "io/volume.py"}
    assert callers("write_raster") == {"io/raster.py", "io/volume.py"}
    assert "with atomic.replacing(path, verify) as temporary:\n        _write(temporary, " in (PACKAGE / "io/volume.py").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "gzip.open(path, 'wb')",
        "path.write_text('x')",
        "np.save(path, array)",
        "torch.save(state, path)",
        "nibabel.save(image, path)",
        "save_file(state, path)",
        "zipfile.ZipFile(path, 'w')",
        "sitk.WriteImage(image, name)",
        "np.memmap(path, mode='w+')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
    ],
)
def test_the_check_finds_these_calls(source: str) -> None:
    assert writers_in(source) == [source]


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "open(path, 'rb')",
        "atomic.write_text(path, text)",
        "save(state, header)",
        "image.save(memory, 'WEBP')",
        "zipfile.ZipFile(memory, 'w')",
        "os.open(os.devnull, os.O_WRONLY)",
    ],
)
def test_the_check_accepts_these_calls(source: str) -> None:
    assert writers_in(source) == []
