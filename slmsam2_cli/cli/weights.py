"""The commands `slmsam2 weights …`: parse options and call slmsam2_cli.commands.weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmsam2_cli.cli.options import command_decorator, format_examples

weights = typer.Typer(
    name="weights",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Download, verify and convert published weights.

    Only slmsam2 weights get uses the internet. Downloads are kept in your user cache; finetune and predict find them by name:
    --weights sam2.1-tiny.""",
    epilog=format_examples("slmsam2 weights list", "slmsam2 weights get sam2.1-tiny", "slmsam2 finetune -n 5 --weights sam2.1-tiny"),
)
command = command_decorator(weights)


@command("slmsam2 weights list", name="list")
def list_() -> int:
    """List the weights known by name, and which of them are downloaded."""
    from slmsam2_cli.commands import weights as module

    return module.list_weights()


@command(
    "slmsam2 weights get sam2.1-tiny",
    "slmsam2 weights get medsam2 -o weights",
    "slmsam2 weights get sam2.1-tiny --url http://mirror/t.pt",
)
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from slmsam2 weights list.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Folder for the file.  [default: your user cache]"),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Expected SHA-256 of the file.  [default: the published one]")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="ADDRESS", help="Download from this address.  [default: the publisher's]")
    ] = None,
) -> int:
    """Download published weights.

    Resumes interrupted downloads. Verifies the published SHA-256 before saving the file.
    """
    from slmsam2_cli.commands import weights as module

    return module.get(name, output=output, sha256=sha256, url=url)


@command("slmsam2 weights verify", "slmsam2 weights verify sam2.1-tiny", "slmsam2 weights verify model.safetensors")
def verify(
    target: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE]", help="Weights to check.  [default: all downloaded ones]", show_default=False)
    ] = None,
) -> int:
    """Check digests and tensors.

    Compares each file with its published or saved digest, and its tensors with those of the network. Exits with code 1 if one of several
    is bad.
    """
    from slmsam2_cli.commands import weights as module

    return module.verify(target)


@command("slmsam2 weights import sam2.1_hiera_tiny.pt", "slmsam2 weights import checkpoint.pt --name knee", name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pt or .safetensors file.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name to use with --weights.  [default: the file's name]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing weights of that name.")] = False,
) -> int:
    """Convert third-party weights to this tool's format.

    Recognises SAM 2.0, SAM 2.1, models fine-tuned from it (MedSAM2) and fine-tuned SLM-SAM 2, of every size, by their tensors. Runs no
    code from the file; rejects it if a tensor is missing, unknown or of another shape.
    """
    from slmsam2_cli.commands import weights as module

    return module.import_weights(file, name=name, overwrite=overwrite)
