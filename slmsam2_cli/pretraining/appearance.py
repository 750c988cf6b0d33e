"""Turn label maps into images: intensities and textures of tissues, then the effects of a scanner.

Every label of a window gets an intensity and the strengths of three textures. Adjacent labels may be as similar as two halves of one
organ or as different as bone and air. Intensities are in units of the intensity window, 0 to 1, and may exceed it, as bone does in CT.

A scanner adds overlapping slices, uneven gain, coarser pixels, noise, artefacts and the intensity window. Real images are either
clipped to a window in Hounsfield units or scaled between percentiles of their volume (dataset/intensity.py); so are these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.random_fields import Draw, Fraction, LogRange, Shares4, Shares5, smooth_field

CT, MR, PET, US = range(4)
RESOLUTIONS = (1.0, 0.75, 0.5, 0.375, 0.25)  # scanner pixels per image pixel, along each axis


class AppearanceRecipe(FrozenModel):
    """Intensities and textures."""

    tissue_contrast: LogRange = Field(default=(0.02, 0.3), description="standard deviation of intensity between the tissues of a window")
    ct_contrast: LogRange = Field(default=(0.03, 0.15), description="standard deviation of intensity between organs in CT")
    bone: Fraction = Field(default=0.1, description="share of labels as bright as bone or contrast agent, in CT")
    bright_walls: Fraction = Field(default=0.25, description="share of walls as bright as bone or contrast agent, in CT")
    gas: Fraction = Field(default=0.05, description="share of labels as dark as gas or lung, in CT")
    uptake: Fraction = Field(default=0.6, description="share of structures with uptake, in PET")
    low_contrast: Fraction = Field(default=0.12, description="share of structures with nearly the intensity of a surrounding tissue")
    same_as_first: Fraction = Field(default=0.1, description="share of other structures with the intensity of the first structure")
    jitter: LogRange = Field(default=(0.003, 0.04), description="difference between labels that share one appearance")
    texture: LogRange = Field(default=(0.004, 0.07), description="standard deviation of a label's texture")
    coarse_texture: Fraction = Field(default=0.15, description="share of labels with a coarse texture up to four times as strong")
    lines: Fraction = Field(default=0.3, description="share of labels with bright or dark lines, as fascia, vessels or sulci")


@dataclass
class Appearance:
    """(W, L) each, for every label: intensity, strengths of coarse and fine texture, strength of lines."""

    intensity: Tensor
    coarse: Tensor
    fine: Tensor
    lines: Tensor


def draw_appearance(recipe: AppearanceRecipe, draw: Draw, modality: Tensor, shared: Tensor, tissues: int, first: int) -> Appearance:
    """Draw the appearance of the labels of W windows. modality (W,); shared (W, L): the label whose appearance a label has.

    Label 0 is air, labels 1 to `tissues` are tissues, `first` and the labels after it are structures.
    """
    shape = tuple(shared.shape)
    number = torch.arange(shape[1], device=draw.device)
    structure, second = number >= first, (number - first) % 2 == 1
    values = torch.where((modality == CT)[:, None], _draw_ct(recipe, draw, second, shape[0]), draw.uniform((0.03, 1.0), *shape))
    common = draw.uniform((0.2, 0.7), shape[0], 1)  # tissues vary around one intensity
    values[:, :first] = common + draw.normal(shape[0], first) * draw.log_uniform(recipe.tissue_contrast, shape[0], 1)
    background = values[:, :first].gather(1, draw.categorical([0.0] + [1.0] * tissues, *shape))
    low_contrast = draw.bernoulli(recipe.low_contrast, *shape) & structure
    values = torch.where(low_contrast, background + 0.05 * draw.normal(*shape), values)
    values = torch.where(draw.bernoulli(recipe.same_as_first, *shape) & structure, values[:, first : first + 1], values)
    uptake = draw.bernoulli(recipe.uptake, *shape) & structure
    pet = torch.where(uptake, draw.uniform((0.3, 1.5), *shape), draw.log_uniform((0.01, 0.2), *shape))
    values = torch.where((modality == PET)[:, None], pet, values)
    values = values.gather(1, shared) + draw.normal(*shape) * draw.log_uniform(recipe.jitter, *shape)
    coarse, fine = draw.log_uniform(recipe.texture, *shape), draw.log_uniform(recipe.texture, *shape)
    coarse = torch.where(draw.bernoulli(recipe.coarse_texture, *shape), coarse * draw.uniform((1.0, 4.0), *shape), coarse)
    lines = draw.normal(*shape) * 0.2 * draw.bernoulli(recipe.lines, *shape) * (modality != PET)[:, None]
    inside = (number > 0).float()
    return Appearance(values * inside, *(strength.gather(1, shared) * inside for strength in (coarse, fine, lines)))


def _draw_ct(recipe: AppearanceRecipe, draw: Draw, second: Tensor, windows: int) -> Tensor:
    """Draw intensities in CT, (W, L): organs within some tens of Hounsfield units, sometimes bone or gas. second (L,): possible walls."""
    shape = windows, len(second)
    values = draw.uniform((0.35, 0.65), windows, 1) + draw.normal(*shape) * draw.log_uniform(recipe.ct_contrast, windows, 1)
    bone = draw.uniform((0.0, 1.0), *shape) < torch.where(second, recipe.bright_walls, recipe.bone)
    values = torch.where(bone, draw.uniform((0.8, 1.6), *shape), values)
    return torch.where(draw.bernoulli(recipe.gas, *shape), draw.uniform((-0.5, 0.05), *shape), values)


def render_labels(draw: Draw, appearance: Appearance, labels: Tensor) -> Tensor:
    """Render label maps (T, W, px, px) as intensities with textures, (T, W, px, px)."""
    slices, windows, px, _ = labels.shape
    table = torch.stack([appearance.intensity, appearance.coarse, appearance.fine, appearance.lines], -1)
    offset = torch.arange(windows, dtype=torch.int32, device=labels.device)[:, None, None] * table.shape[1]
    intensity, coarse, fine, lines = F.embedding(labels + offset, table.flatten(0, 1)).unbind(-1)
    rate = draw.uniform((0.05, 0.6), windows)
    grain = smooth_field(draw, slices, rate, 1, max(px // 10, 4), px)[:, :, 0]
    image = torch.addcmul(intensity, coarse, grain)
    image.addcmul_(lines, grain.abs_().mul_(-4).add_(1).clamp_(min=0))
    return image.addcmul_(fine, smooth_field(draw, slices, rate, 1, max(px // 3, 8), px)[:, :, 0])


class ScannerRecipe(FrozenModel):
    """Modalities and scanner effects. Strengths are in units of the intensity window, 0 to 1."""

    modalities: Shares4 = Field(default=(0.32, 0.5, 0.14, 0.04), description="shares of CT, MR, PET, ultrasound")
    resolutions: Shares5 = Field(
        default=(0.3, 0.2, 0.2, 0.2, 0.1),
        description=f"shares of scanners with {RESOLUTIONS} pixels per image pixel; PET has the last two",
    )
    noise: LogRange = Field(default=(0.006, 0.08), description="standard deviation of noise on the scanner's pixels")
    bias_field: LogRange = Field(default=(0.02, 0.35), description="standard deviation of the logarithm of the gain across an MR image")
    slice_gain: Fraction = Field(default=0.3, description="share of MR whose gain differs from slice to slice")
    slice_overlap: Fraction = Field(default=0.5, description="share of windows whose slices overlap")
    streaks: Fraction = Field(default=0.12, description="share of CT with streaks along the rows")
    ghosts: Fraction = Field(default=0.06, description="share of MR with a ghost")


@dataclass(frozen=True)
class Scanners:
    """(W,) each. modality: CT, MR, PET or US; resolution: index into RESOLUTIONS."""

    modality: Tensor
    resolution: Tensor


def draw_scanners(recipe: ScannerRecipe, draw: Draw, windows: int) -> Scanners:
    """Draw a scanner for each of W windows."""
    modality, resolution = draw.categorical(recipe.modalities, windows), draw.categorical(recipe.resolutions, windows)
    return Scanners(modality, torch.where(modality == PET, resolution.clamp(min=len(RESOLUTIONS) - 2), resolution))


def scan(recipe: ScannerRecipe, draw: Draw, scanners: Scanners, image: Tensor) -> Tensor:
    """Apply scanner effects to true intensities (T, W, px, px); the result is within 0 to 1."""
    windows = image.shape[1]
    share = draw.uniform((0.05, 0.25), windows) * draw.bernoulli(recipe.slice_overlap, windows)  # of a slice in each adjacent one
    if len(image) > 1:
        around = torch.cat([image[:1], image[:-1]]) + torch.cat([image[1:], image[-1:]])
        image = torch.lerp(image, around.mul_(0.5), 2 * share[:, None, None])
    image = image * _draw_gain(recipe, draw, scanners.modality, len(image), image.shape[-1])
    image = _resample_with_noise(recipe, draw, scanners, image)
    return _apply_window(draw, scanners.modality, image)


def _draw_gain(recipe: ScannerRecipe, draw: Draw, modality: Tensor, slices: int, px: int) -> Tensor:
    """Draw the slowly varying gain of MR and ultrasound and the gain per slice of MR, (T, W, px, px); 1 elsewhere."""
    windows = len(modality)
    strength = draw.log_uniform(recipe.bias_field, windows) * ((modality == MR) | (modality == US))
    varying = 0.06 * draw.bernoulli(recipe.slice_gain, windows) * (modality == MR)
    field = smooth_field(draw, slices, torch.full_like(strength, 0.05), 1, 3, px)[:, :, 0]
    per_slice = draw.normal(slices, windows) * varying
    return field.mul_(strength[:, None, None]).add_(per_slice[..., None, None]).exp_()


def _resample_with_noise(recipe: ScannerRecipe, draw: Draw, scanners: Scanners, image: Tensor) -> Tensor:
    """Resample an image (T, W, px, px) to the scanner's pixels, add noise there, and resample it back."""
    windows, px = image.shape[1], image.shape[-1]
    level = draw.log_uniform(recipe.noise, windows)
    result = torch.empty_like(image)
    for index, resolution in enumerate(RESOLUTIONS):
        chosen = (scanners.resolution == index).nonzero()[:, 0]
        if not len(chosen):
            continue
        part = image[:, chosen]
        if resolution < 1:
            part = F.interpolate(part, (round(px * resolution),) * 2, mode="area")
        else:
            part = torch.lerp(part, F.avg_pool2d(part, 3, 1, 1, count_include_pad=False), draw.uniform((0.0, 1.0), len(chosen), 1, 1))
        part = _add_noise(recipe, draw, scanners.modality[chosen], level[chosen, None, None], part)
        if resolution < 1:
            part = F.interpolate(part, (px, px), mode="bilinear", align_corners=False)
        result[:, chosen] = part
    return result


def _add_noise(recipe: ScannerRecipe, draw: Draw, modality: Tensor, level: Tensor, image: Tensor) -> Tensor:
    """Add noise and artefacts to (T, W, n, n): Rician noise for MR, multiplicative for ultrasound, additive else. level (W, 1, 1)."""
    windows, n = image.shape[1], image.shape[-1]
    noise = draw.normal(*image.shape).mul_(level)
    scale = torch.ones_like(level)
    if len((modality == US).nonzero()):
        scale = torch.where((modality == US)[:, None, None], 6 * image, 1.0)
    image = torch.addcmul(image, noise, scale)
    mr = (modality == MR).nonzero()[:, 0]
    if len(mr):
        image[:, mr] = torch.hypot(image[:, mr], noise[:, mr].flip(-1))
    ghosts = ((modality == MR) & draw.bernoulli(recipe.ghosts, windows)).nonzero()[:, 0]
    if len(ghosts):
        image[:, ghosts] = image[:, ghosts] + 0.2 * image[:, ghosts].roll(n // 3, -2)
    streaked = ((modality == CT) & draw.bernoulli(recipe.streaks, windows)).nonzero()[:, 0]
    if len(streaked):
        streaks = F.interpolate(draw.normal(len(image), len(streaked), n, 6), (n, n), mode="bilinear", align_corners=False)
        image[:, streaked] = image[:, streaked] + streaks * draw.uniform((0.02, 0.1), len(streaked), 1, 1)
    return image


def _apply_window(draw: Draw, modality: Tensor, image: Tensor) -> Tensor:
    """Clip CT to 0 to 1; scale other images between percentiles first, which those of the volume may exceed."""
    sample = image[:, :, ::4, ::4].transpose(0, 1).flatten(1)
    low, high = (sample.kthvalue(max(1, round(share * sample.shape[1])), dim=1).values for share in (0.01, 0.995))
    factor = torch.where(draw.bernoulli(0.3, len(modality)), draw.uniform((1.0, 2.5), len(modality)), 1.0)
    high = torch.where(modality == CT, 1.0, low + (high - low).clamp(min=0.05) * factor)
    low = torch.where(modality == CT, 0.0, low)
    return image.sub_(low[:, None, None]).div_((high - low)[:, None, None]).clamp_(0, 1)
