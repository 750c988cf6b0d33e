"""Random numbers for many windows at once, and smooth random fields made of them.

One generator, one device: the same seed gives the same numbers on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor


def _ordered(between: tuple[float, float]) -> tuple[float, float]:
    if between[0] > between[1]:
        raise ValueError(f"{between[0]:g} to {between[1]:g} is no range")
    return between


def _positive(between: tuple[float, float]) -> tuple[float, float]:
    if between[0] <= 0:
        raise ValueError(f"{between[0]:g}: doublings begin above 0")
    return _ordered(between)


def _possible(shares: tuple[float, ...]) -> tuple[float, ...]:
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError("shares are 0 or more, and not all 0")
    return shares


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
LogRange = Annotated[tuple[float, float], AfterValidator(_positive)]
Share = Annotated[float, Field(ge=0, le=1)]
Three = Annotated[tuple[float, float, float], AfterValidator(_possible)]
Four = Annotated[tuple[float, float, float, float], AfterValidator(_possible)]
Five = Annotated[tuple[float, float, float, float, float], AfterValidator(_possible)]


@dataclass(frozen=True)
class Draw:
    """Draws tensors of any shape from one generator, on its device."""

    rng: torch.Generator

    @classmethod
    def on(cls, device: torch.device, rng: torch.Generator) -> Draw:
        """From `rng` itself where it lives on the device, else from a generator there that `rng` seeds."""
        if rng.device.type == device.type:
            return cls(rng)
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        return cls(torch.Generator(device).manual_seed(seed))

    @property
    def device(self) -> torch.device:
        return self.rng.device

    def uniform(self, between: tuple[float, float], *shape: int) -> Tensor:
        low, high = between
        return torch.rand(shape, generator=self.rng, device=self.device).mul_(high - low).add_(low)

    def spread(self, between: tuple[float, float], *shape: int) -> Tensor:
        """Log-uniform: every doubling is equally likely."""
        low, high = torch.tensor(between).log().tolist()
        return self.uniform((low, high), *shape).exp_()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def chance(self, share: float, *shape: int) -> Tensor:
        """Booleans, True with the given probability."""
        return torch.rand(shape, generator=self.rng, device=self.device) < share

    def pick(self, shares: Sequence[float], *shape: int) -> Tensor:
        """Indices, each as likely as its share of the sum."""
        edges = torch.tensor(shares, device=self.device).cumsum(0)
        return torch.bucketize(self.uniform((0.0, float(edges[-1])), *shape), edges[:-1], right=True)

    def sign(self, *shape: int) -> Tensor:
        """-1 or 1."""
        return self.chance(0.5, *shape).float().mul_(2).sub_(1)


def smooth_field(draw: Draw, slices: int, pace: Tensor, channels: int, cells: int, px: int) -> Tensor:
    """(T, W, C, px, px) of smooth noise, about unit variance: `cells` independent values across a slice.

    pace (W,): independent values per slice along the stack, at most 1; 0 makes all slices of a window the same.
    """
    windows = len(pace)
    knots = draw.normal(windows, slices + 2, channels, cells + 3, cells + 3)
    place = draw.uniform((0.0, 1.0), windows, 1) + pace[:, None] * torch.arange(slices, device=draw.device)
    below = place.floor().long()
    share = (place - below)[..., None, None, None]
    rows = torch.arange(windows, device=draw.device)[:, None]
    mixed = torch.lerp(knots[rows, below], knots[rows, below + 1], share) / (share**2 + (1 - share) ** 2).sqrt()
    spline = _spline(cells, px, draw.device)
    return spline @ mixed.transpose(0, 1) @ spline.T


def _spline(cells: int, px: int, device: torch.device) -> Tensor:
    """(px, cells + 3): cubic B-spline weights of the knots at every pixel's centre, squares summing to 1."""
    place = (torch.arange(px, device=device) + 0.5) * (cells / px) + 1
    apart = (place[:, None] - torch.arange(cells + 3, device=device)).abs()
    weight = torch.where(apart < 1, 2 / 3 - apart**2 + apart**3 / 2, (2 - apart).clamp(min=0) ** 3 / 6)
    normalised: Tensor = weight / weight.norm(dim=1, keepdim=True)
    return normalised
