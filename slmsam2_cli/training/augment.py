"""Augment a window of slices by batchgenerators; all slices of it get the same random change.

The slices, and the masks on them, are stacked as channels, which spatial transforms change alike; for transforms of the intensities they
are one tall image. In-plane mirroring is always allowed: tracks follow a mask and not a name, so left may become right. Blur, low
resolution and elastic deformation are as rare as in nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 4). All else is
applied always, as there are few volumes, but less far, as slices lie the way the patient does.
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

_ROTATION = math.radians(25)
_SCALE = (0.75, 1.35)
_SHIFT = 0.075  # of the frame, to either side; twice as much lost slices (docs/experiments/2026-11-27-augmentation-and-strides.md)
_DEFORM_PROBABILITY, _BLUR_PROBABILITY, _LOW_RESOLUTION_PROBABILITY = 0.2, 0.2, 0.25
_DEFORM, _DEFORM_SMOOTHNESS = 0.02, (0.1, 0.135)  # of the frame's area and edge: about 3 px in 96, smooth over a tenth of the frame
Array = np.ndarray[Any, Any]


def augment(clips: Clips, rng: np.random.Generator) -> Clips:
    """Return an augmented copy of one window, on the CPU; tracks whose annotated slice became empty are dropped.

    When that would be all of them, only intensities are changed. All randomness comes from `rng`.
    """
    frames, masks = (stack.flatten(0, 2).numpy() for stack in (clips.frames, clips.masks))  # (T * N * C, H, W)
    grey = bool((clips.frames[:, :, :1] == clips.frames).all())  # three equal channels, which noise must not make different
    shown = frames[:: clips.frames.shape[2]] if grey else frames
    ignored = [(1 - clips.valid).flatten(0, 2).numpy()] if clips.valid is not None else []
    with _seed_global_generators(rng):
        moved = _spatial_transforms(shown.shape[-1])(data=shown[None], seg=np.concatenate([masks, *ignored])[None])
        labels = moved["seg"][0]
        after = _unstack(labels[: len(masks)], clips.masks)
        kept = after[0].flatten(1).any(dim=1)
        if not kept.any():
            return replace(clips, frames=_unstack(_augment_intensity(shown), clips.frames))
        valid = 1 - _unstack(labels[len(masks) :], clips.masks)[:, kept] if ignored else None
        seen = _unstack(_augment_intensity(moved["data"][0]), clips.frames)
    return replace(clips, frames=seen, masks=after[:, kept], window=clips.window[kept], reverse=clips.reverse[kept], valid=valid)


@contextmanager
def _seed_global_generators(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of numpy and Python, which batchgenerators uses, during a block; afterwards they are as before."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    seed = int(rng.integers(2**32))
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _unstack(planes: Array, stack: Tensor) -> Tensor:
    """Bring planes (T * N * C, H, W), or (T * N, H, W) of one channel for all, to the shape of `stack` (T, N, C, H, W)."""
    shape = stack.shape if len(planes) == math.prod(stack.shape[:3]) else (*stack.shape[:2], 1, *stack.shape[3:])
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)).reshape(shape).expand(stack.shape)


def _augment_intensity(shown: Array) -> Array:
    """Change gamma, contrast, brightness, sharpness, resolution and noise of (N, H, W); the result lies in [0, 1]."""
    tall = np.clip(shown, 0, 1).reshape(1, 1, -1, shown.shape[-1])
    changed = _intensity_transforms()(data=tall)["data"].reshape(1, *shown.shape)
    changed = _sharpness_transforms()(data=changed)["data"][0]
    return np.asarray(np.clip(changed, 0, 1))


@cache
def _spatial_transforms(px: int) -> Any:
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform

    return Compose(
        [
            SpatialTransform(
                (px, px),
                patch_center_dist_from_border=[px * (0.5 - _SHIFT)] * 2,
                do_elastic_deform=True,
                alpha=(0.0, _DEFORM * px * px),
                sigma=(_DEFORM_SMOOTHNESS[0] * px, _DEFORM_SMOOTHNESS[1] * px),
                p_el_per_sample=_DEFORM_PROBABILITY,
                angle_x=(-_ROTATION, _ROTATION),
                scale=_SCALE,
                border_mode_data="constant",
                order_data=1,
                order_seg=0,
            ),
            MirrorTransform(axes=(1,)),
        ]
    )


@cache
def _intensity_transforms() -> Any:
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
def _sharpness_transforms() -> Any:
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform

    return Compose(
        [
            GaussianBlurTransform((0.5, 1.0), different_sigma_per_channel=False, p_per_sample=_BLUR_PROBABILITY),
            SimulateLowResolutionTransform((0.5, 1.0), per_channel=False, order_upsample=1, p_per_sample=_LOW_RESOLUTION_PROBABILITY),
            GaussianNoiseTransform((0.0, 0.05), per_channel=False),
        ]
    )
