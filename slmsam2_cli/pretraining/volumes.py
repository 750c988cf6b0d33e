"""Draw clips of procedurally generated volumes: anatomy-like label maps with the intensities of many scanners.

The idea is that of SynthSeg (Billot et al. 2023, arXiv:2107.09559): a network trained on random appearances does not depend on any one.
Here the shapes are random too, with what propagation fails on: ends, look-alikes, branches and invisible borders.

    view, anatomy, scanner -> label map -> tracks (which structures are propagated, in which direction) -> intensities -> scanner effects
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.anatomy import PAINT_ORDER, STRUCTURES, Anatomy, AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.appearance import (
    RESOLUTIONS,
    AppearanceRecipe,
    ScannerRecipe,
    Scanners,
    draw_appearance,
    draw_scanners,
    render_labels,
    scan,
)
from slmsam2_cli.pretraining.random_fields import Draw, Fraction, LogRange, Range, smooth_field
from slmsam2_cli.pretraining.shapes import cross_sections, cut_tiles, join_tiles, paint, paint_around, pixel_centres
from slmsam2_cli.training.clips import Clips

MIN_TRACK_PX = 6  # pixels of a structure on the first slice of a track
AIR, FAT, TISSUE, SEPTUM, FIRST = 0, 1, 2, 6, 7  # labels: four tissues from TISSUE on, two labels per structure from FIRST on
NO_TARGET = 2 * STRUCTURES
MAIN_STRUCTURES = 2  # the first pair of structures, which is tracked more often
_NOT_A_START = 10**6


class VolumesRecipe(FrozenModel):
    """Every range and probability of the generator."""

    anatomy: AnatomyRecipe = Field(default=AnatomyRecipe(), description="structures and their relations")
    appearance: AppearanceRecipe = Field(default=AppearanceRecipe(), description="intensities and textures")
    scanner: ScannerRecipe = Field(default=ScannerRecipe(), description="modalities and scanner effects")
    air: Fraction = Field(default=0.5, description="share of windows that may show the outline of the body")
    septa: Fraction = Field(default=0.5, description="share of windows with thin layers between tissues")
    coarse_deformation: Range = Field(default=(0.04, 0.2), description="coarse deformation, in sizes of the first structure")
    fine_deformation: Range = Field(default=(0.01, 0.06), description="fine deformation, in sizes of the first structure")
    shifted_slices: Fraction = Field(
        default=0.1, description="share of windows whose slices are shifted against each other, as by breathing"
    )
    slice_shift: LogRange = Field(default=(0.002, 0.01), description="standard deviation of these shifts, image widths")
    misplaced_masks: Fraction = Field(default=0.05, description="share of windows whose masks are shifted against the image")
    mask_offset: Range = Field(default=(-0.025, 0.025), description="shift of misplaced masks along each axis, image widths")
    padded: Fraction = Field(default=0.5, description="share of windows with zeros below or to the right, as slices that are not square")
    cropped: Fraction = Field(default=0.12, description="share of windows that reach beyond the volume at the left or the top")
    pixelated_masks: Fraction = Field(default=0.6, description="share of masks drawn on the scanner's pixels, if coarser than the image's")
    differing_channels: Fraction = Field(default=0.05, description="share of windows whose three channels differ")
    ending_weight: float = Field(default=6.0, description="how much likelier a structure that ends within the clip is to be tracked")
    volume_slices: tuple[int, int] = Field(default=(8, 80), description="length of the procedurally generated volumes, slices")


@dataclass(frozen=True)
class ClipShape:
    """Size of what `draw_clips` draws: windows, slices of each, tracks at most, edge of the slices in pixels (a multiple of 16)."""

    windows: int
    length: int
    tracks: int
    input_size: int


def draw_clips(recipe: VolumesRecipe, rng: torch.Generator, shape: ClipShape, device: torch.device | None = None) -> Clips:
    """Draw windows of slices and at most `shape.tracks` tracks through them, at least one.

    rng: the only source of randomness, on `device` (default: the CPU) or on the CPU.
    """
    draw = Draw.on(device or torch.device("cpu"), rng)
    windows, length, px = shape.windows, shape.length, shape.input_size
    while True:
        view = _draw_view(recipe, draw, windows)
        anatomy = draw_anatomy(recipe.anatomy, draw, length, view)
        scanners = draw_scanners(recipe.scanner, draw, windows)
        pixelated = draw.bernoulli(recipe.pixelated_masks, windows)
        labels = _pixelate(scanners, pixelated, _draw_labels(recipe, draw, anatomy, length, px))
        visible = _visible(view, px)
        targets = _targets(labels, anatomy, visible)
        area = target_areas(targets, NO_TARGET)
        weight = (area.amax(0) / px**2).clamp(1e-3, 0.1)  # tiny targets are tracked less often
        weight[:, : 2 * MAIN_STRUCTURES] *= 3
        weight = weight * torch.where((area == 0).any(0), recipe.ending_weight, 1.0)
        tracks = choose_tracks(draw, area, weight, shape.tracks)
        if len(tracks.window):
            break
    frames = _render(recipe, draw, _misplace(recipe, draw, labels), anatomy, scanners, visible)
    low, high = recipe.volume_slices
    slices = max(length, int(draw.log_uniform((float(low), float(high)), 1)))
    return Clips(frames, _track_masks(targets, tracks), tracks.window, tracks.reverse, slices)


def _draw_view(recipe: VolumesRecipe, draw: Draw, windows: int) -> Tensor:
    """Draw left, top, width and height of the part without padding, (W, 4), image widths."""
    view = torch.tensor([0.0, 0.0, 1.0, 1.0], device=draw.device).repeat(windows, 1)
    side = draw.bernoulli(0.5, windows).long()[:, None]
    shorter = torch.where(draw.bernoulli(recipe.padded, windows), draw.uniform((0.5, 1.0), windows), 1.0)
    beyond = draw.uniform((0.0, 0.3), windows) * draw.bernoulli(recipe.cropped, windows)
    view.scatter_(1, side + 2, (shorter - beyond)[:, None])
    return view.scatter_(1, side, beyond[:, None])


def _visible(view: Tensor, input_size: int) -> Tensor:
    """Compute (W, px, px): 0 in the padding, 1 elsewhere."""
    x, y = pixel_centres(input_size, view.device)
    left, top, width, height = view[:, :, None, None].unbind(1)
    within: Tensor = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return within.float()


def _draw_labels(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """Draw label maps (T, W, px, px) uint8."""
    windows = len(anatomy.size)
    coordinates = pixel_centres(input_size, draw.device) + _draw_deformation(recipe, draw, anatomy, length, input_size)
    tiles = cut_tiles(coordinates, _draw_tissues(recipe, draw, anatomy, length, input_size))
    sections = cross_sections(anatomy.structures, length)
    for k in PAINT_ORDER:
        paint(anatomy.structures, sections, k, tiles, FIRST + 2 * k)
    paint_around(anatomy.body, cross_sections(anatomy.body, length), tiles, draw.bernoulli(recipe.air, windows), AIR, FAT)
    return join_tiles(tiles.labels, length, windows)


def _draw_deformation(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """Draw the displacement of every pixel, the same for all structures, (T, W, 2, px, px), image widths."""
    windows = len(anatomy.size)
    strengths = [draw.uniform(limits, windows) * anatomy.size for limits in (recipe.coarse_deformation, recipe.fine_deformation)]
    coarse, fine = (smooth_field(draw, length, anatomy.rate, 2, cells, input_size) for cells in (5, 16))
    field = coarse.mul_(strengths[0][:, None, None, None]).addcmul_(fine, strengths[1][:, None, None, None])
    shift = draw.log_uniform(recipe.slice_shift, windows, 1) * draw.bernoulli(recipe.shifted_slices, windows, 1)
    return field.add_((draw.normal(length, windows, 2) * shift)[..., None, None])


def _draw_tissues(recipe: VolumesRecipe, draw: Draw, anatomy: Anatomy, length: int, input_size: int) -> Tensor:
    """Draw what is between the structures, (T, W, px, px) uint8: four tissues, and thin layers where they meet."""
    windows = len(anatomy.size)
    coarse, fine = (smooth_field(draw, length, anatomy.rate, 1, cells, input_size)[:, :, 0] for cells in (4, 11))
    coarse.sub_(draw.normal(windows, 1, 1))
    fine.sub_(draw.normal(windows, 1, 1))
    tissue = (coarse > 0).to(torch.uint8).add_(TISSUE).add_((fine > 0).to(torch.uint8), alpha=2)
    thickness = draw.uniform((0.02, 0.12), windows, 1, 1) * draw.bernoulli(recipe.septa, windows, 1, 1)
    return tissue.masked_fill_(coarse.abs_() < thickness, SEPTUM)


def _pixelate(scanners: Scanners, pixelated: Tensor, labels: Tensor) -> Tensor:
    """Redraw labels (T, W, px, px) on the scanner's pixels where `pixelated` (W,) is True, in place."""
    px = labels.shape[-1]
    for index, resolution in enumerate(RESOLUTIONS):
        chosen = (pixelated & (scanners.resolution == index)).nonzero()[:, 0]
        if resolution < 1 and len(chosen):
            count = round(px * resolution)
            pixel = torch.arange(px, device=labels.device) * count // px
            centre = ((pixel + 0.5) * (px / count)).long()
            labels[:, chosen] = labels[:, chosen][..., centre, :][..., centre]
    return labels


def _misplace(recipe: VolumesRecipe, draw: Draw, labels: Tensor) -> Tensor:
    """Return label maps (T, W, px, px) for the image, which in some windows are shifted against those of the masks."""
    px = labels.shape[-1]
    chosen = draw.bernoulli(recipe.misplaced_masks, labels.shape[1]).nonzero()[:, 0]
    offset = (draw.uniform(recipe.mask_offset, 2, len(chosen), 1) * px).round().long()
    rows, columns = (torch.arange(px, device=draw.device) + offset).clamp(0, px - 1)
    if not len(chosen):
        return labels
    moved = labels.clone()
    moved[:, chosen] = labels[:, chosen[:, None, None], rows[:, :, None], columns[:, None]]
    return moved


def _targets(labels: Tensor, anatomy: Anatomy, visible: Tensor) -> Tensor:
    """Look up the target to which every pixel belongs, (T, W, px, px) uint8; NO_TARGET for background and padding."""
    windows = labels.shape[1]
    table = torch.full((windows, FIRST + 2 * STRUCTURES), NO_TARGET, dtype=torch.uint8, device=labels.device)
    table[:, FIRST:] = anatomy.target.flatten(1)
    offset = torch.arange(windows, dtype=torch.int32, device=labels.device)[:, None, None] * table.shape[1]
    targets = table.flatten().index_select(0, (labels + offset).flatten())
    return targets.view(labels.shape).masked_fill_(visible == 0, NO_TARGET)


def target_areas(targets: Tensor, count: int) -> Tensor:
    """Count the pixels of each target, (T, W, count), in target maps (T, W, px, px), where the value `count` is background."""
    slices, windows = targets.shape[:2]
    offset = torch.arange(slices * windows, device=targets.device).view(slices, windows, 1, 1) * (count + 1)
    counted = torch.bincount((targets + offset).flatten(), minlength=slices * windows * (count + 1))
    return counted.view(slices, windows, count + 1)[..., :-1]


class Tracks(NamedTuple):
    """(M,) each. window and target of every track; reverse: from the last slice to the first."""

    window: Tensor
    target: Tensor
    reverse: Tensor


def choose_tracks(draw: Draw, area: Tensor, weight: Tensor, count: int) -> Tracks:
    """Draw at most `count` tracks, evenly distributed over the windows, each from the first slice or from the last.

    area (T, W, targets): pixels; weight (W, targets): relative probability that a target is tracked.
    """
    starts = torch.stack([area[0], area[-1]], -1)
    score = weight.log()[..., None] - draw.uniform((1e-6, 1.0), *starts.shape).log().neg().log()  # Gumbel: draws without replacement
    score = torch.where(starts >= MIN_TRACK_PX, score, -torch.inf).flatten(1)
    order = score.argsort(dim=1, descending=True)
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.where(score.isfinite(), torch.empty_like(order).scatter_(1, order, position), _NOT_A_START).flatten()
    chosen = (rank + draw.uniform((0.0, 0.5), *rank.shape)).argsort()[:count]
    chosen = chosen[rank[chosen] < _NOT_A_START].sort().values
    window, rest = chosen // order.shape[1], chosen % order.shape[1]
    return Tracks(window, rest // 2, rest % 2 == 1)


def _track_masks(targets: Tensor, tracks: Tracks) -> Tensor:
    """Return masks (T, M, 1, px, px) in {0, 1}, each in its track's own order."""
    step = torch.arange(len(targets), device=targets.device)[:, None]
    slices = torch.where(tracks.reverse, len(targets) - 1 - step, step)
    chosen = targets.flatten(0, 1).index_select(0, (slices * targets.shape[1] + tracks.window).flatten())
    masks = chosen.view(len(targets), len(tracks.window), 1, *targets.shape[2:]) == tracks.target.to(torch.uint8)[:, None, None, None]
    return masks.float()


def _render(recipe: VolumesRecipe, draw: Draw, labels: Tensor, anatomy: Anatomy, scanners: Scanners, visible: Tensor) -> Tensor:
    """Render label maps as frames (T, W, 3, px, px): one image three times, or three different ones in some windows."""
    windows = labels.shape[1]
    everyone = torch.arange(windows, device=labels.device)
    tissues = torch.arange(FIRST, device=labels.device).repeat(windows, 1)
    shared = torch.cat([tissues, FIRST + anatomy.appearance.flatten(1)], 1)
    differing = draw.bernoulli(recipe.differing_channels, windows).nonzero()[:, 0]
    source = torch.cat([everyone, differing, differing])
    if len(differing):
        labels, shared = labels[:, source], shared[source]
        scanners = Scanners(scanners.modality[source], scanners.resolution[source])
    appearance = draw_appearance(recipe.appearance, draw, scanners.modality, shared, SEPTUM, FIRST)
    images = scan(recipe.scanner, draw, scanners, render_labels(draw, appearance, labels))
    frames = images[:, :windows].mul_(visible)[:, :, None].repeat(1, 1, 3, 1, 1)
    for channel in (1, 2) if len(differing) else ():
        other = images[:, windows + (channel - 1) * len(differing) :][:, : len(differing)]
        frames[:, differing, channel] = other * visible[differing]
    return frames
