"""From parameters to label maps: one formula for ellipsoids, bent tubes, sheets, shells and organs cut in two.

A primitive is a superellipsoid whose axis through the slices may lean and twist, and whose long axis in the slice may bend.
Everything that depends on the slice alone is a handful of numbers per slice; what is left per pixel is one affine map, one norm
and one comparison, and only in the tiles of the frame that the primitive may touch. Positions and radii are in frame widths
(0 to 1), the third axis in slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Primitives:
    """K superellipsoids in each of W windows; every field is (W, K).

    x, y, drift_x, drift_y: centre on the slice `at`, and how far it moves per slice; long, short: radii; angle, twist: of the long
    axis, and per slice; bend: how far its ends curve away, in short radii; square: 0 an ellipse, 1 a rectangle;
    middle, half, blunt: centre and half length through the slices, and how bluntly it ends (2 an ellipsoid, large a cylinder).
    Inside, the part where cut_long * u + cut_short * v + cut_tilt * s > cut_at is the second label (u, v, s: position in radii);
    with shell > 0 it is the wall, so many radii thick.
    """

    x: Tensor
    y: Tensor
    drift_x: Tensor
    drift_y: Tensor
    at: Tensor
    long: Tensor
    short: Tensor
    angle: Tensor
    twist: Tensor
    bend: Tensor
    square: Tensor
    middle: Tensor
    half: Tensor
    blunt: Tensor
    cut_long: Tensor
    cut_short: Tensor
    cut_tilt: Tensor
    cut_at: Tensor
    shell: Tensor


@dataclass(frozen=True)
class Poses:
    """K primitives as T slices see them.

    turn (T, W, K, 2, 2) and shift (T, W, K, 2): from the frame to radii; radius, inner (T, W, K): of the outline and of the wall's
    inside, -1 where there is none; place (T, W, K): along the axis through the slices, -1 to 1; reach (T, W, K): how far from its
    centre (T, W, K, 2) the outline may be, below 0 where the slice does not meet it.
    """

    turn: Tensor
    shift: Tensor
    radius: Tensor
    inner: Tensor
    place: Tensor
    centre: Tensor
    reach: Tensor


@dataclass
class Tiles:
    """Square pieces of all slices: N = T * W * pieces rows of P pixels.

    where (N, 2, P): x and y of every pixel after deformation; slice, window (N,); middle (N, 2) and reach (N,): a disc that holds
    the tile; labels (N, P) uint8.
    """

    where: Tensor
    slice: Tensor
    window: Tensor
    middle: Tensor
    reach: Tensor
    labels: Tensor


TILE_PX = 16


def pixel_centres(input_size: int, device: torch.device) -> Tensor:
    """(2, px, px): x and y of every pixel in frame widths."""
    centres = (torch.arange(input_size, device=device) + 0.5) / input_size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y])


def poses(bodies: Primitives, slices: int) -> Poses:
    t = torch.arange(slices, device=bodies.x.device)[:, None, None]
    place, since = (t - bodies.middle) / bodies.half, t - bodies.at
    radius = _profile(place, bodies.blunt)
    inner = _profile(place / (1 - bodies.shell), bodies.blunt) * (1 - bodies.shell)
    angle = bodies.angle + bodies.twist * since
    centre = torch.stack([bodies.x + bodies.drift_x * since, bodies.y + bodies.drift_y * since], -1)
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1)
    turn = turn.view(*place.shape, 2, 2) / torch.stack([bodies.long, bodies.short], -1)[..., None]
    shift = -(turn @ centre[..., None])[..., 0]
    reach = torch.hypot(bodies.long, bodies.short * (1 + bodies.bend.abs())) * radius
    return Poses(turn, shift, radius, inner, place, centre, reach)


def _profile(place: Tensor, blunt: Tensor) -> Tensor:
    """Radius of a superellipsoid of half length 1 at `place`; -1 beyond its ends."""
    height = 1 - place.abs() ** blunt
    radius: Tensor = torch.where(height > 0, height.clamp(min=1e-6) ** (1 / blunt), -1.0)
    return radius


def cut(where: Tensor, labels: Tensor) -> Tiles:
    """Coordinates (T, W, 2, px, px) and label maps (T, W, px, px) as tiles."""
    slices, windows, _, px, _ = where.shape
    n, area = px // TILE_PX, TILE_PX**2
    split = where.reshape(slices, windows, 2, n, TILE_PX, n, TILE_PX)
    rows = split.permute(0, 1, 3, 5, 2, 4, 6).reshape(slices * windows * n * n, 2, area)
    painted = labels.reshape(slices, windows, n, TILE_PX, n, TILE_PX).transpose(3, 4).reshape(len(rows), area)
    number = torch.arange(len(rows), device=where.device) // (n * n)
    low, high = rows.aminmax(dim=2)
    return Tiles(rows, number // windows, number % windows, (low + high) / 2, (high - low).norm(dim=1) / 2, painted)


def joined(labels: Tensor, slices: int, windows: int) -> Tensor:
    """The inverse of `cut` for labels: (N, P) -> (T, W, px, px)."""
    n = int((len(labels) // (slices * windows)) ** 0.5)
    tiled = labels.view(slices, windows, n, n, TILE_PX, TILE_PX)
    return tiled.transpose(3, 4).reshape(slices, windows, n * TILE_PX, n * TILE_PX)


def touched(pose: Poses, k: int, tiles: Tiles) -> Tensor:
    """Rows of the tiles that primitive k may touch."""
    at = tiles.slice, tiles.window
    reach = pose.reach[..., k][at]
    apart = (tiles.middle - pose.centre[:, :, k][at]).norm(dim=1)
    near: Tensor = (reach > 0) & (apart < reach + tiles.reach)
    return near.nonzero()[:, 0]


def norms(bodies: Primitives, pose: Poses, k: int, tiles: Tiles, rows: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and the norm of primitive k at the coordinates `where` (R, 2, P) of the given tiles, (R, P) each."""
    slices, windows = tiles.slice[rows], tiles.window[rows]
    turn, shift = pose.turn[slices, windows, k], pose.shift[slices, windows, k]
    bend, square = (values[windows, k][:, None] for values in (bodies.bend, bodies.square))
    u, v = torch.baddbmm(shift[..., None], turn, where).unbind(1)
    squared = u * u
    v = torch.addcmul(v, bend, 0.4 - squared)
    return u, v, torch.lerp(squared.addcmul_(v, v).sqrt_(), torch.maximum(u.abs(), v.abs()), square)


def section(bodies: Primitives, pose: Poses, k: int, tiles: Tiles, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where primitive k is in the given tiles, and where it is its second label: two booleans (R, P)."""
    slices, windows = tiles.slice[rows], tiles.window[rows]
    u, v, norm = norms(bodies, pose, k, tiles, rows, tiles.where.index_select(0, rows))
    inside = norm < pose.radius[slices, windows, k][:, None]
    hollow = (bodies.shell[windows, k] > 0).float()
    side = bodies.cut_tilt[windows, k] * pose.place[slices, windows, k] - bodies.cut_at[windows, k]
    side = (side - hollow * pose.inner[slices, windows, k])[:, None]
    across, along = bodies.cut_long[windows, k][:, None], bodies.cut_short[windows, k][:, None]
    second = torch.addcmul(side, across, u).addcmul_(along, v).addcmul_(norm, hollow[:, None]) > 0
    return inside, second


def paint(bodies: Primitives, pose: Poses, k: int, tiles: Tiles, first: int) -> None:
    """Paint primitive k over the tiles' labels: `first`, and `first` + 1 where it is its second label."""
    rows = touched(pose, k, tiles)
    inside, second = section(bodies, pose, k, tiles, rows)
    painted = torch.where(inside, second.to(torch.uint8).add_(first), tiles.labels.index_select(0, rows))
    tiles.labels.index_copy_(0, rows, painted)


def paint_around(bodies: Primitives, pose: Poses, tiles: Tiles, windows: Tensor, outside: int, wall: int) -> None:
    """In the windows marked True (W,), paint what is outside primitive 0, and its wall.

    What the tile's middle says, and how fast the norm can grow, settles most tiles.
    """
    rows = windows[tiles.window].nonzero()[:, 0]
    at = tiles.slice[rows], tiles.window[rows]
    norm = norms(bodies, pose, 0, tiles, rows, tiles.middle[rows][..., None])[2][:, 0]
    steep = (1 + 3 * bodies.bend.abs()) / bodies.short
    change = 1.5 * tiles.reach[rows] * steep[:, 0][at[1]]
    tiles.labels.index_fill_(0, rows[norm - change > pose.radius[..., 0][at]], outside)
    rows = rows[(norm - change <= pose.radius[..., 0][at]) & (norm + change >= pose.inner[..., 0][at])]
    inside, second = section(bodies, pose, 0, tiles, rows)
    painted = tiles.labels.index_select(0, rows).masked_fill_(second, wall).masked_fill_(~inside, outside)
    tiles.labels.index_copy_(0, rows, painted)
