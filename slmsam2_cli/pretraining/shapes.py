"""Rasterise structures to label maps: one formula for ellipsoids, bent tubes, sheets, shells and structures cut in two.

A primitive is a superellipsoid whose axis through the slices may tilt and twist, and whose long axis within the slice may bend.
Values that depend on the slice alone are computed once per slice. What remains per pixel is one affine map, one norm and one
comparison, and only in the tiles of the image that the primitive may touch. Positions and radii are in image widths (0 to 1), the
third axis is in slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Primitives:
    """K superellipsoids in each of W windows; every field has the shape (W, K).

    x, y: centre on the slice `reference_slice`; drift_x, drift_y: its shift per slice; long_radius, short_radius: radii within the
    slice; angle: direction of the long axis, radians; twist: its change per slice; bend: how far the ends of the long axis curve away,
    in short radii; squareness: 0 for an ellipse, 1 for a rectangle; centre_slice, half_length: centre and half length through the
    slices; bluntness: shape of the two ends, 2 for an ellipsoid, large for a cylinder.

    The inside is divided into two labels. The second one is where cut_long * u + cut_short * v + cut_tilt * s > cut_offset, with the
    position (u, v, s) in radii. With wall > 0 it is instead the wall, `wall` radii thick.
    """

    x: Tensor
    y: Tensor
    drift_x: Tensor
    drift_y: Tensor
    reference_slice: Tensor
    long_radius: Tensor
    short_radius: Tensor
    angle: Tensor
    twist: Tensor
    bend: Tensor
    squareness: Tensor
    centre_slice: Tensor
    half_length: Tensor
    bluntness: Tensor
    cut_long: Tensor
    cut_short: Tensor
    cut_tilt: Tensor
    cut_offset: Tensor
    wall: Tensor


@dataclass(frozen=True)
class Sections:
    """Cross-sections of K primitives on T slices.

    rotation (T, W, K, 2, 2), shift (T, W, K, 2): affine map from image coordinates to radii; radius, inner_radius (T, W, K): of the
    outline and of the inside of the wall, -1 where there is none; position (T, W, K): along the axis through the slices, -1 to 1;
    centre (T, W, K, 2); reach (T, W, K): greatest distance of the outline from the centre, below 0 on slices without the primitive.
    """

    rotation: Tensor
    shift: Tensor
    radius: Tensor
    inner_radius: Tensor
    position: Tensor
    centre: Tensor
    reach: Tensor


@dataclass
class Tiles:
    """Square tiles of all slices: N = T * W * (tiles per slice) rows of P pixels.

    coordinates (N, 2, P): x and y of every pixel after deformation; slice, window (N,); centre (N, 2), radius (N,): a disc that holds
    the tile; labels (N, P) uint8.
    """

    coordinates: Tensor
    slice: Tensor
    window: Tensor
    centre: Tensor
    radius: Tensor
    labels: Tensor


TILE_PX = 16


def pixel_centres(input_size: int, device: torch.device) -> Tensor:
    """Compute x and y of every pixel in image widths, (2, px, px)."""
    centres = (torch.arange(input_size, device=device) + 0.5) / input_size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y])


def cross_sections(bodies: Primitives, slices: int) -> Sections:
    """Compute the cross-section of every primitive on the slices 0 to `slices` - 1."""
    t = torch.arange(slices, device=bodies.x.device)[:, None, None]
    position, passed = (t - bodies.centre_slice) / bodies.half_length, t - bodies.reference_slice
    radius = _profile(position, bodies.bluntness)
    inner_radius = _profile(position / (1 - bodies.wall), bodies.bluntness) * (1 - bodies.wall)
    angle = bodies.angle + bodies.twist * passed
    centre = torch.stack([bodies.x + bodies.drift_x * passed, bodies.y + bodies.drift_y * passed], -1)
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1)
    rotation = rotation.view(*position.shape, 2, 2) / torch.stack([bodies.long_radius, bodies.short_radius], -1)[..., None]
    shift = -(rotation @ centre[..., None])[..., 0]
    reach = torch.hypot(bodies.long_radius, bodies.short_radius * (1 + bodies.bend.abs())) * radius
    return Sections(rotation, shift, radius, inner_radius, position, centre, reach)


def _profile(position: Tensor, bluntness: Tensor) -> Tensor:
    """Compute the radius of a superellipsoid of half length 1 at `position`; -1 beyond its ends."""
    height = 1 - position.abs() ** bluntness
    radius: Tensor = torch.where(height > 0, height.clamp(min=1e-6) ** (1 / bluntness), -1.0)
    return radius


def cut_tiles(coordinates: Tensor, labels: Tensor) -> Tiles:
    """Cut coordinates (T, W, 2, px, px) and label maps (T, W, px, px) into tiles."""
    slices, windows, _, px, _ = coordinates.shape
    n, area = px // TILE_PX, TILE_PX**2
    split = coordinates.reshape(slices, windows, 2, n, TILE_PX, n, TILE_PX)
    rows = split.permute(0, 1, 3, 5, 2, 4, 6).reshape(slices * windows * n * n, 2, area)
    tiled_labels = labels.reshape(slices, windows, n, TILE_PX, n, TILE_PX).transpose(3, 4).reshape(len(rows), area)
    number = torch.arange(len(rows), device=coordinates.device) // (n * n)
    low, high = rows.aminmax(dim=2)
    return Tiles(rows, number // windows, number % windows, (low + high) / 2, (high - low).norm(dim=1) / 2, tiled_labels)


def join_tiles(labels: Tensor, slices: int, windows: int) -> Tensor:
    """Join the labels of tiles, (N, P) -> (T, W, px, px); the inverse of `cut_tiles`."""
    n = int((len(labels) // (slices * windows)) ** 0.5)
    tiled = labels.view(slices, windows, n, n, TILE_PX, TILE_PX)
    return tiled.transpose(3, 4).reshape(slices, windows, n * TILE_PX, n * TILE_PX)


def _norms(
    bodies: Primitives, sections: Sections, k: int, tiles: Tiles, rows: Tensor, coordinates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute u, v and the norm of primitive k at coordinates (R, 2, P) that lie in the given rows of tiles, (R, P) each."""
    slices, windows = tiles.slice[rows], tiles.window[rows]
    rotation, shift = sections.rotation[slices, windows, k], sections.shift[slices, windows, k]
    bend, squareness = (values[windows, k][:, None] for values in (bodies.bend, bodies.squareness))
    u, v = torch.baddbmm(shift[..., None], rotation, coordinates).unbind(1)
    squared = u * u
    v = torch.addcmul(v, bend, 0.4 - squared)
    return u, v, torch.lerp(squared.addcmul_(v, v).sqrt_(), torch.maximum(u.abs(), v.abs()), squareness)


def inside_of(bodies: Primitives, sections: Sections, k: int, tiles: Tiles, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute which pixels of the given rows of tiles are in primitive k, and which of these have its second label: two booleans (R, P)."""
    slices, windows = tiles.slice[rows], tiles.window[rows]
    u, v, norm = _norms(bodies, sections, k, tiles, rows, tiles.coordinates.index_select(0, rows))
    inside = norm < sections.radius[slices, windows, k][:, None]
    hollow = (bodies.wall[windows, k] > 0).float()
    side = bodies.cut_tilt[windows, k] * sections.position[slices, windows, k] - bodies.cut_offset[windows, k]
    side = (side - hollow * sections.inner_radius[slices, windows, k])[:, None]
    along_long, along_short = bodies.cut_long[windows, k][:, None], bodies.cut_short[windows, k][:, None]
    second = torch.addcmul(side, along_long, u).addcmul_(along_short, v).addcmul_(norm, hollow[:, None]) > 0
    return inside, second


def paint(bodies: Primitives, sections: Sections, k: int, tiles: Tiles, label: int) -> None:
    """Write primitive k into the labels of the tiles that it may touch: `label`, and `label` + 1 where it has its second label."""
    place = tiles.slice, tiles.window
    reach = sections.reach[..., k][place]
    distance = (tiles.centre - sections.centre[:, :, k][place]).norm(dim=1)
    rows = ((reach > 0) & (distance < reach + tiles.radius)).nonzero()[:, 0]
    inside, second = inside_of(bodies, sections, k, tiles, rows)
    labels = torch.where(inside, second.to(torch.uint8).add_(label), tiles.labels.index_select(0, rows))
    tiles.labels.index_copy_(0, rows, labels)


def paint_around(bodies: Primitives, sections: Sections, tiles: Tiles, windows: Tensor, outside: int, wall: int) -> None:
    """Write the label `outside` to what is outside primitive 0, and `wall` to its wall, in the windows that are True in `windows` (W,).

    The norm at a tile's centre and a bound on its slope decide most tiles as a whole; only the others are computed per pixel.
    """
    rows = windows[tiles.window].nonzero()[:, 0]
    place = tiles.slice[rows], tiles.window[rows]
    norm = _norms(bodies, sections, 0, tiles, rows, tiles.centre[rows][..., None])[2][:, 0]
    slope = (1 + 3 * bodies.bend.abs()) / bodies.short_radius
    change = 1.5 * tiles.radius[rows] * slope[:, 0][place[1]]
    tiles.labels.index_fill_(0, rows[norm - change > sections.radius[..., 0][place]], outside)
    rows = rows[(norm - change <= sections.radius[..., 0][place]) & (norm + change >= sections.inner_radius[..., 0][place])]
    inside, second = inside_of(bodies, sections, 0, tiles, rows)
    labels = tiles.labels.index_select(0, rows).masked_fill_(second, wall).masked_fill_(~inside, outside)
    tiles.labels.index_copy_(0, rows, labels)
