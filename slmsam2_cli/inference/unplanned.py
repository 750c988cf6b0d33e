"""A plan for images that nobody planned for: measured on these images, where they carry prompts.

The first prediction of a folder of scans should need no data set. What a plan decides can be seen in the images and in what was
painted on them, the slice axis too: it is the one along which the paint lies on few slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.cases import Case, Dataset
from slmsam2_cli.data.check import count_values
from slmsam2_cli.data.geometry import AXES, SliceAxis
from slmsam2_cli.data.volume import read_labels
from slmsam2_cli.errors import CaseError, DatasetError, SlmSam2Error
from slmsam2_cli.inference.folder import PromptSource
from slmsam2_cli.planning.decision import Decision
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.network import NetworkPlan
from slmsam2_cli.planning.passes import AS_STORED, LEAST_PATIENCE
from slmsam2_cli.planning.plan import Plan, read_plan, signed, write_plan
from slmsam2_cli.planning.rules import decide

MOST_MEASURED = 20  # images; more would not change a decision
FILE = "plan.json"


def plan_for(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan, masks: Path, anew: bool = False) -> Plan:
    """The plan by which an earlier run into the folder `masks` went, or, `anew`, one measured on these cases, written there.

    DatasetError when no case can be measured, PlanError for a plan that cannot be read, OutputError.
    """
    if (masks / FILE).exists() and not anew:
        console.say(f"plan: {masks / FILE}, as before (--overwrite plans anew)")
        return read_plan(masks / FILE)
    prompted = [replace(case, label=file) for case in cases if (file := prompts.file(case)) is not None][:MOST_MEASURED]
    plan = _decided(prompted, prompts, network)
    write_plan(masks / FILE, plan)
    console.say(f"planned on {len(prompted)} of these images: {plan.modality}, slices along {plan.geometry.slice_axis}: {masks / FILE}")
    return plan


def _decided(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan) -> Plan:
    problems: list[CaseError] = []
    labels = _labels(cases, prompts.folder, problems)
    if not labels:
        why = f"{prompts.folder}: no image has a painted mask of its own name, so nothing can be planned"
        raise DatasetError(f"{why}. Save each mask under its image's name", tuple(problems))
    channels = tuple(f"channel {i}" if i else "image" for i in range(len(cases[0].images)))
    data = Dataset(prompts.folder, prompts.folder.resolve().name, channels, labels, None, ".nii.gz", tuple(cases), (), (), ())
    with console.progress("measuring", len(cases)) as advance:
        fingerprint, found = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{prompts.folder}: none of the {len(found)} prompted images can be measured", found)
    painted = None if prompts.simulated else _painted_axis(fingerprint, cases, prompts.folder)
    plan = decide(fingerprint, network.size, axis=painted)
    if not prompts.simulated:  # a slice or two tell nothing of how long structures are, and of gaps in them
        plan = plan.model_copy(
            update={
                "geometry": plan.geometry.model_copy(update={"through_plane_mm": None}),
                "inference": plan.inference.model_copy(update={"patience": LEAST_PATIENCE}),
                "reasons": plan.reasons | {"geometry.through_plane_mm": AS_STORED, "inference": "as where labels have no gaps"},
            }
        )
    return signed(plan.model_copy(update={"network": network}))


def _labels(cases: Sequence[Case], root: Path, problems: list[CaseError]) -> dict[int, str]:
    """The values that occur in any of the masks; masks that cannot be read are problems."""
    values: set[int] = set()
    for case in cases:
        assert case.label is not None
        try:
            values |= set(count_values(read_labels(case.label, case=case.id, root=root).voxels)) - {0}
        except CaseError as problem:
            problems.append(problem)
    return {value: f"label {value}" for value in sorted(values)}


def _painted_axis(fingerprint: Fingerprint, cases: Sequence[Case], folder: Path) -> Decision[SliceAxis] | None:
    """The axis that a list of slices names, else the one along which the paint lies on the fewest slices; None when that is a tie."""
    listed = {axis for case in cases if (axis := _listed_axis(folder / f"{case.id}.prompts.json")) is not None}
    if len(listed) == 1:
        (axis,) = listed
        return Decision(axis, "named by the lists of annotated slices")
    extents = [label.extents for case in fingerprint.cases for label in case.labels.values()]
    slices = np.array([[extent[axis].slices for axis in AXES] for extent in extents]).sum(axis=0)
    fewest = [axis for axis, count in zip(AXES, slices.tolist()) if count == slices.min()]
    return Decision(fewest[0], f"the paint lies on {slices.min()} slices along it, on more along the others") if len(fewest) == 1 else None


def _listed_axis(path: Path) -> SliceAxis | None:
    """What CASE.prompts.json says of the axis; None when it says nothing that can be used, which is an error where it is read."""
    if not path.exists():
        return None
    try:
        value = store.read_json(path, "list of annotated slices")
    except SlmSam2Error:
        return None
    said = value.get("axis") if isinstance(value, dict) else None
    return next((axis for axis in AXES if axis == said), None)
