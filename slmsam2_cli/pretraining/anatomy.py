"""Draw the structures of a window: their sizes, places and ends, and how the second of a pair relates to the first.

A window has GROUPS pairs of structures, of which the first pair is the main one, and SMALL further small ones, most of which are
distractors. Lengths through the slices follow from the slice distance, so a structure that is large within the slice is also long.

The second structure of a pair may be a look-alike of the first, a branch of it, its return after a gap, or a nodule in it. Propagation
fails most where a structure ends next to something that looks like it. So a look-alike often begins where the first structure ends, or
is mirrored to the other side, as paired organs are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from slmsam2_cli.planning.plan import FrozenModel
from slmsam2_cli.pretraining.random_fields import Draw, Fraction, LogRange, Range, Shares3, Shares5
from slmsam2_cli.pretraining.shapes import Primitives

GROUPS, SMALL = 4, 4
STRUCTURES = 2 * GROUPS + SMALL
PAINT_ORDER = (6, 7, 4, 5, 2, 3, 0, 1, 8, 9, 10, 11)  # later structures hide earlier ones
UNRELATED, LOOK_ALIKE, BRANCH, RETURN, NODULE = range(5)  # roles of the second structure of a pair
WHOLE, HALVES, SHELL = range(3)  # interiors
_FIRST, _SECOND = range(2)  # of a pair
_SHAPE_FIELDS = ("long_radius", "short_radius", "half_length", "bluntness", "bend", "squareness", "twist", "angle")
_NEVER_CUT = 100.0  # a cut_offset that is never reached


class AnatomyRecipe(FrozenModel):
    """Sizes and shares of structures. Sizes are the longest side in image widths."""

    crops: Fraction = Field(default=0.75, description="share of windows that are crops around the first structure")
    crop_size: Range = Field(default=(0.38, 0.68), description="size of the first structure in a crop")
    whole_slice_size: LogRange = Field(default=(0.07, 0.45), description="size of the first structure in a whole slice")
    tiny: Fraction = Field(default=0.08, description="share of windows whose first structure is tiny")
    tiny_size: Range = Field(default=(0.025, 0.06), description="size of a tiny first structure")
    other_size: LogRange = Field(default=(0.1, 0.55), description="size of other structures")
    small_size: LogRange = Field(default=(0.03, 0.15), description="size of the small structures")
    half_length: LogRange = Field(default=(4.0, 45.0), description="half the length of the first structure, slices")
    static: Fraction = Field(default=0.12, description="share of windows that hardly change from slice to slice")
    static_half_length: LogRange = Field(default=(60.0, 200.0), description="half_length in static windows")
    thick_slices: Fraction = Field(
        default=0.0, description="share of windows with thick slices, through which the first structure continues"
    )
    thickness_factor: LogRange = Field(default=(1.0, 4.0), description="factor by which thick slices are thicker")
    length_factor: LogRange = Field(
        default=(5.0, 40.0), description="factor on the length of the first structure in windows of thick slices"
    )
    tilt: float = Field(default=0.3, description="slope of a structure's axis, standard deviation")
    tubes: Fraction = Field(default=0.2, description="share of structures that continue through many slices")
    elongated: Fraction = Field(default=0.3, description="share of structures that are long and thin within the slice")
    ends_in_clip: Fraction = Field(default=0.85, description="share of structures with an end within the clip")
    pairs: Shares5 = Field(
        default=(0.25, 0.35, 0.15, 0.1, 0.15), description="shares of pairs: unrelated, look-alike, branch, return, nodule"
    )
    interiors: Shares3 = Field(default=(0.68, 0.18, 0.14), description="shares of interiors: whole, cut in two, wall and inside")
    single_target: Fraction = Field(default=0.3, description="share of cut or hollow structures that are tracked as a whole")
    faint_cuts: Fraction = Field(default=0.5, description="share of cuts with hardly a border in the image")
    clusters: Fraction = Field(default=0.25, description="share of windows whose small structures form one cluster, tracked together")
    body_size: Range = Field(default=(0.3, 0.75), description="long radius of the body")


@dataclass
class Anatomy:
    """The structures of W windows, K in each.

    body: the outline of the body, one primitive per window; target (W, K, 2): the target to which each of a structure's two labels
    belongs; appearance (W, K, 2): the label, 2 * structure + 0 or 1, whose appearance it shares; size (W,): of the first structure,
    image widths; rate (W,): how fast shapes change, independent values per slice.
    """

    structures: Primitives
    body: Primitives
    target: Tensor
    appearance: Tensor
    size: Tensor
    rate: Tensor


@dataclass(frozen=True)
class _FirstStructure:
    """(W,) each. size: image widths; half_length: slices, from which the slice distance follows; length_factor: 1 for usual slices."""

    size: Tensor
    half_length: Tensor
    length_factor: Tensor


def draw_anatomy(recipe: AnatomyRecipe, draw: Draw, length: int, view: Tensor) -> Anatomy:
    """Draw the structures of W windows of `length` slices. view (W, 4): left, top, width and height without padding, image widths."""
    windows = len(view)
    first = _draw_first(recipe, draw, view)
    structures = _draw_structures(recipe, draw, first, length, view)
    role = draw.categorical(recipe.pairs, windows, GROUPS)
    relate_pairs(draw, structures, role, view)
    cluster = draw.bernoulli(recipe.clusters, windows)
    for name in ("x", "y"):  # move the small structures of a cluster around the first of them
        small, size = getattr(structures, name)[:, 2 * GROUPS :], structures.long_radius[:, 2 * GROUPS :]
        near = small[:, :1] + 2.5 * size * draw.uniform((-1.0, 1.0), windows, SMALL)
        small.copy_(torch.where(cluster[:, None], near, small))
    interior = _draw_interiors(recipe, draw, structures)
    target, appearance = _draw_labels(recipe, draw, role, interior, cluster)
    rate = (draw.uniform((0.3, 1.2), windows) / first.half_length).clamp(max=0.9)
    body = _draw_body(recipe, draw, first.size / first.half_length, length, view)
    return Anatomy(structures, body, target, appearance, first.size, rate)


def _draw_first(recipe: AnatomyRecipe, draw: Draw, view: Tensor) -> _FirstStructure:
    """Draw size and length of the first structure of every window."""
    windows = len(view)
    crop = draw.bernoulli(recipe.crops, windows)
    size = torch.where(crop, draw.uniform(recipe.crop_size, windows), draw.log_uniform(recipe.whole_slice_size, windows))
    size = torch.where(draw.bernoulli(recipe.tiny, windows), draw.uniform(recipe.tiny_size, windows), size)
    static = draw.bernoulli(recipe.static, windows)
    half = torch.where(static, draw.log_uniform(recipe.static_half_length, windows), draw.log_uniform(recipe.half_length, windows))
    size, factor = size * view[:, 2:].amin(1).clamp(min=0.6), torch.ones_like(half)
    if recipe.thick_slices:  # else draws nothing, so that recipes without thick slices keep their clips
        thick = draw.bernoulli(recipe.thick_slices, windows)
        half = torch.where(thick, (half / draw.log_uniform(recipe.thickness_factor, windows)).clamp(min=2.0), half)
        factor = torch.where(thick, draw.log_uniform(recipe.length_factor, windows), factor)
    return _FirstStructure(size, half, factor)


def _draw_structures(recipe: AnatomyRecipe, draw: Draw, first: _FirstStructure, length: int, view: Tensor) -> Primitives:
    """Draw all structures, (W, STRUCTURES), without any relation between them."""
    shape = len(view), STRUCTURES
    size = _draw_sizes(recipe, draw, first.size)
    elongated = draw.bernoulli(recipe.elongated, *shape)
    ratio = torch.where(elongated, draw.log_uniform((2.0, 7.0), *shape), draw.log_uniform((1.0, 1.8), *shape))
    long = size / 2
    short = (long / ratio).clamp(min=0.0115)
    step = (first.size / (2 * first.half_length))[:, None]  # slice distance, image widths
    half = (long * short).sqrt() * draw.log_uniform((0.9, 2.2), *shape) / step
    half = torch.where(draw.bernoulli(recipe.tubes, *shape), half * draw.log_uniform((2.0, 8.0), *shape), half).clamp(min=0.6)
    half[:, 0] = first.half_length * first.length_factor
    slope = draw.normal(2, *shape) * (recipe.tilt * step * (short / long).sqrt())
    x, y = _draw_places(draw, size, view)
    zero = torch.zeros(shape, device=draw.device)
    return Primitives(
        x=x,
        y=y,
        drift_x=slope[0],
        drift_y=slope[1],
        reference_slice=draw.uniform((0.0, length - 1.0), *shape),
        long_radius=long,
        short_radius=short,
        angle=draw.uniform((0.0, math.tau), *shape),
        twist=0.5 * draw.normal(*shape) / half.clamp(min=2.0),
        bend=0.3 * draw.normal(*shape) * (long / short).clamp(max=4.0),
        squareness=draw.uniform((0.0, 0.6), *shape),
        centre_slice=_draw_centre_slices(recipe, draw, half, length, first.length_factor > 1),
        half_length=half,
        bluntness=draw.log_uniform((1.8, 8.0), *shape),
        cut_long=zero,
        cut_short=zero,
        cut_tilt=zero,
        cut_offset=zero + _NEVER_CUT,
        wall=zero,
    )


def _draw_sizes(recipe: AnatomyRecipe, draw: Draw, first_size: Tensor) -> Tensor:
    """Draw sizes (W, K). Half of the other structures are about as large as the first, so that size does not identify it."""
    shape = len(first_size), STRUCTURES
    similar = first_size[:, None] * draw.log_uniform((0.5, 1.6), *shape)
    size = torch.where(draw.bernoulli(0.5, *shape), similar, draw.log_uniform(recipe.other_size, *shape))
    size[:, 0] = first_size
    size[:, 2 * GROUPS :] = draw.log_uniform(recipe.small_size, len(first_size), SMALL)
    return size.clamp(0.025, 0.65)


def _draw_places(draw: Draw, size: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """Draw centres, x and y (W, K): anywhere in the view, large ones nearer to its middle; half of the others adjacent to the first."""
    shape = tuple(size.shape)
    free = (1 - size / view[:, 2:].amin(1, keepdim=True)).clamp(min=0.15)
    anywhere = 0.5 + draw.uniform((-0.5, 0.5), 2, *shape) * free
    x, y = view[:, :1] + anywhere[0] * view[:, 2:3], view[:, 1:2] + anywhere[1] * view[:, 3:]
    direction = draw.uniform((0.0, math.tau), *shape)
    distance = draw.uniform((0.4, 0.9), *shape) * (size[:, :1] + size)
    adjacent = draw.bernoulli(0.5, *shape)
    adjacent[:, 0] = False
    near_x, near_y = x[:, :1] + distance * direction.cos(), y[:, :1] + distance * direction.sin()
    return torch.where(adjacent, near_x, x), torch.where(adjacent, near_y, y)


def _draw_centre_slices(recipe: AnatomyRecipe, draw: Draw, half: Tensor, length: int, continues: Tensor) -> Tensor:
    """Draw centre slices (W, K): some structures end within the clip, the others are present on a random slice of it.

    half (W, K): half lengths, slices; continues (W,): windows whose first structure does not end within the clip.
    """
    shape = tuple(half.shape)
    present = draw.uniform((0.0, length - 1.0), *shape) + half * draw.uniform((-0.85, 0.85), *shape)
    if length == 1:
        return present
    ending = draw.uniform((0.4, length - 1.4), *shape) + half * draw.sign(*shape)
    ends = draw.bernoulli(recipe.ends_in_clip, *shape)
    ends[:, 0] &= ~continues
    return torch.where(ends, ending, present)


class _Pairs:
    """The first structures of all pairs (0, 2, 4, ...) and the second ones (1, 3, 5, ...), which are changed in place."""

    def __init__(self, structures: Primitives, groups: int) -> None:
        self.structures, self.count = structures, 2 * groups

    def get(self, name: str, member: int = _FIRST) -> Tensor:
        """Return a view (W, groups) of a field of Primitives."""
        values: Tensor = getattr(self.structures, name)
        return values[:, member : self.count : 2]

    def put(self, name: str, value: Tensor, where: Tensor) -> None:
        """Set a field of the second structures where the condition holds."""
        second = self.get(name, _SECOND)
        second.copy_(torch.where(where, value, second))


def relate_pairs(draw: Draw, structures: Primitives, role: Tensor, view: Tensor) -> None:
    """Change the second structure of each pair by its role (W, groups), in place; UNRELATED ones stay. view: see draw_anatomy."""
    pairs = _Pairs(structures, role.shape[1])
    _relate_shapes(draw, pairs, role)
    _relate_places(draw, pairs, role)
    _relate_ends(draw, pairs, role)
    _mirror(draw, pairs, role, view)


def _relate_shapes(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Give look-alikes, branches and returns nearly the shape of the first structure, and nodules a fraction of its size."""
    shape = tuple(role.shape)
    alike = (role == LOOK_ALIKE) | (role == BRANCH) | (role == RETURN)
    for name in _SHAPE_FIELDS:
        pairs.put(name, pairs.get(name), alike)
    for name in ("long_radius", "short_radius", "half_length"):
        pairs.put(name, pairs.get(name, _SECOND) * draw.log_uniform((0.75, 1.3), *shape), alike)
    pairs.put("angle", pairs.get("angle", _SECOND) + 0.4 * draw.normal(*shape), alike)
    fraction = draw.uniform((0.2, 0.5), *shape)
    for name in ("long_radius", "short_radius"):
        pairs.put(name, (pairs.get(name) * fraction).clamp(min=0.0115), role == NODULE)
    pairs.put("half_length", (pairs.get("half_length") * fraction).clamp(min=0.6), role == NODULE)


def _relate_places(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Place the second structure next to the first or in it, with the same drift; a branch drifts away from it."""
    shape = tuple(role.shape)
    direction, long = draw.uniform((0.0, math.tau), *shape), pairs.get("long_radius")
    distance = long * torch.where(role == LOOK_ALIKE, draw.uniform((0.8, 2.0), *shape), draw.uniform((0.0, 0.5), *shape))
    parting = draw.uniform((0.5, 2.0), *shape) * long / pairs.get("half_length")
    pairs.put("reference_slice", pairs.get("reference_slice"), role != UNRELATED)
    for axis, cosine in (("x", direction.cos()), ("y", direction.sin())):
        drift = pairs.get(f"drift_{axis}")
        pairs.put(axis, pairs.get(axis) + distance * cosine, role != UNRELATED)
        pairs.put(f"drift_{axis}", drift, role != UNRELATED)
        pairs.put(f"drift_{axis}", drift + parting * cosine, role == BRANCH)


def _relate_ends(draw: Draw, pairs: _Pairs, role: Tensor) -> None:
    """Let half of the look-alikes begin about where the first structure ends, and returns begin after a gap."""
    shape = tuple(role.shape)
    centre, half, second_half = pairs.get("centre_slice"), pairs.get("half_length"), pairs.get("half_length", _SECOND)
    pairs.put("centre_slice", centre + half * draw.uniform((-0.5, 0.5), *shape), (role == BRANCH) | (role == NODULE))
    after = centre + draw.sign(*shape) * (half + second_half) * draw.uniform((0.85, 1.1), *shape)
    pairs.put("centre_slice", after, (role == LOOK_ALIKE) & draw.bernoulli(0.5, *shape))
    gap = draw.uniform((1.0, 3.0), *shape)
    pairs.put("centre_slice", centre + draw.sign(*shape) * (half + second_half + gap), role == RETURN)


def _mirror(draw: Draw, pairs: _Pairs, role: Tensor, view: Tensor) -> None:
    """Mirror a third of the look-alikes to the other side of the view's middle."""
    mirrored = (role == LOOK_ALIKE) & draw.bernoulli(0.35, *role.shape)
    pairs.put("x", 2 * view[:, :1] + view[:, 2:3] - pairs.get("x"), mirrored)
    pairs.put("y", pairs.get("y") + 0.1 * pairs.get("long_radius") * draw.normal(*role.shape), mirrored)
    for name, value in (("angle", math.pi - pairs.get("angle")), ("bend", -pairs.get("bend"))):
        pairs.put(name, value, mirrored)
    for name in ("drift_x", "twist"):
        pairs.put(name, -pairs.get(name), mirrored)


def _draw_interiors(recipe: AnatomyRecipe, draw: Draw, structures: Primitives) -> Tensor:
    """Cut some structures in two and hollow out others, in place. Return WHOLE, HALVES or SHELL for each, (W, K)."""
    shape = tuple(structures.x.shape)
    interior = draw.categorical(recipe.interiors, *shape)
    halves, shell = interior == HALVES, interior == SHELL
    direction = draw.uniform((-0.6, 0.6), *shape)
    structures.cut_long = torch.where(halves, direction.cos() * draw.sign(*shape), 0.0)
    structures.cut_short = torch.where(halves, direction.sin(), 0.0)
    structures.cut_tilt = torch.where(halves, 0.7 * draw.normal(*shape), 0.0)
    structures.cut_offset = torch.where(halves, draw.uniform((-0.4, 0.4), *shape), torch.where(shell, 0.0, _NEVER_CUT))
    structures.wall = torch.where(shell, draw.uniform((0.12, 0.6), *shape), 0.0)
    return interior


def _draw_labels(recipe: AnatomyRecipe, draw: Draw, role: Tensor, interior: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `target` and `appearance` of an Anatomy, (W, K, 2) each."""
    windows, first, second = len(role), slice(0, 2 * GROUPS, 2), slice(1, 2 * GROUPS, 2)
    target = torch.arange(2 * STRUCTURES, device=draw.device).view(STRUCTURES, 2).repeat(windows, 1, 1)
    appearance = target.clone()
    single = (interior == WHOLE) | draw.bernoulli(recipe.single_target, windows, STRUCTURES)
    target[..., 1] -= single.long()
    appearance[..., 1] -= ((interior == HALVES) & draw.bernoulli(recipe.faint_cuts, windows, STRUCTURES)).long()
    same = (role == BRANCH) | (role == RETURN)
    target[:, second] = torch.where(same[..., None], target[:, first], target[:, second])
    alike = same | (role == LOOK_ALIKE)
    appearance[:, second] = torch.where(alike[..., None], appearance[:, first], appearance[:, second])
    for labels in (target, appearance):
        small = labels[:, 2 * GROUPS :]
        small.copy_(torch.where(cluster[:, None, None], small[:, :1, :1], small))
    return target, appearance


def _draw_body(recipe: AnatomyRecipe, draw: Draw, step: Tensor, length: int, view: Tensor) -> Primitives:
    """Draw the outline of the body with its layer of fat, one per window, (W, 1). step (W,): slice distance."""
    shape = len(view), 1
    zero = torch.zeros(shape, device=draw.device)
    long = draw.uniform(recipe.body_size, *shape) * view[:, 2:].amax(1, keepdim=True)
    slope = 0.05 * draw.normal(2, *shape) * step[:, None]
    centre = view[:, None, :2] + view[:, None, 2:] * draw.uniform((0.3, 0.7), *shape, 2)
    return Primitives(
        x=centre[..., 0],
        y=centre[..., 1],
        drift_x=slope[0],
        drift_y=slope[1],
        reference_slice=zero + length / 2,
        long_radius=long,
        short_radius=long * draw.uniform((0.5, 1.0), *shape),
        angle=draw.uniform((0.0, math.tau), *shape),
        twist=zero,
        bend=0.2 * draw.normal(*shape),
        squareness=draw.uniform((0.0, 0.7), *shape),
        centre_slice=zero + length / 2,
        half_length=zero + 1000.0,
        bluntness=zero + 2.0,
        cut_long=zero,
        cut_short=zero,
        cut_tilt=zero,
        cut_offset=zero,
        wall=draw.log_uniform((0.015, 0.3), *shape),
    )
