"""The command line: options -> one stage -> exit code (cli/exit_codes.py). Decides nothing; torch waits until a stage asks for it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from slmsam2_cli import console
from slmsam2_cli.cli.exit_codes import terminate
from slmsam2_cli.cli.options import (
    DatasetOption,
    DeviceOption,
    NetworkOption,
    OverwriteOption,
    WorkspaceOption,
    command_decorator,
    format_examples,
)
from slmsam2_cli.cli.pretrain import EXAMPLES as PRETRAIN_EXAMPLES
from slmsam2_cli.cli.pretrain import pretrain
from slmsam2_cli.cli.weights import weights as weights_commands
from slmsam2_cli.errors import UsageError
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

NNUNET_ALIASES = {
    "-num_parts": "--num-parts",
    "-part_id": "--part-id",
    "-device": "--device",
    "-chk": "--model",
    "--c": "--continue",
    "--continue_prediction": "--continue",
    "--disable_progress_bar": "--disable-progress",
}

app = typer.Typer(
    name="slmsam2",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(weights_commands)
command = command_decorator(app)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, terminate)
    app(args=translate_aliases(sys.argv[1:]), prog_name="slmsam2")


def translate_aliases(arguments: Sequence[str]) -> list[str]:
    """nnU-Net's option names as ours; what follows a bare -- is left alone."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    named = [argument.partition("=") for argument in arguments[:end]]
    return [NNUNET_ALIASES.get(name, name) + equals + value for name, equals, value in named] + list(arguments[end:])


def _show_version(asked: bool) -> None:
    if asked:
        console.result(f"slmsam2 {VERSION}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback(
    epilog=format_examples("slmsam2 demo", "cd Task04_Hippocampus && slmsam2 finetune -n 5 && slmsam2 predict && slmsam2 evaluate")
)
def _slmsam2(version: VersionOption = False) -> None:
    """Annotate one slice of a CT or MR volume, get the whole volume.

    The commands in the order of a day's work: plan, preprocess, finetune, predict, evaluate. They meet through one folder, the workspace,
    by default slmsam2/ inside the data set. Every command may be repeated: what is done and still right is not done again.
    """


def _dataset_or_current(dataset: Path | None) -> Path | None:
    """The data set asked for, else the current folder if it is one."""
    return dataset if dataset is not None or not Path("dataset.json").is_file() else Path()


def _require_dataset(dataset: Path | None) -> Path:
    found = _dataset_or_current(dataset)
    if found is None:
        raise UsageError("no data set: the current folder holds no dataset.json. Name a data set with -d")
    return found


@command(
    "slmsam2 plan",
    "slmsam2 plan -d Task09_Spleen -w /scratch/spleen",
    "slmsam2 plan --axis LR",
    "slmsam2 plan --memory 1.2 --minutes 10",
    "slmsam2 plan --diff",
    "slmsam2 plan --against colleagues_plan.json",
    "slmsam2 plan --network tiny --overwrite",
)
def plan(
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    network: NetworkOption = None,
    axis: Annotated[
        Literal["auto", "SI", "AP", "LR"] | None,
        typer.Option(help="Cut slices along this axis; auto lets the data decide again.  [default: what the plan was asked, else auto]"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, max=1e6, metavar="M", help="Let fine-tuning take so many minutes at most; 0: no limit.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, metavar="GB", help="Let fine-tuning take so much memory at most, by shorter clips; 0: no limit."),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Write nothing; say where plan.json differs from what would be decided now.")
    ] = False,
    against: Annotated[Path | None, typer.Option(metavar="FILE", help="As --diff, for the plan in this file.")] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write plan.html, which shows every case under the plan.")] = True,
    overwrite: OverwriteOption = False,
) -> int:
    """Measure a data set and decide how to treat it.

    Writes fingerprint.json (what was measured), plan.json (what was decided, and why) and plan.html (the same with pictures) into the
    workspace. plan.json may be edited:
    the edit is kept as long as the data stay the same. Says which slices to annotate, and which cases to look at. Reports all bad cases
    at once.
    """
    from slmsam2_cli.commands import plan as stage

    root = _require_dataset(dataset)
    space = Workspace.of(root, workspace)
    if diff or against is not None:
        if overwrite:
            raise UsageError("--diff writes nothing, so there is nothing to --overwrite. Leave one of them out")
        return stage.compare(root, against or space.plan, network=network, axis=axis, minutes=minutes, max_memory_gb=memory)
    return stage.plan(root, space, overwrite=overwrite, network=network, axis=axis, minutes=minutes, max_memory_gb=memory, report=report)


@command("slmsam2 preprocess", "slmsam2 preprocess -d Task09_Spleen")
def preprocess(dataset: DatasetOption = None, workspace: WorkspaceOption = None, overwrite: OverwriteOption = False) -> int:
    """Turn labelled volumes into stacks of slices.

    Does what the plan says. Writes prepared/ into the workspace. Needs plan.json; finetune does both by itself. Cases that are prepared
    and unchanged are skipped.
    """
    from slmsam2_cli.commands import preprocess as stage

    root = _require_dataset(dataset)
    return stage.preprocess(root, Workspace.of(root, workspace), overwrite=overwrite)


@command(
    "slmsam2 finetune -n 5",
    "slmsam2 finetune -n 1 --minutes 20 --weights base.safetensors",
    "slmsam2 finetune -n 5 --continue",
    "slmsam2 finetune -n 5 --processes 2",
)
def finetune(
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    cases: Annotated[int, typer.Option("-n", "--cases", min=1, metavar="N", help="How many labelled cases to learn from.")] = 5,
    weights: Annotated[
        str,
        typer.Option(metavar="auto|random|NAME|FILE", help="Where to start: packaged, random, named (slmsam2 weights list), or a file."),
    ] = "auto",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, metavar="M", help="Stop after so many minutes.  [default: what the plan says]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after so many optimiser steps.  [default: what the plan says]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Chooses the cases and every random draw.")] = 0,
    resume: Annotated[bool, typer.Option("--continue", help="Go on where an interrupted run stopped.")] = False,
    skip_invalid: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable training cases instead of stopping.")] = False,
    device: DeviceOption = "auto",
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="GPUs (on a CPU: parallel) to share each step.  [default: what the plan says]"),
    ] = None,
    network: NetworkOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Adapt the network to a data set by a few labelled cases.

    Plans and preprocesses first if need be. Writes finetuned/ into the workspace: the model, split.json with the cases it learned from
    (the others count as unseen), and a log. Two networks learn: the one that propagates, and a small one that learns what the labels
    look like and is heeded as far as it agrees with your slices. First, short runs leave cases out: where tuning does harm, the base stays.
    """
    from slmsam2_cli.commands import finetune as stage

    root = _require_dataset(dataset)
    return stage.finetune(
        root,
        Workspace.of(root, workspace),
        cases=cases,
        weights=weights,
        minutes=minutes,
        steps=steps,
        seed=seed,
        resume=resume,
        skip_invalid=skip_invalid,
        device=device,
        processes=processes,
        network=network,
        overwrite=overwrite,
    )


@command(
    "slmsam2 predict -i imagesTs -o masks -p prompts",
    "slmsam2 predict -i scans -o masks -p prompts --model slmsam2/finetuned --device cpu",
    "slmsam2 predict -i scans -o masks --prompts-from labels --slice largest",
    "slmsam2 predict",
)
def predict(
    images: Annotated[
        Path | None, typer.Option("-i", "--images", metavar="FOLDER|FILE", help="Volumes to segment.  [default: the unseen cases]")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("-o", "--masks", metavar="FOLDER", help="Where the masks go.  [default: WORKSPACE/predictions]")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("-p", "--prompts", metavar="FOLDER", help="Masks of the same names with the annotated slices painted.")
    ] = None,
    prompts_from: Annotated[
        Path | None, typer.Option("--prompts-from", metavar="LABELS", help="Whole masks of which one slice a label is taken, as a trial.")
    ] = None,
    where: Annotated[Literal["middle", "largest", "quarter"], typer.Option("--slice", help="Which slice --prompts-from takes.")] = "middle",
    mark_ends: Annotated[
        bool, typer.Option("--end-stops", help="From whole masks take, too, that the slices just beyond each label's ends are empty.")
    ] = False,
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="A fine-tuned model.  [default: the workspace's, else the packaged base]")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="auto|NAME|FILE", help="Base weights, not fine-tuned, instead of a model.")] = None,
    device: DeviceOption = "auto",
    num_parts: Annotated[int, typer.Option(min=1, metavar="P", help="Share the volumes among so many runs.")] = 1,
    part_id: Annotated[int, typer.Option(min=0, metavar="I", help="Which share this run takes, from 0.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do every mask again.")] = False,
    resume: Annotated[
        bool, typer.Option("--continue", help="Do only masks that are missing or out of date.  [default: so]", show_default=False)
    ] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html: which masks to look at first.")] = True,
) -> int:
    """Propagate annotated slices through whole volumes.

    Takes a folder of volumes, or one. Writes a mask for each, on the volume's own grid and under its name, manifest.json with what was
    given and used, and report.html, a page that shows which to look at first. A person's slices come back exactly as they were painted.
    Inside a data set and without -i, predicts the labelled cases that fine-tuning has not seen (all, if it has seen all), each from one
    slice a label. Where there is no plan, one is made from the images and the paint, and kept beside the masks.
    """
    from slmsam2_cli.commands import predict as stage

    if overwrite and resume:
        raise UsageError("--continue and --overwrite contradict each other. Give one of them")
    root = _dataset_or_current(dataset) if images is not None else _require_dataset(dataset)
    return stage.predict(
        images,
        masks,
        prompts=prompts,
        prompts_from=prompts_from,
        where=where,
        mark_ends=mark_ends,
        dataset=root,
        workspace=Workspace.of(root, workspace) if root is not None else Workspace(workspace) if workspace is not None else None,
        model=model,
        weights=weights,
        device=device,
        num_parts=num_parts,
        part_id=part_id,
        overwrite=overwrite,
        report=report,
    )


@command(
    "slmsam2 evaluate",
    "slmsam2 evaluate -p masks -g labelsTr -o scores",
    "slmsam2 evaluate -p ours -p theirs -g labelsTr -o comparison",
    "slmsam2 evaluate --json --fail-under dice=0.8 > summary.json",
)
def evaluate(
    predictions: Annotated[
        list[Path] | None,
        typer.Option("-p", "--predictions", metavar="FOLDER", help="Masks to score; several to compare.  [default: WORKSPACE/predictions]"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("-g", "--labels", metavar="FOLDER", help="Masks to compare with, by name.  [default: the data set's labels]"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="FOLDER", help="Volumes to show in the report.  [default: the data set's images]")
    ] = None,
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", help="Where the results go.  [default: WORKSPACE/evaluation, else MASKS/evaluation]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Exit with 1 when the foreground mean of unseen cases is lower, as in dice=0.8."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--nsd-tolerance", min=0.001, metavar="MM", help="Tolerance of NSD.  [default: the plan's, else 2]")
    ] = None,
    resample: Annotated[bool, typer.Option("--resample", help="Bring masks on another grid onto the label's, nearest voxel.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html, a page to look at.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that score, 8 at most.  [default: one a core]")] = None,
) -> int:
    """Score masks against labels: Dice and HD95.

    By label and by case. Writes summary.json, cases.csv, slices.csv, summary.md and report.html. Cases the model learned from are reported
    apart from unseen ones, and slices that were given as prompts apart from those that were not. Several folders of masks are scored side
    by side and compared in pairs. HD95 is the larger of the two directed 95th percentiles, between border voxels, in mm.
    """
    from slmsam2_cli import parallel

    if parallel.count(workers) > 1:
        parallel.prepare(["slmsam2_cli.report.case_images"] if report else [])
    from slmsam2_cli.commands import evaluate as stage

    folders_given = bool(predictions) and labels is not None
    return stage.evaluate(
        predictions or (),
        labels,
        Workspace(workspace) if workspace is not None else None,
        out,
        dataset=dataset if folders_given else _dataset_or_current(dataset),
        images=images,
        tolerance_mm=tolerance,
        as_json=as_json,
        fail_under=fail_under or (),
        options=stage.Options(workers=workers, resample=resample, report=report),
    )


@command("slmsam2 demo", "slmsam2 demo -o trial --overwrite")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where everything goes.")] = Path("demo"),
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> int:
    """Run the whole pipeline on made-up patients.

    Takes a few minutes. Writes a data set in the Decathlon's layout, then plans, preprocesses, fine-tunes on five cases, predicts the
    others from one slice a label, and evaluates. Needs no data and no network. A second run does only what is missing.
    """
    from slmsam2_cli.commands.demo import demo as run

    return run(output, device=device, overwrite=overwrite)


@command("slmsam2 export-model -o model.zip", "slmsam2 export-model --model slmsam2/finetuned/adapter.safetensors -o adapter.zip")
def export_model(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.zip", help="The file to write.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="A fine-tuned model, or an adapter.  [default: the workspace's model]")
    ] = None,
    workspace: WorkspaceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another file of that name.")] = False,
) -> int:
    """Pack a fine-tuned model into one file for others.

    The zip holds the weights, the plan, where they come from (with the names of the cases they learned from, and no image), a licence note
    and digests.
    """
    from slmsam2_cli.commands import export as stage

    root = _dataset_or_current(None)
    space = Workspace(workspace) if workspace is not None else Workspace.of(root, None) if root is not None else None
    return stage.export_model(space, model, out, overwrite=overwrite)


@command("slmsam2 import-model model.zip -o spleen", "slmsam2 predict -i scans -o masks -p prompts --model spleen")
def import_model(
    archive: Annotated[Path, typer.Argument(metavar="FILE.zip", help="What export-model wrote.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Where it goes.  [default: the file's name]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another model in that folder.")] = False,
) -> int:
    """Unpack a model that somebody exported.

    Takes nothing from a zip that holds anything else than an exported model, whole and unchanged. Runs no code from it.
    """
    from slmsam2_cli.commands import export as stage

    return stage.import_model(archive, out, overwrite=overwrite)


command(*PRETRAIN_EXAMPLES)(pretrain)
