"""Random numbers for many windows at once, and smooth random fields made from them.

All numbers come from one generator on one device, so the same seed gives the same numbers on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor


def _check_range(limits: tuple[float, float]) -> tuple[float, float]:
    """Raise ValueError when the limits do not ascend."""
    if limits[0] > limits[1]:
        raise ValueError(f"{limits[0]:g} is greater than {limits[1]:g}: give the lower limit first")
    return limits


def _check_log_range(limits: tuple[float, float]) -> tuple[float, float]:
    """Raise ValueError when a limit is not positive, or the limits do not ascend."""
    if limits[0] <= 0:
        raise ValueError(f"the lower limit {limits[0]:g} must be greater than 0")
    return _check_range(limits)


def _check_shares(shares: tuple[float, ...]) -> tuple[float, ...]:
    """Raise ValueError when a share is negative, or all are 0."""
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError("shares must be 0 or greater, and at least one of them greater than 0")
    return shares


Range = Annotated[tuple[float, float], AfterValidator(_check_range)]  # uniform between the limits
LogRange = Annotated[tuple[float, float], AfterValidator(_check_log_range)]  # log-uniform between the limits
Fraction = Annotated[float, Field(ge=0, le=1)]
Shares3 = Annotated[tuple[float, float, float], AfterValidator(_check_shares)]
Shares4 = Annotated[tuple[float, float, float, float], AfterValidator(_check_shares)]
Shares5 = Annotated[tuple[float, float, float, float, float], AfterValidator(_check_shares)]


@dataclass(frozen=True)
class Draw:
    """Draws tensors of any shape from one generator, on the generator's device."""

    rng: torch.Generator

    @classmethod
    def on(cls, device: torch.device, rng: torch.Generator) -> Draw:
        """Draw from `rng` if it is on the device, else from a new generator on the device that `rng` seeds."""
        if rng.device.type == device.type:
            return cls(rng)
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        return cls(torch.Generator(device).manual_seed(seed))

    @property
    def device(self) -> torch.device:
        """Return the generator's device."""
        return self.rng.device

    def uniform(self, limits: tuple[float, float], *shape: int) -> Tensor:
        """Draw numbers that are uniform between the limits."""
        low, high = limits
        return torch.rand(shape, generator=self.rng, device=self.device).mul_(high - low).add_(low)

    def log_uniform(self, limits: tuple[float, float], *shape: int) -> Tensor:
        """Draw numbers whose logarithm is uniform, so that every doubling is equally likely."""
        low, high = torch.tensor(limits).log().tolist()
        return self.uniform((low, high), *shape).exp_()

    def normal(self, *shape: int) -> Tensor:
        """Draw normally distributed numbers of mean 0 and variance 1."""
        return torch.randn(shape, generator=self.rng, device=self.device)

    def bernoulli(self, probability: float, *shape: int) -> Tensor:
        """Draw booleans that are True with the given probability."""
        return torch.rand(shape, generator=self.rng, device=self.device) < probability

    def categorical(self, shares: Sequence[float], *shape: int) -> Tensor:
        """Draw indices into `shares`; each is as likely as its share of the sum."""
        edges = torch.tensor(shares, device=self.device).cumsum(0)
        return torch.bucketize(self.uniform((0.0, float(edges[-1])), *shape), edges[:-1], right=True)

    def sign(self, *shape: int) -> Tensor:
        """Draw -1 or 1."""
        return self.bernoulli(0.5, *shape).float().mul_(2).sub_(1)


def smooth_field(draw: Draw, slices: int, rate: Tensor, channels: int, cells: int, px: int) -> Tensor:
    """Draw smooth noise of about unit variance, (T, W, C, px, px), with `cells` independent values across a slice.

    The noise is interpolated between random knots: by cubic B-splines within a slice, linearly along the slices.
    slices: T. channels: C. px: edge of a slice in pixels.
    rate (W,): independent values per slice along the stack, at most 1; 0 makes all slices of a window the same.
    """
    windows = len(rate)
    knots = draw.normal(windows, slices + 2, channels, cells + 3, cells + 3)
    position = draw.uniform((0.0, 1.0), windows, 1) + rate[:, None] * torch.arange(slices, device=draw.device)
    below = position.floor().long()
    share = (position - below)[..., None, None, None]
    rows = torch.arange(windows, device=draw.device)[:, None]
    mixed = torch.lerp(knots[rows, below], knots[rows, below + 1], share) / (share**2 + (1 - share) ** 2).sqrt()
    centre = (torch.arange(px, device=draw.device) + 0.5) * (cells / px) + 1
    distance = (centre[:, None] - torch.arange(cells + 3, device=draw.device)).abs()
    weight = torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6)
    spline: Tensor = weight / weight.norm(dim=1, keepdim=True)  # (px, cells + 3); the squares sum to 1 per pixel
    return spline @ mixed.transpose(0, 1) @ spline.T
