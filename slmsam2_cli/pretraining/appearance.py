"""Grey values for labels: what tissue looks like to a scanner, before the scanner's own faults.

Every label of a window gets a grey value and the strengths of three textures; neighbours may be as alike as two halves of one organ
or as different as bone and air. Grey values are in units of the window, 0 to 1; they may leave it, as bone does in CT.

What a scanner does to an image: thick slices, uneven gain, its own pixels, noise, artefacts, and the window.

Real input is either cut to one window in Hounsfield units or stretched between percentiles of its volume (dataset/intensity.py);
images end here in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.random_fields import Draw, Five, Four, LogRange, Share, smooth_field

CT, MR, PET, US = range(4)
PIXELS = (1.0, 0.75, 0.5, 0.375, 0.25)  # the scanner's pixels per frame pixel, along each axis


class ScannerRecipe(FrozenModel):
    """Kinds of scanners and their faults; strengths are in units of the window, 0 to 1."""

    kinds: Four = Field(default=(0.32, 0.5, 0.14, 0.04), description="shares of CT, MR, PET, ultrasound")
    pixels: Five = Field(
        default=(0.3, 0.2, 0.2, 0.2, 0.1), description=f"shares of scanners with {PIXELS} pixels per frame pixel; PET has the last two"
    )
    noise: LogRange = Field(default=(0.006, 0.08), description="standard deviation of noise on the scanner's own pixels")
    bias: LogRange = Field(default=(0.02, 0.35), description="standard deviation of the logarithm of MR's gain across the frame")
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


class AppearanceRecipe(FrozenModel):
    """Grey values and textures."""

    tissue_contrast: LogRange = Field(default=(0.02, 0.3), description="standard deviation of grey values between the tissues of a window")
    ct_contrast: LogRange = Field(default=(0.03, 0.15), description="standard deviation of grey values between CT's organs")
    bone: Share = Field(default=0.1, description="share of labels as bright as bone or contrast agent, in CT")
    rind: Share = Field(default=0.25, description="share of walls as bright as that, in CT")
    gas: Share = Field(default=0.05, description="share of labels as dark as gas or lung, in CT")
    hot: Share = Field(default=0.6, description="share of structures with uptake, in PET")
    faint: Share = Field(default=0.12, description="share of structures whose grey value is nearly that of a tissue around them")
    camouflage: Share = Field(default=0.1, description="share of other structures with the grey value of the first one")
    jitter: LogRange = Field(default=(0.003, 0.04), description="difference between labels that are meant to look alike")
    texture: LogRange = Field(default=(0.004, 0.07), description="standard deviation of a label's texture")
    mottled: Share = Field(default=0.15, description="share of labels with a coarse texture up to four times as strong")
    fibres: Share = Field(default=0.3, description="share of labels with bright or dark lines, as fascia, vessels or sulci")


@dataclass
class Looks:
    """(W, L) each, for every label: grey value, strengths of coarse and fine texture, strength of lines."""

    grey: Tensor
    coarse: Tensor
    fine: Tensor
    lines: Tensor


def draw_appearance(recipe: AppearanceRecipe, draw: Draw, kind: Tensor, alike: Tensor, tissues: int, first: int) -> Looks:
    """Looks for the labels of W windows. kind (W,): of scanner; alike (W, L): the label whose looks a label shares.

    Labels 1 to `tissues` are tissue, the label `first` and those behind it are structures, label 0 is air.
    """
    shape = tuple(alike.shape)
    number = torch.arange(shape[1], device=draw.device)
    structure, second = number >= first, (number - first) % 2 == 1
    grey = torch.where((kind == CT)[:, None], _ct(recipe, draw, second, shape[0]), draw.uniform((0.03, 1.0), *shape))
    grey[:, :first] = _tissue(recipe, draw, shape[0], first)
    background = grey[:, :first].gather(1, draw.pick([0.0] + [1.0] * tissues, *shape))
    grey = torch.where(draw.chance(recipe.faint, *shape) & structure, background + 0.05 * draw.normal(*shape), grey)
    grey = torch.where(draw.chance(recipe.camouflage, *shape) & structure, grey[:, first : first + 1], grey)
    grey = torch.where((kind == PET)[:, None], _pet(recipe, draw, structure, shape[0]), grey)
    grey = grey.gather(1, alike) + draw.normal(*shape) * draw.spread(recipe.jitter, *shape)
    coarse, fine = draw.spread(recipe.texture, *shape), draw.spread(recipe.texture, *shape)
    coarse = torch.where(draw.chance(recipe.mottled, *shape), coarse * draw.uniform((1.0, 4.0), *shape), coarse)
    lines = draw.normal(*shape) * 0.2 * draw.chance(recipe.fibres, *shape) * (kind != PET)[:, None]
    inside = (number > 0).float()
    return Looks(grey * inside, *(strength.gather(1, alike) * inside for strength in (coarse, fine, lines)))


def _tissue(recipe: AppearanceRecipe, draw: Draw, windows: int, count: int) -> Tensor:
    """(W, count): tissues around a common grey value, sometimes hardly to be told apart."""
    return draw.uniform((0.2, 0.7), windows, 1) + draw.normal(windows, count) * draw.spread(recipe.tissue_contrast, windows, 1)


def _ct(recipe: AppearanceRecipe, draw: Draw, second: Tensor, windows: int) -> Tensor:
    """(W, L): organs within some tens of Hounsfield units, and now and then bone or gas. second (L,): labels that may be walls."""
    shape = windows, len(second)
    grey = draw.uniform((0.35, 0.65), windows, 1) + draw.normal(*shape) * draw.spread(recipe.ct_contrast, windows, 1)
    bone = draw.uniform((0.0, 1.0), *shape) < torch.where(second, recipe.rind, recipe.bone)
    grey = torch.where(bone, draw.uniform((0.8, 1.6), *shape), grey)
    return torch.where(draw.chance(recipe.gas, *shape), draw.uniform((-0.5, 0.05), *shape), grey)


def _pet(recipe: AppearanceRecipe, draw: Draw, structure: Tensor, windows: int) -> Tensor:
    """(W, L): hot spots on a low background. structure (L,)."""
    shape = windows, len(structure)
    hot = draw.chance(recipe.hot, *shape) & structure
    return torch.where(hot, draw.uniform((0.3, 1.5), *shape), draw.spread((0.01, 0.2), *shape))


def filled(draw: Draw, looks: Looks, labels: Tensor) -> Tensor:
    """Label maps (T, W, px, px) -> grey values (T, W, px, px): every label in its grey with its textures."""
    slices, windows, px, _ = labels.shape
    table = torch.stack([looks.grey, looks.coarse, looks.fine, looks.lines], -1)
    offset = torch.arange(windows, dtype=torch.int32, device=labels.device)[:, None, None] * table.shape[1]
    grey, coarse, fine, lines = F.embedding(labels + offset, table.flatten(0, 1)).unbind(-1)
    pace = draw.uniform((0.05, 0.6), windows)
    grain = smooth_field(draw, slices, pace, 1, max(px // 10, 4), px)[:, :, 0]
    image = torch.addcmul(grey, coarse, grain)
    image.addcmul_(lines, grain.abs_().mul_(-4).add_(1).clamp_(min=0))
    return image.addcmul_(fine, smooth_field(draw, slices, pace, 1, max(px // 3, 8), px)[:, :, 0])
