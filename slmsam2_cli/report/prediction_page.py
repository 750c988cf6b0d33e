"""Make the report of a folder of predicted masks, without reference: MASKS/report.html from MASKS/manifest.json and the masks.

It shows volumes, confidence and flags, so that the user knows which cases to check. Cases are sorted by gross outliers, then by the number
of flags, then by doubt (the highest of 1 - mean confidence and mean disagreement over all structures), then by name. A report that cannot
be made is a warning and never an error: the masks are complete without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slmsam2_cli import console
from slmsam2_cli.dataset.intensity import ChannelIntensityLike
from slmsam2_cli.inference.manifest import MANIFEST, ManifestCase
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import open_regular
from slmsam2_cli.report import prediction_qc as qc
from slmsam2_cli.report.case_files import CaseFiles, Window, load_case
from slmsam2_cli.report.case_images import PageOutput, Thumbnails, WriteVolumes, add_thumbnails
from slmsam2_cli.report.flags import prefix_names
from slmsam2_cli.report.prediction_qc import Cohort, StructureStats
from slmsam2_cli.report.render import NAME, write_report
from slmsam2_cli.report.schema import CaseReport, Report, SliceMark, Structure

Json = Mapping[str, Any]
UNCALIBRATED = "uncalibrated: use it to rank cases for review, not as a quality estimate"
CALIBRATED = "calibrated: the expected Dice of a slice"
PARTLY = "calibrated for some cases only; do not compare it between cases"
_CONFIDENCE = "object score probability times predicted IoU, mean over unprompted slices with the structure"
_LOCK_FILE = ".slmsam2-report.lock"
_DIGEST = "digest of the manifest's cases"
COLUMNS = (
    ("volume_ml", "Volume ml", 2, ""),
    ("confidence", "Confidence", 3, "high"),
    ("confidence_lowest", "Lowest confidence", 3, "high"),
    ("disagreement", "Disagreement", 3, "low"),
    ("slices", "Slices", 0, ""),
)
DEFINITIONS = (
    ("volume_ml", "voxels of the structure times the volume of a voxel"),
    ("confidence", _CONFIDENCE),
    ("confidence_lowest", "the lowest confidence of these slices"),
    ("disagreement", "1 - Dice of the masks of the forward and the backward pass, mean over slices between two annotated slices"),
    (
        "unusual volume",
        f"robust z of log volume, 0.6745 (log v - median) / MAD, beyond {qc.OUTLIER_Z:g}, of at least {qc.OUTLIER_CASES} cases",
    ),
    ("separate parts", f"connected components of at least {100 * qc.PART:g} % of the structure, more than is usual among the cases"),
    (
        "end of the volume",
        f"at least {100 * qc.OPEN_END:g} % of the largest slice's area there, where that is not usual among the cases",
    ),
    (
        "area jump",
        f"more than {qc.JUMP:g} times the adjacent area, and by more than {100 * qc.JUMP_SHARE:g} % of the structure's largest slice",
    ),
    (
        "order of cases",
        f"first cases with a missing structure or a volume beyond a robust z of {qc.GROSS_Z:g}, then by the number of flags, "
        "then by 1 - mean confidence or mean disagreement, whichever is more",
    ),
)


@dataclass(frozen=True)
class _Measured:
    """One mask. found: by label value; slices: of the volume."""

    found: Mapping[int, StructureStats]
    slices: int
    slice_mm: float


def prediction_report(
    manifest: Json, files: Mapping[str, CaseFiles], output: PageOutput | None = None, facts: Sequence[tuple[str, str]] = ()
) -> Report:
    """Make the page of a folder of masks.

    manifest: as predict writes it; files: case -> its mask, and its images where known; facts: further provenance. Every mask is read
    twice, once to measure all of them and once to draw it; output.advance is called each time.
    """
    output = output or PageOutput()
    entries = {case: ManifestCase.model_validate(entry) for case, entry in manifest["cases"].items()}
    masks: dict[str, _Measured | None] = {}
    for case in entries:
        loaded = load_case(case, replace(files[case], images=())) if case in files else None
        readable = loaded if loaded is not None and loaded.prediction is not None else None
        masks[case] = None if readable is None else _Measured(qc.measure(readable), readable.slice_count, readable.slice_mm)
        output.advance()
    cohorts = _cohorts(entries, masks)
    labels = {int(value): str(name) for value, name in manifest.get("labels", {}).items()}
    names = {value: labels.get(value) or f"label {value}" for value in cohorts}
    cases = [_case(case, entry, masks[case], names) for case, entry in entries.items()]
    usually_low = _usually_low_confidence(cases)
    cases = [_add_flags(case, entries[case.id], masks[case.id], cohorts, usually_low) for case in cases]
    measured = {case: mask for case, mask in masks.items() if mask is not None}
    gross = {case for case, mask in measured.items() if any(qc.is_gross_outlier(mask.found.get(v), c) for v, c in cohorts.items())}
    flagged = {
        case: {k: words for value, found in mask.found.items() for k, words in qc.flagged_slices(found, cohorts[value]).items()}
        for case, mask in measured.items()
    }
    ordered = sorted(cases, key=lambda case: (case.status != "failed", case.id not in gross, -len(case.flags), -_doubt(case), case.id))
    thumbnails = add_thumbnails(ordered, files, lambda case, drawing: case, output, flagged=flagged)
    return _report(manifest, names, thumbnails, facts)


def _cohorts(entries: Mapping[str, ManifestCase], masks: Mapping[str, _Measured | None]) -> dict[int, Cohort]:
    """Summarise each label that is annotated or predicted in any case, in ascending order."""
    annotated = {value for entry in entries.values() for value, slices in entry.annotated_slices.items() if slices}
    values = sorted(annotated | {value for mask in masks.values() if mask for value in mask.found})
    found = {value: [mask.found[value] for mask in masks.values() if mask and value in mask.found] for value in values}
    return {value: Cohort.of(stats, value in annotated) for value, stats in found.items()}


def _case(case: str, entry: ManifestCase, mask: _Measured | None, names: Mapping[int, str]) -> CaseReport:
    """Collect the measures and slices of a case. names: label value -> name of the structures on the page."""
    group = "training" if entry.training else "held_out"
    if mask is None:
        return CaseReport(case, group, "failed", problem="the mask cannot be read. Run slmsam2 predict again")
    structures = []
    for value, name in names.items():
        found, annotated = mask.found.get(value), entry.annotated_slices.get(value, ())
        areas = found.areas if found is not None else {}
        confidence, disagreement = entry.confidence.get(value, {}), entry.disagreement.get(value, {})
        marks = []
        for k in sorted({*areas, *annotated, *(k for k, share in disagreement.items() if share > 0)}):
            if k < mask.slices:
                distance = min((k - other for other in annotated), key=lambda d: (abs(d), -d), default=None)
                mark = SliceMark(k, areas.get(k, 0), prompted=k in annotated, distance=distance)
                marks.append(replace(mark, confidence=confidence.get(k), disagreement=disagreement.get(k)))
        unprompted = [share for k, share in confidence.items() if k in areas and k not in annotated]
        measures = {
            "volume_ml": found.volume_ml if found is not None else 0.0,
            "confidence": _mean(unprompted),
            "confidence_lowest": min(unprompted, default=None),
            "disagreement": _mean(list(disagreement.values())),
            "slices": len(areas),
        }
        status = "ok" if areas else "pred_empty"
        structures.append(Structure(str(value), name, status, measures, slices=tuple(marks), slice_count=mask.slices))
    return CaseReport(case, group, "ok", tuple(structures), slice_mm=mask.slice_mm)


def _add_flags(
    case: CaseReport, entry: ManifestCase, mask: _Measured | None, cohorts: Mapping[int, Cohort], usually_low: Mapping[str, str]
) -> CaseReport:
    """Flag what is unusual about a case compared with all cases."""
    if mask is None:
        return case
    flags = []
    for s, (value, cohort) in zip(case.structures, cohorts.items(), strict=True):
        doubts = qc.confidence_flags(s.measures.get("confidence"), entry.disagreement.get(value, {}), s.key in usually_low)
        flags.append([*qc.structure_flags(mask.found.get(value), cohort), *doubts])
    return replace(case, flags=tuple(prefix_names(case.structures, flags)))


def _usually_low_confidence(cases: Sequence[CaseReport]) -> dict[str, str]:
    """Find structures with low confidence in at least half of enough cases: key -> a warning, shown once in place of a flag per case."""
    confidences: dict[tuple[str, str], list[float]] = {}
    for s in (s for case in cases for s in case.structures):
        if (confidence := s.measures.get("confidence")) is not None:
            confidences.setdefault((s.key, s.name), []).append(confidence)
    warnings = {}
    for (key, name), found in confidences.items():
        low = sum(confidence < qc.CONFIDENCE for confidence in found)
        if len(found) >= qc.OUTLIER_CASES and 2 * low >= len(found):
            fraction = f"{low} of {len(found)} cases"
            warnings[key] = f"{name}: mean confidence is below {qc.CONFIDENCE:g} in {fraction}, so that low confidence alone is not flagged"
    return warnings


def _doubt(case: CaseReport) -> float:
    """Return the highest of 1 - mean confidence and mean disagreement over the structures; 0 when nothing is known."""
    doubts = [0.0]
    for s in case.structures:
        confidence = s.measures.get("confidence")
        doubts += [1 - confidence if confidence is not None else 0.0, s.measures.get("disagreement") or 0.0]
    return max(doubts)


def _report(manifest: Json, names: Mapping[int, str], thumbnails: Thumbnails, facts: Sequence[tuple[str, str]]) -> Report:
    cases, meaning = thumbnails.cases, _confidence_meaning(manifest)
    mean = _mean([c for case in cases for s in case.structures if (c := s.measures.get("confidence")) is not None])
    flagged = sum(bool(case.flags) for case in cases)
    model, version = manifest.get("model") or {}, manifest.get("tool_version")
    provenance = [("predicted with", version and f"slmsam2 {version}"), ("model", model.get("name"))]
    provenance += [*((key, model.get(key)) for key in ("weights_digest", "plan_digest")), ("prompts", manifest.get("prompts"))]
    return Report(
        kind="prediction",
        title=f"Masks of {len(cases)} case{'s' * (len(cases) != 1)}",
        headline=(
            ("Cases", str(len(cases)), "masks that slmsam2 predict wrote to this folder"),
            ("Mean confidence", "-" if mean is None else f"{mean:.3f}", meaning),
            ("Flagged", str(flagged), "cases flagged for review, listed first" if flagged else "no case flagged"),
        ),
        cases=cases,
        structures={str(value): name for value, name in names.items()},
        columns=COLUMNS,
        worst=thumbnails.worst,
        facts=(*((name, str(value)) for name, value in provenance if value), *facts),
        definitions=tuple((key, f"{text}; {meaning}" if text == _CONFIDENCE else text) for key, text in DEFINITIONS),
        warnings=(*map(str, manifest.get("warnings", ())), *_usually_low_confidence(cases).values()),
    )


def _confidence_meaning(manifest: Json) -> str:
    """Describe what confidence means, from the cases' `calibrated` and the calibration's note on its slices."""
    calibrated = {bool(entry.get("calibrated")) for entry in manifest.get("cases", {}).values()}
    if len(calibrated) > 1:
        return PARTLY
    table = manifest.get("calibration") or {}
    note = str(table.get("note") or "") if isinstance(table, dict) else ""
    return (f"{CALIBRATED}; {note}" if note else CALIBRATED) if calibrated == {True} else UNCALIBRATED


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def write_prediction_report(
    masks: Path, images: Mapping[str, tuple[Path, ...]], intensity: ChannelIntensityLike | None = None, force: bool = True
) -> None:
    """Write the page of all masks in the folder. images: case -> its files, where known; intensity: of the plan, for the CT window.

    Without `force`, an existing page of the same manifest is kept. Runs that share the folder wait for each other. Errors are warnings.
    """
    window = (intensity.lower, intensity.upper) if intensity is not None and intensity.scheme == "ct" else None
    try:
        with atomic.wait_for_lock(masks / _LOCK_FILE):
            manifest, page = atomic.read_json(masks / MANIFEST, "the predictions' manifest"), masks / NAME
            times_left_out = {case: {k: v for k, v in entry.items() if k != "seconds"} for case, entry in manifest["cases"].items()}
            digest = hashlib.sha256(json.dumps(times_left_out, sort_keys=True).encode()).hexdigest()
            current = False
            if page.exists() and not force:
                with open_regular(page) as file:
                    current = digest.encode() in file.read()
            if (manifest["cases"] or page.exists()) and not current:
                _write_page(masks, manifest, images, window, digest)
                console.say(f"wrote {page}: cases to check first")
    except Exception as error:  # noqa: BLE001 - the masks are complete; a report must not make the run fail
        console.warn(f"could not write {NAME}: {error or type(error).__name__}")
        console.trace(error)


def _write_page(masks: Path, manifest: dict[str, Any], images: Mapping[str, tuple[Path, ...]], window: Window | None, digest: str) -> None:
    files = {}
    for case, entry in manifest["cases"].items():
        name = entry["output"]
        mask = masks / name if Path(name).name == name else None  # a mask outside the folder is not read
        files[case] = CaseFiles(mask, images.get(case, ()), None, masks, entry.get("array_axis"), window=window)

    def make(write_volumes: WriteVolumes) -> Report:
        with console.progress("report", 2 * len(files)) as advance:
            return prediction_report(manifest, files, PageOutput(write_volumes, advance), [(_DIGEST, digest)])

    write_report(masks, make)
