"""The commands `slmsam2 weights …`: options -> stage. Decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmsam2_cli.cli.options import command_decorator, format_examples

weights = typer.Typer(
    name="weights",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Fetch, check and convert published weights.

    Only slmsam2 weights get uses the network. What it fetches is kept for this user, and finetune and predict find it by name:
    --weights sam2.1-tiny.""",
    epilog=format_examples("slmsam2 weights list", "slmsam2 weights get sam2.1-tiny", "slmsam2 finetune -n 5 --weights sam2.1-tiny"),
)
command = command_decorator(weights)


@command("slmsam2 weights list", name="list")
def list_() -> int:
    """Show which weights are known by name, and which are here."""
    from slmsam2_cli.commands import weights as stage

    return stage.list_weights()


@command(
    "slmsam2 weights get sam2.1-tiny",
    "slmsam2 weights get medsam2 --to weights",
    "slmsam2 weights get sam2.1-tiny --url http://mirror/t.pt",
)
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of slmsam2 weights list.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", help="Keep the file there, to be named as a file.  [default: this user's cache]"),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Accept only a file with this digest.  [default: the published one]")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="ADDRESS", help="Fetch the same file from elsewhere.  [default: where it was published]")
    ] = None,
) -> int:
    """Fetch published weights.

    Goes on where a cut connection or Ctrl-C left it. The file gets its name only after its SHA-256 was found to be the published one.
    """
    from slmsam2_cli.commands import weights as stage

    return stage.get(name, to=to, sha256=sha256, url=url)


@command("slmsam2 weights verify", "slmsam2 weights verify sam2.1-tiny", "slmsam2 weights verify model.safetensors")
def verify(
    target: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE]", help="Which.  [default: all that are here]", show_default=False)
    ] = None,
) -> int:
    """Check digests and tensors.

    Compares files with what was published or saved, and their tensors with those of the network. The exit code is 1 when one of several
    is bad.
    """
    from slmsam2_cli.commands import weights as stage

    return stage.verify(target)


@command("slmsam2 weights import sam2.1_hiera_tiny.pt", "slmsam2 weights import checkpoint.pt --name knee", name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pt or .safetensors file.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What --weights will call it.  [default: the file's name]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other weights of that name.")] = False,
) -> int:
    """Bring weights made elsewhere into this tool's format.

    Knows SAM 2.0, SAM 2.1 and what was tuned from it (MedSAM2), and tuned SLM-SAM 2, at every size, by their tensors. Runs no code from
    the file, and refuses it when a tensor is missing, unknown or of another shape.
    """
    from slmsam2_cli.commands import weights as stage

    return stage.import_weights(file, name=name, overwrite=overwrite)
