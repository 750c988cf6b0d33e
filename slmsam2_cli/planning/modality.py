"""Choose the modality of a channel and the normalisation of its values to 0...1, from its name and the measured values."""

from __future__ import annotations

import math
import re

from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.plan import ChannelIntensity, Decision

PERCENTILES = (0.5, 99.5)
MIN_WINDOW_HU = 400.0
HU_RANGE = (-1024.0, 3071.0)
UNKNOWN = "unknown"
MR_SEQUENCES = ("flair", "dwi", "adc", "swi", "dce")
MODALITY_NAMES = {  # modality -> words of a channel name
    "CT": {"ct"},
    "MR": {"mr", "mri", "mra", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2s", "t2star", "pd", "pdw", *MR_SEQUENCES},
    "PET": {"pet", "pt", "suv"},
    "US": {"us", "ultrasound"},
    "XR": {"xr", "xray", "ray", "cr", "dx", "radiograph"},
    "RGB": {"rgb", "red", "green", "blue"},
}


def choose_modality(fingerprint: Fingerprint, channel: int) -> Decision[str]:
    """Choose the modality by the channel's name; CT and unknown names are checked against the values.

    A channel named CT without Hounsfield units is "unknown"; a channel with an unknown name and Hounsfield units is CT. The values
    never overrule another name.
    """
    name = fingerprint.channels[channel]
    words = set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
    declared = next((modality for modality, known in MODALITY_NAMES.items() if words & known), None)
    hounsfield, evidence = check_hounsfield(fingerprint, channel)
    if declared == "CT" and not hounsfield:
        return Decision(UNKNOWN, f"named CT, but values are not in Hounsfield units ({evidence}), so each volume is normalised by itself")
    if declared:
        return Decision(declared, "from the channel name" + (f"; {evidence}" if declared == "CT" else ""))
    problem = f"channel name {name!r} is no known modality" if name.strip() else "channel name is blank"
    if hounsfield:
        return Decision("CT", f"{problem}; treated as CT: {evidence}")
    return Decision(UNKNOWN, f"{problem}; not in Hounsfield units: {evidence}")


def check_hounsfield(fingerprint: Fingerprint, channel: int) -> tuple[bool, str]:
    """Return whether the values of a channel are plausible Hounsfield units, and what was found.

    In at least half of the cases the 0.5th percentile must lie between -3100 and -30 (fat), the maximum must be at most 32767, and the
    values must span at least 200.
    """
    values = [whole for case in fingerprint.cases if (whole := case.channels[channel].whole) is not None]
    if not values:
        return False, "all values are 0"
    plausible = [v for v in values if -3100 <= v.p00_5 <= -30 and v.max <= 32767 and v.max - v.min >= 200]
    low, high = min(v.min for v in values), max(v.max for v in values)
    found = f"values from {low:g} to {high:g}, plausible Hounsfield units in {len(plausible)} of {len(values)} cases"
    return 2 * len(plausible) >= len(values), found


def choose_intensity(fingerprint: Fingerprint, channel: int, modality: str) -> Decision[ChannelIntensity]:
    """Choose one window around the labelled tissue for CT, and percentiles of each volume for other modalities.

    PET is not clipped above where this would affect labelled tissue: its highest values are no artefacts but the uptake of interest.
    """
    name = fingerprint.channels[channel]
    low, high = PERCENTILES
    if modality != "CT":
        values = "values" if modality == UNKNOWN else f"{modality} values"
        brightest = modality == "PET" and clips_foreground(fingerprint, channel)
        upper, note = (100.0, "; the maximum is not clipped, since labelled tissue is brightest") if brightest else (high, "")
        reason = f"{values} have no fixed unit: percentiles {low:g} and {upper:g} of each volume's non-zero voxels become 0 and 1{note}"
        return Decision(ChannelIntensity(name=name, scheme="percentile", lower=low, upper=upper), reason)
    tissue = fingerprint.foreground[channel]
    if tissue is None:
        window = ChannelIntensity(name=name, scheme="ct", lower=-160.0, upper=240.0)
        return Decision(window, "no labelled voxels, so the standard soft-tissue window is used")
    lower, upper = ct_window(tissue.p00_5, tissue.p99_5)
    reason = (
        f"labelled tissue has {tissue.p00_5:.0f} to {tissue.p99_5:.0f} HU; the window is wider by half of this range on either side, "
        f"and at least {MIN_WINDOW_HU:g} HU wide"
    )
    return Decision(ChannelIntensity(name=name, scheme="ct", lower=lower, upper=upper), reason)


def clips_foreground(fingerprint: Fingerprint, channel: int) -> bool:
    """Return whether clipping at the upper percentile of the volume affects labelled voxels, in at least half of the labelled cases."""
    pairs = [(c.whole, c.foreground) for c in (case.channels[channel] for case in fingerprint.cases) if c.whole and c.foreground]
    return bool(pairs) and 2 * sum(foreground.p99_5 > whole.p99_5 for whole, foreground in pairs) >= len(pairs)


def ct_window(low_hu: float, high_hu: float) -> tuple[float, float]:
    """Widen the range of labelled tissue by half on either side, so that its surroundings show; whole HU, at least MIN_WINDOW_HU."""
    centre, width = (low_hu + high_hu) / 2, max(2 * (high_hu - low_hu), MIN_WINDOW_HU)
    lower, upper = max(centre - width / 2, HU_RANGE[0]), min(centre + width / 2, HU_RANGE[1])
    return float(math.floor(lower)), float(math.ceil(upper))
