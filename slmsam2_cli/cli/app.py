"""The command line: parse options, call one command of slmsam2_cli.commands, exit with its code.

Holds no decisions. Each command is imported when it is called, so that --help does not load torch.
"""

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

# Hidden spellings: nnU-Net's, and those of earlier versions that scripts may use.
ALIASES = {
    "-num_parts": "--num-parts",
    "-part_id": "--part-id",
    "-device": "--device",
    "-chk": "--model",
    "--c": "--continue",
    "--continue_prediction": "--continue",
    "--disable_progress_bar": "--disable-progress",
    "--masks": "--output",
    "--out": "--output",
    "--to": "--output",
    "--processes": "--workers",
    "--prompts-from": "--simulate-prompts",
    "--slice": "--prompt-slice",
    "--end-stops": "--mark-ends",
    "--skip-bad": "--skip-invalid",
    "--against": "--compare-to",
    "--memory": "--max-memory",
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
    """Run the console script `slmsam2`."""
    signal.signal(signal.SIGTERM, terminate)
    app(args=translate_aliases(sys.argv[1:]), prog_name="slmsam2")


def translate_aliases(arguments: Sequence[str]) -> list[str]:
    """Replace hidden spellings of options by the names in ALIASES; arguments after a bare -- stay as they are."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    named = [argument.partition("=") for argument in arguments[:end]]
    return [ALIASES.get(name, name) + equals + value for name, equals, value in named] + list(arguments[end:])


def _show_version(requested: bool) -> None:
    if requested:
        console.result(f"slmsam2 {VERSION}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")]


@app.callback(
    epilog=format_examples("slmsam2 demo", "cd Task04_Hippocampus && slmsam2 finetune -n 5 && slmsam2 predict && slmsam2 evaluate")
)
def _slmsam2(version: VersionOption = False) -> None:
    """Annotate one slice of a CT or MR volume, get the whole volume.

    Commands in the order of use: plan, preprocess, finetune, predict, evaluate. All share one folder, the workspace (default: slmsam2/
    inside the data set). Repeating a command skips results that are up to date.
    """


def _dataset_or_current(dataset: Path | None) -> Path | None:
    """Return the data set that -d names, else the current folder if it holds a dataset.json, else None."""
    return dataset if dataset is not None or not Path("dataset.json").is_file() else Path()


def _require_dataset(dataset: Path | None) -> Path:
    """Return the data set that -d names, else the current folder. Raises: UsageError when neither is a data set."""
    found = _dataset_or_current(dataset)
    if found is None:
        raise UsageError("no data set: the current folder has no dataset.json. Use -d DATASET")
    return found


@command(
    "slmsam2 plan",
    "slmsam2 plan -d Task09_Spleen -w /scratch/spleen",
    "slmsam2 plan --axis LR",
    "slmsam2 plan --max-memory 1.2 --minutes 10",
    "slmsam2 plan --diff",
    "slmsam2 plan --compare-to colleagues_plan.json",
    "slmsam2 plan --network tiny --overwrite",
)
def plan(
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    network: NetworkOption = None,
    axis: Annotated[
        Literal["auto", "SI", "AP", "LR"] | None,
        typer.Option(help="Slice axis; auto chooses it from the data.  [default: as in the existing plan, else auto]"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, max=1e6, metavar="M", help="Maximum fine-tuning time in minutes; 0: no limit.")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, metavar="GB", help="Maximum fine-tuning memory in GB (shortens training clips); 0: no limit."),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show how plan.json differs from a fresh plan; write nothing.")] = False,
    compare_to: Annotated[Path | None, typer.Option(metavar="FILE", help="Like --diff, but compare this plan file.")] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write plan.html: the plan with its reasons and a picture of every case.")
    ] = True,
    overwrite: OverwriteOption = False,
) -> int:
    """Analyse a data set and write a plan for it.

    Writes fingerprint.json (measurements), plan.json (settings with their reasons) and plan.html (both with pictures) into the workspace.
    You may edit plan.json: edits are kept as long as the data stay the same. Prints which slices to annotate and which cases to check.
    Lists all invalid cases in one run.
    """
    from slmsam2_cli.commands import plan as module

    root = _require_dataset(dataset)
    space = Workspace.of(root, workspace)
    if diff or compare_to is not None:
        if overwrite:
            raise UsageError("--diff and --overwrite cannot be combined")
        return module.compare(root, compare_to or space.plan, network=network, axis=axis, minutes=minutes, max_memory_gb=max_memory)
    return module.plan(
        root, space, overwrite=overwrite, network=network, axis=axis, minutes=minutes, max_memory_gb=max_memory, report=report
    )


@command("slmsam2 preprocess", "slmsam2 preprocess -d Task09_Spleen")
def preprocess(dataset: DatasetOption = None, workspace: WorkspaceOption = None, overwrite: OverwriteOption = False) -> int:
    """Convert labelled volumes to preprocessed slice stacks.

    Follows plan.json and writes prepared/ into the workspace. Skips cases that are prepared and unchanged. Optional: finetune plans and
    preprocesses by itself.
    """
    from slmsam2_cli.commands import preprocess as module

    root = _require_dataset(dataset)
    return module.preprocess(root, Workspace.of(root, workspace), overwrite=overwrite)


@command(
    "slmsam2 finetune -n 5",
    "slmsam2 finetune -n 1 --minutes 20 --weights base.safetensors",
    "slmsam2 finetune -n 5 --continue",
    "slmsam2 finetune -n 5 --workers 2",
)
def finetune(
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    cases: Annotated[int, typer.Option("-n", "--cases", min=1, metavar="N", help="Number of labelled cases to train on.")] = 5,
    weights: Annotated[
        str,
        typer.Option(
            metavar="auto|random|NAME|FILE", help="Initial weights: auto (bundled), random, a name from slmsam2 weights list, or a file."
        ),
    ] = "auto",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, metavar="M", help="Maximum training time in minutes.  [default: from plan.json]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Maximum number of optimiser steps.  [default: from plan.json]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Random seed for case selection and training.")] = 0,
    resume: Annotated[bool, typer.Option("--continue", help="Resume an interrupted run.")] = False,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Skip invalid training cases instead of stopping.")] = False,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, metavar="N", help="Number of GPUs, or of processes on a CPU, that share each step.  [default: from plan.json]"
        ),
    ] = None,
    network: NetworkOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Fine-tune the network on a few labelled cases.

    Plans and preprocesses first if needed. Writes finetuned/ into the workspace: the model, split.json with the training and the held-out
    cases, and a log. Trains two networks: the propagation network, and a label U-Net whose prediction is weighted by its agreement with
    your annotated slices. Cross-validation runs first; if fine-tuning does not help, the pretrained model is kept.
    """
    from slmsam2_cli.commands import finetune as module

    root = _require_dataset(dataset)
    return module.finetune(
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
        workers=workers,
        network=network,
        overwrite=overwrite,
    )


@command(
    "slmsam2 predict -i imagesTs -o masks -p prompts",
    "slmsam2 predict -i scans -o masks -p prompts --together",
    "slmsam2 predict -i scans -o masks -p prompts --model slmsam2/finetuned --device cpu",
    "slmsam2 predict -i scans -o masks --simulate-prompts labels --prompt-slice largest",
    "slmsam2 predict",
)
def predict(
    images: Annotated[
        Path | None, typer.Option("-i", "--images", metavar="FOLDER|FILE", help="Volumes to segment.  [default: the held-out cases]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER|FILE",
            help="Folder for masks, or one image's mask.  [default: WORKSPACE/predictions]",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("-p", "--prompts", metavar="FOLDER|FILE", help="Prompt masks: one per volume, same name, annotated slices only."),
    ] = None,
    simulate_prompts: Annotated[
        Path | None,
        typer.Option("--simulate-prompts", metavar="LABELS", help="Full masks; one slice per label is used as the prompt, for testing."),
    ] = None,
    prompt_slice: Annotated[
        Literal["middle", "largest", "quarter"], typer.Option("--prompt-slice", help="Which slice of a label --simulate-prompts uses.")
    ] = "middle",
    mark_ends: Annotated[
        bool, typer.Option("--mark-ends", help="With --simulate-prompts: also mark the first empty slice beyond each end of a label.")
    ] = False,
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="Fine-tuned model.  [default: the workspace's, else the bundled pretrained model]"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="auto|NAME|FILE", help="Pretrained weights to use instead of a fine-tuned model.")
    ] = None,
    device: DeviceOption = "auto",
    num_parts: Annotated[int, typer.Option(min=1, metavar="P", help="Number of runs that share the volumes.")] = 1,
    part_id: Annotated[int, typer.Option(min=0, metavar="I", help="Index of this run, from 0.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Recompute all masks.")] = False,
    resume: Annotated[
        bool, typer.Option("--continue", help="Compute only missing or outdated masks.  [default: on]", show_default=False)
    ] = False,
    together: Annotated[
        bool,
        typer.Option("--together", help="Learn from the annotated slices of all volumes (4 or more) first; use it after finetune."),
    ] = False,
    series: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|all", help="Which DICOM series to read where a folder holds several; all: each one, as CASE#NUMBER."),
    ] = None,
    format: Annotated[
        Literal["auto", "nifti", "nrrd", "seg.nrrd", "dicom-seg"],
        typer.Option(help="Format of the masks. auto: the prompt's or image's, and a DICOM segmentation beside it for DICOM images."),
    ] = "auto",
    label_codes: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Codes of the labels for DICOM segmentations, in the format of dcmqi.")
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html: which masks to check first.")] = True,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of processes on a CPU; masks of nano do not depend on it.  [default: one per core]"),
    ] = None,
) -> int:
    """Propagate annotated slices through whole volumes.

    Takes a folder of volumes (files, or sub-folders with a DICOM series), or one file. Writes one mask per volume with the volume's name
    and grid, manifest.json (prompts, model and confidence per case) and report.html (which masks to check first). Annotated slices are
    copied to the result unchanged. Inside a data set and without -i, predicts the held-out cases from one slice per label. Without a
    plan, one is made from the images and prompts and saved with the masks.
    """
    if overwrite and resume:
        raise UsageError("--continue and --overwrite cannot be combined")
    several = images is None or (images.is_dir() and len(list(images.glob("*"))) > 1)
    if several and workers != 1 and device in ("auto", "cpu"):
        from slmsam2_cli import parallel

        parallel.prepare(["slmsam2_cli.commands.predict"])
    from slmsam2_cli.commands import predict as module

    root = _dataset_or_current(dataset) if images is not None else _require_dataset(dataset)
    return module.predict(
        images,
        output,
        prompts=prompts,
        simulate_from=simulate_prompts,
        prompt_slice=prompt_slice,
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
        workers=workers,
        together=together,
        series=series,
        format=format,
        label_codes=label_codes,
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
        typer.Option(
            "-p",
            "--predictions",
            metavar="FOLDER",
            help="Predicted masks to score; repeat -p to compare several.  [default: WORKSPACE/predictions]",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("-g", "--labels", metavar="FOLDER", help="Reference masks, matched by file name.  [default: the data set's labels]"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="FOLDER", help="Volumes shown in the report.  [default: the data set's images]")
    ] = None,
    dataset: DatasetOption = None,
    workspace: WorkspaceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FOLDER", help="Folder for results.  [default: WORKSPACE/evaluation, else PREDICTIONS/evaluation]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Exit with code 1 if the mean over held-out cases is lower, e.g. dice=0.8."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--nsd-tolerance", min=0.001, metavar="MM", help="Tolerance of NSD in mm.  [default: from plan.json, else 2]"),
    ] = None,
    resample: Annotated[bool, typer.Option("--resample", help="Resample masks to the label's grid (nearest neighbour).")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html: scores, pictures and the worst cases.")] = True,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of worker processes, at most 8.  [default: one per core]")
    ] = None,
) -> int:
    """Score masks against labels: Dice and HD95.

    Reports per label and per case; writes summary.json, cases.csv, slices.csv, summary.md and report.html. Held-out cases and training
    cases are reported separately, and so are annotated slices and all others. Several folders of masks are compared in pairs. HD95 is the
    larger of the two directed 95th percentiles of border distances, in mm.
    """
    from slmsam2_cli import parallel

    if parallel.count(workers) > 1:
        parallel.prepare([*parallel.SCORING_MODULES, *(["slmsam2_cli.report.case_images"] if report else [])])
    from slmsam2_cli.commands import evaluate as module

    folders_given = bool(predictions) and labels is not None
    return module.evaluate(
        predictions or (),
        labels,
        Workspace(workspace) if workspace is not None else None,
        output,
        dataset=dataset if folders_given else _dataset_or_current(dataset),
        images=images,
        tolerance_mm=tolerance,
        as_json=as_json,
        fail_under=fail_under or (),
        options=module.Options(workers=workers, resample=resample, report=report),
    )


@command("slmsam2 demo", "slmsam2 demo -o trial --overwrite")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder for the data set and all results.")] = Path(
        "demo"
    ),
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> int:
    """Run the whole pipeline on synthetic phantoms.

    Takes a few minutes. Writes a data set in the Decathlon layout, plans, preprocesses, fine-tunes on five cases, predicts the others from
    one slice per label, and evaluates. Needs no data and no internet. A second run computes only what is missing.
    """
    from slmsam2_cli.commands.demo import demo as run

    return run(output, device=device, overwrite=overwrite)


@command("slmsam2 export-model -o model.zip", "slmsam2 export-model --model slmsam2/finetuned/adapter.safetensors -o adapter.zip")
def export_model(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.zip", help="File to write.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="Fine-tuned model or adapter.  [default: the workspace's model]")
    ] = None,
    workspace: WorkspaceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Pack a fine-tuned model into one file to share.

    The zip holds the weights, the plan, their provenance (names of the training cases, no image data), a licence note and digests.
    """
    from slmsam2_cli.commands import export as module

    root = _dataset_or_current(None)
    space = Workspace(workspace) if workspace is not None else Workspace.of(root, None) if root is not None else None
    return module.export_model(space, model, output, overwrite=overwrite)


@command("slmsam2 import-model model.zip -o spleen", "slmsam2 predict -i scans -o masks -p prompts --model spleen")
def import_model(
    archive: Annotated[Path, typer.Argument(metavar="FILE.zip", help="Archive written by export-model.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Folder for the model.  [default: the archive's name]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model in that folder.")] = False,
) -> int:
    """Unpack a model written by export-model.

    Rejects any archive other than an unmodified exported model. Runs no code from it.
    """
    from slmsam2_cli.commands import export as module

    return module.import_model(archive, output, overwrite=overwrite)


command(*PRETRAIN_EXAMPLES)(pretrain)
