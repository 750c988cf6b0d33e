"""Draw training clips: windows of consecutive slices, tracked in both directions, often across the end of a structure.

A window is encoded once and tracked several times: every label present on its first slice forwards, every label present on its last
slice backwards. Published training saw ends in about 7/L of its clips and never went backwards (docs/explanation/training.md); here
`END_FRACTION` of the windows hold the end of a structure, and some leave slices out, as if the volume had thicker ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.dataset.cache import PreparedCase
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.model.roi import mask_box, pad_to_square, roi_around, to_input
from slmsam2_cli.planning.plan import GeometryPlan

END_FRACTION = 0.6
_POINTERS = 16
_MIN_STRIDED_SLICES = 8  # that must remain of a volume of which only every second or third slice is used


@dataclass(frozen=True)
class Clips:
    """W windows of T slices and M tracks through them.

    frames (T, W, C, px, px) in [0, 1]; masks (T, M, 1, px, px) in the track's own order, the first slice annotated; valid, like masks: 0
    under the ignore label, or None when no pixel is ignored; window (M,): the window that a track runs through; reverse (M,): whether it
    runs from the last slice to the first; slices: length of the volumes, as far as object pointers reach.
    """

    frames: Tensor
    masks: Tensor
    window: Tensor
    reverse: Tensor
    slices: int
    valid: Tensor | None = None

    def to(self, device: torch.device) -> Clips:
        """Copy the clips to a device."""
        moved = {n: getattr(self, n).to(device) for n in ("frames", "masks", "window", "reverse")}
        return replace(self, **moved, valid=None if self.valid is None else self.valid.to(device))

    def feature_index(self, t: int) -> Tensor:
        """Return which of the T * W encoded slices (T-major) each track sees at its step t, (M,)."""
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
    """One label of one stack: the slices that hold it and have no ignored pixel."""

    stack: int
    label: int
    slices: np.ndarray


@dataclass(frozen=True)
class WindowChoice:
    """A structure and a first slice for every window, and the number of slices in each; chosen before any voxel is read."""

    structures: tuple[_Structure, ...]
    starts: tuple[int, ...]
    length: int


class ClipSampler:
    """Draws clips from prepared cases; all randomness comes from the generators that its methods get.

    `strides`: how often every slice, every second or every third slice of a volume with enough of them is used.
    """

    strides: ClassVar[dict[int, float]] = {1: 0.7, 2: 0.2, 3: 0.1}

    def __init__(self, cases: Sequence[PreparedCase], values: Sequence[int], geometry: GeometryPlan, ignore: int | None = None) -> None:
        self.cases, self.geometry, self.ignore = tuple(cases), geometry, ignore
        self.stacks: list[_Stack] = []
        self.structures: dict[int, list[_Structure]] = {}
        for stride in self.strides:
            enough = 2 if stride == 1 else stride * _MIN_STRIDED_SLICES
            usable = [case for case in cases if case.labels is not None and case.frames.shape[1] >= enough]
            strided = [_Stack(case, stride, first) for case in usable for first in range(stride)]
            start = len(self.stacks)
            self.structures[stride] = [s for i, stack in enumerate(strided, start) for s in _structures(i, stack, values, ignore)]
            self.stacks += strided
        if not self.structures[1]:
            raise DatasetError("no training case holds a labelled structure over at least two slices. Annotate one, or check the labels")

    def choose_windows(self, rng: np.random.Generator, windows: int, length: int) -> WindowChoice:
        """Choose W windows of `length` slices; volumes too short for it shorten all of them."""
        chosen = self._similar_structures(rng, windows)
        length = min([length, *(self._longest(s) for s in chosen)])
        return WindowChoice(tuple(chosen), tuple(self._start(rng, s, length) for s in chosen), length)

    def cases_of(self, windows: WindowChoice) -> tuple[str, ...]:
        """Return the ids of the cases that the windows are taken from."""
        return tuple(dict.fromkeys(self.stacks[s.stack].case.id for s in windows.structures))

    def read_window(self, windows: WindowChoice, number: int, rng: np.random.Generator, tracks: int) -> Clips:
        """Read one of the windows, with at most `tracks` tracks through it."""
        structure, start, length = windows.structures[number], windows.starts[number], windows.length
        stack, geometry = self.stacks[structure.stack], self.geometry
        runs = self._runs(structure, start, length)
        runs = [runs[i] for i in sorted(rng.permutation(len(runs))[:tracks])]
        roi = None
        if geometry.roi_scale is not None:  # around the structure on the edge of the window that holds it
            edge = start if start in structure.slices else start + length - 1
            annotated = pad_to_square(torch.from_numpy(np.asarray(stack.labels[edge]) == structure.label), geometry.storage_size)
            roi = roi_around(mask_box([annotated]), geometry.roi_scale, geometry.storage_size)

        def masks(value: int, reverse: bool) -> Tensor:
            mask = torch.from_numpy(np.asarray(stack.labels[start : start + length]) == value).float()
            slices = pad_to_square((mask.flip(0) if reverse else mask).unsqueeze(1), geometry.storage_size)
            return roi.crop_masks(slices, geometry.input_size) if roi is not None else slices

        first = max(start - 1, 0)  # the slices just outside the window are neighbours of its outer slices
        read = torch.from_numpy(np.asarray(stack.frames[:, first : start + length + 1], dtype=np.float32))
        frames = pad_to_square(to_input(read, geometry.adjacent_slices)[start - first : start - first + length], geometry.storage_size)
        ignore, valid = self.ignore, None
        if ignore is not None:
            valid = 1 - torch.stack([masks(ignore, reverse) for _, reverse in runs], dim=1)
        return Clips(
            frames=(roi.crop(frames, geometry.input_size) if roi is not None else frames)[:, None],
            masks=torch.stack([masks(value, reverse) for value, reverse in runs], dim=1),
            window=torch.zeros(len(runs), dtype=torch.long),
            reverse=torch.tensor([reverse for _, reverse in runs]),
            slices=self._slices(structure),
            valid=valid,
        )

    def draw(self, rng: np.random.Generator, windows: int, length: int, tracks: int) -> Clips:
        """Draw W windows with at most `tracks` tracks through each."""
        chosen = self.choose_windows(rng, windows, length)
        return concatenate_clips([self.read_window(chosen, number, rng, tracks) for number in range(windows)])

    def _similar_structures(self, rng: np.random.Generator, windows: int) -> list[_Structure]:
        """Draw structures with the same stride, from volumes with the same pointer scale, min(slices, 16)."""
        whole = self.structures[1][rng.integers(len(self.structures[1]))]
        case, possible = self.stacks[whole.stack].case, {1: [whole]}
        for stride, structures in self.structures.items():
            if stride > 1 and (same := [s for s in structures if s.label == whole.label and self.stacks[s.stack].case is case]):
                possible[stride] = same
        chances = np.array([self.strides[stride] for stride in possible])
        stride = int(rng.choice(list(possible), p=chances / chances.sum()))
        first = possible[stride][rng.integers(len(possible[stride]))]
        scale = min(self._slices(first), _POINTERS)
        similar = [s for s in self.structures[stride] if min(self._slices(s), _POINTERS) == scale]
        return [first, *(similar[i] for i in rng.integers(len(similar), size=windows - 1))]

    def _slices(self, structure: _Structure) -> int:
        return int(self.stacks[structure.stack].frames.shape[1])

    def _longest(self, structure: _Structure) -> int:
        """Compute the slices of the longest window that begins or ends on the structure; at least 2."""
        return max(self._slices(structure) - int(structure.slices[0]), int(structure.slices[-1]) + 1)

    def _start(self, rng: np.random.Generator, structure: _Structure, length: int) -> int:
        """Draw the first slice of a window whose first or last slice holds the structure; often across an end of it."""
        held = structure.slices
        if rng.random() < END_FRACTION:
            beyond = int(rng.integers(1, length)) if length > 1 else 0
            start = int(held[-1]) - (length - 1) + beyond if rng.random() < 0.5 else int(held[0]) - beyond
        else:
            edge = int(rng.choice(held))
            start = edge if rng.random() < 0.5 else edge - (length - 1)
        last = self._slices(structure) - length
        possible = np.concatenate([held[held <= last], held[held >= length - 1] - (length - 1)])
        return int(possible[np.abs(possible - min(max(start, 0), last)).argmin()])

    def _runs(self, structure: _Structure, start: int, length: int) -> list[tuple[int, bool]]:
        """List (label, reverse) of every track that can start at either edge of a window."""
        siblings = [s for structures in self.structures.values() for s in structures if s.stack == structure.stack]
        edges = ((start, False), (start + length - 1, True))
        return [(s.label, reverse) for s in siblings for edge, reverse in edges if edge in s.slices]


def concatenate_clips(clips: Sequence[Clips]) -> Clips:
    """Join clips of equally many slices; the tracks of the first window come first."""
    firsts = np.cumsum([0, *(one.frames.shape[1] for one in clips)])
    valid = [one.valid for one in clips if one.valid is not None]
    return Clips(
        frames=torch.cat([one.frames for one in clips], dim=1),
        masks=torch.cat([one.masks for one in clips], dim=1),
        window=torch.cat([one.window + int(first) for one, first in zip(clips, firsts)]),
        reverse=torch.cat([one.reverse for one in clips]),
        slices=clips[0].slices,
        valid=torch.cat(valid, dim=1) if valid else None,
    )


def _structures(index: int, stack: _Stack, values: Sequence[int], ignore: int | None) -> list[_Structure]:
    """List the labels of a stack that lie on at least one slice without ignored pixels."""
    labels = np.asarray(stack.labels)
    complete = np.ones(len(labels), bool) if ignore is None else (labels != ignore).all(axis=(1, 2))
    held = [(value, np.flatnonzero(np.count_nonzero(labels == value, axis=(1, 2)) * complete)) for value in values]
    return [_Structure(index, value, slices) for value, slices in held if slices.size]
