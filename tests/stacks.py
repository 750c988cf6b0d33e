"""Prepared cases made of numbers, whose contents a test can say without running anything."""

from types import SimpleNamespace

import numpy as np

from slmsam2_cli.planning.plan import GeometryPlan


def whole(px, **changes):
    """Slices of `px` pixels that the network sees whole; or, with focus and storage_size, in squares."""
    return GeometryPlan(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, input_size=px, crop_to_nonzero=False, **changes)


def case(slices=20, held=range(6, 14), size=(24, 32), value=1, name="a"):
    """A case whose grey value is its slice number over 100, with a label on `held`."""
    frames = np.broadcast_to(np.arange(slices, dtype=np.float16)[None, :, None, None] / 100, (1, slices, *size))
    labels = np.zeros((slices, *size), np.uint8)
    labels[list(held), 4:12, 4:12] = value
    return SimpleNamespace(id=name, frames=frames, labels=labels)
