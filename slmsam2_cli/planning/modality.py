"""Which kind of image a channel is, and how its grey values become 0 to 1: by its name, checked against the values."""

from __future__ import annotations

import math
import re

from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.plan import ChannelIntensity, Decision

PERCENTILES = (0.5, 99.5)
NARROWEST_WINDOW_HU = 400.0
HU_RANGE = (-1024.0, 3071.0)

NAMES = {
    "CT": {"ct"},
    "MR": {
        "mr",
        "mri",
        "t1",
        "t2",
        "t1w",
        "t2w",
        "t1c",
        "t1ce",
        "t1gd",
        "pd",
        "pdw",
        "flair",
        "dwi",
        "adc",
        "swi",
        "t2s",
        "t2star",
        "dce",
        "mra",
    },
    "PET": {"pet", "pt", "suv"},
    "US": {"us", "ultrasound"},
    "XR": {"xr", "xray", "ray", "cr", "dx", "radiograph"},
    "RGB": {"rgb", "red", "green", "blue"},
}
UNKNOWN = "unknown"


def choose_modality(fingerprint: Fingerprint, channel: int) -> Decision[str]:
    """By the channel's name; a name that says nothing, or CT, is checked against the values. Values never make an MR a CT."""
    name = fingerprint.channels[channel]
    words = set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
    declared = next((kind for kind, known in NAMES.items() if words & known), None)
    hounsfield, evidence = check_hounsfield(fingerprint, channel)
    if declared == "CT" and not hounsfield:
        return Decision(UNKNOWN, f"named CT, but not in Hounsfield units ({evidence}), so every volume is scaled by itself")
    if declared:
        return Decision(declared, "by its name" + (f"; {evidence}" if declared == "CT" else ""))
    said = f"the name {name!r} does not settle it" if name.strip() else "the name is blank"
    if hounsfield:
        return Decision("CT", f"{said}; taken for CT: {evidence}")
    return Decision(UNKNOWN, f"{said}; not Hounsfield units: {evidence}")


def check_hounsfield(fingerprint: Fingerprint, channel: int) -> tuple[bool, str]:
    """Whether the values look like Hounsfield units, and what was seen.

    They do when, in at least half of the cases, the 0.5th percentile lies below that of fat (-30) but not below -3100, and nothing
    exceeds 32767; and when the extremes together span at least 200.
    """
    values = [whole for case in fingerprint.cases if (whole := case.channels[channel].whole) is not None]
    if not values:
        return False, "all values are 0"
    fitting = [v for v in values if -3100 <= v.p00_5 <= -30 and v.max <= 32767 and v.max - v.min >= 200]
    low, high = min(v.min for v in values), max(v.max for v in values)
    seen = f"values from {low:g} to {high:g}, {len(fitting)} of {len(values)} cases reach from fat or air upwards"
    return 2 * len(fitting) >= len(values), seen


def choose_intensity(fingerprint: Fingerprint, channel: int, modality: str) -> Decision[ChannelIntensity]:
    """CT: one window around the labelled tissue. Others: each volume by its own percentiles.

    Of PET, whose highest values are no artefacts but what is looked for, nothing is cut off above where that would be labelled tissue.
    """
    name = fingerprint.channels[channel]
    low, high = PERCENTILES
    if modality != "CT":
        whose = "these values" if modality == UNKNOWN else f"{modality} values"
        hottest = modality == "PET" and clips_foreground(fingerprint, channel)
        upper, why = (100.0, "; no more is cut off above, where what is labelled is the hottest") if hottest else (high, "")
        reason = f"{whose} carry no unit: percentiles {low:g} to {upper:g} of each volume's non-zero voxels become 0 to 1{why}"
        return Decision(ChannelIntensity(name=name, scheme="percentile", lower=low, upper=upper), reason)
    tissue = fingerprint.foreground[channel]
    if tissue is None:
        window = ChannelIntensity(name=name, scheme="ct", lower=-160.0, upper=240.0)
        return Decision(window, "no labelled voxels; the usual soft-tissue window")
    lower, upper = ct_window(tissue.p00_5, tissue.p99_5)
    reason = (
        f"labelled tissue lies in {tissue.p00_5:.0f} to {tissue.p99_5:.0f} HU; half its width is added on either side, "
        f"at least {NARROWEST_WINDOW_HU:g} HU in all"
    )
    return Decision(ChannelIntensity(name=name, scheme="ct", lower=lower, upper=upper), reason)


def clips_foreground(fingerprint: Fingerprint, channel: int) -> bool:
    """Whether the usual upper percentile of the volume lies below that of the labelled voxels, in half of the cases that have any."""
    pairs = [(c.whole, c.foreground) for c in (case.channels[channel] for case in fingerprint.cases) if c.whole and c.foreground]
    return bool(pairs) and 2 * sum(foreground.p99_5 > whole.p99_5 for whole, foreground in pairs) >= len(pairs)


def ct_window(low_hu: float, high_hu: float) -> tuple[float, float]:
    """The labelled tissue's range and half its width more on either side, so that its surroundings show; at least 400 whole HU."""
    centre, width = (low_hu + high_hu) / 2, max(2 * (high_hu - low_hu), NARROWEST_WINDOW_HU)
    lower, upper = max(centre - width / 2, HU_RANGE[0]), min(centre + width / 2, HU_RANGE[1])
    return float(math.floor(lower)), float(math.ceil(upper))
