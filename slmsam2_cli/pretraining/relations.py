"""What the second structure of a pair is to the first: a look-alike, a branch, its return, or a nodule in it.

Propagation fails most where a structure ends next to something that looks like it, so a look-alike often begins where the first
ends, or lies mirrored on the other side, as organs in pairs do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slmsam2_cli.pretraining.draw import Draw
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
