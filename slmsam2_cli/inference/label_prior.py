"""What a label U-Net says of one volume, and how far it is weighted: as far as it agrees with what a person drew on this very volume.

The annotated slices are a test that nobody has to set: where the label U-Net finds them, it counts as much as propagation; where it
finds something else, it counts little or nothing. It is weighted slice by slice, before the slice is remembered, so that what it mends
stays mended. Shares and bounds were chosen on the cases that docs/decisions.md names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.masks import dice
from slmsam2_cli.model.label_unet import LabelUNet, view_of, with_adjacent_slices
from slmsam2_cli.model.roi import RoiCrop
from slmsam2_cli.model.slmsam2 import SliceOutput, with_mask

SURE = 10.0  # the most a logit counts
MOST = 0.5  # what the label U-Net counts at most; propagation counts the rest
GOOD = 0.7  # Dice with what was drawn from which on it counts that much
MIN_AREA_FRACTION = 0.1  # share of what was drawn that has to be recognised for the structure to be there
SCALES = (1.0, 0.87, 1.15)  # at which it is asked; one answer is worth less than their mean
_BATCH = 16
_FEW = 4  # pixels


@dataclass(frozen=True)
class LabelPrior:
    """What is recognised of one structure.

    margins (T, px, px): logits of the label against all others, in `view`; agreement: Dice with what was drawn, mean over the annotated
    slices; area: of what was drawn, in pixels of the slices, mean; raises: whether it may find the structure where propagation sees none.
    """

    margins: Tensor
    view: RoiCrop
    storage_size: int
    agreement: float
    area: float
    raises: bool = True

    @property
    def share(self) -> float:
        """What it counts, 0 to MOST."""
        return MOST * min(1.0, self.agreement / GOOD) ** 2

    def weighted(self, output: SliceOutput, t: int, square: RoiCrop | None) -> SliceOutput:
        """The output of one object on slice t, seen in `square`, or of the whole slice, with what is recognised mixed in."""
        if self.share == 0:
            return output
        place = square or RoiCrop(0, 0, self.storage_size)
        margins, seen = self._at(t, place, output.chosen.shape[-1])
        if not seen.any():
            return output
        margins, share = margins.to(output.chosen), self.share * seen.to(output.chosen)
        chosen = torch.lerp(output.chosen.clamp(-SURE, SURE), margins, share)
        pixels = max(_FEW, int(MIN_AREA_FRACTION * self.area * (chosen.shape[-1] / place.edge) ** 2))
        there = torch.where(seen.to(share) > 0, margins, -SURE).flatten().topk(min(pixels, margins.numel())).values.mean()
        object_score = torch.lerp(output.object_score.float().clamp(-SURE, SURE), there.float().expand_as(output.object_score), self.share)
        if not self.raises:
            object_score = torch.minimum(object_score, output.object_score.float().clamp(-SURE, SURE))
        return with_mask(output, chosen, object_score)

    def _at(self, t: int, place: RoiCrop, edge: int) -> tuple[Tensor, Tensor]:
        """(1, 1, n, n) each: margins of slice t in a square of the slice, and 1 where the label U-Net looked, else 0."""
        margins = self.margins[t].float().clamp(-SURE, SURE)
        both = torch.stack(
            [self.view.paste(margins, self.storage_size, 0.0), self.view.paste(torch.ones_like(margins), self.storage_size, 0.0)]
        )
        cut = place.cut(both[:, None], edge)
        return cut[:1], (cut[1:] > 0.99).float()


@torch.inference_mode()
def recognised(label_unet: LabelUNet, frames: Tensor, drawn: Mapping[int, Sequence[tuple[int, Tensor]]]) -> dict[int, LabelPrior]:
    """One hint for every label that it knows and somebody drew.

    frames (T, C or more, S, S) in [0, 1]; drawn: label -> (slice, mask (S, S) bool), empty masks included.
    """
    held = {value: [(t, mask) for t, mask in masks if bool(mask.any())] for value, masks in drawn.items()}
    held = {value: masks for value, masks in held.items() if masks and value in label_unet.values}
    if not held:
        return {}
    storage_size = frames.shape[-1]
    view = view_of([mask for masks in held.values() for _, mask in masks], storage_size)
    margins = _margins(label_unet, view.cut(frames[:, : label_unet.channels].float(), label_unet.px), list(held))
    return {value: _hint(margins[value], view, storage_size, masks, label_unet.raises) for value, masks in held.items()}


def _margins(label_unet: LabelUNet, stack: Tensor, values: Sequence[int]) -> dict[int, Tensor]:
    """Label -> (T, px, px) float16 on the CPU: log p - log(1 - p), none beyond ±SURE, mean of what it says at every zoom."""
    found: dict[int, list[Tensor]] = {value: [] for value in values}
    for start in range(0, len(stack), _BATCH):
        slices = torch.stack([with_adjacent_slices(stack, t) for t in range(start, min(start + _BATCH, len(stack)))])
        told = [_zoomed(_told(label_unet, _zoomed(slices, zoom), values), 1 / zoom) for zoom in SCALES]
        for row, value in enumerate(values):
            found[value].append(torch.stack([one[:, row] for one in told]).mean(dim=0).half())
    return {value: torch.cat(parts) for value, parts in found.items()}


def _zoomed(slices: Tensor, zoom: float) -> Tensor:
    """Slices (T, C, px, px) with everything `zoom` times as large around their middle; what comes from outside repeats the rim."""
    if zoom == 1:
        return slices
    matrix = torch.tensor([[1 / zoom, 0.0, 0.0], [0.0, 1 / zoom, 0.0]], device=slices.device).expand(len(slices), -1, -1)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="border", align_corners=False)


def _told(label_unet: LabelUNet, slices: Tensor, values: Sequence[int]) -> Tensor:
    """(B, labels, px, px) on the CPU, in the order of `values`, of slices with their neighbours."""
    logits, known = label_unet(slices.to(label_unet.labels.device)).float(), label_unet.values
    margins = []
    for row in (1 + known.index(value) for value in values):
        others = torch.cat([logits[:, :row], logits[:, row + 1 :]], dim=1)
        margins.append(logits[:, row] - others.logsumexp(dim=1))
    return torch.stack(margins, dim=1).clamp(-SURE, SURE).cpu()


def _hint(margins: Tensor, view: RoiCrop, storage_size: int, masks: Sequence[tuple[int, Tensor]], raises: bool) -> LabelPrior:
    agreement, area = 0.0, 0.0
    for t, mask in masks:
        said = view.paste(margins[t].float(), storage_size, -SURE) > 0
        agreement += dice(int((said & mask).sum()), int(said.sum()), int(mask.sum())) / len(masks)
        area += int(mask.sum()) / len(masks)
    return LabelPrior(margins, view, storage_size, agreement, area, raises)
