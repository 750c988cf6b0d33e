"""A model as one file, and back.   export: reads a model, writes a zip.   import: reads a zip, writes FOLDER/{model.safetensors,…}."""

from __future__ import annotations

from pathlib import Path

from slmsam2_cli import console
from slmsam2_cli.errors import DONE, OutputError, UsageError, WeightsError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.model import export
from slmsam2_cli.model.checkpoint import Checkpoint, read_checkpoint
from slmsam2_cli.workspace import Workspace


def export_model(workspace: Workspace | None, model: Path | None, output: Path, *, overwrite: bool = False) -> int:
    """One zip of a fine-tuned model, or of an adapter. The exit code: 0. UsageError, WeightsError, OutputError."""
    source = _source(workspace, model)
    if output.suffix != ".zip":
        raise UsageError(f"-o {output}: the name of the file must end in .zip")
    checkpoint = read_checkpoint(source)
    with open_regular(source) as file:
        content = export.pack(checkpoint, file.read())
    if not _already_written(output, content, overwrite):
        atomic.write_bytes(output, content)
        console.say(f"wrote {output}: {len(content) / 2**20:.1f} MB, weights {checkpoint.digest[:12]}")
    for warning in checkpoint.warnings:
        console.warn(warning)
    if checkpoint.required_base:
        console.say(f"it is an adapter: whoever uses it needs the base {checkpoint.required_base.name}")
    return DONE


def _source(workspace: Workspace | None, model: Path | None) -> Path:
    """The file to pack: the one named, the one in the folder named, or the workspace's."""
    if model is not None and model.is_dir():
        return export.model_in(model)
    if model is not None:
        return model
    if workspace is None:
        raise UsageError("no model named. Give --model FILE, or a workspace with -w, or run inside a data set")
    if not workspace.model.is_file():
        raise UsageError(f"{workspace.root}: holds no fine-tuned model. Run slmsam2 finetune, or name a model with --model")
    return workspace.model


def _already_written(path: Path, content: bytes, overwrite: bool) -> bool:
    """Whether exactly this is there already. OutputError when something else is, and may not be overwritten."""
    if overwrite or not path.exists():
        return False
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        console.say(f"already there: {path}")
        return True
    raise OutputError(f"{path}: exists already and is something else. Use --overwrite, or another name")


def import_model(archive: Path, output: Path | None, *, overwrite: bool = False) -> int:
    """The model in a zip as a folder for predict --model. The exit code: 0. UsageError, WeightsError, OutputError, LockError."""
    try:
        with open_regular(archive) as file:
            package = export.unpack(file, archive.name)
    except InputError as error:
        raise UsageError(f"{archive}: {error.what}. Name a zip that slmsam2 export-model wrote") from None
    folder = output if output is not None else Path(archive.stem)
    _refuse_to_lose(folder, package, overwrite)
    with atomic.lock_folder(folder):
        checkpoint = _write_model(folder / package.model, package, archive.name)
        for name in sorted(set(package.files) - {package.model}):
            atomic.write_bytes(folder / name, package.files[name])
    _print_import(folder, checkpoint)
    return DONE


def _refuse_to_lose(folder: Path, package: export.Package, overwrite: bool) -> None:
    """OutputError when files of these names are there with other content, or a model of the other kind is."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a directory. Name a folder with -o")
    for name in sorted({*package.files, *export.MODELS}):
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        same = path.is_file() and not path.is_symlink() and path.read_bytes() == package.files.get(name)
        if not same and (not overwrite or name not in package.files):
            raise OutputError(f"{path}: exists already and is something else. Use another folder with -o, or --overwrite")


def _write_model(path: Path, package: export.Package, source: str) -> Checkpoint:
    """The model, read back and found to be what the zip says before it gets its name."""
    read: list[Checkpoint] = []

    def verify(temporary: Path) -> None:
        read.append(read_checkpoint(temporary))
        export.check_contents(package, read[0], source)

    try:
        with atomic.replacing(path, verify) as temporary, atomic.create(temporary) as file:
            file.write(package.files[package.model])
    except OutputError as error:
        if isinstance(error.__cause__, WeightsError):
            raise WeightsError(f"{source}: what it holds is no model: {str(error.__cause__).partition(': ')[2]}") from None
        raise
    return read[0]


def _print_import(folder: Path, checkpoint: Checkpoint) -> None:
    needs = checkpoint.required_base
    console.say(f"imported into {folder}: weights {checkpoint.digest[:12]}")
    for warning in checkpoint.warnings:
        console.warn(warning)
    base = f" --weights BASE, the base being {needs.name} (weights {needs.digest[:12]})" if needs else ""
    console.say(f"use it with slmsam2 predict --model {folder}{base}")
