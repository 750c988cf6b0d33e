"""Which slices the model learns from: windows of consecutive slices, tracked both ways, often across an end.

A window is encoded once and tracked several times: every label present on its first slice forwards, every label
present on its last slice backwards. Published training saw ends in about 7/L of its clips and never went backwards
(see docs/explanation/training.md); here `ENDS` of the windows hold the end of a structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.data.prepared import PreparedCase
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.model.focus import Square, around, box_of
from slmsam2_cli.model.slices import framed, to_input
from slmsam2_cli.planning.plan import GeometryPlan

ENDS = 0.6
_POINTERS = 16


@dataclass(frozen=True)
class Clips:
    """W windows of T slices and M tracks through them.

    frames (T, W, C, px, px) in [0, 1]; masks (T, M, 1, px, px) in the track's own order, the first slice annotated;
    known, like masks: 0 where the ignore label says that nobody looked, or None when it never does;
    window (M,): the window a track runs through; reverse (M,): whether it runs from the last slice to the first;
    slices: length of the volumes, as far as pointers can see.
    """

    frames: Tensor
    masks: Tensor
    window: Tensor
    reverse: Tensor
    slices: int
    known: Tensor | None = None

    def to(self, device: torch.device) -> Clips:
        """The same clips on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("frames", "masks", "window", "reverse")}
        return replace(self, **moved, known=None if self.known is None else self.known.to(device))

    def feature_index(self, t: int) -> Tensor:
        """(M,): which of the T * W encoded slices (T-major) each track sees at its step t."""
        length, windows = self.frames.shape[:2]
        return torch.where(self.reverse, length - 1 - t, t) * windows + self.window


@dataclass(frozen=True)
class _Structure:
    """One label of one case: the stack slices that hold it and were looked at as a whole."""

    case: int
    label: int
    slices: np.ndarray


class ClipSampler:
    """Draws clips from prepared cases; all randomness comes from the generator given to `draw`."""

    def __init__(self, cases: Sequence[PreparedCase], values: Sequence[int], geometry: GeometryPlan, ignore: int | None = None) -> None:
        self.cases, self.geometry, self.ignore = [case for case in cases if case.frames.shape[1] > 1], geometry, ignore
        self.structures = [s for i, case in enumerate(self.cases) for s in _structures(i, case, values, ignore)]
        if not self.structures:
            raise DatasetError("no training case holds a labelled structure over at least two slices. Annotate one, or check the labels")

    def draw(self, rng: np.random.Generator, windows: int, length: int, tracks: int) -> Clips:
        """W windows and at most `tracks` tracks; volumes too short for `length` shorten the clips."""
        chosen = self._alike(rng, windows)
        length = min([length, *(self._longest(s) for s in chosen)])
        starts = [self._start(rng, s, length) for s in chosen]
        runs = [(w, value, reverse) for w, (s, start) in enumerate(zip(chosen, starts)) for value, reverse in self._runs(s, start, length)]
        runs = [runs[i] for i in sorted(rng.permutation(len(runs))[:tracks])]
        squares = [self._square(s, start, length) for s, start in zip(chosen, starts)]
        frames = torch.stack([self._frames(s, start, length, square) for s, start, square in zip(chosen, starts, squares)], dim=1)
        masks = torch.stack([self._masks(chosen[w], starts[w], length, value, reverse, squares[w]) for w, value, reverse in runs], dim=1)
        known = None
        if self.ignore is not None:
            ignored = [self._masks(chosen[w], starts[w], length, self.ignore, reverse, squares[w]) for w, _, reverse in runs]
            known = 1 - torch.stack(ignored, dim=1)
        window, reverse = torch.tensor([w for w, _, _ in runs]), torch.tensor([r for _, _, r in runs])
        return Clips(frames, masks, window, reverse, self._slices(chosen[0]), known)

    def _alike(self, rng: np.random.Generator, windows: int) -> list[_Structure]:
        """Structures of volumes whose pointer scale is the same, min(slices, 16)."""
        first = self.structures[rng.integers(len(self.structures))]
        reach = min(self._slices(first), _POINTERS)
        alike = [s for s in self.structures if min(self._slices(s), _POINTERS) == reach]
        return [first, *(alike[i] for i in rng.integers(len(alike), size=windows - 1))]

    def _slices(self, structure: _Structure) -> int:
        return int(self.cases[structure.case].frames.shape[1])

    def _longest(self, structure: _Structure) -> int:
        """Slices of the longest window that begins or ends on the structure; at least 2."""
        return max(self._slices(structure) - int(structure.slices[0]), int(structure.slices[-1]) + 1)

    def _start(self, rng: np.random.Generator, structure: _Structure, length: int) -> int:
        """First slice of a window with the structure on its first or last slice; often across an end of it."""
        held = structure.slices
        if rng.random() < ENDS:
            beyond = int(rng.integers(1, length)) if length > 1 else 0
            start = int(held[-1]) - (length - 1) + beyond if rng.random() < 0.5 else int(held[0]) - beyond
        else:
            anchor = int(rng.choice(held))
            start = anchor if rng.random() < 0.5 else anchor - (length - 1)
        last = self._slices(structure) - length
        possible = np.concatenate([held[held <= last], held[held >= length - 1] - (length - 1)])
        return int(possible[np.abs(possible - min(max(start, 0), last)).argmin()])

    def _runs(self, structure: _Structure, start: int, length: int) -> list[tuple[int, bool]]:
        """(label, reverse) of every track that can start at either edge of a window."""
        siblings = [s for s in self.structures if s.case == structure.case]
        edges = ((start, False), (start + length - 1, True))
        return [(s.label, reverse) for s in siblings for edge, reverse in edges if edge in s.slices]

    def _square(self, structure: _Structure, start: int, length: int) -> Square | None:
        """Where the network looks: around the structure on the edge of the window that holds it; None: at whole slices."""
        if self.geometry.focus is None:
            return None
        labels = self.cases[structure.case].labels
        assert labels is not None
        edges = [edge for edge in (start, start + length - 1) if edge in structure.slices]
        given = framed(torch.from_numpy(np.asarray(labels[edges[0]]) == structure.label), self.geometry.stack_px)
        return around(box_of([given]), self.geometry.focus, self.geometry.stack_px)

    def _frames(self, structure: _Structure, start: int, length: int, square: Square | None) -> Tensor:
        first = max(start - 1, 0)  # the neighbours of a window's outer slices are seen, too
        stack = torch.from_numpy(np.asarray(self.cases[structure.case].frames[:, first : start + length + 1], dtype=np.float32))
        seen = to_input(stack, self.geometry.neighbours)[start - first : start - first + length]
        slices = framed(seen, self.geometry.stack_px)
        return square.cut(slices, self.geometry.frame_px) if square is not None else slices

    def _masks(self, structure: _Structure, start: int, length: int, value: int, reverse: bool, square: Square | None) -> Tensor:
        labels = self.cases[structure.case].labels
        assert labels is not None
        mask = torch.from_numpy(np.asarray(labels[start : start + length]) == value).float()
        slices = framed((mask.flip(0) if reverse else mask).unsqueeze(1), self.geometry.stack_px)
        return square.cut_masks(slices, self.geometry.frame_px) if square is not None else slices


def _structures(index: int, case: PreparedCase, values: Sequence[int], ignore: int | None) -> list[_Structure]:
    if case.labels is None:
        return []
    labels = np.asarray(case.labels)
    whole = np.ones(len(labels), bool) if ignore is None else ~(labels == ignore).any(axis=(1, 2))
    held = [(value, np.flatnonzero((labels == value).any(axis=(1, 2)) & whole)) for value in values]
    return [_Structure(index, value, slices) for value, slices in held if slices.size]
