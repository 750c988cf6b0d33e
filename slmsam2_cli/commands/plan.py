"""slmsam2 plan: dataset -> measurements and settings.   Reads dataset.json, images, labels.   Writes fingerprint.json, plan.json,
plan.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, Literal

from slmsam2_cli import console
from slmsam2_cli.dataset.dataset import Dataset, read_dataset
from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.device import choose_device, describe, needs_one_thread
from slmsam2_cli.errors import DONE, SOME_FAILED, DatasetError, OutputError, PlanError, UsageError
from slmsam2_cli.io.atomic import lock_folder
from slmsam2_cli.parallel import available_cpus
from slmsam2_cli.planning.advice import annotation_advice, dataset_warnings
from slmsam2_cli.planning.estimate import (
    REFERENCE_INPUT_SIZE,
    SUPPORTED_SIZE,
    estimate_finetuning,
    estimate_prediction,
    format_estimate,
    longest_clip,
)
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint, write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.modality import MODALITY_NAMES, UNKNOWN
from slmsam2_cli.planning.plan import Plan, differences, flatten_plan, keep_edits, read_plan, write_plan
from slmsam2_cli.planning.resolution import resolution_warning
from slmsam2_cli.planning.rules import TRAINING, decide, override_training, requested_axis
from slmsam2_cli.report.plan_page import PlanNotes, shown_cases, write_plan_page
from slmsam2_cli.report.schema import Table
from slmsam2_cli.workspace import Workspace

AxisName = Literal["auto"] | SliceAxis
AXIS_KEY: Final = "geometry.slice_axis"
ESTIMATE_COLUMNS = ("command", "time", "memory")
MEASUREMENT_COLUMNS = ("property", "minimum", "median", "maximum")
LABEL_COLUMNS = ("label", "cases", "voxels", *(f"slices {axis}" for axis in AXES), *(f"copy Dice {axis}" for axis in AXES))
Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PlanOptions:
    """Settings from the command line; None: as in the existing plan, else by the rules."""

    network: str | None = None
    axis: AxisName | None = None
    minutes: float | None = None
    max_memory_gb: float | None = None


@dataclass(frozen=True)
class PlanTables:
    """The tables about a plan, shown on the terminal and in plan.html."""

    settings: Rows
    measurements: Rows
    labels: Rows
    advice: Rows
    estimates: Rows
    warnings: tuple[str, ...]


def plan(
    dataset: Path,
    workspace: Workspace,
    *,
    overwrite: bool = False,
    network: str | None = None,
    axis: AxisName | None = None,
    minutes: float | None = None,
    max_memory_gb: float | None = None,
    report: bool = True,
) -> int:
    """Measure a dataset and write a plan for it. Returns the exit code: 0, or 1 when some cases are invalid.

    network, axis, minutes and max_memory_gb (of fine-tuning) are kept by later runs; axis "auto" and limits of 0 reset them. report:
    whether to write plan.html.

    Raises: DatasetError, with all problems, when no case is valid; PlanError for manual edits that conflict with the dataset or the
    options; UsageError when max_memory_gb is too small; OutputError when the workspace cannot be written.
    """
    data, options = _read_dataset(dataset), PlanOptions(network, axis, minutes, max_memory_gb)
    previous = read_plan(workspace.plan) if workspace.plan.exists() and not overwrite else None
    try:
        with lock_folder(workspace.root):
            fingerprint, failed = _measure(data)
            decided = _decide(fingerprint, previous, options)
            final = keep_edits(previous, decided)
            _check_edits(final, decided, fingerprint, options)
            write_fingerprint(workspace.fingerprint, fingerprint)
            write_plan(workspace.plan, final)
            tables = _tables(final, fingerprint)
            if report:
                _write_page(workspace.plan_page, data, fingerprint, final, tables)
            elif workspace.plan_page.exists():
                console.say(f"{workspace.plan_page.name} was not updated and may show an earlier plan")
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    _show(fingerprint.dataset_name, tables, final)
    for key, mine, default in differences(final, decided):
        console.warn(f"plan.json has manual edits, keeping {key} = {mine} (default: {default}; use --overwrite to reset)")
    if previous is not None and not previous.edited:
        for key, before, now in differences(previous, final):
            console.say(f"changed since the last plan: {key} was {before}, is now {now}")
    return SOME_FAILED if failed else DONE


def compare(
    dataset: Path,
    path: Path,
    *,
    network: str | None = None,
    axis: AxisName | None = None,
    minutes: float | None = None,
    max_memory_gb: float | None = None,
) -> int:
    """Show how a plan file differs from a newly decided plan; writes nothing. Returns the exit code as `plan` does.

    Raises: DatasetError when no case is valid; PlanError when the plan file is missing or invalid.
    """
    if not path.exists():
        raise PlanError(f"no plan at {path} to compare with. Name a plan.json with --compare-to, or run slmsam2 plan first")
    mine = read_plan(path)
    fingerprint, failed = _measure(_read_dataset(dataset))
    fresh = _decide(fingerprint, mine, PlanOptions(network, axis, minutes, max_memory_gb))
    rows = []
    for key, before, now in differences(mine, fresh):
        group = next((name for name in fresh.reasons if key == name or key.startswith(f"{name}.")), key)
        rows.append([key, *("-" if value is None else str(value) for value in (before, now)), fresh.reasons.get(group, "-")])
    if mine.fingerprint_digest != fresh.fingerprint_digest:
        console.say(f"{path.name} was made for different data, or the dataset has changed since")
    if rows:
        console.table(f"{path.name} compared with a new plan", ["setting", path.name, "new", "reason"], rows)
    else:
        console.result(f"{path.name} is up to date: no differences")
    return SOME_FAILED if failed else DONE


def _read_dataset(dataset: Path) -> Dataset:
    data = read_dataset(dataset)
    for warning in data.warnings:
        console.warn(warning)
    return data


def _measure(data: Dataset) -> tuple[Fingerprint, bool]:
    """Measure the dataset and print the problems and warnings of its cases; returns the fingerprint and whether a case is invalid."""
    with console.progress("Analysing dataset", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    for problem in problems:
        console.error(str(problem))
    for line in _case_warnings(fingerprint):
        console.warn(line)
    return fingerprint, bool(problems)


def _case_warnings(fingerprint: Fingerprint) -> list[str]:
    return [f"case {case.id}: {warning}" for case in fingerprint.cases for warning in case.warnings]


def _decide(fingerprint: Fingerprint, previous: Plan | None, options: PlanOptions) -> Plan:
    """Decide all settings, keeping options of this run and of the previous plan.

    Raises: UsageError when the memory limit cannot be met.
    """
    overrides = previous.overrides if previous is not None else ()
    kept = previous.geometry.slice_axis if previous is not None and AXIS_KEY in overrides else None
    axis = options.axis or kept
    network = options.network or (previous.network.size if previous else None)
    if axis is None or axis == "auto":
        plan = decide(fingerprint, network)
    else:
        plan = decide(fingerprint, network, axis=requested_axis(fingerprint, axis), overrides=(AXIS_KEY,))
    settings = {}
    if previous is not None:
        settings = {key.removeprefix(TRAINING): flatten_plan(previous)[key] for key in overrides if key.startswith(TRAINING)}
    if options.minutes is not None:
        settings["minutes"] = options.minutes or None
    if options.max_memory_gb is not None:
        settings["clip_slices"] = _clip_that_fits(plan, fingerprint, options.max_memory_gb) if options.max_memory_gb else None
    return override_training(plan, {name: value for name, value in settings.items() if value is not None})


def _clip_that_fits(plan: Plan, fingerprint: Fingerprint, max_memory_gb: float) -> int:
    """Find the longest training clips within a memory limit.

    Raises: UsageError when there are none, or the network's memory cannot be estimated.
    """
    if (longest := longest_clip(plan, fingerprint, int(max_memory_gb * 1e9))) is not None:
        return longest
    needed = estimate_finetuning(override_training(plan, {"clip_slices": 2}), fingerprint, 1)
    if needed is None:
        raise UsageError(f"--max-memory: no estimate for network {plan.network.size}. Set training.clip_slices in plan.json instead")
    raise UsageError(f"--max-memory {max_memory_gb:g}: even clips of 2 slices need {math.ceil(needed.memory_bytes / 1e7) / 100:.2f} GB")


def _check_edits(final: Plan, decided: Plan, fingerprint: Fingerprint, options: PlanOptions) -> None:
    """Check that the manual edits of a plan do not conflict with an option.

    Raises: PlanError, with the key and its wanted value, when they do.
    """
    kept, fresh = flatten_plan(final), flatten_plan(decided)
    wanted = {"network.size": options.network, AXIS_KEY: options.axis, f"{TRAINING}minutes": options.minutes}
    conflicts = [key for key, value in wanted.items() if value is not None and kept[key] != fresh[key]]
    needed = estimate_finetuning(final, fingerprint, 1) if options.max_memory_gb else None
    if needed is not None and options.max_memory_gb and needed.memory_bytes > options.max_memory_gb * 1e9:
        conflicts.append(f"{TRAINING}clip_slices")
    if conflicts:
        key = conflicts[0]
        raise PlanError(
            f"plan.json has a manual edit of {key} that conflicts with this option. Set it to {fresh[key]} in plan.json, or use --overwrite"
        )


def _tables(final: Plan, fingerprint: Fingerprint) -> PlanTables:
    """Collect all tables about a plan; measures the speed of this machine for the estimates."""
    geometry, size = final.geometry, final.network.size
    warnings = list(dataset_warnings(fingerprint))
    if thin := resolution_warning(fingerprint, geometry.slice_axis, size, geometry.input_size, geometry.roi_scale):
        warnings.insert(0, thin)
    if final.modality == UNKNOWN:
        reason = final.reasons.get("modality", "unknown modality")
        names = ", ".join(MODALITY_NAMES)
        warnings.insert(0, f"{reason}. To set the modality, name the channel in dataset.json after it ({names}) and run slmsam2 plan again")
    return PlanTables(
        settings=_setting_rows(final),
        measurements=_measurement_rows(fingerprint.cases),
        labels=_label_measurement_rows(fingerprint),
        advice=tuple(
            (f"{advice.label} {advice.name}", advice.describe(geometry.slice_axis))
            for advice in annotation_advice(fingerprint, geometry.slice_axis)
        ),
        estimates=_estimate_rows(final, fingerprint),
        warnings=tuple(warnings),
    )


def _estimate_rows(final: Plan, fingerprint: Fingerprint) -> Rows:
    """Estimate the runs that usually follow; none for unsupported networks, no times where the speed cannot be measured."""
    if final.network.size != SUPPORTED_SIZE:
        return ()
    (speed, workers), count = _measure_speed(final), len(fingerprint.cases)
    estimates = {f"finetune -n {n}": estimate_finetuning(final, fingerprint, n, speed, workers) for n in sorted({1, min(5, count)})}
    estimates[f"predict {count} volume{'s' if count != 1 else ''}"] = estimate_prediction(final, fingerprint.cases, speed, workers)
    return tuple((name, *format_estimate(estimate)) for name, estimate in estimates.items() if estimate is not None)


def _measure_speed(final: Plan) -> tuple[float | None, int]:
    """Measure the seconds per slice on this machine; None, with a line of verbose output, where that fails. Also count the workers."""
    try:
        from slmsam2_cli.model.speed import seconds_per_slice  # torch takes seconds to load, and a comparison needs none

        device = choose_device()
        seconds = seconds_per_slice(final.network, REFERENCE_INPUT_SIZE, device)
    except Exception as error:  # noqa: BLE001 - the plan is written; nothing about an estimate may make the run fail
        console.detail(f"could not estimate run time: {error or type(error).__name__}")
        console.trace(error)
        return None, 1
    console.detail(f"{1000 * seconds:.0f} ms per slice on {describe(device)}")
    return seconds, available_cpus() if needs_one_thread(final.network.size, device) else 1


def _measurement_rows(cases: tuple[CaseFingerprint, ...]) -> Rows:
    """Return sizes, spacings and intensities over the cases, one row each."""
    values = {f"slices along {axis}": [float(case.shape[index]) for case in cases] for index, axis in enumerate(AXES)}
    values |= {f"spacing along {axis} (mm)": [case.spacing_mm[index] for case in cases] for index, axis in enumerate(AXES)}
    for channel in range(len(cases[0].channels)):
        measured = [whole for case in cases if (whole := case.channels[channel].whole)]
        if measured:
            values |= {f"channel {channel}: {name}": [getattr(whole, name) for whole in measured] for name in ("min", "median", "max")}
    return tuple((name, f"{min(found):.4g}", f"{median(found):.4g}", f"{max(found):.4g}") for name, found in values.items())


def _label_measurement_rows(fingerprint: Fingerprint) -> Rows:
    """Return one row per label: number of cases, median size and number of slices, Dice of the middle slice copied to all slices."""
    rows = []
    for value, name in fingerprint.labels.items():
        found = [case.labels[value] for case in fingerprint.cases if value in case.labels]
        sizes = [f"{median(label.voxels for label in found):.0f}"] if found else ["-"]
        spans = [f"{median(label.extents[axis].slices for label in found):.0f}" if found else "-" for axis in AXES]
        copies = [[label.copied[axis] for label in found if axis in label.copied] for axis in AXES]
        scores = [f"{median(scores):.3f}" if scores else "-" for scores in copies]
        rows.append((f"{value} {name}", f"{len(found)} of {len(fingerprint.cases)}", *sizes, *spans, *scores))
    return tuple(rows)


def _setting_rows(final: Plan) -> Rows:
    """Return one row per reason: the key, its value or the values of its group, the reason."""
    values, rows = flatten_plan(final), []
    for key, reason in final.reasons.items():
        of_key = {name.removeprefix(f"{key}."): value for name, value in values.items() if name == key or name.startswith(f"{key}.")}
        text = ", ".join(str(value) if name == key else f"{name} {value}" for name, value in of_key.items() if value is not None)
        if key == "intensity":
            text = "; ".join(f"{channel.name}: {channel.scheme} {channel.lower:g} to {channel.upper:g}" for channel in final.intensity)
        rows.append((key, text or "-", reason))
    return tuple(rows)


def _write_page(path: Path, data: Dataset, fingerprint: Fingerprint, final: Plan, tables: PlanTables) -> None:
    """Write plan.html: the tables of the terminal, and pictures of the cases."""
    notes = PlanNotes(
        settings=tables.settings,
        warnings=(*_case_warnings(fingerprint), *tables.warnings),
        advice=tables.advice,
        estimates=tuple((command, memory) for command, _, memory in tables.estimates),  # times differ from run to run
        measured=(Table("Dataset", MEASUREMENT_COLUMNS, tables.measurements), Table("Labels", LABEL_COLUMNS, tables.labels)),
    )
    try:
        with console.progress("Drawing cases", shown_cases(data)) as advance:
            write_plan_page(path, data, fingerprint, final, notes, advance)
        console.say(f"wrote {path}: every case as the network will see it")
    except Exception as error:  # noqa: BLE001 - the plan is written; nothing about a page may make the run fail
        console.warn(f"could not write {path.name}: {error or type(error).__name__}")
        console.trace(error)


def _show(name: str, tables: PlanTables, final: Plan) -> None:
    """Print the tables and warnings."""
    console.table(f"{name}: dataset", MEASUREMENT_COLUMNS, tables.measurements)
    console.table("Labels", LABEL_COLUMNS, tables.labels)
    console.table("Plan", ["setting", "value", "reason"], tables.settings)
    console.table("Slices to annotate per volume", ["label", f"slices along {final.geometry.slice_axis}"], tables.advice)
    if tables.estimates:
        console.table("Estimated time and memory", ESTIMATE_COLUMNS, tables.estimates)
    for line in tables.warnings:
        console.warn(line)
