"""Grey values for label maps, as a CT, an MR, a PET or an ultrasound scanner might give them, already between 0 and 1.

Every label of a window gets a grey value and two amplitudes of texture; then come the bias field, the scanner's own pixels, noise
and windowing. Real input is either cut to one window in Hounsfield units or stretched between percentiles of its volume
(see data/intensity.py); this module ends with the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import Frozen
from slmsam2_cli.pretraining.draw import Draw, Range, smooth_field

CT, MR, PET, US = range(4)
PIXELS = (1.0, 0.75, 0.5, 0.34, 0.22)  # the scanner's pixels per frame pixel


class AppearanceRecipe(Frozen):
    """What scanners make of labels. Grey values are in units of the window, 0 to 1."""

    modalities: tuple[float, float, float, float] = Field(default=(0.32, 0.5, 0.14, 0.04), description="shares of CT, MR, PET, ultrasound")
    colours: float = Field(default=0.05, description="share of windows whose three channels differ")
    faint: float = Field(default=0.3, description="share of structures whose grey value is nearly that of what surrounds them")
    same: float = Field(default=0.25, description="share of structures that take the grey value of the first one")
    texture: Range = Field(default=(0.004, 0.08), description="standard deviation of a label's texture")
    bias: Range = Field(default=(0.02, 0.35), description="standard deviation of the logarithm of an MR's bias field")
    noise: Range = Field(default=(0.006, 0.09), description="standard deviation of noise on the scanner's own pixels")
    fine: tuple[float, float, float, float, float] = Field(
        default=(0.35, 0.2, 0.2, 0.15, 0.1), description=f"shares of scanners with {PIXELS} pixels per frame pixel"
    )


@dataclass
class Tissues:
    """(W, L) each: grey value of every label, amplitude of coarse and of fine texture."""

    grey: Tensor
    coarse: Tensor
    fine: Tensor


def scan(recipe: AppearanceRecipe, draw: Draw, labels: Tensor, alike: Tensor) -> Tensor:
    """Label maps (T, W, px, px) -> grey values (T, W, 1, px, px) in 0...1; alike (W, L): whose grey value a label shares."""
    windows = labels.shape[1]
    kind = draw.pick(recipe.modalities, windows)
    tissues = _tissues(recipe, draw, kind, alike)
    image = _filled(draw, tissues, labels)
    image = image * _bias(recipe, draw, kind, len(labels), labels.shape[-1])
    image = _sampled(recipe, draw, kind, image)
    return _windowed(draw, kind, image)


def _tissues(recipe: AppearanceRecipe, draw: Draw, kind: Tensor, alike: Tensor) -> Tissues:
    shape = tuple(alike.shape)
    soft = draw.uniform((0.35, 0.65), shape[0], 1)
    ct = soft + draw.normal(*shape) * draw.spread((0.02, 0.15), shape[0], 1)
    ct = torch.where(draw.chance(0.12, *shape), draw.uniform((0.75, 1.3), *shape), ct)
    ct = torch.where(draw.chance(0.06, *shape), draw.uniform((-0.3, 0.05), *shape), ct)
    mr = draw.uniform((0.03, 1.0), *shape)
    pet = torch.where(draw.chance(0.3, *shape), draw.uniform((0.3, 1.5), *shape), draw.spread((0.01, 0.2), *shape))
    choice = kind[:, None]
    grey = torch.where(choice == CT, ct, torch.where(choice == PET, pet, mr))
    grey = torch.gather(grey, 1, alike)
    faint = draw.chance(recipe.faint, *shape)
    grey = torch.where(faint, grey[:, 2:3] + 0.04 * draw.normal(*shape), grey)
    grey = torch.where(draw.chance(recipe.same, *shape), grey[:, 6:7], grey)
    grey = torch.gather(grey, 1, alike) + 0.01 * draw.normal(*shape)
    grey[:, 0] = 0.0
    coarse, fine = draw.spread(recipe.texture, *shape), draw.spread(recipe.texture, *shape)
    coarse[:, 0], fine[:, 0] = 0.0, 0.0
    return Tissues(grey, coarse, fine)


def _filled(draw: Draw, tissues: Tissues, labels: Tensor) -> Tensor:
    """(T, W, 1, px, px): every label in its grey value with its texture."""
    slices, windows, px = len(labels), labels.shape[1], labels.shape[-1]
    table = torch.stack([tissues.grey, tissues.coarse, tissues.fine], -1)
    offset = torch.arange(windows, device=labels.device)[:, None, None] * table.shape[1]
    grey, coarse, fine = F.embedding(labels.long() + offset, table.flatten(0, 1)).unbind(-1)
    pace = draw.uniform((0.1, 0.6), windows)
    grain = smooth_field(draw, slices, pace, 1, max(px // 12, 4), px)[:, :, 0]
    finer = smooth_field(draw, slices, pace, 1, max(px // 4, 8), px)[:, :, 0]
    return torch.addcmul(torch.addcmul(grey, coarse, grain), fine, finer)[:, :, None]


def _bias(recipe: AppearanceRecipe, draw: Draw, kind: Tensor, slices: int, px: int) -> Tensor:
    """(T, W, 1, px, px): slowly varying gain of MR, 1 elsewhere."""
    strength = draw.spread(recipe.bias, len(kind)) * ((kind == MR) | (kind == US))
    return (smooth_field(draw, slices, torch.full_like(strength, 0.05), 1, 3, px) * strength[:, None, None, None]).exp_()


def _sampled(recipe: AppearanceRecipe, draw: Draw, kind: Tensor, image: Tensor) -> Tensor:
    """The image on the scanner's own pixels, with noise, and back on the frame's."""
    px = image.shape[-1]
    fineness = draw.pick(recipe.fine, len(kind))
    fineness = torch.where(kind == PET, fineness.clamp(min=3), fineness)
    level = draw.spread(recipe.noise, len(kind))
    sampled = torch.empty_like(image)
    for choice, share in enumerate(PIXELS):
        some = (fineness == choice).nonzero()[:, 0]
        if len(some):
            coarse = image[:, some].flatten(0, 1)
            if share < 1:
                coarse = F.interpolate(coarse, (round(px * share),) * 2, mode="area")
            coarse = _noisy(draw, kind[some].repeat(len(image)), level[some].repeat(len(image)), coarse)
            if share < 1:
                coarse = F.interpolate(coarse, (px, px), mode="bilinear", align_corners=False)
            sampled[:, some] = coarse.view(len(image), len(some), 1, px, px)
    return sampled


def _noisy(draw: Draw, kind: Tensor, level: Tensor, image: Tensor) -> Tensor:
    """Noise on (N, 1, n, n): Rician for MR, multiplied for ultrasound, additive elsewhere."""
    noise = draw.normal(*image.shape) * level[:, None, None, None]
    speckled = image * (1 + 6 * noise)
    rician = torch.hypot(image + noise, noise.flip(-1))
    choice = kind[:, None, None, None]
    return torch.where(choice == MR, rician, torch.where(choice == US, speckled, image + noise))


def _windowed(draw: Draw, kind: Tensor, image: Tensor) -> Tensor:
    """CT: cut to 0...1. Others: stretched between the volume's percentiles first, which the clip need not reach."""
    some = image[:, :, 0, ::4, ::4].transpose(0, 1).flatten(1)
    low, high = (some.kthvalue(max(1, round(share * some.shape[1])), dim=1).values for share in (0.01, 0.995))
    reach = torch.where(draw.chance(0.3, len(kind)), draw.uniform((1.0, 2.5), len(kind)), 1.0)
    low, high = torch.where(kind == CT, 0.0, low), torch.where(kind == CT, 1.0, low + (high - low).clamp(min=0.05) * reach)
    shape = (-1, 1, 1, 1)
    return ((image - low.view(shape)) / (high - low).view(shape)).clamp_(0, 1)
