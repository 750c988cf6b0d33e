"""Stage 1: dataset -> measurements and decisions.   Reads dataset.json, images, labels.   Writes fingerprint.json, plan.json."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from slmsam2_cli import console
from slmsam2_cli.data.dataset import Dataset, read_dataset
from slmsam2_cli.data.geometry import AXES
from slmsam2_cli.data.store import one_writer
from slmsam2_cli.errors import DONE, SOME_FAILED, DatasetError, OutputError, PlanError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint, write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan, differences, leaves, read_plan, settle, write_plan
from slmsam2_cli.planning.rules import decide
from slmsam2_cli.workspace import Workspace

LABEL_COLUMNS = ["label", "cases", "voxels", *(f"slices {axis}" for axis in AXES), *(f"copy Dice {axis}" for axis in AXES)]


def plan(dataset: Path, workspace: Workspace, *, overwrite: bool = False, network: str | None = None) -> int:
    """Measure a data set, decide how to treat it, and say why. The exit code: 0, or 1 when some cases are unusable.

    Raises DatasetError with all problems when no case is usable, PlanError for an edited plan that cannot be kept, OutputError.
    """
    data = read_dataset(dataset)
    for warning in data.warnings:
        console.warn(warning)
    previous = read_plan(workspace.plan) if workspace.plan.exists() and not overwrite else None
    try:
        with one_writer(workspace.root):
            fingerprint, failed = _measure(data)
            decided = decide(fingerprint, network or (previous.network.size if previous else None))
            settled = settle(previous, decided)
            if network and settled.network.size != network:
                raise PlanError(f"plan.json was edited by hand and keeps its network: set network.size {network} there, or add --overwrite")
            write_fingerprint(workspace.fingerprint, fingerprint)
            write_plan(workspace.plan, settled)
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    _show(fingerprint, previous, settled, decided)
    return SOME_FAILED if failed else DONE


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


def _show(fingerprint: Fingerprint, previous: Plan | None, settled: Plan, decided: Plan) -> None:
    """The facts and the decisions, as tables; then what differs from before."""
    console.table(f"{fingerprint.dataset_name}: what was measured", ["what", "lowest", "median", "highest"], facts(fingerprint.cases))
    console.table("labels", LABEL_COLUMNS, label_facts(fingerprint))
    console.table("what was decided", ["decision", "value", "because"], decisions(settled))
    for key, mine, theirs in differences(settled, decided):
        console.warn(f"plan.json was edited by hand and is kept: {key} is {mine}; the tool would take {theirs} (--overwrite to do so)")
    if previous is not None and not previous.edited:
        for key, before, now in differences(previous, settled):
            console.say(f"changed since the last plan: {key} was {before}, now {now}")


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


def label_facts(fingerprint: Fingerprint) -> list[list[str]]:
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


def decisions(settled: Plan) -> list[list[str]]:
    """One row a reason: the key, its value or values, why."""
    values = leaves(settled)

    def value_of(key: str) -> str:
        if key == "intensity":
            return "; ".join(f"{channel.name}: {channel.scheme} {channel.lower:g} to {channel.upper:g}" for channel in settled.intensity)
        inside = {name.removeprefix(f"{key}."): value for name, value in values.items() if name == key or name.startswith(f"{key}.")}
        return ", ".join(str(value) if name == key else f"{name} {value}" for name, value in inside.items() if value is not None) or "-"

    return [[key, value_of(key), why] for key, why in settled.reasons.items()]
