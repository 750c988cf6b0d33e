"""Clips of imaginary volumes: anatomy-like label maps with the grey values of many scanners, drawn as fast as they are learnt from.

After the idea of SynthSeg (Billot et al. 2023, arXiv:2107.09559): a network that has seen every appearance needs to know none.
Here the geometry is drawn too, with what propagation stumbles over: ends, look-alikes, branches and invisible borders.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.finetuning.clips import Clips
from slmsam2_cli.planning.plan import Frozen
from slmsam2_cli.pretraining.anatomy import PAINTED, STRUCTURES, Anatomy, AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.appearance import AppearanceRecipe, scan
from slmsam2_cli.pretraining.draw import Draw, Range, smooth_field
from slmsam2_cli.pretraining.shapes import cut, joined, paint, paint_around, pixel_centres, poses
from slmsam2_cli.pretraining.tracks import Tracks, areas, choose

AIR, FAT, TISSUE, FIRST = 0, 1, 2, 6  # labels: four tissues, then two labels for every structure
_BACKGROUND = 2 * STRUCTURES


class VolumesRecipe(Frozen):
    """What the generator draws from: every range and every probability."""

    anatomy: AnatomyRecipe = Field(default=AnatomyRecipe(), description="structures and how they relate")
    appearance: AppearanceRecipe = Field(default=AppearanceRecipe(), description="what scanners make of them")
    air: float = Field(default=0.5, description="share of windows in which the body's outline may be seen")
    warp: Range = Field(default=(0.05, 0.25), description="coarse deformation, in sizes of the first structure")
    rough: Range = Field(default=(0.01, 0.06), description="fine deformation, in sizes of the first structure")
    padded: float = Field(
        default=0.5, description="share of windows padded with zeros below or to the right, as slices that are not square"
    )
    cropped: float = Field(default=0.12, description="share of windows that reach beyond the volume on some side")
    eager: float = Field(default=3.0, description="how much likelier a structure that ends within the clip is to be followed")
    slices: tuple[int, int] = Field(default=(8, 80), description="length of the imaginary volumes")


def draw_clips(
    recipe: VolumesRecipe,
    rng: torch.Generator,
    windows: int,
    length: int,
    tracks: int,
    frame_px: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  a value
) -> Clips:
    """W windows of `length` slices and at most `tracks` tracks through them; at least one. All randomness comes from `rng`."""
    draw = Draw.on(device, rng)
    while True:
        view = _view(recipe, draw, windows)
        anatomy = draw_anatomy(recipe.anatomy, draw, windows, length, view)
        labels = _labels(recipe, draw, anatomy, length, frame_px)
        seen = _seen(view, frame_px)
        targets = _targets(labels, anatomy, seen)
        chosen = choose(draw, areas(targets, _BACKGROUND + 1), tracks, recipe.eager)
        if len(chosen.window):
            break
    frames = _frames(recipe.appearance, draw, labels, anatomy) * seen[:, None]
    slices = max(length, int(draw.spread((float(recipe.slices[0]), float(recipe.slices[1])), 1)))
    return Clips(frames, _masks(targets, chosen), chosen.window, chosen.reverse, slices)


def _view(recipe: VolumesRecipe, draw: Draw, windows: int) -> Tensor:
    """(W, 4): left, top, width and height of what is not padding, frame widths."""
    view = torch.tensor([0.0, 0.0, 1.0, 1.0], device=draw.device).repeat(windows, 1)
    side = 2 + draw.chance(0.5, windows).long()
    shorter = torch.where(draw.chance(recipe.padded, windows), draw.uniform((0.5, 1.0), windows), 1.0)
    view.scatter_(1, side[:, None], shorter[:, None])
    beyond = draw.uniform((0.0, 0.3), windows) * draw.chance(recipe.cropped, windows)
    view.scatter_(1, side[:, None] - 2, beyond[:, None])
    view[:, 2:] = torch.minimum(view[:, 2:], 1 - view[:, :2])
    return view


def _seen(view: Tensor, frame_px: int) -> Tensor:
    """(W, px, px) of 0 in the padding and 1 elsewhere."""
    x, y = pixel_centres(frame_px, view.device)
    left, top, width, height = view[:, :, None, None].unbind(1)
    within: Tensor = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return within.float()


def _labels(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, frame_px: int) -> Tensor:
    """Label maps (T, W, px, px) uint8."""
    windows = len(anatomy.size)
    warp, rough = (draw.uniform(between, windows) * anatomy.size for between in (recipe.warp, recipe.rough))
    moved = smooth_field(draw, length, anatomy.pace, 2, 5, frame_px) * warp[:, None, None, None]
    moved += smooth_field(draw, length, anatomy.pace, 2, 16, frame_px) * rough[:, None, None, None]
    coarse, fine = (smooth_field(draw, length, anatomy.pace, 1, cells, frame_px) for cells in (4, 10))
    level = draw.normal(2, windows, 1, 1)
    labels = ((coarse[:, :, 0] > level[0]).to(torch.uint8) + 2 * (fine[:, :, 0] > level[1]).to(torch.uint8)) + TISSUE
    tiles = cut(pixel_centres(frame_px, draw.device) + moved, labels)
    pose = poses(anatomy.structures, length)
    for k in PAINTED:
        paint(anatomy.structures, pose, k, tiles, FIRST + 2 * k)
    paint_around(anatomy.body, poses(anatomy.body, length), tiles, draw.chance(recipe.air, windows), AIR, FAT)
    return joined(tiles.labels, length, windows)


def _targets(labels: Tensor, anatomy: Anatomy, seen: Tensor) -> Tensor:
    """(T, W, px, px) int64: the target every pixel belongs to, or _BACKGROUND."""
    windows = labels.shape[1]
    table = torch.full((windows, FIRST + 2 * STRUCTURES), _BACKGROUND, dtype=torch.uint8, device=labels.device)
    table[:, FIRST:] = anatomy.target
    offset = torch.arange(windows, device=labels.device)[:, None, None] * table.shape[1]
    return torch.where(seen > 0, table.flatten()[labels.long() + offset], _BACKGROUND)


def _masks(targets: Tensor, tracks: Tracks) -> Tensor:
    """(T, M, 1, px, px) in {0, 1}, each in its track's own order."""
    step = torch.arange(len(targets), device=targets.device)[:, None]
    slices = torch.where(tracks.reverse, len(targets) - 1 - step, step)
    return (targets[slices, tracks.window] == tracks.target.to(torch.uint8)[:, None, None]).float()[:, :, None]


def _frames(recipe: AppearanceRecipe, draw: Draw, labels: Tensor, anatomy: Anatomy) -> Tensor:
    """(T, W, 3, px, px): one grey image three times, or for some windows three of them."""
    windows = labels.shape[1]
    own = torch.arange(FIRST, device=labels.device).repeat(windows, 1)
    pairs = 2 * anatomy.like[..., None] + torch.arange(2, device=labels.device)
    alike = torch.cat([own, FIRST + pairs.flatten(1)], 1)
    coloured = draw.chance(recipe.colours, windows).nonzero()[:, 0]
    source = torch.cat([torch.arange(windows, device=labels.device), coloured, coloured])
    grey = scan(recipe, draw, labels[:, source], alike[source])
    frames = grey[:, :windows].repeat(1, 1, 3, 1, 1)
    frames[:, coloured, 1] = grey[:, windows : windows + len(coloured), 0]
    frames[:, coloured, 2] = grey[:, windows + len(coloured) :, 0]
    return frames
