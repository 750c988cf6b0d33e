"""Predictions without a truth as a report: volumes, the model's own doubt, and what is odd, so that a person knows where to look first.

Cases come with the most suspicious first: gross warnings, then by the number of flags, then by doubt (1 - mean confidence, or the mean
disagreement where that is more, of the worst structure), then by name.

The page of a folder of masks that predict wrote: MASKS/manifest.json and the masks in, MASKS/report.html out.

A page is an extra: whatever goes wrong with it is a warning, and the masks stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slmsam2_cli import console
from slmsam2_cli.dataset.intensity import ChannelIntensityLike
from slmsam2_cli.inference.manifest import ManifestCase
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import open_regular
from slmsam2_cli.report import prediction_qc as looking
from slmsam2_cli.report.case_files import LoadedCase, Sources, Window, load_case
from slmsam2_cli.report.case_images import Beside, Budget, Looks, add_thumbnails
from slmsam2_cli.report.flags import named
from slmsam2_cli.report.prediction_qc import Cohort, Found
from slmsam2_cli.report.render import NAME, write_report
from slmsam2_cli.report.schema import CaseReport, Report, SliceMark, Structure

Json = Mapping[str, Any]
UNCALIBRATED = "uncalibrated: it says where to look first, not how good a mask is"
CALIBRATED = "calibrated: the Dice to expect of a slice, by what was found in slices like it"
PARTLY = "calibrated for some cases only, so it cannot be compared between cases"
_CONFIDENCE = "object score probability times predicted IoU, mean over slices that hold the structure and were not given"
COLUMNS = (
    ("volume_ml", "Volume ml", 2, ""),
    ("confidence", "Confidence", 3, "high"),
    ("confidence_lowest", "Lowest", 3, "high"),
    ("disagreement", "Disagreement", 3, "low"),
    ("slices", "Slices", 0, ""),
)
DEFINITIONS = (
    ("volume_ml", "voxels of the structure times the volume of a voxel"),
    ("confidence", _CONFIDENCE),
    ("confidence_lowest", "the least sure of these slices"),
    ("disagreement", "1 - Dice of the masks of the forward and the backward pass, mean over slices between two given ones"),
    (
        "unusual volume",
        f"robust z of log volume, 0.6745 (log v - median) / MAD, beyond {looking.OUTLIER_Z:g}, of at least {looking.OUTLIER_CASES} cases",
    ),
    ("separate parts", f"pieces of at least {100 * looking.PART:g} % of the structure, more than is usual among the cases"),
    (
        "where the volume ends",
        f"at least {100 * looking.OPEN_END:g} % of the largest slice's area there, where that is not usual among the cases",
    ),
    (
        "area jumps",
        f"more than {looking.JUMP:g} times its neighbour, by more than {100 * looking.JUMP_SHARE:g} % of the structure's largest slice",
    ),
    (
        "order of cases",
        f"first those with an empty structure, or one whose volume is beyond a robust z of {looking.GROSS_Z:g}; then the number of flags, "
        "then by 1 - mean confidence or mean disagreement, whichever is more",
    ),
)


@dataclass(frozen=True)
class _Seen:
    """One mask, measured. slices: of the volume."""

    found: Mapping[int, Found]
    slices: int
    slice_mm: float


@dataclass(frozen=True)
class _Told:
    """What the manifest says. labels: value -> name; cases: id -> entry."""

    labels: Mapping[int, str]
    cases: Mapping[str, ManifestCase]
    rest: Json = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Json) -> _Told:
        labels = {int(value): str(name) for value, name in manifest.get("labels", {}).items()}
        return cls(labels, {case: ManifestCase.model_validate(entry) for case, entry in manifest["cases"].items()}, manifest)


def prediction_report(
    manifest: Json,
    sources: Mapping[str, Sources],
    *,
    facts: Sequence[tuple[str, str]] = (),
    beside: Beside | None = None,
    budget: Budget | None = None,
    advance: Callable[..., None] = lambda: None,
) -> Report:
    """The page of a folder of masks. manifest: as predict writes it; sources: case -> its mask, and its images where they are known.

    Every mask is read twice, one at a time: to measure all of them, then to show them. beside: see looks.py. advance: called twice a case.
    """
    told = _Told.of(manifest)
    seen: dict[str, _Seen | None] = {}
    for case in told.cases:
        seen[case] = _look(case, sources.get(case))
        advance()
    cohorts = _cohorts(told, seen)
    cases = _with_flags([_case(case, entry, seen[case], told, cohorts) for case, entry in told.cases.items()], told, seen, cohorts)
    gross = {case for case, one in seen.items() if one and any(looking.gross(one.found.get(v), c) for v, c in cohorts.items())}
    ordered = sorted(cases, key=lambda case: (case.status != "failed", case.id not in gross, *_order(case)))
    looks = add_thumbnails(ordered, sources, lambda case, opened: case, beside, advance, budget, odd=_odd(seen, cohorts))
    return _report(told, cohorts, looks, facts)


def _look(case: str, sources: Sources | None) -> _Seen | None:
    opened: LoadedCase | None = load_case(case, replace(sources, images=())) if sources is not None else None
    if opened is None or opened.prediction is None:
        return None
    return _Seen(looking.measure(opened), opened.slice_count, opened.slice_mm)


def _cohorts(told: _Told, seen: Mapping[str, _Seen | None]) -> dict[int, Cohort]:
    """By label, those that any case holds or was given, in ascending order."""
    held = {value: [one.found[value] for one in seen.values() if one and value in one.found] for value in _values(told, seen)}
    return {
        value: Cohort.of(found, any(entry.annotated_slices.get(value) for entry in told.cases.values())) for value, found in held.items()
    }


def _odd(seen: Mapping[str, _Seen | None], cohorts: Mapping[int, Cohort]) -> dict[str, dict[int, str]]:
    """Case -> slices on which something odd can be seen."""
    return {
        case: {k: words for value, found in one.found.items() for k, words in looking.flagged_slices(found, cohorts[value]).items()}
        for case, one in seen.items()
        if one
    }


def _values(told: _Told, seen: Mapping[str, _Seen | None]) -> list[int]:
    given = {value for entry in told.cases.values() for value, slices in entry.annotated_slices.items() if slices}
    return sorted(given | {value for one in seen.values() if one for value in one.found})


def _case(case: str, entry: ManifestCase, seen: _Seen | None, told: _Told, cohorts: Mapping[int, Cohort]) -> CaseReport:
    group = "training" if entry.training else "held_out"
    if seen is None:
        return CaseReport(case, group, "failed", problem="the mask cannot be read any more. Run slmsam2 predict again")
    structures = tuple(_structure(value, told.labels.get(value) or f"label {value}", entry, seen) for value in cohorts)
    return CaseReport(case, group, "ok", structures, slice_mm=seen.slice_mm)


def _with_flags(
    cases: Sequence[CaseReport], told: _Told, seen: Mapping[str, _Seen | None], cohorts: Mapping[int, Cohort]
) -> list[CaseReport]:
    """What is odd about each case, by what is usual among all."""
    unsure = _usually_low_confidence(cases)

    def flags(case: CaseReport, one: _Seen) -> list[str]:
        said = [
            [
                *looking.structure_flags(one.found.get(value), cohort),
                *looking.doubts(_number(s, "confidence"), told.cases[case.id].disagreement.get(value, {}), s.key in unsure),
            ]
            for s, (value, cohort) in zip(case.structures, cohorts.items(), strict=True)
        ]
        return named(case.structures, said)

    return [case if (one := seen[case.id]) is None else replace(case, flags=tuple(flags(case, one))) for case in cases]


def _usually_low_confidence(cases: Sequence[CaseReport]) -> dict[str, str]:
    """Key of each structure that the model is unsure of in most cases -> what to say about it once."""
    confidences: dict[tuple[str, str], list[float]] = {}
    for s in (s for case in cases for s in case.structures):
        if (confidence := _number(s, "confidence")) is not None:
            confidences.setdefault((s.key, s.name), []).append(confidence)
    return {
        key: f"{name}: mean confidence is below {looking.CONFIDENCE:g} in {low} of {len(found)} cases, so that alone is not flagged"
        for (key, name), found in confidences.items()
        if (low := looking.unsure(found))
    }


def _structure(value: int, name: str, entry: ManifestCase, seen: _Seen) -> Structure:
    found, given = seen.found.get(value), entry.annotated_slices.get(value, ())
    areas = found.areas if found is not None else {}
    confidence, disagreement = entry.confidence.get(value, {}), entry.disagreement.get(value, {})
    worth = sorted({*areas, *given, *(k for k, share in disagreement.items() if share > 0)})
    marks = tuple(_mark(k, areas.get(k, 0), given, confidence.get(k), disagreement.get(k)) for k in worth if k < seen.slices)
    sure = [share for k, share in confidence.items() if k in areas and k not in given]
    measures = {
        "volume_ml": found.volume_ml if found is not None else 0.0,
        "confidence": _mean(sure),
        "confidence_lowest": min(sure, default=None),
        "disagreement": _mean(list(disagreement.values())),
        "slices": len(areas),
    }
    return Structure(str(value), name, "ok" if areas else "pred_empty", measures, slices=marks, slice_count=seen.slices)


def _mark(k: int, pixels: int, given: Sequence[int], confidence: float | None, disagreement: float | None) -> SliceMark:
    away = min((k - g for g in given), key=lambda d: (abs(d), -d), default=None)
    return SliceMark(k, pixels, prompted=k in given, distance=away, confidence=confidence, disagreement=disagreement)


def _order(case: CaseReport) -> tuple[int, float, str]:
    """By the number of flags, then by doubt, then by name."""
    doubt = [
        max(1 - (confidence if confidence is not None else 1.0), _number(s, "disagreement") or 0.0)
        for s in case.structures
        for confidence in [_number(s, "confidence")]
    ]
    return -len(case.flags), -max(doubt, default=0.0), case.id


def _report(told: _Told, cohorts: Mapping[int, Cohort], looks: Looks, facts: Sequence[tuple[str, str]]) -> Report:
    count, worth = len(looks.cases), _confidence_meaning(told.rest)
    return Report(
        kind="prediction",
        title=f"Masks of {count} case{'s' * (count != 1)}",
        headline=_headline(looks.cases, worth),
        cases=looks.cases,
        structures={str(value): told.labels.get(value) or f"label {value}" for value in cohorts},
        columns=COLUMNS,
        worst=looks.worst,
        facts=(*_facts(told.rest), *facts),
        definitions=tuple((key, f"{text}; {worth}" if text == _CONFIDENCE else text) for key, text in DEFINITIONS),
        warnings=(*map(str, told.rest.get("warnings", ())), *_usually_low_confidence(looks.cases).values()),
    )


def _confidence_meaning(manifest: Json) -> str:
    """What confidence says, by what predict noted of each case; and on which slices a table was fitted."""
    each = {bool(entry.get("calibrated")) for entry in manifest.get("cases", {}).values()}
    if len(each) > 1:
        return PARTLY
    table = manifest.get("calibration") or {}
    note = str(table.get("note") or "") if isinstance(table, dict) else ""
    return (f"{CALIBRATED}; {note}" if note else CALIBRATED) if each == {True} else UNCALIBRATED


def _headline(cases: Sequence[CaseReport], worth: str) -> tuple[tuple[str, str, str], ...]:
    sure = [share for case in cases for s in case.structures if (share := _number(s, "confidence")) is not None]
    flagged = sum(bool(case.flags) for case in cases)
    mean = _mean(sure)
    return (
        ("Cases", str(len(cases)), "masks in this folder that slmsam2 predict made"),
        ("Mean confidence", "-" if mean is None else f"{mean:.3f}", worth),
        (
            "Flagged",
            str(flagged),
            "cases with something odd about them, first in the table" if flagged else "nothing odd was noticed; that is no proof",
        ),
    )


def _facts(manifest: Json) -> tuple[tuple[str, str], ...]:
    model = manifest.get("model") or {}
    version = manifest.get("tool_version")
    told = [("predicted with", f"slmsam2 {version}" if version else ""), ("model", model.get("name"))]
    told += [(key, model.get(key)) for key in ("weights_digest", "plan_digest")]
    return tuple((what, str(value)) for what, value in [*told, ("prompts", manifest.get("prompts"))] if value)


def _number(structure: Structure, key: str) -> float | None:
    value = structure.measures.get(key)
    return None if value is None else float(value)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


MANIFEST = "manifest.json"
_TURN = ".slmsam2-report.lock"
_DIGEST = "account of the masks"


def write_prediction_report(
    masks: Path, images: Mapping[str, tuple[Path, ...]], shown: ChannelIntensityLike | None = None, again: bool = True
) -> None:
    """Write the page of all masks in the folder. images: case -> its files, where they are known; shown: how the network sees grey values.

    Unless `again`, a page that tells of these very masks already is left alone. Runs that share the folder take turns.
    """
    window = (shown.lower, shown.upper) if shown is not None and shown.scheme == "ct" else None
    try:
        with atomic.wait_for_lock(masks / _TURN):
            manifest = atomic.read_json(masks / MANIFEST, "the predictions' manifest")
            digest = _digest(manifest)
            if (manifest["cases"] or (masks / NAME).exists()) and (again or not _tells(masks / NAME, digest)):
                _write(masks, manifest, images, window, digest)
                console.say(f"wrote {masks / NAME}: what to look at first")
    except Exception as error:  # noqa: BLE001 - the masks are done; nothing about a page may make the run fail
        console.warn(f"{NAME} could not be made: {error or type(error).__name__}")
        console.trace(error)


def _write(masks: Path, manifest: dict[str, Any], images: Mapping[str, tuple[Path, ...]], window: Window | None, digest: str) -> None:
    sources = {case: _sources(masks, entry, images.get(case, ()), window) for case, entry in manifest["cases"].items()}

    def make(beside: Beside) -> Report:
        with console.progress("report", 2 * len(sources)) as advance:
            return prediction_report(manifest, sources, facts=[(_DIGEST, digest)], beside=beside, advance=advance)

    write_report(masks, make)


def _sources(masks: Path, entry: dict[str, Any], images: tuple[Path, ...], window: Window | None) -> Sources:
    """A mask outside the folder is none of ours. root: only for messages, which nobody sees."""
    name = entry["output"]
    return Sources(masks / name if Path(name).name == name else None, images, None, masks, entry.get("array_axis"), window=window)


def _digest(manifest: dict[str, Any]) -> str:
    """Of everything that the manifest says of the masks but for the time they took."""
    told = {case: {key: value for key, value in entry.items() if key != "seconds"} for case, entry in manifest["cases"].items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _tells(page: Path, digest: str) -> bool:
    """Whether there is a page with this digest in it."""
    if not page.exists():
        return False
    with open_regular(page) as file:
        return digest.encode() in file.read()
