"""Scale intensities to 0…1.

CT values have a unit (Hounsfield), so one fixed window is used for all volumes. Other modalities have none (maxima from 112 to 1.7e6
occur in one dataset), so each volume is scaled by its own percentiles. Values outside the window are clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class ChannelIntensityLike(Protocol):
    """The settings of one channel of a plan: lower and upper in HU ("ct") or as percentiles."""

    @property
    def scheme(self) -> Literal["ct", "percentile"]: ...
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...


def window_of(voxels: Array, channel: ChannelIntensityLike) -> tuple[float, float]:
    """Return the voxel values that are mapped to 0 and 1.

    "ct": the plan's window in HU. "percentile": the plan's percentiles of this volume's non-zero voxels; where they coincide (a nearly
    constant volume), its minimum and maximum.
    """
    if channel.scheme == "ct":
        return channel.lower, channel.upper
    inside = voxels[voxels != 0]
    if inside.size == 0:
        return 0.0, 0.0
    low, high = (float(p) for p in np.percentile(inside, [channel.lower, channel.upper]))
    return (low, high) if high > low else (float(voxels.min()), float(voxels.max()))


def normalise(voxels: Array, channels: Sequence[ChannelIntensityLike]) -> Array:
    """Scale the window of every channel (C, Z, Y, X) to [0, 1] and clip, as float32; a constant channel becomes zeros.

    Raises: ValueError when the plan has another number of channels.
    """
    if len(channels) != len(voxels):
        raise ValueError(f"{len(voxels)} channels of voxels but {len(channels)} in the plan")
    scaled: Array = np.zeros(voxels.shape, dtype=np.float32)
    for channel, plan, out in zip(voxels, channels, scaled, strict=True):
        low, high = window_of(channel, plan)
        if high > low:
            for plane, target in zip(channel, out, strict=True):
                target[...] = np.clip((plane.astype(np.float64) - low) / (high - low), 0.0, 1.0)
    return scaled
