"""Training of SLM-SAM 2 and of its baseline SAM 2 as published: arXiv 2505.01854, section III.

Clips of 8 slices in ascending order, of which the first holds an object, up to 3 objects; one clip per step, 100 steps per volume; focal
times 20, Dice, IoU and object score, the first three only where the object is present; AdamW, weight decay 0.1, a cosine from 5e-6 to
5e-7 (image encoder 3e-6, a factor of 0.9 for each block below the last), gradients clipped at 0.1; the last weights are kept. Mirroring,
rotation up to 25 degrees, shear up to 20 degrees, brightness and contrast as in SAM 2's own recipe for fine-tuning.

Differences: prompts are masks only, as in the comparison (published: also boxes and points); every step draws a window by structure
(published: every volume once per epoch); one model is trained on all labels (published: one each). The initial weights differ too: their
object score was lowered after training (docs/explanation/pretraining.md), and this recipe trains it on ground truth.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.cache import PreparedCase
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.training.clips import Clips, ClipSampler, _Structure
from slmsam2_cli.training.losses import LossWeights
from slmsam2_cli.training.trainer import clip_losses

SLICES, OBJECTS, STEPS = 8, 3, 100
LOSSES = LossWeights(absent=0.0)
RATE, ENCODER_RATE, LEAST = 5e-6, 3e-6, 0.1
DECAY, LAYER_DECAY, NORM = 0.1, 0.9, 0.1
ENCODER = "image_encoder."
TRUNK = f"{ENCODER}trunk."


class PublishedSampler(ClipSampler):
    """Windows that begin on a slice with the structure, tracked upwards."""

    strides: ClassVar = {1: 1.0}

    def _start(self, rng: np.random.Generator, structure: _Structure, length: int) -> int:
        last = self._slices(structure) - length
        possible = structure.slices[structure.slices <= last]
        return int(rng.choice(possible)) if len(possible) else max(0, last)

    def _longest(self, structure: _Structure) -> int:
        return self._slices(structure) - int(structure.slices[0])

    def _runs(self, structure: _Structure, start: int, length: int) -> list[tuple[int, bool]]:
        return [(label, reverse) for label, reverse in super()._runs(structure, start, length) if not reverse]


def augment(clips: Clips, rng: np.random.Generator) -> Clips:
    """Mirror, rotate and shear all slices of a window alike, and change brightness and contrast; not if an object would leave the image."""
    turn, shear = np.radians(rng.uniform(-25, 25)), np.tan(np.radians(rng.uniform(-20, 20)))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[mirror, shear], [0, 1]])
    matrix = torch.tensor(np.column_stack([linear, [0, 0]]), dtype=torch.float32)[None]
    masks = transform(clips.masks, matrix, "nearest")
    if not bool(masks[0].flatten(1).any(dim=1).all()):
        matrix, masks = torch.eye(2, 3)[None], clips.masks
    frames = transform(clips.frames, matrix, "bilinear") * rng.uniform(0.9, 1.1)
    frames = (frames - frames.mean()) * rng.uniform(0.97, 1.03) + frames.mean()
    valid = None if clips.valid is None else 1 - transform(1 - clips.valid, matrix, "nearest")
    return replace(clips, frames=frames.clamp(0, 1), masks=masks, valid=valid)


def transform(stack: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """Transform (T, N, C, H, W) by one affine matrix (1, 2, 3)."""
    flat = stack.flatten(0, 1)
    grid = F.affine_grid(matrix.expand(len(flat), -1, -1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, mode=mode, align_corners=False).reshape(stack.shape)


def groups(model: SlmSam2) -> list[dict[str, object]]:
    """Return groups of parameters with their peak learning rates."""
    depth = 1 + max(int(found.group(1)) for name, _ in model.named_parameters() if (found := re.match(rf"{TRUNK}blocks\.(\d+)\.", name)))
    made: dict[float, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        block = re.match(rf"{TRUNK}blocks\.(\d+)\.", name)
        below = depth - 1 - int(block.group(1)) if block else depth
        rate = ENCODER_RATE * LAYER_DECAY**below if name.startswith(TRUNK) else ENCODER_RATE if name.startswith(ENCODER) else RATE
        made.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in made.items()]


def train(model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, seed: int) -> int:
    """Train in place. Return the number of steps."""
    sampler = PublishedSampler(cases, tuple(plan.labels), plan.geometry, plan.ignore)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(groups(model), weight_decay=DECAY)
    steps = STEPS * len(cases)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        losses = clip_losses(model, augment(sampler.draw(rng, 1, SLICES, OBJECTS), rng), model.device, LOSSES)
        optimiser.zero_grad(set_to_none=True)
        torch.stack([loss.total for loss in losses]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimiser.step()
    model.eval()
    return steps
