"""Which structures a window holds: their sizes, places and ends, and what they are to each other.

A window has GROUPS pairs of structures, the first pair being what the window is about, and MINOR small ones that mostly get in the
way. Lengths through the slices follow from the slice distance, so what is large in the slice is long through the slices.

What the second structure of a pair is to the first: a look-alike, a branch, its return, or a nodule in it.

Propagation fails most where a structure ends next to something that looks like it, so a look-alike often begins where the first
ends, or lies mirrored on the other side, as organs in pairs do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.random_fields import Draw, Five, LogRange, Range, Share, Three
from slmsam2_cli.pretraining.shapes import Primitives

ALONE, LOOK_ALIKE, BRANCH, RETURN, NODULE = range(5)
_FORM = ("long", "short", "half", "blunt", "bend", "square", "twist", "angle")


class _Pairs:
    """The structures 0, 2, 4, ... and their seconds 1, 3, 5, ...; what is put is put in place."""

    def __init__(self, structures: Primitives, groups: int) -> None:
        self.structures, self.count = structures, 2 * groups

    def first(self, name: str) -> Tensor:
        values: Tensor = getattr(self.structures, name)
        return values[:, 0 : self.count : 2]

    def second(self, name: str) -> Tensor:
        values: Tensor = getattr(self.structures, name)
        return values[:, 1 : self.count : 2]

    def put(self, name: str, value: Tensor, where: Tensor) -> None:
        self.second(name).copy_(torch.where(where, value, self.second(name)))


def relate(draw: Draw, structures: Primitives, role: Tensor, view: Tensor) -> None:
    """Make the second of each pair what its role (W, groups) says, in place; ALONE leaves it as it is. view: see draw_anatomy."""
    pairs = _Pairs(structures, role.shape[1])
    _form(draw, pairs, role)
    _place(draw, pairs, role)
    _ends(draw, pairs, role)
    _mirror(draw, pairs, role, view)


def _form(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Look-alikes, branches and returns have nearly the form of the first; nodules are a fraction of its size."""
    shape = tuple(role.shape)
    alike = (role == LOOK_ALIKE) | (role == BRANCH) | (role == RETURN)
    for name in _FORM:
        pairs.put(name, pairs.first(name), alike)
    for name in ("long", "short", "half"):
        pairs.put(name, pairs.second(name) * draw.spread((0.75, 1.3), *shape), alike)
    pairs.put("angle", pairs.second("angle") + 0.4 * draw.normal(*shape), alike)
    fraction = draw.uniform((0.2, 0.5), *shape)
    for name in ("long", "short"):
        pairs.put(name, (pairs.first(name) * fraction).clamp(min=0.0115), role == NODULE)
    pairs.put("half", (pairs.first("half") * fraction).clamp(min=0.6), role == NODULE)


def _place(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Beside the first, or in it, moving with it; branches move away from it."""
    shape = tuple(role.shape)
    turn, long = draw.uniform((0.0, math.tau), *shape), pairs.first("long")
    apart = long * torch.where(role == LOOK_ALIKE, draw.uniform((0.8, 2.0), *shape), draw.uniform((0.0, 0.5), *shape))
    parting = draw.uniform((0.5, 2.0), *shape) * long / pairs.first("half")
    pairs.put("at", pairs.first("at"), role != ALONE)
    for axis, cosine in (("x", turn.cos()), ("y", turn.sin())):
        drift = pairs.first(f"drift_{axis}")
        pairs.put(axis, pairs.first(axis) + apart * cosine, role != ALONE)
        pairs.put(f"drift_{axis}", drift, role != ALONE)
        pairs.put(f"drift_{axis}", drift + parting * cosine, role == BRANCH)


def _ends(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Half of the look-alikes begin about where the first ends; returns come after a gap."""
    shape = tuple(role.shape)
    middle, half, other = pairs.first("middle"), pairs.first("half"), pairs.second("half")
    pairs.put("middle", middle + half * draw.uniform((-0.5, 0.5), *shape), (role == BRANCH) | (role == NODULE))
    after = middle + draw.sign(*shape) * (half + other) * draw.uniform((0.85, 1.1), *shape)
    pairs.put("middle", after, (role == LOOK_ALIKE) & draw.chance(0.5, *shape))
    gap = draw.uniform((1.0, 3.0), *shape)
    pairs.put("middle", middle + draw.sign(*shape) * (half + other + gap), role == RETURN)


def _mirror(draw: Draw, pairs: _Pairs, role: Tensor, view: Tensor) -> None:
    """A third of the look-alikes lie on the other side of the view's middle."""
    across = (role == LOOK_ALIKE) & draw.chance(0.35, *role.shape)
    pairs.put("x", 2 * view[:, :1] + view[:, 2:3] - pairs.first("x"), across)
    pairs.put("y", pairs.first("y") + 0.1 * pairs.first("long") * draw.normal(*role.shape), across)
    for name, value in (("angle", math.pi - pairs.first("angle")), ("bend", -pairs.first("bend"))):
        pairs.put(name, value, across)
    for name in ("drift_x", "twist"):
        pairs.put(name, -pairs.first(name), across)


GROUPS, MINOR = 4, 4
STRUCTURES = 2 * GROUPS + MINOR
PAINTED = (6, 7, 4, 5, 2, 3, 0, 1, 8, 9, 10, 11)  # later ones hide earlier ones
WHOLE, HALVES, SHELL = range(3)
_NOWHERE = 100.0  # a cut that is never reached


class AnatomyRecipe(FrozenModel):
    """What structures look like. Sizes are in frame widths, as longest side."""

    close: Share = Field(default=0.75, description="share of windows that are crops around the first structure")
    close_size: Range = Field(default=(0.38, 0.68), description="size of the first structure in a crop")
    far_size: LogRange = Field(default=(0.07, 0.45), description="the same in a whole slice")
    tiny: Share = Field(default=0.08, description="share of windows about something tiny")
    tiny_size: Range = Field(default=(0.025, 0.06), description="its size")
    other_size: LogRange = Field(default=(0.1, 0.55), description="size of other structures")
    minor_size: LogRange = Field(default=(0.03, 0.15), description="size of what gets in the way")
    half_length: LogRange = Field(default=(4.0, 45.0), description="half the length of the first structure, slices")
    still: Share = Field(default=0.12, description="share of windows in which hardly anything changes from slice to slice")
    still_half_length: LogRange = Field(default=(60.0, 200.0), description="half_length of these")
    through: Share = Field(default=0.0, description="share of windows of thick slices, through which the first structure goes on")
    thicker: LogRange = Field(default=(1.0, 4.0), description="how many times thicker their slices are")
    further: LogRange = Field(default=(5.0, 40.0), description="how many times longer than its half_length that structure is")
    lean: float = Field(default=0.3, description="slope of a structure's axis, standard deviation")
    tubes: Share = Field(default=0.2, description="share of structures that go on through many slices")
    slender: Share = Field(default=0.3, description="share of structures that are long and thin in the slice")
    ends: Share = Field(default=0.85, description="share of structures with an end within the clip")
    pairs: Five = Field(default=(0.25, 0.35, 0.15, 0.1, 0.15), description="shares of pairs: unrelated, look-alike, branch, return, nodule")
    interiors: Three = Field(default=(0.68, 0.18, 0.14), description="shares: whole, cut in two, wall and inside")
    one_target: Share = Field(default=0.3, description="share of cut or hollow structures that are followed as a whole")
    faint_cut: Share = Field(default=0.5, description="share of cuts with hardly a border in the image")
    clusters: Share = Field(default=0.25, description="share of windows whose small structures are one cluster, followed together")
    body_size: Range = Field(default=(0.3, 0.75), description="long radius of the body")


@dataclass
class Anatomy:
    """What one call draws for W windows of K structures.

    target (W, K, 2): the target that a structure's labels belong to; like (W, K, 2): the label, 2 * structure + 0 or 1, whose grey
    value they share; size (W,): of the first structure, frame widths; pace (W,): how fast forms change, per slice.
    """

    structures: Primitives
    body: Primitives
    target: Tensor
    like: Tensor
    size: Tensor
    pace: Tensor


def draw_anatomy(recipe: AnatomyRecipe, draw: Draw, length: int, view: Tensor) -> Anatomy:
    """view (W, 4): left, top, width and height of what is not padding, frame widths."""
    windows = len(view)
    size, half = _scale(recipe, draw, view)
    half, further = _through(recipe, draw, half)
    structures = _structures(recipe, draw, size, half, further, length, view)
    role = draw.pick(recipe.pairs, windows, GROUPS)
    relate(draw, structures, role, view)
    cluster = draw.chance(recipe.clusters, windows)
    _gather(draw, structures, cluster)
    interior = _interiors(recipe, draw, structures)
    target, like = _identities(recipe, draw, role, interior, cluster)
    pace = (draw.uniform((0.3, 1.2), windows) / half).clamp(max=0.9)
    return Anatomy(structures, _body(recipe, draw, size / half, length, view), target, like, size, pace)


def _scale(recipe: AnatomyRecipe, draw: Draw, view: Tensor) -> tuple[Tensor, Tensor]:
    """(W,) each: size of the first structure in frame widths, and half its length in slices."""
    windows = len(view)
    close = draw.chance(recipe.close, windows)
    size = torch.where(close, draw.uniform(recipe.close_size, windows), draw.spread(recipe.far_size, windows))
    size = torch.where(draw.chance(recipe.tiny, windows), draw.uniform(recipe.tiny_size, windows), size)
    still = draw.chance(recipe.still, windows)
    half = torch.where(still, draw.spread(recipe.still_half_length, windows), draw.spread(recipe.half_length, windows))
    return size * view[:, 2:].amin(1).clamp(min=0.6), half


def _through(recipe: AnatomyRecipe, draw: Draw, half: Tensor) -> tuple[Tensor, Tensor]:
    """(W,) each: half lengths by the distance of the slices, and how many times longer the first structure is; 1 where it is not."""
    further = torch.ones_like(half)
    if not recipe.through:  # drawing nothing, it leaves the clips of older recipes as they were
        return half, further
    through = draw.chance(recipe.through, len(half))
    thinner = (half / draw.spread(recipe.thicker, len(half))).clamp(min=2.0)
    return torch.where(through, thinner, half), torch.where(through, draw.spread(recipe.further, len(half)), further)


def _structures(
    recipe: AnatomyRecipe, draw: Draw, first_size: Tensor, first_half: Tensor, further: Tensor, length: int, view: Tensor
) -> Primitives:
    """All structures, as if none of them had anything to do with another."""
    shape = len(view), STRUCTURES
    size = _sizes(recipe, draw, first_size)
    slender = draw.chance(recipe.slender, *shape)
    slim = torch.where(slender, draw.spread((2.0, 7.0), *shape), draw.spread((1.0, 1.8), *shape))
    long = size / 2
    short = (long / slim).clamp(min=0.0115)
    step = (first_size / (2 * first_half))[:, None]  # slice distance, frame widths
    half = (long * short).sqrt() * draw.spread((0.9, 2.2), *shape) / step
    half = torch.where(draw.chance(recipe.tubes, *shape), half * draw.spread((2.0, 8.0), *shape), half).clamp(min=0.6)
    half[:, 0] = first_half * further
    slope = draw.normal(2, *shape) * (recipe.lean * step * (short / long).sqrt())
    x, y = _places(draw, size, view)
    nothing = torch.zeros(shape, device=draw.device)
    return Primitives(
        x=x,
        y=y,
        drift_x=slope[0],
        drift_y=slope[1],
        at=draw.uniform((0.0, length - 1.0), *shape),
        long=long,
        short=short,
        angle=draw.uniform((0.0, math.tau), *shape),
        twist=0.5 * draw.normal(*shape) / half.clamp(min=2.0),
        bend=0.3 * draw.normal(*shape) * (long / short).clamp(max=4.0),
        square=draw.uniform((0.0, 0.6), *shape),
        middle=_middles(recipe, draw, half, length, further > 1),
        half=half,
        blunt=draw.spread((1.8, 8.0), *shape),
        cut_long=nothing,
        cut_short=nothing,
        cut_tilt=nothing,
        cut_at=nothing + _NOWHERE,
        shell=nothing,
    )


def _sizes(recipe: AnatomyRecipe, draw: Draw, first_size: Tensor) -> Tensor:
    """(W, K): half of the others are about as large as the first, so that size tells nothing."""
    shape = len(first_size), STRUCTURES
    akin = first_size[:, None] * draw.spread((0.5, 1.6), *shape)
    size = torch.where(draw.chance(0.5, *shape), akin, draw.spread(recipe.other_size, *shape))
    size[:, 0] = first_size
    size[:, 2 * GROUPS :] = draw.spread(recipe.minor_size, len(first_size), MINOR)
    return size.clamp(0.025, 0.65)


def _places(draw: Draw, size: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (W, K): the first anywhere in the view (a large one nearer to its middle), half of the others beside it."""
    shape = tuple(size.shape)
    free = (1 - size / view[:, 2:].amin(1, keepdim=True)).clamp(min=0.15)
    anywhere = 0.5 + draw.uniform((-0.5, 0.5), 2, *shape) * free
    x, y = view[:, :1] + anywhere[0] * view[:, 2:3], view[:, 1:2] + anywhere[1] * view[:, 3:]
    turn = draw.uniform((0.0, math.tau), *shape)
    away = draw.uniform((0.4, 0.9), *shape) * (size[:, :1] + size)
    beside = draw.chance(0.5, *shape)
    beside[:, 0] = False
    return torch.where(beside, x[:, :1] + away * turn.cos(), x), torch.where(beside, y[:, :1] + away * turn.sin(), y)


def _middles(recipe: AnatomyRecipe, draw: Draw, half: Tensor, length: int, through: Tensor) -> Tensor:
    """Centres (W, K) through the slices: some structures end within the clip, the others are met on a random slice of it.

    through (W,): where the first one does not end.
    """
    shape = tuple(half.shape)
    met = draw.uniform((0.0, length - 1.0), *shape) + half * draw.uniform((-0.85, 0.85), *shape)
    if length == 1:
        return met
    ending = draw.uniform((0.4, length - 1.4), *shape) + half * draw.sign(*shape)
    ends = draw.chance(recipe.ends, *shape)
    ends[:, 0] &= ~through
    return torch.where(ends, ending, met)


def _gather(draw: Draw, structures: Primitives, cluster: Tensor) -> None:
    """Where cluster (W,) says so, move the small structures around the first of them, in place."""
    for name in ("x", "y"):
        place = getattr(structures, name)[:, 2 * GROUPS :]
        size = structures.long[:, 2 * GROUPS :]
        close = place[:, :1] + 2.5 * size * draw.uniform((-1.0, 1.0), len(cluster), MINOR)
        place.copy_(torch.where(cluster[:, None], close, place))


def _interiors(recipe: AnatomyRecipe, draw: Draw, structures: Primitives) -> Tensor:
    """Cut some structures in two and hollow others out, in place; (W, K) of WHOLE, HALVES or SHELL."""
    shape = tuple(structures.x.shape)
    interior = draw.pick(recipe.interiors, *shape)
    halves, shell = interior == HALVES, interior == SHELL
    across = draw.uniform((-0.6, 0.6), *shape)
    structures.cut_long = torch.where(halves, across.cos() * draw.sign(*shape), 0.0)
    structures.cut_short = torch.where(halves, across.sin(), 0.0)
    structures.cut_tilt = torch.where(halves, 0.7 * draw.normal(*shape), 0.0)
    structures.cut_at = torch.where(halves, draw.uniform((-0.4, 0.4), *shape), torch.where(shell, 0.0, _NOWHERE))
    structures.shell = torch.where(shell, draw.uniform((0.12, 0.6), *shape), 0.0)
    return interior


def _identities(recipe: AnatomyRecipe, draw: Draw, role: Tensor, interior: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """target and like of an Anatomy, (W, K, 2) each."""
    windows, first, second = len(role), slice(0, 2 * GROUPS, 2), slice(1, 2 * GROUPS, 2)
    target = torch.arange(2 * STRUCTURES, device=draw.device).view(STRUCTURES, 2).repeat(windows, 1, 1)
    like = target.clone()
    together = (interior == WHOLE) | draw.chance(recipe.one_target, windows, STRUCTURES)
    target[..., 1] -= together.long()
    like[..., 1] -= ((interior == HALVES) & draw.chance(recipe.faint_cut, windows, STRUCTURES)).long()
    same = (role == BRANCH) | (role == RETURN)
    target[:, second] = torch.where(same[..., None], target[:, first], target[:, second])
    alike = same | (role == LOOK_ALIKE)
    like[:, second] = torch.where(alike[..., None], like[:, first], like[:, second])
    for identity in (target, like):
        minor = identity[:, 2 * GROUPS :]
        minor.copy_(torch.where(cluster[:, None, None], minor[:, :1, :1], minor))
    return target, like


def _body(recipe: AnatomyRecipe, draw: Draw, step: Tensor, length: int, view: Tensor) -> Primitives:
    """The body's outline, one per window with a layer of fat, (W, 1); step (W,): slice distance."""
    one = len(view), 1
    zero = torch.zeros(one, device=draw.device)
    long = draw.uniform(recipe.body_size, *one) * view[:, 2:].amax(1, keepdim=True)
    slope = 0.05 * draw.normal(2, *one) * step[:, None]
    middle = view[:, None, :2] + view[:, None, 2:] * draw.uniform((0.3, 0.7), *one, 2)
    return Primitives(
        x=middle[..., 0],
        y=middle[..., 1],
        drift_x=slope[0],
        drift_y=slope[1],
        at=zero + length / 2,
        long=long,
        short=long * draw.uniform((0.5, 1.0), *one),
        angle=draw.uniform((0.0, math.tau), *one),
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
        shell=draw.spread((0.015, 0.3), *one),
    )
