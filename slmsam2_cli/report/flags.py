"""Why to look at a case, in words: what a person would say who had compared the two masks.

Limits are those of a first look, not of a judgement; every flag names the number behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from slmsam2_cli.report.schema import SliceMark, Structure

DICE, HD95_MM, VOLUME_PERCENT = 0.7, 10.0, 20.0  # below, beyond, off by more
END_SLICES, END_MM = 3, 5.0  # either counts
Ends = tuple[str, str]


def evaluation_flags(structure: Structure, ends: Ends | None, slice_mm: float | None) -> list[str]:
    """What is wrong with one structure. ends: where slices begin and end in the patient ("feet", "head"), when known."""
    m = structure.measures
    match structure.status:
        case "pred_missing":
            return ["no prediction"]
        case "pred_empty":
            return [f"nothing found, {_ml(m.get('ref_ml'))} are there"]
        case "ref_empty":
            return [f"{_ml(m.get('pred_ml'))} found where there is nothing"]
        case "ok":
            return [*_overlap(structure), *extent_flags(structure.slices, ends, slice_mm)]
    return []


def _overlap(structure: Structure) -> list[str]:
    said, m = [], structure.measures
    dice, hd95, volume = m.get("Dice"), m.get("HD95"), m.get("volume_difference_percent")
    if dice is not None and dice < DICE:
        said.append(f"Dice {dice:.2f}")
    if hd95 is not None and hd95 > HD95_MM:
        said.append(f"HD95 {hd95:.1f} mm")
    if volume is not None and abs(volume) > VOLUME_PERCENT:
        said.append(f"volume {abs(volume):.0f} % too {'large' if volume > 0 else 'small'}")
    return said


def extent_flags(marks: Sequence[SliceMark], ends: Ends | None, slice_mm: float | None) -> list[str]:
    """Going on too long, stopping early, and gaps, of a structure that is in both masks."""
    truth, found = ([m.slice for m in marks if m.reference_px], [m.slice for m in marks if m.prediction_px])
    if not truth or not found:
        return []
    said = []
    for beyond, side in ((truth[0] - found[0], 0), (found[-1] - truth[-1], 1)):
        if abs(beyond) >= END_SLICES or (slice_mm is not None and abs(beyond) * slice_mm >= END_MM):
            where = f" towards the {ends[side]}" if ends else f" at the {('first', 'last')[side]} slices"
            said.append(
                f"{'goes on' if beyond > 0 else 'stops'} {_slices(abs(beyond), slice_mm)} {'too far' if beyond > 0 else 'early'}{where}"
            )
    gaps = sum(m.missed and found[0] < m.slice < found[-1] for m in marks)
    if gaps:
        said.append(f"missing on {_slices(gaps, None)} in between")
    return said


def named(structures: Sequence[Structure], said: Sequence[Sequence[str]]) -> list[str]:
    """The flags of every structure, with its name where there are several."""
    several = len(structures) > 1
    return [f"{s.name}: {flag}" if several else flag for s, flags in zip(structures, said, strict=True) for flag in flags]


def _slices(count: int, slice_mm: float | None) -> str:
    words = f"{count} slice{'s' * (count != 1)}"
    return words if slice_mm is None else f"{words} ({count * slice_mm:.3g} mm)"


def _ml(value: float | int | None) -> str:
    return "some voxels" if value is None else f"{value:.3g} ml"
