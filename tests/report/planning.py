"""Write a dataset whose cases are a bright block in a dark box, and plan it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import nifti_bytes
from slmsam2_cli.io import atomic
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Decision
from slmsam2_cli.planning.rules import decide


def case_of(name, spacing=(3.0, 1.0, 1.0)):
    """Return an image (8, 20, 24) of value 100, with 300 where it is labelled, on slices 3 to 5. spacing: mm (z, y, x)."""
    labels = np.zeros((8, 20, 24), np.uint8)
    labels[3:6, 5:15, 6:18] = 1
    return SimpleNamespace(id=name, image=100.0 + 200 * labels, labels=labels, spacing=spacing)


def dataset(root, *cases, label="organ", modality="MRI"):
    """Write the cases; returns the dataset and its fingerprint."""
    for case in cases:
        atomic.write_bytes(root / "imagesTr" / f"{case.id}.nii.gz", nifti_bytes(case.image, case.spacing))
        atomic.write_bytes(root / "labelsTr" / f"{case.id}.nii.gz", nifti_bytes(case.labels, case.spacing))
    head = {"name": "Blocks", "modality": {"0": modality}, "labels": {"0": "background", "1": label}}
    entries = [{"image": f"./imagesTr/{case.id}.nii.gz", "label": f"./labelsTr/{case.id}.nii.gz"} for case in cases]
    atomic.write_json(root / "dataset.json", {**head, "tensorImageSize": "3D", "numTraining": len(cases), "training": entries, "test": []})
    data = read_dataset(root)
    return data, measure(data)[0]


def plan_of(fingerprint, axis=None):
    return decide(fingerprint, axis=Decision(axis, "") if axis else None)
