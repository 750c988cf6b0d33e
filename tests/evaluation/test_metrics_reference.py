"""Values on which independent tools agree, from the shared folder next to the repository."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slmsam2_cli.evaluation.metrics import Pair, measure
from slmsam2_cli.evaluation.surface import distance_measures

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "metrics"
pytestmark = pytest.mark.skipif(not (FOLDER / "reference.json").is_file(), reason="the shared reference values are not here")

NAMES = {
    "overlap": {name: name for name in ("volume_similarity", "ref_ml", "pred_ml", "precision", "recall")} | {"dice": "Dice", "iou": "IoU"},
    "slice": {
        name: name for name in ("slice_f1", "over_rate", "under_rate", "over_extent_mm", "over_voxel_fraction", "slice_tp", "slice_tn")
    }
    | {"slice_fp": "over_slices", "slice_fn": "under_slices"},
    "voxel": {"dice": "Dice", "hd95": "HD95", "nsd@1": "nsd@1", "nsd@2": "nsd@2", "nsd@3": "nsd@3"}
    | {name: f"{name}_mm" for name in ("hd", "hd95_pooled", "assd", "masd")},
}


@lru_cache
def reference():
    return json.loads((FOLDER / "reference.json").read_text()) if FOLDER.is_dir() else {"cases": {}}


def values():
    """(case, family, name, value or None) of the three families we define."""
    for case, content in reference()["cases"].items():
        for family, names in NAMES.items():
            for name, value in content["labels"]["1"][family].items():
                if name in names and not (isinstance(value, dict) and "value" not in value):
                    known = value["value"] if isinstance(value, dict) else value
                    yield case, family, names[name], None if known == "nan" else known


@pytest.fixture(scope="module")
def scores():
    found = {}
    for case in reference()["cases"]:
        images = [sitk.ReadImage(str(FOLDER / side / f"{case}.nii.gz")) for side in ("ref", "pred")]
        pair = Pair.of(*map(sitk.GetArrayFromImage, images), images[0].GetSpacing()[::-1])
        counts, record = pair.counts(), measure(pair).all
        both, neither = (counts.reference > 0) & (counts.prediction > 0), (counts.reference == 0) & (counts.prediction == 0)
        record |= {"slice_tp": int(np.count_nonzero(both)), "slice_tn": int(np.count_nonzero(neither))}
        found[case] = record | (distance_measures(pair.distances(), (1, 2, 3)) if record["hd_mm"] is not None else {})
    return found


@pytest.mark.parametrize(("case", "family", "name", "value"), list(values()))
def test_a_value_agrees_with_independent_tools(scores, case, family, name, value):
    tolerance = reference()["tolerance"]["mm" if name.endswith("_mm") or name == "HD95" else "ratio"]
    assert scores[case][name] == (None if value is None else pytest.approx(value, abs=tolerance))


def test_all_332_reference_values_are_tested():
    assert len(list(values())) == 332
