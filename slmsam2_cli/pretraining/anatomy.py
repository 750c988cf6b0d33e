"""Which structures a window holds: sizes, places, ends, and how neighbours relate.

A window has GROUPS pairs of structures, the first pair being what the window is about, and MINOR small ones that only get in the
way. The second of a pair may be a look-alike, another branch of the same structure, its reappearance, or a nodule in it. Lengths
through the slices follow from the slice distance, so that what is large in the slice is long through the slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import Frozen
from slmsam2_cli.pretraining.draw import Draw, Range
from slmsam2_cli.pretraining.shapes import Primitives

GROUPS, MINOR = 4, 4
STRUCTURES = 2 * GROUPS + MINOR
PAINTED = (6, 7, 4, 5, 2, 3, 0, 1, 8, 9, 10, 11)  # later ones hide earlier ones
ALONE, LOOK_ALIKE, BRANCH, RETURN, NODULE = range(5)
WHOLE, HALVES, SHELL = range(3)


class AnatomyRecipe(Frozen):
    """What structures look like. Sizes are in frame widths."""

    close: float = Field(default=0.5, description="share of windows that are crops around the first structure")
    close_size: Range = Field(default=(0.35, 0.65), description="longest side of the first structure in a crop")
    far_size: Range = Field(default=(0.03, 0.35), description="the same in a whole slice")
    relative_size: Range = Field(default=(0.3, 1.6), description="size of other structures, times the first one's")
    half_length: Range = Field(default=(1.5, 14.0), description="half the length of the first structure, slices")
    still: float = Field(default=0.12, description="share of windows in which hardly anything changes from slice to slice")
    still_half_length: Range = Field(default=(25.0, 100.0), description="half_length of these")
    lean: float = Field(default=0.35, description="how far structures lean: standard deviation of the slope of their axis")
    ends: float = Field(default=0.75, description="share of structures with an end within the clip")
    pairs: tuple[float, float, float, float, float] = Field(
        default=(0.3, 0.3, 0.15, 0.1, 0.15), description="second of a pair: none, look-alike, branch, return, nodule"
    )
    interiors: tuple[float, float, float] = Field(default=(0.6, 0.22, 0.18), description="one label, cut in two, wall and inside")
    minor_size: Range = Field(default=(0.02, 0.12), description="size of what gets in the way")
    body_size: Range = Field(default=(0.3, 0.75), description="radii of the body's outline")


@dataclass
class Anatomy:
    """What one call draws for W windows of K structures.

    target (W, 2K): which target a label of a structure belongs to; size (W,): of the first structure, frame widths;
    pace (W,): how fast forms change, per slice; like (W, K): index of the structure whose grey values a structure shares;
    """

    structures: Primitives
    body: Primitives
    target: Tensor
    like: Tensor
    interior: Tensor
    size: Tensor
    pace: Tensor


class Scale(NamedTuple):
    """(W,) each: size of the first structure, and half its length in slices."""

    size: Tensor
    half: Tensor


def draw_anatomy(recipe: AnatomyRecipe, draw: Draw, windows: int, length: int, view: Tensor) -> Anatomy:
    """view (W, 4): left, top, width and height of what is not padding, frame widths."""
    scale = _scale(recipe, draw, windows, view)
    structures = _leaders(recipe, draw, scale, length, view)
    role = draw.pick(recipe.pairs, windows, GROUPS)
    _follow(draw, structures, role, length)
    interior = _interiors(recipe, draw, structures)
    target = torch.arange(2 * STRUCTURES, device=draw.device).repeat(windows, 1).view(windows, STRUCTURES, 2)
    whole = draw.chance(0.3, windows, STRUCTURES)
    target[..., 1] = torch.where(whole | (interior == WHOLE), target[..., 0], target[..., 1])
    same = (role == BRANCH) | (role == RETURN)
    target[:, 1 : 2 * GROUPS : 2] = torch.where(same[..., None], target[:, 0 : 2 * GROUPS : 2], target[:, 1 : 2 * GROUPS : 2])
    like = torch.arange(STRUCTURES, device=draw.device).repeat(windows, 1)
    like[:, 1 : 2 * GROUPS : 2] -= ((role >= LOOK_ALIKE) & (role <= RETURN)).long()
    body = _body(recipe, draw, scale, length, view)
    pace = (draw.uniform((0.5, 2.0), windows) / scale.half).clamp(max=0.9)
    return Anatomy(structures, body, target.flatten(1), like, interior, scale.size, pace)


def _scale(recipe: AnatomyRecipe, draw: Draw, windows: int, view: Tensor) -> Scale:
    close = draw.chance(recipe.close, windows)
    size = torch.where(close, draw.uniform(recipe.close_size, windows), draw.spread(recipe.far_size, windows))
    still = draw.chance(recipe.still, windows)
    half = torch.where(still, draw.spread(recipe.still_half_length, windows), draw.spread(recipe.half_length, windows))
    return Scale(size * view[:, 2:].amin(1), half)


def _leaders(recipe: AnatomyRecipe, draw: Draw, scale: Scale, length: int, view: Tensor) -> Primitives:
    """All structures, as if none of them had anything to do with another."""
    shape = len(view), STRUCTURES
    size = scale.size[:, None] * draw.spread(recipe.relative_size, *shape)
    size[:, 0] = scale.size
    size[:, 2 * GROUPS :] = draw.spread(recipe.minor_size, len(view), MINOR)
    size = size.clamp(0.025, 0.7)
    slim = torch.where(draw.chance(0.3, *shape), draw.spread((2.0, 7.0), *shape), draw.spread((1.0, 2.0), *shape))
    long = size / 2
    per_slice = (scale.size / (2 * scale.half))[:, None]  # slice distance, frame widths
    tube = draw.chance(0.15, *shape)
    half = long / slim.sqrt() * draw.spread((0.6, 1.8), *shape) / per_slice
    half[:, 0] = scale.half
    half = torch.where(tube, half * draw.spread((2.0, 8.0), *shape), half).clamp(min=0.4)
    slope = draw.normal(2, *shape) * recipe.lean * per_slice
    x, y = _places(draw, size, view)
    return Primitives(
        x=x,
        y=y,
        drift_x=slope[0],
        drift_y=slope[1],
        at=draw.uniform((0.0, length - 1.0), *shape),
        long=long,
        short=torch.maximum(long / slim, torch.tensor(0.012, device=draw.device)),
        angle=draw.uniform((0.0, 6.2832), *shape),
        twist=draw.normal(*shape) * 0.5 / half.clamp(min=2.0),
        bend=draw.normal(*shape) * 0.3 * slim.clamp(max=4.0),
        square=draw.uniform((0.0, 0.6), *shape),
        middle=_middles(recipe, draw, half, length),
        half=half,
        blunt=draw.uniform((1.8, 5.0), *shape),
        cut_long=torch.zeros(shape, device=draw.device),
        cut_short=torch.zeros(shape, device=draw.device),
        cut_tilt=torch.zeros(shape, device=draw.device),
        cut_at=torch.full(shape, 100.0, device=draw.device),
        shell=torch.zeros(shape, device=draw.device),
    )


def _places(draw: Draw, size: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (W, K): the first anywhere in the view (a large one nearer to its middle), half of the others around it."""
    windows, count = size.shape
    free = (1 - size / view[:, 2:].amin(1, keepdim=True)).clamp(min=0.1)
    anywhere = 0.5 + (draw.uniform((-0.5, 0.5), 2, windows, count)) * free
    x, y = view[:, :1] + anywhere[0] * view[:, 2:3], view[:, 1:2] + anywhere[1] * view[:, 3:]
    turn = draw.uniform((0.0, 6.2832), windows, count)
    away = draw.uniform((0.4, 0.9), windows, count) * (size[:, :1] + size)
    near = draw.chance(0.5, windows, count)
    near[:, 0] = False
    return torch.where(near, x[:, :1] + away * turn.cos(), x), torch.where(near, y[:, :1] + away * turn.sin(), y)


def _middles(recipe: AnatomyRecipe, draw: Draw, half: Tensor, length: int) -> Tensor:
    """Centres through the slices: some end within the clip, the others are met on a random slice of it."""
    shape = tuple(half.shape)
    within = draw.uniform((0.4, length - 1.4), *shape) + half * draw.sign(*shape) if length > 1 else torch.zeros_like(half)
    met = draw.uniform((0.0, length - 1.0), *shape) + half * draw.uniform((-0.85, 0.85), *shape)
    ends = draw.chance(recipe.ends if length > 1 else 0.0, *shape)
    return torch.where(ends, within, met)


def _follow(draw: Draw, all_of_them: Primitives, role: Tensor, length: int) -> None:
    """Make the second of each pair what its role says, in place."""
    shape = tuple(role.shape)

    def pair(name: str) -> tuple[Tensor, Tensor]:
        values: Tensor = getattr(all_of_them, name)[:, : 2 * GROUPS]
        return values[:, 0::2], values[:, 1::2]

    def put(name: str, value: Tensor, where: Tensor) -> None:
        second = pair(name)[1]
        second.copy_(torch.where(where, value, second))

    alike = (role >= LOOK_ALIKE) & (role <= RETURN)
    for name in ("long", "short", "half", "blunt", "bend", "square", "twist", "at"):
        first = pair(name)[0]
        put(name, first * draw.spread((0.8, 1.25), *shape) if name in ("long", "short", "half") else first, alike)
    long, half = pair("long")[0], pair("half")[0]
    turn, angle = draw.uniform((0.0, 6.2832), *shape), pair("angle")[0]
    put("angle", angle + 0.3 * draw.normal(*shape), alike)
    apart = long * torch.where(role == LOOK_ALIKE, draw.uniform((0.9, 2.2), *shape), draw.uniform((0.0, 0.5), *shape))
    for name, offset in (("x", turn.cos()), ("y", turn.sin())):
        put(name, pair(name)[0] + offset * apart, role != ALONE)
        drift = f"drift_{name}"
        put(drift, pair(drift)[0] + offset * long / half * draw.uniform((0.5, 2.0), *shape), role == BRANCH)
        put(drift, pair(drift)[0], (role == LOOK_ALIKE) | (role == NODULE))
    put("at", pair("at")[0], role != ALONE)
    put("middle", pair("middle")[0] + half * draw.uniform((-0.5, 0.5), *shape), (role == BRANCH) | (role == NODULE))
    other_end = pair("middle")[0] + (half + pair("half")[1]) * draw.sign(*shape) * draw.uniform((0.9, 1.1), *shape)
    put("middle", other_end, (role == LOOK_ALIKE) & draw.chance(0.5, *shape))
    gap = draw.uniform((1.0, 3.0), *shape)
    put("middle", pair("middle")[0] + draw.sign(*shape) * (half + pair("half")[1] + gap), role == RETURN)
    small = draw.uniform((0.2, 0.5), *shape)
    for name in ("long", "short", "half"):
        put(name, (pair(name)[0] * small).clamp(min=0.012), role == NODULE)
    put("half", torch.full(shape, 1e-3, device=draw.device), role == ALONE)
    put("middle", torch.full(shape, -9.0, device=draw.device), role == ALONE)


def _interiors(recipe: AnatomyRecipe, draw: Draw, all_of_them: Primitives) -> Tensor:
    """Cut some structures in two and hollow others out, in place; returns (W, K) of WHOLE, HALVES or SHELL."""
    windows, count = all_of_them.x.shape
    interior = draw.pick(recipe.interiors, windows, count)
    halves, shell = interior == HALVES, interior == SHELL
    across = draw.uniform((-0.6, 0.6), windows, count)
    all_of_them.cut_long = torch.where(halves, across.cos(), 0.0) * draw.sign(windows, count)
    all_of_them.cut_short = torch.where(halves, across.sin(), 0.0)
    all_of_them.cut_tilt = torch.where(halves, draw.normal(windows, count) * 0.7, 0.0)
    all_of_them.cut_at = torch.where(halves, draw.uniform((-0.4, 0.4), windows, count), torch.where(shell, 0.0, 100.0))
    all_of_them.shell = torch.where(shell, draw.uniform((0.12, 0.6), windows, count), 0.0)
    return interior


def _body(recipe: AnatomyRecipe, draw: Draw, scale: Scale, length: int, view: Tensor) -> Primitives:
    """The body's outline, one per window with a layer of fat, (W, 1)."""
    one = len(view), 1
    zero = torch.zeros(one, device=draw.device)
    long = draw.uniform(recipe.body_size, *one) * view[:, 2:].amax(1, keepdim=True)
    slant = 0.1 * draw.normal(2, *one) * (scale.size / scale.half)[:, None]
    middle = view[:, None, :2] + view[:, None, 2:] * draw.uniform((0.3, 0.7), *one, 2)
    return Primitives(
        x=middle[..., 0],
        y=middle[..., 1],
        drift_x=slant[0],
        drift_y=slant[1],
        at=draw.uniform((0.0, float(length)), *one),
        long=long,
        short=long * draw.uniform((0.5, 1.0), *one),
        angle=draw.uniform((0.0, 6.2832), *one),
        twist=zero,
        bend=0.2 * draw.normal(*one),
        square=draw.uniform((0.0, 0.7), *one),
        middle=zero + length / 2,
        half=zero + 1000.0,
        blunt=zero + 2.0,
        cut_long=zero,
        cut_short=zero,
        cut_tilt=zero,
        cut_at=zero,
        shell=draw.uniform((0.02, 0.3), *one),
    )
