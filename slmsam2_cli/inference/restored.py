"""The way back: from mask logits on the network's frame to labels on the volume's own grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from slmsam2_cli.data.geometry import View
from slmsam2_cli.inference.engine import Propagated


def labels_of(found: Mapping[int, Propagated], view: View, slice_px: int) -> np.ndarray:
    """What was found of one label at least, on every slice of the stack -> labels (Z, Y, X), uint8 or uint16.

    A voxel gets the label with the largest logit above 0, and 0 where there is none.
    """
    _, height, width = view.stack_shape

    def planes(t: int) -> np.ndarray:
        return torch.stack([one.plane(t, slice_px, height, width) for one in found.values()]).numpy()

    return view.restore(planes, tuple(found))
