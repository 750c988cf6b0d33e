"""Training runs that take seconds: phantoms with one labelled structure, and a network that sees few pixels of few slices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
from made_models import planned

from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.planning.plan import Plan, write_plan
from slmsam2_cli.workspace import Workspace

SHAPE = (8, 32, 32)


def write_organs(folder: Path, cases: int, test_cases: int = 0, shape: tuple[int, int, int] = SHAPE) -> Path:
    """Write phantoms of which the organ alone is labelled, label 1; returns `folder`."""
    write_phantom_dataset(folder, cases=cases, test_cases=test_cases, seed=3, shape=shape)
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"labels": {"0": "background", "1": "organ"}}))
    for path in (folder / "labelsTr").iterdir():
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image((np.asarray(label.dataobj) == 1).astype(np.uint8), label.affine, label.header), path)
    return folder


def small(plan: Plan, **training: object) -> Plan:
    """The same plan for an input of 32 pixels and clips of two slices, with these training settings."""
    return plan.model_copy(
        update={
            "geometry": plan.geometry.model_copy(update={"input_size": 32}),
            "training": plan.training.model_copy(update={"clip_slices": 2, **training}),
        }
    )


def small_workspace(root: Path, dataset: Path, **training: object) -> Workspace:
    """A workspace whose plan is `small`."""
    root.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(root)
    write_plan(workspace.plan, small(planned(dataset), **training))
    return workspace


def beside(workspace: Workspace, root: Path) -> Workspace:
    """A workspace with the same plan, fingerprint and prepared cases, in which nothing was trained."""
    root.mkdir(parents=True, exist_ok=True)
    for file in (workspace.plan, workspace.fingerprint):
        if file.exists():
            shutil.copy(file, root)
    if workspace.prepared.exists():
        shutil.copytree(workspace.prepared, root / workspace.prepared.name)
    return Workspace(root)
