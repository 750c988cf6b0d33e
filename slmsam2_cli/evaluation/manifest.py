"""What predict wrote beside its masks: which slices were given for which label, which cases the model had learned from.

`MASKS/manifest.json`:

    {"format_version": 1, "tool_version": "…", "model": {…digests…},
     "cases": {"<case id>": {"output": "<file>", "slice_axis": "SI", "array_axis": 0,
                             "prompted_slices": {"1": [12]}, "training": false,
                             "confidence": {"1": {"mean": 0.9, "slices": {"11": 0.8, …}}}, "disagreement": {"1": {"11": 0.1}}, …}}}

array_axis: the (z, y, x) axis of the stored array along which slices are numbered; prompted_slices: label value -> indices along it.
Scores rest on these; confidence and disagreement are only shown, so what cannot be understood of them is left out. Other keys are
left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from slmsam2_cli.data import store
from slmsam2_cli.errors import UsageError

NAME = "manifest.json"
FORMAT_VERSION = 1


class ManifestCase(BaseModel):
    """One case as predict left it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    array_axis: Literal[0, 1, 2] | None = None
    prompted_slices: dict[int, tuple[NonNegativeInt, ...]] = Field(default_factory=dict)
    training: bool = False
    confidence: dict[int, dict[int, float]] = Field(default_factory=dict)
    disagreement: dict[int, dict[int, float]] = Field(default_factory=dict)

    @field_validator("confidence", "disagreement", mode="before")
    @classmethod
    def _by_slice(cls, value: object) -> dict[int, dict[int, float]]:
        """Label -> slice -> share, of what is one."""
        labels = value.items() if isinstance(value, dict) else ()
        return {int(label): shares for label, told in labels if _is_index(label) and (shares := _shares(told))}


class Manifest(BaseModel):
    """The predictions' own account of themselves."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    tool_version: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cases: dict[str, ManifestCase] = Field(default_factory=dict)


def _shares(told: object) -> dict[int, float]:
    """Slice -> share, from the slices alone or from an object that holds them as `slices` beside other things."""
    slices = told.get("slices", told) if isinstance(told, dict) else None
    known = slices.items() if isinstance(slices, dict) else ()
    return {int(k): float(v) for k, v in known if _is_index(k) and isinstance(v, int | float) and 0 <= v <= 1}


def _is_index(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 9


def read_manifest(predictions: Path) -> Manifest | None:
    """The manifest of a folder of predictions, None when there is none; UsageError when it cannot be understood."""
    path = predictions / NAME
    if not path.exists():
        return None
    value = store.read_json(path, "the predictions' manifest")
    remedy = "Run slmsam2 predict again, or remove the file to score without prompted slices"
    try:
        manifest = Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"{NAME}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}. {remedy}") from None
    if manifest.format_version > FORMAT_VERSION:
        raise UsageError(f"{NAME}: format_version {manifest.format_version} is newer than this tool's {FORMAT_VERSION}. Update slmsam2")
    return manifest
