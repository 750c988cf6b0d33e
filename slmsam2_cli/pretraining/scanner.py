"""What a scanner does to an image: thick slices, uneven gain, its own pixels, noise, artefacts, and the window.

Real input is either cut to one window in Hounsfield units or stretched between percentiles of its volume (data/intensity.py);
images end here in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import Frozen
from slmsam2_cli.pretraining.draw import Doublings, Draw, Five, Four, Share, smooth_field

CT, MR, PET, US = range(4)
PIXELS = (1.0, 0.75, 0.5, 0.375, 0.25)  # the scanner's pixels per frame pixel, along each axis


class ScannerRecipe(Frozen):
    """Kinds of scanners and their faults; strengths are in units of the window, 0 to 1."""

    kinds: Four = Field(default=(0.32, 0.5, 0.14, 0.04), description="shares of CT, MR, PET, ultrasound")
    pixels: Five = Field(
        default=(0.3, 0.2, 0.2, 0.2, 0.1), description=f"shares of scanners with {PIXELS} pixels per frame pixel; PET has the last two"
    )
    noise: Doublings = Field(default=(0.006, 0.08), description="standard deviation of noise on the scanner's own pixels")
    bias: Doublings = Field(default=(0.02, 0.35), description="standard deviation of the logarithm of MR's gain across the frame")
    unsteady: Share = Field(default=0.3, description="share of MR whose gain differs from slice to slice")
    thick: Share = Field(default=0.5, description="share of windows whose slices overlap")
    streaks: Share = Field(default=0.12, description="share of CT with streaks along the rows")
    ghosts: Share = Field(default=0.06, description="share of MR with a ghost")


@dataclass(frozen=True)
class Scanners:
    """(W,) each: CT, MR, PET or US; index into PIXELS."""

    kind: Tensor
    pixels: Tensor

    def of(self, windows: Tensor) -> Scanners:
        return Scanners(self.kind[windows], self.pixels[windows])


def draw_scanners(recipe: ScannerRecipe, draw: Draw, windows: int) -> Scanners:
    kind, pixels = draw.pick(recipe.kinds, windows), draw.pick(recipe.pixels, windows)
    return Scanners(kind, torch.where(kind == PET, pixels.clamp(min=len(PIXELS) - 2), pixels))


def scanned(recipe: ScannerRecipe, draw: Draw, scanners: Scanners, image: Tensor) -> Tensor:
    """(T, W, px, px) of true grey values -> what the scanner shows of them, 0...1."""
    image = _thick(recipe, draw, image)
    image = image * _gain(recipe, draw, scanners.kind, len(image), image.shape[-1])
    image = _digital(recipe, draw, scanners, image)
    return _windowed(draw, scanners.kind, image)


def _thick(recipe: ScannerRecipe, draw: Draw, image: Tensor) -> Tensor:
    """Slices that share up to a quarter of their thickness with each neighbour."""
    windows = image.shape[1]
    share = draw.uniform((0.05, 0.25), windows) * draw.chance(recipe.thick, windows)
    if len(image) == 1:
        return image
    around = torch.cat([image[:1], image[:-1]]) + torch.cat([image[1:], image[-1:]])
    return torch.lerp(image, around.mul_(0.5), 2 * share[:, None, None])


def _gain(recipe: ScannerRecipe, draw: Draw, kind: Tensor, slices: int, px: int) -> Tensor:
    """(T, W, px, px): MR's slowly varying gain and its unsteadiness, 1 elsewhere."""
    windows = len(kind)
    strength = draw.spread(recipe.bias, windows) * ((kind == MR) | (kind == US))
    unsteady = 0.06 * draw.chance(recipe.unsteady, windows) * (kind == MR)
    field = smooth_field(draw, slices, torch.full_like(strength, 0.05), 1, 3, px)[:, :, 0]
    steps = draw.normal(slices, windows) * unsteady
    return field.mul_(strength[:, None, None]).add_(steps[..., None, None]).exp_()


def _digital(recipe: ScannerRecipe, draw: Draw, scanners: Scanners, image: Tensor) -> Tensor:
    """The image on the scanner's own pixels with noise, brought back to the frame's."""
    windows, px = image.shape[1], image.shape[-1]
    level = draw.spread(recipe.noise, windows)
    shown = torch.empty_like(image)
    for choice, share in enumerate(PIXELS):
        some = (scanners.pixels == choice).nonzero()[:, 0]
        if not len(some):
            continue
        part = image[:, some]
        if share < 1:
            part = F.interpolate(part, (round(px * share),) * 2, mode="area")
        else:
            part = torch.lerp(part, F.avg_pool2d(part, 3, 1, 1, count_include_pad=False), draw.uniform((0.0, 1.0), len(some), 1, 1))
        part = _noisy(recipe, draw, scanners.kind[some], level[some, None, None], part)
        if share < 1:
            part = F.interpolate(part, (px, px), mode="bilinear", align_corners=False)
        shown[:, some] = part
    return shown


def _noisy(recipe: ScannerRecipe, draw: Draw, kind: Tensor, level: Tensor, image: Tensor) -> Tensor:
    """Noise on (T, W, n, n): Rician for MR, multiplied for ultrasound, added elsewhere; artefacts. level (W, 1, 1)."""
    windows, n = image.shape[1], image.shape[-1]
    noise = draw.normal(*image.shape).mul_(level)
    speckle = (kind == US)[:, None, None]
    image = torch.addcmul(image, noise, torch.where(speckle, 6 * image, 1.0) if speckle.any() else torch.ones_like(level))
    mr = (kind == MR).nonzero()[:, 0]
    if len(mr):
        image[:, mr] = torch.hypot(image[:, mr], noise[:, mr].flip(-1))
    ghost = ((kind == MR) & draw.chance(recipe.ghosts, windows)).nonzero()[:, 0]
    if len(ghost):
        image[:, ghost] = image[:, ghost] + 0.2 * image[:, ghost].roll(n // 3, -2)
    streaky = ((kind == CT) & draw.chance(recipe.streaks, windows)).nonzero()[:, 0]
    if len(streaky):
        across = F.interpolate(draw.normal(len(image), len(streaky), n, 6), (n, n), mode="bilinear", align_corners=False)
        image[:, streaky] = image[:, streaky] + across * draw.uniform((0.02, 0.1), len(streaky), 1, 1)
    return image


def _windowed(draw: Draw, kind: Tensor, image: Tensor) -> Tensor:
    """CT: cut to 0...1. Others: stretched between the volume's percentiles first, which the clip need not reach."""
    some = image[:, :, ::4, ::4].transpose(0, 1).flatten(1)
    low, high = (some.kthvalue(max(1, round(share * some.shape[1])), dim=1).values for share in (0.01, 0.995))
    reach = torch.where(draw.chance(0.3, len(kind)), draw.uniform((1.0, 2.5), len(kind)), 1.0)
    high = torch.where(kind == CT, 1.0, low + (high - low).clamp(min=0.05) * reach)
    low = torch.where(kind == CT, 0.0, low)
    return image.sub_(low[:, None, None]).div_((high - low)[:, None, None]).clamp_(0, 1)
