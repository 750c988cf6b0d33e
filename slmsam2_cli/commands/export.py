"""Export a model as one zip file, and import it.   export: model -> zip.   import: zip -> FOLDER/{model.safetensors, plan.json, …}."""

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
    """Write a fine-tuned model, or an adapter, as one zip file. Returns the exit code 0.

    model: a file, or a folder that holds one; None for the workspace's model.

    Raises: UsageError when no model is named; WeightsError when it cannot be read; OutputError when the zip cannot be written, or another
    file of its name exists.
    """
    if model is not None:
        source = export.model_in(model) if model.is_dir() else model
    elif workspace is None:
        raise UsageError("no model to export. Name one with --model FILE or a workspace with -w, or run inside a data set")
    elif not workspace.model.is_file():
        raise UsageError(f"{workspace.root}: no fine-tuned model. Run slmsam2 finetune, or name a model with --model")
    else:
        source = workspace.model
    if output.suffix != ".zip":
        raise UsageError(f"-o {output}: the name of the file must end in .zip")
    checkpoint = read_checkpoint(source)
    with open_regular(source) as file:
        content = export.pack(checkpoint, file.read())
    if overwrite or not output.exists():
        atomic.write_bytes(output, content)
        console.say(f"wrote {output}: {len(content) / 2**20:.1f} MB, weights {checkpoint.digest[:12]}")
    elif output.is_file() and output.stat().st_size == len(content) and output.read_bytes() == content:
        console.say(f"already there: {output}")
    else:
        raise OutputError(f"{output}: another file of this name exists. Use --overwrite, or another name")
    for warning in checkpoint.warnings:
        console.warn(warning)
    if checkpoint.required_base:
        console.say(f"it is an adapter: to use it, the weights {checkpoint.required_base.name} are needed too")
    return DONE


def import_model(archive: Path, output: Path | None, *, overwrite: bool = False) -> int:
    """Unpack an exported model into a folder for predict --model. Returns the exit code 0.

    output: the folder, None for one named after the zip.

    Raises: UsageError when the zip cannot be read; WeightsError when it is not an unmodified exported model; OutputError or LockError when
    files cannot be written, or would replace others.
    """
    try:
        with open_regular(archive) as file:
            package = export.unpack(file, archive.name)
    except InputError as error:
        raise UsageError(f"{archive}: {error.what}. Name a zip that slmsam2 export-model wrote") from None
    folder = output if output is not None else Path(archive.stem)
    _check_replaced_files(folder, package, overwrite)
    with atomic.lock_folder(folder):
        checkpoint = _write_model(folder / package.model, package, archive.name)
        for name in sorted(set(package.files) - {package.model}):
            atomic.write_bytes(folder / name, package.files[name])
    console.say(f"imported into {folder}: weights {checkpoint.digest[:12]}")
    for warning in checkpoint.warnings:
        console.warn(warning)
    base = checkpoint.required_base
    needed = f" --weights FILE, with the weights {base.name} ({base.digest[:12]}) that the adapter belongs to" if base else ""
    console.say(f"use it with slmsam2 predict --model {folder}{needed}")
    return DONE


def _check_replaced_files(folder: Path, package: export.Package, overwrite: bool) -> None:
    """Check that no file is replaced, except with overwrite by the package's file of the same name.

    Raises: OutputError when one would be, or the folder holds a model of the other kind.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: a file, not a directory. Name a folder with -o")
    for name in sorted({*package.files, *export.MODELS}):
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        same = path.is_file() and not path.is_symlink() and path.read_bytes() == package.files.get(name)
        if not same and (not overwrite or name not in package.files):
            raise OutputError(f"{path}: another file of this name exists. Name another folder with -o, or use --overwrite")


def _write_model(path: Path, package: export.Package, source: str) -> Checkpoint:
    """Write the model of a package, and check that it is what the package says before it gets its final name.

    Raises: WeightsError when it is not; OutputError when it cannot be written.
    """
    read: list[Checkpoint] = []

    def verify(temporary: Path) -> None:
        read.append(read_checkpoint(temporary))
        export.check_contents(package, read[0], source)

    try:
        with atomic.replacing(path, verify) as temporary, atomic.create(temporary) as file:
            file.write(package.files[package.model])
    except OutputError as error:
        if isinstance(error.__cause__, WeightsError):
            raise WeightsError(f"{source}: does not hold a valid model: {str(error.__cause__).partition(': ')[2]}") from None
        raise
    return read[0]
