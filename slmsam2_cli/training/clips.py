"""Which slices the model learns from: windows of consecutive slices, tracked both ways, often across an end.

A window is encoded once and tracked several times: every label present on its first slice forwards, every label
present on its last slice backwards. Published training saw ends in about 7/L of its clips and never went backwards
(see docs/explanation/training.md); here `ENDS` of the windows hold the end of a structure, and some leave slices out, as if the volume
had thicker ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.model.roi import RoiCrop, mask_box, pad_to_square, roi_around, to_input
from slmsam2_cli.planning.plan import GeometryPlan

ENDS = 0.6
_POINTERS = 16
_MIN_STRIDED_SLICES = 8  # slices that have to be left of a volume without every second or third one


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
class _Stack:
    """A case, or every second or third slice of one, from slice `first` on."""

    case: PreparedCase
    stride: int = 1
    first: int = 0

    @property
    def frames(self) -> np.ndarray[Any, Any]:
        """(C, T, H, W)."""
        return self.case.frames[:, self.first :: self.stride]

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """(T, H, W)."""
        assert self.case.labels is not None
        return self.case.labels[self.first :: self.stride]


@dataclass(frozen=True)
class _Structure:
    """One label of one stack: the slices that hold it and were looked at as a whole."""

    case: int
    label: int
    slices: np.ndarray


@dataclass(frozen=True)
class WindowChoice:
    """What is to be shown, before anything is read: a structure and a first slice for every window, as many slices in each."""

    structures: tuple[_Structure, ...]
    starts: tuple[int, ...]
    length: int


class ClipSampler:
    """Draws clips from prepared cases; all randomness comes from the generators given to it.

    `strides`: how often every first, second or third slice is shown, of a volume with enough of them.
    """

    strides: ClassVar[dict[int, float]] = {1: 0.7, 2: 0.2, 3: 0.1}

    def __init__(self, cases: Sequence[PreparedCase], values: Sequence[int], geometry: GeometryPlan, ignore: int | None = None) -> None:
        self.cases, self.geometry, self.ignore = tuple(cases), geometry, ignore
        self.stacks: list[_Stack] = []
        self.structures: dict[int, list[_Structure]] = {}
        for stride in self.strides:
            thinned = [stack for case in cases for stack in _with_stride(case, stride)]
            first = len(self.stacks)
            self.structures[stride] = [s for i, stack in enumerate(thinned, start=first) for s in _structures(i, stack, values, ignore)]
            self.stacks += thinned
        if not self.structures[1]:
            raise DatasetError("no training case holds a labelled structure over at least two slices. Annotate one, or check the labels")

    def check_not_truncated(self) -> None:
        """ArrayError where a file of a volume was cut short since it was opened."""
        for case in self.cases:
            check_not_truncated(case)

    def choose(self, rng: np.random.Generator, windows: int, length: int) -> WindowChoice:
        """W windows; volumes too short for `length` shorten all of them."""
        chosen = self._alike(rng, windows)
        length = min([length, *(self._longest(s) for s in chosen)])
        return WindowChoice(tuple(chosen), tuple(self._start(rng, s, length) for s in chosen), length)

    def cases_of(self, windows: WindowChoice) -> tuple[str, ...]:
        """The ids of the volumes that the windows are of."""
        return tuple(dict.fromkeys(self.stacks[s.case].case.id for s in windows.structures))

    def show(self, windows: WindowChoice, number: int, rng: np.random.Generator, tracks: int) -> Clips:
        """One of the windows, and at most `tracks` tracks through it."""
        structure, start, length = windows.structures[number], windows.starts[number], windows.length
        runs = self._runs(structure, start, length)
        runs = [runs[i] for i in sorted(rng.permutation(len(runs))[:tracks])]
        square = self._square(structure, start, length)
        masks = [self._masks(structure, start, length, value, reverse, square) for value, reverse in runs]
        known = None
        if self.ignore is not None:
            known = 1 - torch.stack([self._masks(structure, start, length, self.ignore, reverse, square) for _, reverse in runs], dim=1)
        return Clips(
            frames=self._frames(structure, start, length, square)[:, None],
            masks=torch.stack(masks, dim=1),
            window=torch.zeros(len(runs), dtype=torch.long),
            reverse=torch.tensor([reverse for _, reverse in runs]),
            slices=self._slices(structure),
            known=known,
        )

    def draw(self, rng: np.random.Generator, windows: int, length: int, tracks: int) -> Clips:
        """W windows with at most `tracks` tracks through each."""
        chosen = self.choose(rng, windows, length)
        return together([self.show(chosen, number, rng, tracks) for number in range(windows)])

    def _alike(self, rng: np.random.Generator, windows: int) -> list[_Structure]:
        """Structures of volumes whose pointer scale is the same, min(slices, 16), thinned alike."""
        whole = self.structures[1][rng.integers(len(self.structures[1]))]
        case, possible = self.stacks[whole.case].case, {1: [whole]}
        for stride, structures in self.structures.items():
            if stride > 1 and (thinned := [s for s in structures if s.label == whole.label and self.stacks[s.case].case is case]):
                possible[stride] = thinned
        chances = np.array([self.strides[stride] for stride in possible])
        stride = int(rng.choice(list(possible), p=chances / chances.sum()))
        first = possible[stride][rng.integers(len(possible[stride]))]
        reach = min(self._slices(first), _POINTERS)
        alike = [s for s in self.structures[stride] if min(self._slices(s), _POINTERS) == reach]
        return [first, *(alike[i] for i in rng.integers(len(alike), size=windows - 1))]

    def _slices(self, structure: _Structure) -> int:
        return int(self.stacks[structure.case].frames.shape[1])

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
        siblings = [s for alike in self.structures.values() for s in alike if s.case == structure.case]
        edges = ((start, False), (start + length - 1, True))
        return [(s.label, reverse) for s in siblings for edge, reverse in edges if edge in s.slices]

    def _square(self, structure: _Structure, start: int, length: int) -> RoiCrop | None:
        """Where the network looks: around the structure on the edge of the window that holds it; None: at whole slices."""
        if self.geometry.roi_scale is None:
            return None
        labels = self.stacks[structure.case].labels
        edges = [edge for edge in (start, start + length - 1) if edge in structure.slices]
        given = pad_to_square(torch.from_numpy(np.asarray(labels[edges[0]]) == structure.label), self.geometry.stack_size)
        return roi_around(mask_box([given]), self.geometry.roi_scale, self.geometry.stack_size)

    def _frames(self, structure: _Structure, start: int, length: int, square: RoiCrop | None) -> Tensor:
        first = max(start - 1, 0)  # the neighbours of a window's outer slices are seen, too
        stack = torch.from_numpy(np.asarray(self.stacks[structure.case].frames[:, first : start + length + 1], dtype=np.float32))
        seen = to_input(stack, self.geometry.adjacent_slices)[start - first : start - first + length]
        slices = pad_to_square(seen, self.geometry.stack_size)
        return square.crop(slices, self.geometry.input_size) if square is not None else slices

    def _masks(self, structure: _Structure, start: int, length: int, value: int, reverse: bool, square: RoiCrop | None) -> Tensor:
        labels = self.stacks[structure.case].labels
        mask = torch.from_numpy(np.asarray(labels[start : start + length]) == value).float()
        slices = pad_to_square((mask.flip(0) if reverse else mask).unsqueeze(1), self.geometry.stack_size)
        return square.crop_masks(slices, self.geometry.input_size) if square is not None else slices


def together(clips: Sequence[Clips]) -> Clips:
    """Clips of as many slices each, as one; the tracks of the first window come first."""
    firsts = np.cumsum([0, *(one.frames.shape[1] for one in clips)])
    known = [one.known for one in clips if one.known is not None]
    return Clips(
        frames=torch.cat([one.frames for one in clips], dim=1),
        masks=torch.cat([one.masks for one in clips], dim=1),
        window=torch.cat([one.window + int(first) for one, first in zip(clips, firsts)]),
        reverse=torch.cat([one.reverse for one in clips]),
        slices=clips[0].slices,
        known=torch.cat(known, dim=1) if known else None,
    )


def _with_stride(case: PreparedCase, stride: int) -> list[_Stack]:
    """The case as it is, or the ways to leave all but every second or third slice of it out; none where too few slices are left."""
    if case.labels is None or case.frames.shape[1] < (2 if stride == 1 else stride * _MIN_STRIDED_SLICES):
        return []
    return [_Stack(case, stride, first) for first in range(stride)]


def _structures(index: int, stack: _Stack, values: Sequence[int], ignore: int | None) -> list[_Structure]:
    labels = np.asarray(stack.labels)
    whole = np.ones(len(labels), bool) if ignore is None else ~(labels == ignore).any(axis=(1, 2))
    held = [(value, np.flatnonzero((labels == value).any(axis=(1, 2)) & whole)) for value in values]
    return [_Structure(index, value, slices) for value, slices in held if slices.size]
