"""The way back: from mask logits on the network's frame to labels on the volume's own grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.data.geometry import View
from slmsam2_cli.inference.engine import full_resolution


def labels_of(logits: Mapping[int, Tensor], view: View, frame_px: int) -> np.ndarray:
    """Label -> (T, 4h, 4w) logits of every slice of the stack, one label at least -> labels (Z, Y, X), uint8 or uint16.

    A voxel gets the label with the largest logit above 0, and 0 where there is none.
    """
    _, height, width = view.stack_shape

    def planes(t: int) -> np.ndarray:
        return full_resolution(torch.stack([one[t] for one in logits.values()]), frame_px, height, width).numpy()

    return view.restore(planes, tuple(logits))
