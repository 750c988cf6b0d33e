"""Stage 1: dataset -> measurements and decisions.   Reads dataset.json, images, labels.   Writes fingerprint.json, plan.json,
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
from slmsam2_cli.device import choose_device, describe
from slmsam2_cli.errors import DONE, SOME_FAILED, DatasetError, OutputError, PlanError, UsageError
from slmsam2_cli.io.atomic import lock_folder
from slmsam2_cli.planning.advice import annotation_advice, dataset_warnings
from slmsam2_cli.planning.estimate import (
    KNOWN,
    REFERENCE_INPUT_SIZE,
    estimate_finetuning,
    estimate_prediction,
    format_estimate,
    longest_clip,
)
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint, write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.modality import NAMES, UNKNOWN
from slmsam2_cli.planning.plan import Plan, differences, flatten_plan, keep_edits, read_plan, write_plan
from slmsam2_cli.planning.resolution import resolution_warning
from slmsam2_cli.planning.rules import TRAINING, decide, override_training, requested_axis
from slmsam2_cli.report.plan_page import PlanNotes, steps, write_plan_page
from slmsam2_cli.report.schema import Table
from slmsam2_cli.workspace import Workspace

AxisName = Literal["auto"] | SliceAxis
AXIS_KEY: Final = "geometry.slice_axis"
Rows = tuple[tuple[str, str, str], ...]
COST_COLUMNS = ("run", "time", "memory")
MEASUREMENT_COLUMNS = ("what", "lowest", "median", "highest")
LABEL_COLUMNS = ("label", "cases", "voxels", *(f"slices {axis}" for axis in AXES), *(f"copy Dice {axis}" for axis in AXES))


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
    """Measure a data set, decide how to treat it, and say why. The exit code: 0, or 1 when some cases are unusable.

    network, axis, minutes and max_memory_gb, of fine-tuning, are kept when planning anew; axis "auto" and limits of 0 take them back.
    report: also draw plan.html.
    Raises DatasetError with all problems when no case is usable, PlanError for an edited plan that cannot be kept, OutputError.
    """
    data, wish = _read(dataset), Wish(network, axis, minutes, max_memory_gb)
    previous = read_plan(workspace.plan) if workspace.plan.exists() and not overwrite else None
    try:
        with lock_folder(workspace.root):
            fingerprint, failed = _measure(data)
            decided = _decide(fingerprint, previous, wish)
            settled = keep_edits(previous, decided)
            _check_edits(settled, decided, fingerprint, wish)
            write_fingerprint(workspace.fingerprint, fingerprint)
            write_plan(workspace.plan, settled)
            costs = _costs(settled, fingerprint)
            if report:
                _draw(workspace.plan_page, data, fingerprint, settled, costs)
            elif workspace.plan_page.exists():
                console.say(f"{workspace.plan_page.name} was left as it is, and may show an earlier plan")
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    _show(fingerprint, previous, settled, decided, costs)
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
    """Say in what the plan in a file differs from what would be decided now; nothing is written. The exit code as of `plan`.

    Raises DatasetError, PlanError when there is no such plan or it is not one.
    """
    if not path.exists():
        raise PlanError(f"no plan at {path} to compare with. Name a plan.json with --against, or run slmsam2 plan first")
    mine = read_plan(path)
    fingerprint, failed = _measure(_read(dataset))
    fresh = _decide(fingerprint, mine, Wish(network, axis, minutes, max_memory_gb))
    differing = differences(mine, fresh)
    rows = [[key, shown(before), shown(now), fresh.reasons.get(_reason_key_of(key, fresh), "-")] for key, before, now in differing]
    if mine.fingerprint_digest != fresh.fingerprint_digest:
        console.say(f"{path.name} rests on other measurements: the data have changed since, or it was made for other data")
    if rows:
        console.table(f"{path.name} against what would be decided now", ["decision", path.name, "now", "because"], rows)
    else:
        console.result(f"{path.name}: every decision is as it would be made now")
    return SOME_FAILED if failed else DONE


def _read(dataset: Path) -> Dataset:
    data = read_dataset(dataset)
    for warning in data.warnings:
        console.warn(warning)
    return data


@dataclass(frozen=True)
class Wish:
    """The options that decide; None: as the previous plan was asked, else as the data say."""

    network: str | None = None
    axis: AxisName | None = None
    minutes: float | None = None
    max_memory_gb: float | None = None


def _decide(fingerprint: Fingerprint, previous: Plan | None, wish: Wish) -> Plan:
    """Fresh decisions, with what was asked for, now or for the previous plan. UsageError where the memory is too little for any."""
    before = previous.overrides if previous is not None else ()
    axis = previous.geometry.slice_axis if previous is not None and wish.axis is None and AXIS_KEY in before else wish.axis
    network = wish.network or (previous.network.size if previous else None)
    if axis is None or axis == "auto":
        plan = decide(fingerprint, network)
    else:
        plan = decide(fingerprint, network, axis=requested_axis(fingerprint, axis), overrides=(AXIS_KEY,))
    settings = {key.removeprefix(TRAINING): flatten_plan(previous)[key] for key in before if key.startswith(TRAINING)} if previous else {}
    if wish.minutes is not None:
        settings["minutes"] = wish.minutes or None
    if wish.max_memory_gb is not None:
        settings["clip_slices"] = _clip_that_fits(plan, fingerprint, wish.max_memory_gb) if wish.max_memory_gb else None
    return override_training(plan, {name: value for name, value in settings.items() if value is not None})


def _clip_that_fits(plan: Plan, fingerprint: Fingerprint, max_memory_gb: float) -> int:
    """The longest clips that fine-tuning can learn from in so much memory."""
    if (longest := longest_clip(plan, fingerprint, int(max_memory_gb * 1e9))) is not None:
        return longest
    if plan.network.size != KNOWN:
        raise UsageError(f"--memory: what network {plan.network.size} needs is not known. Set training.clip_slices in plan.json yourself")
    need = estimate_finetuning(override_training(plan, {"clip_slices": 2}), fingerprint, 1)
    assert need is not None
    raise UsageError(f"--memory {max_memory_gb:g}: even clips of 2 slices need {math.ceil(need.memory_bytes / 1e7) / 100:.2f} GB")


def _check_edits(settled: Plan, decided: Plan, fingerprint: Fingerprint, wish: Wish) -> None:
    """PlanError where an edited plan is kept that says otherwise than an option."""
    kept, fresh = flatten_plan(settled), flatten_plan(decided)
    wanted = {"network.size": wish.network, AXIS_KEY: wish.axis, f"{TRAINING}minutes": wish.minutes}
    against = [key for key, value in wanted.items() if value is not None and kept[key] != fresh[key]]
    cost = estimate_finetuning(settled, fingerprint, 1) if wish.max_memory_gb else None
    if cost is not None and wish.max_memory_gb and cost.memory_bytes > wish.max_memory_gb * 1e9:
        against.append(f"{TRAINING}clip_slices")
    if against:
        key = against[0]
        raise PlanError(f"plan.json was edited by hand and keeps its {key}: set it to {fresh[key]} there, or add --overwrite")


def _reason_key_of(key: str, plan: Plan) -> str:
    """The key under which the plan gives the reason for a decision: its own, or that of the group it belongs to."""
    return next((name for name in plan.reasons if key == name or key.startswith(f"{name}.")), key)


def shown(value: object) -> str:
    """A decision's value in a table; "-" where there is none."""
    return "-" if value is None else str(value)


def _measure(data: Dataset) -> tuple[Fingerprint, bool]:
    """The fingerprint and whether some cases failed; says what is wrong with each."""
    with console.progress("measuring", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    for problem in problems:
        console.error(str(problem))
    for case in fingerprint.cases:
        for warning in case.warnings:
            console.warn(f"case {case.id}: {warning}")
    return fingerprint, bool(problems)


def _costs(settled: Plan, fingerprint: Fingerprint) -> Rows:
    """A row for each run that is likely to follow. Nothing where the network's needs are not known; no time where trying failed."""
    if settled.network.size != KNOWN:
        return ()
    pace, count = _measure_speed(settled), len(fingerprint.cases)
    runs = {f"finetune -n {n}": estimate_finetuning(settled, fingerprint, n, pace) for n in sorted({1, min(5, count)})}
    runs[f"predict {count} volume{'s' if count != 1 else ''}"] = estimate_prediction(settled, fingerprint.cases, pace)
    return tuple((name, *format_estimate(cost)) for name, cost in runs.items() if cost is not None)


def _measure_speed(settled: Plan) -> float | None:
    """Seconds a slice on this machine; None, and a line, where it could not be tried out."""
    try:
        from slmsam2_cli.model.speed import seconds_per_slice  # torch takes seconds to load, and a comparison needs none

        device = choose_device()
        pace = seconds_per_slice(settled.network, REFERENCE_INPUT_SIZE, device)
    except Exception as error:  # noqa: BLE001 - the plan is written; nothing about an estimate may make the run fail
        console.detail(f"times are not foretold: {error or type(error).__name__}")
        console.trace(error)
        return None
    console.detail(f"{1000 * pace:.0f} ms to encode and track a slice on {describe(device)}")
    return pace


def _draw(path: Path, data: Dataset, fingerprint: Fingerprint, settled: Plan, costs: Rows) -> None:
    """plan.html: what the terminal says, and pictures."""
    axis = settled.geometry.slice_axis
    measured = (
        Table("What was measured", MEASUREMENT_COLUMNS, tuple(tuple(row) for row in facts(fingerprint.cases))),
        Table("Labels", LABEL_COLUMNS, tuple(tuple(row) for row in label_measurement_rows(fingerprint))),
    )
    notes = PlanNotes(
        decisions=tuple((key, value, why) for key, value, why in decisions(settled)),
        warnings=(*(f"case {case.id}: {line}" for case in fingerprint.cases for line in case.warnings), *warnings_of(fingerprint, settled)),
        advice=tuple((f"{one.label} {one.name}", one.words(axis)) for one in annotation_advice(fingerprint, axis)),
        costs=tuple((run, memory) for run, _, memory in costs),  # not the time, which is another with every run
        measured=measured,
    )
    try:
        with console.progress("drawing", steps(data)) as advance:
            write_plan_page(path, data, fingerprint, settled, notes, advance)
        console.say(f"wrote {path}: every case as the network will see it")
    except Exception as error:  # noqa: BLE001 - the plan is written; nothing about a page may make the run fail
        console.warn(f"{path.name} could not be made: {error or type(error).__name__}")
        console.trace(error)


def _show(fingerprint: Fingerprint, previous: Plan | None, settled: Plan, decided: Plan, costs: Rows) -> None:
    """The facts and the decisions, as tables; then what differs from before."""
    console.table(f"{fingerprint.dataset_name}: what was measured", MEASUREMENT_COLUMNS, facts(fingerprint.cases))
    console.table("labels", LABEL_COLUMNS, label_measurement_rows(fingerprint))
    console.table("what was decided", ["decision", "value", "because"], decisions(settled))
    axis = settled.geometry.slice_axis
    console.table("what to annotate on a new volume", ["label", f"slices along {axis}"], advice_rows(fingerprint, axis))
    if costs:
        console.table("what runs take here, roughly", COST_COLUMNS, costs)
    for line in warnings_of(fingerprint, settled):
        console.warn(line)
    for key, mine, theirs in differences(settled, decided):
        console.warn(f"plan.json was edited by hand and is kept: {key} is {mine}; the tool would take {theirs} (--overwrite to do so)")
    if previous is not None and not previous.edited:
        for key, before, now in differences(previous, settled):
            console.say(f"changed since the last plan: {key} was {before}, now {now}")


def warnings_of(fingerprint: Fingerprint, settled: Plan) -> tuple[str, ...]:
    """What to look at before going on."""
    unsure = (
        f"{settled.reasons.get('modality', 'nothing tells the modality')}. If you know better, name the channel in dataset.json after it"
    )
    asked = (f"{unsure} ({', '.join(NAMES)}), and plan again",) if settled.modality == UNKNOWN else ()
    geometry, size = settled.geometry, settled.network.size
    thin = resolution_warning(fingerprint, geometry.slice_axis, size, geometry.input_size, geometry.roi_scale)
    return (*asked, *([thin] if thin else []), *dataset_warnings(fingerprint))


def facts(cases: tuple[CaseFingerprint, ...]) -> list[list[str]]:
    """Sizes, spacings and grey values over the cases: one row each."""

    def row(what: str, values: list[float]) -> list[str]:
        return [what, f"{min(values):.4g}", f"{median(values):.4g}", f"{max(values):.4g}"]

    rows = [row(f"slices along {axis}", [case.shape[index] for case in cases]) for index, axis in enumerate(AXES)]
    rows += [row(f"spacing along {axis} (mm)", [case.spacing_mm[index] for case in cases]) for index, axis in enumerate(AXES)]
    for channel in range(len(cases[0].channels)):
        seen = [whole for case in cases if (whole := case.channels[channel].whole)]
        if seen:
            rows += [row(f"channel {channel}: {name}", [getattr(whole, name) for whole in seen]) for name in ("min", "median", "max")]
    return rows


def label_measurement_rows(fingerprint: Fingerprint) -> list[list[str]]:
    """One row a label: in how many cases, its median size, and how well its middle slice copied to all slices would do."""
    rows = []
    for value, name in fingerprint.labels.items():
        found = [case.labels[value] for case in fingerprint.cases if value in case.labels]
        sizes = [f"{median(label.voxels for label in found):.0f}"] if found else ["-"]
        spans = [f"{median(label.extents[axis].slices for label in found):.0f}" if found else "-" for axis in AXES]
        copies = [[label.copied[axis] for label in found if axis in label.copied] for axis in AXES]
        scores = [f"{median(scores):.3f}" if scores else "-" for scores in copies]
        rows.append([f"{value} {name}", f"{len(found)} of {len(fingerprint.cases)}", *sizes, *spans, *scores])
    return rows


def advice_rows(fingerprint: Fingerprint, axis: SliceAxis) -> list[list[str]]:
    """One row a label: which slices to annotate."""
    return [[f"{one.label} {one.name}", one.words(axis)] for one in annotation_advice(fingerprint, axis)]


def decisions(settled: Plan) -> list[list[str]]:
    """One row a reason: the key, its value or values, why."""
    values = flatten_plan(settled)

    def value_of(key: str) -> str:
        if key == "intensity":
            return "; ".join(f"{channel.name}: {channel.scheme} {channel.lower:g} to {channel.upper:g}" for channel in settled.intensity)
        inside = {name.removeprefix(f"{key}."): value for name, value in values.items() if name == key or name.startswith(f"{key}.")}
        return ", ".join(str(value) if name == key else f"{name} {value}" for name, value in inside.items() if value is not None) or "-"

    return [[key, value_of(key), why] for key, why in settled.reasons.items()]
