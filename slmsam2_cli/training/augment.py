"""Random changes of a window that leave its meaning alone, by batchgenerators; every slice of it gets the same draw.

The slices, and the masks on them, are stacked as channels, which its transforms change alike, and for what looks at the grey values
themselves they are one tall picture. In-plane mirroring is always allowed: tracks follow a mask, not a name, so left may become right.
Blur, low resolution and bending are as rare as in nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 4); all else is done
always, as there are few volumes, and less far, as slices lie the way the patient does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.training.clips import Clips

_TURN = math.radians(25)
_SCALE = (0.75, 1.35)
_SHIFT = 0.075  # of the frame, to either side; twice as much lost slices (docs/decisions.md)
_BENT, _BLURRED, _COARSE = 0.2, 0.2, 0.25  # how often
_BEND, _BEND_OVER = 0.02, (0.1, 0.135)  # of the frame's area and edge: about 3 px in 96, smooth over a tenth of the frame
Array = np.ndarray[Any, Any]


def augment(clips: Clips, rng: np.random.Generator) -> Clips:
    """A changed copy of one window, on the CPU; tracks whose annotated slice was moved out of sight are dropped.

    When that would be all of them, nothing is moved. The draw is the generator's alone.
    """
    frames, masks = _planes(clips.frames), _planes(clips.masks)
    grey = bool((clips.frames[:, :, :1] == clips.frames).all())  # the same slice in every colour, which noise must not tell apart
    shown = frames[:: clips.frames.shape[2]] if grey else frames
    ignored = [_planes(1 - clips.known)] if clips.known is not None else []
    with _seed_global_generators(rng):
        moved, labels = _move(shown, np.concatenate([masks, *ignored]))
        after = _like(labels[: len(masks)], clips.masks)
        kept = after[0].flatten(1).any(dim=1)
        if not kept.any():
            return replace(clips, frames=_like(_augment_intensity(shown), clips.frames))
        known = 1 - _like(labels[len(masks) :], clips.masks)[:, kept] if ignored else None
        seen = _like(_augment_intensity(moved), clips.frames)
    return replace(clips, frames=seen, masks=after[:, kept], window=clips.window[kept], reverse=clips.reverse[kept], known=known)


@contextmanager
def _seed_global_generators(rng: np.random.Generator) -> Iterator[None]:
    """batchgenerators draws from the two generators that belong to everybody: they are as they were afterwards."""
    theirs, pythons = np.random.get_state(), random.getstate()
    seed = int(rng.integers(2**32))
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(theirs)
        random.setstate(pythons)


def _planes(stack: Tensor) -> Array:
    """(T, N, C, H, W) or (T, N, 1, H, W) as channels, (T * N * C, H, W)."""
    return stack.flatten(0, 2).numpy()


def _like(planes: Array, stack: Tensor) -> Tensor:
    """The other way round; grey planes in every colour."""
    shape = stack.shape if len(planes) == math.prod(stack.shape[:3]) else (*stack.shape[:2], 1, *stack.shape[3:])
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)).reshape(shape).expand(stack.shape)


def _move(shown: Array, masks: Array) -> tuple[Array, Array]:
    """Bent, turned, scaled, shifted, mirrored."""
    changed = _moving(shown.shape[-1])(data=shown[None], seg=masks[None])
    return changed["data"][0], changed["seg"][0]


def _augment_intensity(shown: Array) -> Array:
    """Gamma, contrast, brightness, blur, low resolution, noise; within 0 ... 1."""
    tall = np.clip(shown, 0, 1).reshape(1, 1, -1, shown.shape[-1])
    greys = _greys()(data=tall)["data"].reshape(1, *shown.shape)
    changed: Array = _sharpness()(data=greys)["data"][0]
    return np.clip(changed, 0, 1)


@cache
def _moving(px: int) -> Any:
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform

    return Compose(
        [
            SpatialTransform(
                (px, px),
                patch_center_dist_from_border=[px * (0.5 - _SHIFT)] * 2,
                do_elastic_deform=True,
                alpha=(0.0, _BEND * px * px),
                sigma=(_BEND_OVER[0] * px, _BEND_OVER[1] * px),
                p_el_per_sample=_BENT,
                angle_x=(-_TURN, _TURN),
                scale=_SCALE,
                border_mode_data="constant",
                order_data=1,
                order_seg=0,
            ),
            MirrorTransform(axes=(1,)),
        ]
    )


@cache
def _greys() -> Any:
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.color_transforms import (
        BrightnessMultiplicativeTransform,
        ContrastAugmentationTransform,
        GammaTransform,
    )

    return Compose(
        [
            GammaTransform((0.67, 1.5), per_channel=False),
            ContrastAugmentationTransform((0.75, 1.35), per_channel=False),
            BrightnessMultiplicativeTransform((0.75, 1.25), per_channel=False),
        ]
    )


@cache
def _sharpness() -> Any:
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform

    return Compose(
        [
            GaussianBlurTransform((0.5, 1.0), different_sigma_per_channel=False, p_per_sample=_BLURRED),
            SimulateLowResolutionTransform((0.5, 1.0), per_channel=False, order_upsample=1, p_per_sample=_COARSE),
            GaussianNoiseTransform((0.0, 0.05), per_channel=False),
        ]
    )
