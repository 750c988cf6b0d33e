"""Grey values for labels: what tissue looks like to a scanner, before the scanner's own faults.

Every label of a window gets a grey value and the strengths of three textures; neighbours may be as alike as two halves of one organ
or as different as bone and air. Grey values are in units of the window, 0 to 1; they may leave it, as bone does in CT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import Frozen
from slmsam2_cli.pretraining.draw import Doublings, Draw, Share, smooth_field
from slmsam2_cli.pretraining.scanner import CT, PET


class AppearanceRecipe(Frozen):
    """Grey values and textures."""

    tissue_contrast: Doublings = Field(default=(0.02, 0.3), description="standard deviation of grey values between the tissues of a window")
    ct_contrast: Doublings = Field(default=(0.03, 0.15), description="standard deviation of grey values between CT's organs")
    bone: Share = Field(default=0.1, description="share of labels as bright as bone or contrast agent, in CT")
    rind: Share = Field(default=0.25, description="share of walls as bright as that, in CT")
    gas: Share = Field(default=0.05, description="share of labels as dark as gas or lung, in CT")
    hot: Share = Field(default=0.6, description="share of structures with uptake, in PET")
    faint: Share = Field(default=0.12, description="share of structures whose grey value is nearly that of a tissue around them")
    camouflage: Share = Field(default=0.1, description="share of other structures with the grey value of the first one")
    jitter: Doublings = Field(default=(0.003, 0.04), description="difference between labels that are meant to look alike")
    texture: Doublings = Field(default=(0.004, 0.07), description="standard deviation of a label's texture")
    mottled: Share = Field(default=0.15, description="share of labels with a coarse texture up to four times as strong")
    fibres: Share = Field(default=0.3, description="share of labels with bright or dark lines, as fascia, vessels or sulci")


@dataclass
class Looks:
    """(W, L) each, for every label: grey value, strengths of coarse and fine texture, strength of lines."""

    grey: Tensor
    coarse: Tensor
    fine: Tensor
    lines: Tensor


def draw_looks(recipe: AppearanceRecipe, draw: Draw, kind: Tensor, alike: Tensor, tissues: int, first: int) -> Looks:
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
