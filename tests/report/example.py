"""Synthetic reports: a cohort whose numbers follow from one seed, with pictures and volumes small enough for a test."""

from __future__ import annotations

import base64
import gzip
import io

import nibabel as nib
import numpy as np
from PIL import Image

from slmsam2_cli.report.schema import CaseReport, CurvePoint, Kind, Picture, Report, SliceMark, Structure, Table, ViewerVolumes

SHAPE = (44, 44, 24)
COLUMNS = (
    ("Dice", "Dice", 3, "high"),
    ("HD95", "HD95 mm", 1, "low"),
    ("nsd@2", "NSD 2 mm", 3, "high"),
    ("volume_difference_ml", "ΔV ml", 1, ""),
)
UNCERTAIN = (("mean_confidence", "Confidence", 2, "high"), ("disagreement", "Disagreement", 2, "low"), ("pred_ml", "Volume ml", 1, ""))


def report(cases: int = 7, slices: int = 24, kind: Kind = "evaluation", name: str = "prostate_{:02d}", rich: bool = True) -> Report:
    """Two structures. rich: the first three ordinary cases have pictures and volumes; one failed, one missing and one training case."""
    rng = np.random.default_rng(4)
    made = [case(rng, name.format(i), slices, kind, rich and i < 3, "training" if rich and i == 4 else "held_out") for i in range(cases)]
    if rich and kind == "evaluation":
        made.append(CaseReport("prostate_lost", "held_out", "pred_missing", tuple(missing(key) for key in ("1", "2"))))
        made.append(
            CaseReport("prostate_odd", "held_out", "failed", problem="label is 24x44x44 but prediction is 24x44x40; export it again")
        )
    worst = tuple(picture for one in made for picture in one.pictures[:2])
    distances = [CurvePoint(d, max(1, 40 - 3 * d), 0.93 - 0.03 * d, 0.97 - 0.015 * d, 0.99 - 0.005 * d) for d in range(13)]
    return Report(
        kind=kind,
        title="Prostate MR, one annotated slice" if kind == "evaluation" else "Prediction: prostate MR",
        headline=(
            ("Dice, held-out cases", "0.912", "95 % interval 0.894 to 0.927; n 7"),
            ("HD95", "3.1 mm", "n 6 of 7"),
            ("Without annotated slices", "0.905", "Dice"),
            ("Cases", "9", "1 failed, 1 missing"),
        ),
        cases=tuple(made),
        structures={"1": "Peripheral zone", "2": "Transition zone"},
        columns=COLUMNS if kind == "evaluation" else UNCERTAIN,
        tables=(
            Table(
                "Means",
                ("Structure", "Dice", "HD95", "n"),
                (("Peripheral zone", "0.90", "3.4", "7"), ("Transition zone", "0.93", "2.8", "7")),
                "Held-out cases.",
            ),
        ),
        worst=worst,
        curve={"1": tuple(distances), "2": tuple(distances[:9])} if kind == "evaluation" else {},
        facts=(("tool", "slmsam2 0.1.0"), ("weights", "sha256 9f64993c")),
        definitions=(
            ("HD95", "the larger of the two directed 95th percentiles, in mm"),
            ("nsd@2", "share of both borders within 2 mm"),
            ("Dice", "2TP / (2TP + FP + FN)"),
        ),
        warnings=("prostate_03: reference and prediction differ in the header's units",) if kind == "evaluation" else (),
    )


def missing(key: str) -> Structure:
    return Structure(key, {"1": "Peripheral zone", "2": "Transition zone"}[key], "pred_missing", {"Dice": 0.0, "HD95": None})


def case(rng: np.random.Generator, case_id: str, slices: int, kind: Kind, rich: bool, group: str) -> CaseReport:
    structures = tuple(structure(rng, key, label, slices, kind) for key, label in (("1", "Peripheral zone"), ("2", "Transition zone")))
    return CaseReport(
        id=case_id,
        group=group,
        status="ok",
        structures=structures,
        flags=("predicted too far on slices 20-22; add an end mark",) if rich else (),
        slice_mm=3.0,
        pictures=tuple(picture(rng, case_id, k) for k in (17, 5, 11)) if rich else (),
        volumes=volumes(kind) if rich else None,
    )


def structure(rng: np.random.Generator, key: str, name: str, slices: int, kind: Kind) -> Structure:
    first, last, prompt = 2, slices - 3, slices // 2
    marks = tuple(mark(rng, k, first, last, prompt, kind) for k in range(first, last + 1))
    dice = [m.dice for m in marks if m.dice is not None]
    measures = {
        "Dice": float(np.mean(dice)) if dice else None,
        "HD95": float(rng.gamma(2, 2)),
        "nsd@2": float(rng.uniform(0.7, 1)),
        "volume_difference_ml": float(rng.normal(0, 3)),
    }
    doubts = {
        "mean_confidence": float(rng.uniform(0.6, 1)),
        "disagreement": float(rng.uniform(0, 0.3)),
        "pred_ml": float(rng.uniform(10, 40)),
    }
    unprompted = {**measures, "Dice": float(np.mean(dice)) - 0.01} if dice else {}
    return Structure(key, name, "ok", measures if kind == "evaluation" else doubts, unprompted, marks, slices)


def mark(rng: np.random.Generator, k: int, first: int, last: int, prompt: int, kind: Kind) -> SliceMark:
    size = int(500 * np.sin(np.pi * (k - first + 1) / (last - first + 2)))
    known = kind == "evaluation"
    false, missed = known and k >= last - 1, known and k <= first + 1
    dice = 0.0 if false or missed else max(0.05, 1 - 0.02 * abs(k - prompt) - float(rng.gamma(1, 0.05)))
    return SliceMark(
        slice=k,
        prediction_px=0 if missed else max(1, size + int(rng.integers(-20, 20))),
        reference_px=(0 if false else size) if known else None,
        dice=(1.0 if k == prompt else dice) if known else None,
        prompted=k == prompt,
        distance=k - prompt,
        confidence=float(np.clip(1 - 0.03 * abs(k - prompt) - rng.gamma(1, 0.02), 0, 1)),
        disagreement=float(rng.gamma(1, 0.05)) if k != prompt else None,
    )


def picture(rng: np.random.Generator, case_id: str, k: int) -> Picture:
    pixels = rng.integers(30, 120, (60, 72, 3)).astype(np.uint8)
    pixels[20:40, 20, :] = pixels[20:40, 48, :] = (86, 180, 233)
    pixels[22:42, 22, :] = pixels[22:42, 50, :] = (230, 159, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(case_id, k, uri, 216, 180, f"slice {k}, Peripheral zone: Dice 0.710")


def volumes(kind: Kind = "evaluation", axis: int = 2, first: int = 0, step: int = 1) -> ViewerVolumes:
    """A ball in noise, stored to the left and posterior (LPS) as most MR is; the prediction is the ball moved by two voxels."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    truth = ball(x, y, z, 22)
    image = np.random.default_rng(1).normal(200, 30, SHAPE) + 300 * (truth > 0)
    stack = ViewerVolumes(
        prediction=packed(ball(x, y, z, 24).astype(np.uint8)), image=packed(image.astype(np.int16)), axis=axis, first=first, step=step
    )
    return ViewerVolumes(**{**vars(stack), "reference": packed(truth.astype(np.uint8)) if kind == "evaluation" else None})


def ball(x: np.ndarray, y: np.ndarray, z: np.ndarray, middle: int) -> np.ndarray:
    inner = (x - middle) ** 2 + (y - 22) ** 2 + (2 * (z - 12)) ** 2 < 80
    outer = (x - middle) ** 2 + (y - 22) ** 2 + (2 * (z - 12)) ** 2 < 220
    return np.where(inner, 2, np.where(outer, 1, 0))


def packed(array: np.ndarray) -> str:
    """A gzipped NIfTI in base64."""
    file = nib.Nifti1Image(array, np.diag([-0.8, -0.8, 3.0, 1.0]))
    return base64.b64encode(gzip.compress(file.to_bytes(), mtime=0)).decode("ascii")
