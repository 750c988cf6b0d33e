"""Scored slices as marks of a strip."""

from __future__ import annotations

from collections.abc import Mapping

from slmsam2_cli.evaluation.metrics import LabelScore
from slmsam2_cli.evaluation.slices import Row
from slmsam2_cli.report.contents import SliceMark


def marks(
    label: LabelScore, confidence: Mapping[int, float] | None = None, disagreement: Mapping[int, float] | None = None
) -> tuple[SliceMark, ...]:
    """The slices of one scored structure. confidence, disagreement: by slice, where they are known."""
    return tuple(_mark(row, confidence or {}, disagreement or {}) for row in label.slices)


def _mark(row: Row, confidence: Mapping[int, float], disagreement: Mapping[int, float]) -> SliceMark:
    k, away = int(row["slice"] or 0), row["prompt_distance_slices"]
    return SliceMark(
        slice=k,
        prediction_px=int(row["prediction_px"] or 0),
        reference_px=int(row["reference_px"] or 0),
        dice=row["Dice"],
        prompted=away == 0,
        distance=None if away is None else int(away),
        confidence=confidence.get(k),
        disagreement=disagreement.get(k),
    )
