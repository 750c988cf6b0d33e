"""Short statements of what is wrong with the mask of a structure, on which slices, and what to do; shown at the top of a case.

The limits only select cases for review: a flag names the number behind it and does not prove an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from slmsam2_cli.report.charts import list_slices
from slmsam2_cli.report.schema import SliceMark, Structure

DICE, HD95_MM, VOLUME_PERCENT = 0.7, 10.0, 20.0  # flagged below, above, and where the volume differs by more
END_SLICES, END_MM = 3, 5.0  # slices too many or too few at an end; either limit counts
NO_PREDICTION = "no prediction; run slmsam2 predict on this case"
Ends = tuple[str, str]


def evaluation_flags(structure: Structure, ends: Ends | None, slice_mm: float | None) -> list[str]:
    """List what is wrong with a scored structure. ends: direction towards the first and the last slice ("feet", "head"), if known."""
    m = structure.measures
    reference_ml, prediction_ml = ("unknown" if m.get(key) is None else f"{m[key]:.3g} ml" for key in ("ref_ml", "pred_ml"))
    match structure.status:
        case "pred_missing":
            return [NO_PREDICTION]
        case "pred_empty":
            return [f"empty prediction, reference volume {reference_ml}; check that the prompt contains the structure"]
        case "ref_empty":
            return [f"false positive of {prediction_ml}: the reference is empty; check its label"]
        case "ok":
            flags = []
            dice, hd95, volume = m.get("Dice"), m.get("HD95"), m.get("volume_difference_percent")
            if dice is not None and dice < DICE:
                flags.append(f"Dice {dice:.3f} (below {DICE:g})")
            if hd95 is not None and hd95 > HD95_MM:
                flags.append(f"HD95 {hd95:.1f} mm (above {HD95_MM:g} mm)")
            if volume is not None and abs(volume) > VOLUME_PERCENT:
                flags.append(f"volume {abs(volume):.0f} % too {'large' if volume > 0 else 'small'}")
            return [*flags, *_extent_flags(structure.slices, ends, slice_mm)]
    return []


def _extent_flags(marks: Sequence[SliceMark], ends: Ends | None, slice_mm: float | None) -> list[str]:
    """List ends that are predicted too far or not far enough, and gaps, of a structure that is in both masks."""
    reference, predicted = ([m.slice for m in marks if m.reference_px], [m.slice for m in marks if m.prediction_px])
    if not reference or not predicted:
        return []
    flags = []
    for side, (expected, found) in enumerate(((reference[0], predicted[0]), (reference[-1], predicted[-1]))):
        beyond = expected - found if side == 0 else found - expected
        if abs(beyond) >= END_SLICES or (slice_mm is not None and abs(beyond) * slice_mm >= END_MM):
            low, high = min(expected, found), max(expected, found)
            slices = list_slices(range(low, high) if side == 0 else range(low + 1, high + 1))
            size = "" if slice_mm is None else f" ({abs(beyond) * slice_mm:.3g} mm)"
            where = f"at the {ends[side]} end" if ends else f"at the {('first', 'last')[side]} slices"
            if beyond > 0:
                flags.append(f"predicted too far on {slices}{size} {where}; add an end mark")
            else:
                flags.append(f"missed on {slices}{size} {where}; annotate a missed slice")
    gaps = [m.slice for m in marks if m.missed and predicted[0] < m.slice < predicted[-1]]
    if gaps:
        flags.append(f"missed on {list_slices(gaps)} between predicted slices; annotate a missed slice")
    return flags


def prefix_names(structures: Sequence[Structure], flags: Sequence[Sequence[str]]) -> list[str]:
    """Join the flags of all structures, each with the structure's name if there are several structures."""
    several = len(structures) > 1
    return [f"{s.name}: {flag}" if several else flag for s, found in zip(structures, flags, strict=True) for flag in found]
