"""Draw clips of procedurally generated volumes: anatomy-like label maps with the grey values of many scanners.

After the idea of SynthSeg (Billot et al. 2023, arXiv:2107.09559): a network that has seen every appearance needs to know none.
Here the forms are drawn too, with what propagation stumbles over: ends, look-alikes, branches and invisible borders.

Which structures of a window are followed, and which way: from its first slice or from its last, ends preferred.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.anatomy import PAINTED, STRUCTURES, Anatomy, AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.appearance import (
    PIXELS,
    AppearanceRecipe,
    ScannerRecipe,
    Scanners,
    draw_appearance,
    draw_scanners,
    filled,
    scanned,
)
from slmsam2_cli.pretraining.random_fields import Draw, LogRange, Range, Share, smooth_field
from slmsam2_cli.pretraining.shapes import cut, joined, paint, paint_around, pixel_centres, poses
from slmsam2_cli.training.clips import Clips

SMALLEST_PX = 6
_NEVER = 10**6


class Tracks(NamedTuple):
    """(M,) each: window, target and direction of every track."""

    window: Tensor
    target: Tensor
    reverse: Tensor


def areas(targets: Tensor, count: int) -> Tensor:
    """Target maps (T, W, px, px), `count` being background -> pixels of each target, (T, W, count)."""
    slices, windows = targets.shape[:2]
    place = torch.arange(slices * windows, device=targets.device).view(slices, windows, 1, 1) * (count + 1)
    counted = torch.bincount((targets + place).flatten(), minlength=slices * windows * (count + 1))
    return counted.view(slices, windows, count + 1)[..., :-1]


def choose(draw: Draw, area: Tensor, weight: Tensor, tracks: int) -> Tracks:
    """At most `tracks` tracks, spread evenly over the windows.

    area (T, W, targets): pixels; weight (W, targets): how likely a target is to be followed, compared with the others.
    """
    edges = torch.stack([area[0], area[-1]], -1)
    eager = weight.log()[..., None] - draw.uniform((1e-6, 1.0), *edges.shape).log().neg().log()  # Gumbel: a draw without replacement
    eager = torch.where(edges >= SMALLEST_PX, eager, -torch.inf).flatten(1)
    order = eager.argsort(dim=1, descending=True)
    turn = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.where(eager.isfinite(), torch.empty_like(order).scatter_(1, order, turn), _NEVER).flatten()
    chosen = (rank + draw.uniform((0.0, 0.5), *rank.shape)).argsort()[:tracks]
    chosen = chosen[rank[chosen] < _NEVER].sort().values
    window, rest = chosen // order.shape[1], chosen % order.shape[1]
    return Tracks(window, rest // 2, rest % 2 == 1)


AIR, FAT, TISSUE, SEPTUM, FIRST = 0, 1, 2, 6, 7  # labels: four tissues from TISSUE on, two labels for every structure from FIRST on
NO_TARGET = 2 * STRUCTURES
ABOUT = 2  # structures that a window is about


class VolumesRecipe(FrozenModel):
    """What the generator draws from: every range and every probability."""

    anatomy: AnatomyRecipe = Field(default=AnatomyRecipe(), description="structures and what they are to each other")
    appearance: AppearanceRecipe = Field(default=AppearanceRecipe(), description="grey values and textures")
    scanner: ScannerRecipe = Field(default=ScannerRecipe(), description="kinds of scanners and their faults")
    air: Share = Field(default=0.5, description="share of windows in which the body's outline may be seen")
    septa: Share = Field(default=0.5, description="share of windows with thin layers between tissues")
    warp: Range = Field(default=(0.04, 0.2), description="coarse deformation, in sizes of the first structure")
    rough: Range = Field(default=(0.01, 0.06), description="fine deformation, in sizes of the first structure")
    unsteady: Share = Field(default=0.1, description="share of windows whose slices are shifted against each other, as by breathing")
    shift: LogRange = Field(default=(0.002, 0.01), description="standard deviation of these shifts, frame widths")
    misplaced: Share = Field(default=0.05, description="share of windows whose masks lie beside what is seen, as if drawn on another image")
    beside: Range = Field(default=(-0.025, 0.025), description="how far beside, along each axis, frame widths")
    padded: Share = Field(default=0.5, description="share of windows with zeros below or to the right, as slices that are not square")
    cropped: Share = Field(default=0.12, description="share of windows that reach beyond the volume at the left or the top")
    blocky: Share = Field(default=0.6, description="share of masks drawn on the scanner's pixels, where these are coarser than the frame's")
    colours: Share = Field(default=0.05, description="share of windows whose three channels differ")
    eager: float = Field(default=6.0, description="how much likelier a structure that ends within the clip is to be followed")
    slices: tuple[int, int] = Field(default=(8, 80), description="length of the procedurally generated volumes")


def draw_clips(
    recipe: VolumesRecipe,
    rng: torch.Generator,
    windows: int,
    length: int,
    tracks: int,
    input_size: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  a value
) -> Clips:
    """W windows of `length` slices and at most `tracks` tracks through them; at least one.

    All randomness comes from `rng`, of the device or of the CPU. input_size: a multiple of 16.
    """
    draw = Draw.on(device, rng)
    while True:
        view = _view(recipe, draw, windows)
        anatomy = draw_anatomy(recipe.anatomy, draw, length, view)
        scanners = draw_scanners(recipe.scanner, draw, windows)
        labels = _blocky(draw, scanners, draw.chance(recipe.blocky, windows), _labels(recipe, draw, anatomy, length, input_size))
        seen = _seen(view, input_size)
        targets = _targets(labels, anatomy, seen)
        area = areas(targets, NO_TARGET)
        chosen = choose(draw, area, _weights(recipe, area, input_size), tracks)
        if len(chosen.window):
            break
    frames = _frames(recipe, draw, _misplaced(recipe, draw, labels), anatomy, scanners, seen)
    slices = max(length, int(draw.spread((float(recipe.slices[0]), float(recipe.slices[1])), 1)))
    return Clips(frames, _masks(targets, chosen), chosen.window, chosen.reverse, slices)


def _view(recipe: VolumesRecipe, draw: Draw, windows: int) -> Tensor:
    """(W, 4): left, top, width and height of what is not padding, frame widths."""
    view = torch.tensor([0.0, 0.0, 1.0, 1.0], device=draw.device).repeat(windows, 1)
    side = draw.chance(0.5, windows).long()[:, None]
    shorter = torch.where(draw.chance(recipe.padded, windows), draw.uniform((0.5, 1.0), windows), 1.0)
    beyond = draw.uniform((0.0, 0.3), windows) * draw.chance(recipe.cropped, windows)
    view.scatter_(1, side + 2, (shorter - beyond)[:, None])
    return view.scatter_(1, side, beyond[:, None])


def _seen(view: Tensor, input_size: int) -> Tensor:
    """(W, px, px) of 0 in the padding and 1 elsewhere."""
    x, y = pixel_centres(input_size, view.device)
    left, top, width, height = view[:, :, None, None].unbind(1)
    within: Tensor = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return within.float()


def _labels(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """Label maps (T, W, px, px) uint8."""
    windows = len(anatomy.size)
    where = pixel_centres(input_size, draw.device) + _displacement(recipe, draw, anatomy, length, input_size)
    tiles = cut(where, _tissues(recipe, draw, anatomy, length, input_size))
    pose = poses(anatomy.structures, length)
    for k in PAINTED:
        paint(anatomy.structures, pose, k, tiles, FIRST + 2 * k)
    paint_around(anatomy.body, poses(anatomy.body, length), tiles, draw.chance(recipe.air, windows), AIR, FAT)
    return joined(tiles.labels, length, windows)


def _displacement(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """(T, W, 2, px, px): how far every pixel is moved, the same for everything in it, frame widths."""
    windows = len(anatomy.size)
    warp, rough = (draw.uniform(between, windows) * anatomy.size for between in (recipe.warp, recipe.rough))
    coarse, fine = (smooth_field(draw, length, anatomy.pace, 2, cells, input_size) for cells in (5, 16))
    moved = coarse.mul_(warp[:, None, None, None]).addcmul_(fine, rough[:, None, None, None])
    shift = draw.spread(recipe.shift, windows, 1) * draw.chance(recipe.unsteady, windows, 1)
    return moved.add_((draw.normal(length, windows, 2) * shift)[..., None, None])


def _tissues(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """(T, W, px, px) uint8: what lies between the structures: four tissues, and thin layers where one gives way to another."""
    windows = len(anatomy.size)
    coarse, fine = (smooth_field(draw, length, anatomy.pace, 1, cells, input_size)[:, :, 0] for cells in (4, 11))
    coarse.sub_(draw.normal(windows, 1, 1))
    fine.sub_(draw.normal(windows, 1, 1))
    tissue = (coarse > 0).to(torch.uint8).add_(TISSUE).add_((fine > 0).to(torch.uint8), alpha=2)
    thickness = draw.uniform((0.02, 0.12), windows, 1, 1) * draw.chance(recipe.septa, windows, 1, 1)
    return tissue.masked_fill_(coarse.abs_() < thickness, SEPTUM)


def _blocky(draw: Draw, scanners: Scanners, chosen: Tensor, labels: Tensor) -> Tensor:
    """Labels (T, W, px, px) drawn on the scanner's pixels in the windows chosen (W,), in place."""
    px = labels.shape[-1]
    for choice, share in enumerate(PIXELS):
        some = (chosen & (scanners.pixels == choice)).nonzero()[:, 0]
        if share < 1 and len(some):
            count = round(px * share)
            pixel = torch.arange(px, device=draw.device) * count // px
            centre = ((pixel + 0.5) * (px / count)).long()
            labels[:, some] = labels[:, some][..., centre, :][..., centre]
    return labels


def _misplaced(recipe: VolumesRecipe, draw: Draw, labels: Tensor) -> Tensor:
    """Label maps (T, W, px, px) as the scanner sees them: in some windows not quite where the masks are."""
    px = labels.shape[-1]
    some = draw.chance(recipe.misplaced, labels.shape[1]).nonzero()[:, 0]
    beside = (draw.uniform(recipe.beside, 2, len(some), 1) * px).round().long()
    rows, columns = (torch.arange(px, device=draw.device) + beside).clamp(0, px - 1)
    if not len(some):
        return labels
    moved = labels.clone()
    moved[:, some] = labels[:, some[:, None, None], rows[:, :, None], columns[:, None]]
    return moved


def _targets(labels: Tensor, anatomy: Anatomy, seen: Tensor) -> Tensor:
    """(T, W, px, px) uint8: the target every pixel belongs to, or NO_TARGET."""
    windows = labels.shape[1]
    table = torch.full((windows, FIRST + 2 * STRUCTURES), NO_TARGET, dtype=torch.uint8, device=labels.device)
    table[:, FIRST:] = anatomy.target.flatten(1)
    offset = torch.arange(windows, dtype=torch.int32, device=labels.device)[:, None, None] * table.shape[1]
    found = table.flatten().index_select(0, (labels + offset).flatten())
    return found.view(labels.shape).masked_fill_(seen == 0, NO_TARGET)


def _weights(recipe: VolumesRecipe, area: Tensor, input_size: int) -> Tensor:
    """(W, targets): what the window is about comes first, small things last, and ends are wanted."""
    weight = (area.amax(0) / input_size**2).clamp(1e-3, 0.1)
    weight[:, : 2 * ABOUT] *= 3
    return weight * torch.where((area == 0).any(0), recipe.eager, 1.0)


def _masks(targets: Tensor, tracks: Tracks) -> Tensor:
    """(T, M, 1, px, px) in {0, 1}, each in its track's own order."""
    step = torch.arange(len(targets), device=targets.device)[:, None]
    slices = torch.where(tracks.reverse, len(targets) - 1 - step, step)
    seen = targets.flatten(0, 1).index_select(0, (slices * targets.shape[1] + tracks.window).flatten())
    masks = seen.view(len(targets), len(tracks.window), 1, *targets.shape[2:]) == tracks.target.to(torch.uint8)[:, None, None, None]
    return masks.float()


def _frames(recipe: VolumesRecipe, draw: Draw, labels: Tensor, anatomy: Anatomy, scanners: Scanners, seen: Tensor) -> Tensor:
    """(T, W, 3, px, px): one grey image three times, or for some windows three of them."""
    windows = labels.shape[1]
    everyone = torch.arange(windows, device=labels.device)
    tissues = torch.arange(FIRST, device=labels.device).repeat(windows, 1)
    alike = torch.cat([tissues, FIRST + anatomy.like.flatten(1)], 1)
    coloured = draw.chance(recipe.colours, windows).nonzero()[:, 0]
    source = torch.cat([everyone, coloured, coloured])
    if len(coloured):
        labels, alike, scanners = labels[:, source], alike[source], scanners.of(source)
    looks = draw_appearance(recipe.appearance, draw, scanners.kind, alike, SEPTUM, FIRST)
    grey = scanned(recipe.scanner, draw, scanners, filled(draw, looks, labels))
    frames = grey[:, :windows].mul_(seen)[:, :, None].repeat(1, 1, 3, 1, 1)
    for channel in (1, 2) if len(coloured) else ():
        other = grey[:, windows + (channel - 1) * len(coloured) :][:, : len(coloured)]
        frames[:, coloured, channel] = other * seen[coloured]
    return frames
