"""SLM-SAM 2: SAM 2.1 with a short and a long memory, for slices instead of video frames.

The modules are `sam2`'s; what differs is where memory is read. A policy says which slices a slice looks at
(`memory/`), this file gathers their tokens, attends, fuses, decodes and writes the next memory. The state of a run
lives in a `MemoryBank` that the caller owns, never on the module. Chen et al., arXiv:2505.01854.

One network, slices of several sizes: everything that depends on the edge of a slice, and nothing that is learned, changes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor, nn

from slmsam2_cli.model import adapters
from slmsam2_cli.model.block_matching import moved
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.fusion import build_fuser
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.memory.features import ObjectStats, memory_scores, object_stats
from slmsam2_cli.model.memory.policy import MemoryPolicy, ReadContext, MemoryRead
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.refiner import REFINER_UPSCALE, PriorSlice, Refiner, RefinerFeatures
from slmsam2_cli.model.sam2_config import SIZE_OPTIONS, DecoderSize, SizeOptions, build_heads, sam2_parts
from slmsam2_cli.planning.plan import NetworkPlan

ABSENT_LOGIT = float(NO_OBJ_SCORE)  # of every pixel where an object is absent
MASK_LOGIT = 10.0  # an annotated mask enters as logits of +-10, as in SAM 2
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class SliceFeatures:
    """What the image encoder says of B slices.

    top (B, C, h, w) at stride 16 with its position code; fine = (B, C/8, 4h, 4w) and (B, C/4, 2h, 2w) for the decoder;
    detail: for the refiner, where there is one.
    """

    top: Tensor
    top_position: Tensor
    fine: tuple[Tensor, Tensor]
    detail: RefinerFeatures | None = None

    def at(self, index: Tensor | slice) -> SliceFeatures:
        """The features of some of the B slices."""
        detail = self.detail.at(index) if self.detail is not None else None
        return SliceFeatures(self.top[index], self.top_position[index], (self.fine[0][index], self.fine[1][index]), detail)


@dataclass
class SliceOutput:
    """What the decoder says of B objects on one slice.

    candidates (B, M, n, n): raw mask logits, n = 4h, or 16h where there is a refiner; iou (B, M): predicted IoU of each;
    best (B,): the candidate chosen; object_score (B, 1): object-score logit; chosen (B, 1, n, n): the best candidate; logits
    (B, 1, n, n): the same, emptied where the object is absent; pointer (B, C); pointers: what it is of an absent and of a present
    object, None where it is settled.
    """

    candidates: Tensor
    iou: Tensor
    best: Tensor
    object_score: Tensor
    chosen: Tensor
    logits: Tensor
    pointer: Tensor
    pointers: tuple[Tensor, Tensor] | None = None


def with_mask(output: SliceOutput, chosen: Tensor, object_score: Tensor) -> SliceOutput:
    """Return the output with other mask logits (B, 1, n, n) and object score (B, 1); an empty mask is no object."""
    empty = (chosen <= 0).flatten(1).all(dim=1, keepdim=True)
    object_score = torch.where(empty, object_score.clamp(max=-1.0), object_score).to(output.object_score)
    present = object_score > 0
    logits = torch.where(present[..., None, None], chosen, ABSENT_LOGIT)
    pointer = torch.where(present, output.pointers[1], output.pointers[0]) if output.pointers is not None else output.pointer
    return replace(output, chosen=chosen, logits=logits, object_score=object_score, pointer=pointer)


@dataclass
class Memory:
    """What is remembered of one slice: spatial (B, C_mem, h, w), pointer (B, C), chosen mask logits (B, 1, n, n), and traces.

    detail: of the slice, for the refiner, where there is one.
    """

    spatial: Tensor
    pointer: Tensor
    chosen: Tensor
    stats: ObjectStats
    detail: RefinerFeatures | None = None

    def at(self, index: Tensor) -> Memory:
        """The memory of some of the B objects."""
        detail = self.detail.at(index) if self.detail is not None else None
        return Memory(self.spatial[index], self.pointer[index], self.chosen[index], self.stats.at(index), detail)

    def sight(self) -> PriorSlice | None:
        """Where the objects were on the slice, for the refiner; None where there is none."""
        if self.detail is None:
            return None
        return PriorSlice(self.detail, self.chosen.detach().float().sigmoid(), self.stats.object_score.float().sigmoid()[:, None])


@dataclass
class MemoryBank:
    """The state of one run for B objects: anchors that a person annotated, slices tracked, in the order of writing."""

    conditioning: dict[int, Memory] = field(default_factory=dict)
    tracked: dict[int, Memory] = field(default_factory=dict)

    def __getitem__(self, slice_: int) -> Memory:
        return self.tracked[slice_] if slice_ in self.tracked else self.conditioning[slice_]

    def __contains__(self, slice_: int) -> bool:
        return slice_ in self.tracked or slice_ in self.conditioning

    def at(self, index: Tensor) -> MemoryBank:
        """What is remembered of some of the B objects."""
        return MemoryBank({s: m.at(index) for s, m in self.conditioning.items()}, {s: m.at(index) for s, m in self.tracked.items()})

    def write(self, slice_: int, memory: Memory) -> None:
        """Store a tracked slice as the newest one, also where an older memory of it is stored."""
        self.tracked.pop(slice_, None)
        self.tracked[slice_] = memory

    def retain(self, slices: Collection[int]) -> None:
        """Drop all other tracked slices."""
        for other in [s for s in self.tracked if s not in slices]:
            del self.tracked[other]


@dataclass
class Seen:
    """What the refiner looks at: this slice, the one passed, the annotated ones."""

    here: RefinerFeatures
    passed: PriorSlice
    annotated: list[PriorSlice]


def _seen(features: SliceFeatures, passed: Memory, bank: MemoryBank) -> Seen | None:
    """None where the network has no refiner."""
    just, known = passed.sight(), [sight for memory in bank.conditioning.values() if (sight := memory.sight()) is not None]
    if features.detail is None or just is None or not known:
        return None
    return Seen(features.detail, just, known)


class SlmSam2(SAM2Base):  # type: ignore[misc]
    """SAM 2.1 plus, under `shortlong` policies, a short memory-attention stack and a fuser.

    With `fifo` and `selfsort` the state dict has exactly SAM 2.1's keys (plus `carry_gain` where the size carries masks).
    calibration: what these weights' confidence is worth, for policies that weigh it; None while nobody knows, as in training.
    label U-Net: of a data set's labels, where it was tuned on one; tracking does not ask it, inference/label_prior.py does.
    """

    def __init__(self, network: NetworkPlan, input_size: int, size_options: SizeOptions | None = None) -> None:
        if input_size <= 0 or input_size % 32:
            raise ValueError(f"input_size is {input_size}; it must be a positive multiple of 32")
        self.size_options = size_options if size_options is not None else SIZE_OPTIONS[network.size]
        self._decoder_size: DecoderSize = self.size_options.decoder
        super().__init__(**sam2_parts(network.size, input_size, self.size_options.widths))
        self.network = network
        self.calibration: Calibration | None = None
        self.label_unet: LabelUNet | None = None
        self.policy = build_policy(network, self.num_maskmem, self.max_obj_ptrs_in_encoder)
        self.carry_gain = nn.Parameter(torch.tensor(0.25)) if self.size_options.carry_mask else None
        self.refiner = Refiner(self.hidden_dim // 8, self.hidden_dim) if self.size_options.refine else None
        if network.has_short_stream:
            self.short_memory_attention = copy.deepcopy(self.memory_attention)
            self.stream_fuser = build_fuser(network.fuser, self.hidden_dim)
        self.register_buffer("_mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    def _build_sam_heads(self) -> None:
        build_heads(self, self._decoder_size)

    @property
    def input_size(self) -> int:
        return int(self.image_size)

    @property
    def mask_size(self) -> int:
        """Edge of the masks it draws, in their own pixels."""
        return self.input_size // 4 * (REFINER_UPSCALE if self.refiner is not None else 1)

    def copy_long_to_short(self) -> None:
        """Start the short stack as an exact copy of the long one."""
        self.short_memory_attention.load_state_dict(self.memory_attention.state_dict())

    def encode(self, frames: Tensor) -> SliceFeatures:
        """Features of B slices. frames (B, 3, H, W) in [0, 1], or as many channels as the projection in use reads -> SliceFeatures.

        ValueError for any other number of channels.
        """
        coloured = adapters.to_rgb(self, frames)
        seen = (coloured - self._mean) / self._std
        output = self.forward_image(seen)
        s0, s1, top = output["backbone_fpn"][-3:]
        detail = self.refiner.detail(seen, s0, coloured.detach().mean(1, keepdim=True)) if self.refiner is not None else None
        return SliceFeatures(top, output["vision_pos_enc"][-1], (s0, s1), detail)

    def condition_on_mask(self, features: SliceFeatures, masks: Tensor) -> SliceOutput:
        """Annotated masks as output. masks (B, 1, H, W) in {0, 1}."""
        low, _, iou, _, _, pointer, object_score = self._use_mask_as_output(features.top, list(features.fine), masks.float())
        if self.refiner is not None:
            size = (self.mask_size, self.mask_size)
            share = F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
            low = (2 * share - 1) * MASK_LOGIT
        return SliceOutput(low, iou, low.new_zeros(len(low), dtype=torch.long), object_score, low, low, pointer)

    def track(self, features: SliceFeatures, bank: MemoryBank, moment: ReadContext, policy: MemoryPolicy | None = None) -> SliceOutput:
        """Segment B objects on one slice from memory alone; another policy than the network's reads with the same weights."""
        conditioned = self.condition(features, bank, moment, policy)
        just_passed = moment.slice - moment.step
        passed = bank[just_passed] if self.carry_gain is not None and just_passed in bank else None
        return self.decode_after(conditioned, features, bank, passed)

    def decode_after(self, conditioned: Tensor, features: SliceFeatures, bank: MemoryBank, passed: Memory | None) -> SliceOutput:
        """Masks after the slice `passed`, whose mask is carried, refined by what was annotated; without it, neither."""
        if passed is None:
            return self.decode(conditioned, features.fine, None)
        return self.decode(conditioned, features.fine, passed.chosen, _seen(features, passed, bank))

    def prune(self, bank: MemoryBank, moment: ReadContext, policy: MemoryPolicy | None = None) -> None:
        """Drop what no slice will read once `moment.slice` is stored, so that memory does not grow with the volume."""
        policy = policy or self.policy
        bank.retain({s for told in self._told(policy, bank, moment) for s in policy.keep(told)})

    def condition(self, features: SliceFeatures, bank: MemoryBank, moment: ReadContext, policy: MemoryPolicy | None = None) -> Tensor:
        """Attend to each stream that the policy names, and fuse. Returns (B, C, h, w).

        A policy that weighs evidence may read other slices for each object; objects that read the same are attended together.
        """
        policy = policy or self.policy
        reads = [policy.read(told) for told in self._told(policy, bank, moment, features)]
        if len(set(reads)) == 1:
            return self._fused(features, bank, reads[0], moment.slices)
        groups = [[i for i, streams in enumerate(reads) if streams == read] for read in dict.fromkeys(reads)]
        parts = []
        for objects in groups:
            index = torch.tensor(objects, device=features.top.device)
            parts.append(self._fused(features.at(index), bank.at(index), reads[objects[0]], moment.slices))
        back = torch.tensor([i for objects in groups for i in objects], device=features.top.device).argsort()
        return torch.cat(parts)[back]

    def _told(
        self, policy: MemoryPolicy, bank: MemoryBank, moment: ReadContext, features: SliceFeatures | None = None
    ) -> list[ReadContext]:
        """The moment as each object sees it; once, for all, where the policy weighs no evidence. Annotated slices need no calibration."""
        if not policy.needs_scores:
            return [moment]
        traces = {s: bank[s].stats for s in (*bank.conditioning, *bank.tracked)}
        top = features.top if features is not None else None
        objects = len(next(iter(traces.values())).object_score)
        told = [memory_scores(traces, of, top) for of in range(objects)]
        if self.calibration is not None:
            told = [one.calibrated(bank.tracked, self.calibration.of) for one in told]
        return [replace(moment, scores=one) for one in told]

    def _fused(self, features: SliceFeatures, bank: MemoryBank, streams: Sequence[MemoryRead], slices: int) -> Tensor:
        """One stream, or two and the fuser. Returns (B, C, h, w)."""
        long = self._attend(self.memory_attention, features, bank, streams[0], slices)
        if len(streams) == 1:
            return long
        short = self._attend(self.short_memory_attention, features, bank, streams[1], slices)
        fused: Tensor = self.stream_fuser(long, short)
        return fused

    def _attend(self, attention: nn.Module, features: SliceFeatures, bank: MemoryBank, stream: MemoryRead, slices: int) -> Tensor:
        """One memory-attention stack over one stream: query (h*w, B, C) -> (B, C, h, w)."""
        batch, width, h, w = features.top.shape
        spatial, spatial_position = self._spatial_tokens(bank, stream)
        pointers, pointer_position = self._pointer_tokens(bank, stream, batch, slices)
        dtype = features.top.dtype
        attended: Tensor = attention(
            curr=[features.top.flatten(2).permute(2, 0, 1)],
            curr_pos=[features.top_position.flatten(2).permute(2, 0, 1)],
            memory=torch.cat([spatial.to(dtype), pointers.to(dtype)]),
            memory_pos=torch.cat([spatial_position.to(dtype), pointer_position.to(dtype)]),
            num_obj_ptr_tokens=len(pointers),
        )
        return attended.permute(1, 2, 0).reshape(batch, width, h, w)

    def _spatial_tokens(self, bank: MemoryBank, stream: MemoryRead) -> tuple[Tensor, Tensor]:
        memories = [bank[s].spatial for s, _ in stream.spatial]
        position = self.memory_encoder.position_encoding(memories[0]).flatten(2).permute(2, 0, 1)
        tokens = torch.cat([memory.flatten(2).permute(2, 0, 1) for memory in memories])
        positions = torch.cat([position + self.maskmem_tpos_enc[row] for _, row in stream.spatial])
        return tokens, positions

    def _pointer_tokens(self, bank: MemoryBank, stream: MemoryRead, batch: int, slices: int) -> tuple[Tensor, Tensor]:
        """Each pointer of C channels becomes C / C_mem tokens; the position code is its distance in slices.

        Distances are measured against min(slices, 16) - 1, as in SAM 2 (at least 1: a volume of one slice).
        """
        if not stream.pointers:
            empty = self.maskmem_tpos_enc.new_zeros(0, batch, self.mem_dim)
            return empty, empty
        split = self.hidden_dim // self.mem_dim
        pointers = torch.stack([bank[s].pointer for s, _ in stream.pointers])
        tokens = pointers.reshape(-1, batch, split, self.mem_dim).permute(0, 2, 1, 3).flatten(0, 1)
        distances = torch.tensor([d for _, d in stream.pointers], dtype=torch.float32, device=tokens.device)
        code = get_1d_sine_pe(distances / max(1, min(slices, self.max_obj_ptrs_in_encoder) - 1), dim=self.hidden_dim)
        positions = self.obj_ptr_tpos_proj(code).unsqueeze(1).expand(-1, batch, self.mem_dim)
        return tokens, positions.repeat_interleave(split, dim=0)

    def decode(self, conditioned: Tensor, fine: tuple[Tensor, Tensor], carried: Tensor | None, seen: Seen | None = None) -> SliceOutput:
        """Masks, IoU, object score and pointer. conditioned (B, C, h, w); carried (B, 1, n, n): previous logits; seen: to refine by."""
        batch = len(conditioned)
        inside = carried.detach().sigmoid() if carried is not None else None
        if seen is not None and inside is not None:
            grey = seen.passed.detail.grey
            follows = moved(seen.here.grey, grey, torch.cat([inside, grey], dim=1))
            inside = follows[:, :1]
        previous = (2 * inside - 1).to(conditioned.dtype) * MASK_LOGIT if inside is not None else None
        rough = self.coarse(previous) if previous is not None else None
        sparse, dense = self.sam_prompt_encoder(points=self._no_points(batch, conditioned.device), boxes=None, masks=rough)
        candidates, iou, tokens, object_score = self.sam_mask_decoder(
            image_embeddings=conditioned,
            image_pe=self.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self._use_multimask(False, None),
            repeat_image=False,
            high_res_features=list(fine),
        )
        candidates = self.upsample_logits(candidates.float())
        if previous is not None and self.carry_gain is not None:
            candidates = candidates + self.carry_gain * previous.float()
        if seen is not None and self.refiner is not None and inside is not None:
            delta, present, quality = self.refiner(seen.here, conditioned, candidates, follows, seen.passed, seen.annotated)
            candidates, object_score = candidates + delta.float(), object_score + present
            iou = (torch.logit(iou.float(), eps=1e-4) + quality.float()).sigmoid()
        return self._choose(candidates, iou, tokens, object_score)

    def upsample_logits(self, logits: Tensor) -> Tensor:
        """The decoder's logits (B, M, 4h, 4w) at the size at which this network draws."""
        if self.refiner is None:
            return logits
        return F.interpolate(logits, scale_factor=float(REFINER_UPSCALE), mode="bilinear", align_corners=False)

    def coarse(self, logits: Tensor) -> Tensor:
        """Logits at the size at which this network draws, at the decoder's."""
        return F.avg_pool2d(logits, REFINER_UPSCALE) if self.refiner is not None else logits

    @staticmethod
    def _no_points(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch, 1, 2, device=device), -torch.ones(batch, 1, dtype=torch.int32, device=device)

    def _choose(self, candidates: Tensor, iou: Tensor, tokens: Tensor, object_score: Tensor) -> SliceOutput:
        """The candidate of the highest predicted IoU; an absent object empties it and swaps the pointer."""
        rows = torch.arange(len(candidates), device=candidates.device)
        best = iou.argmax(dim=-1)
        token = tokens[rows, best] if tokens.size(1) > 1 else tokens[:, 0]
        present = (object_score > 0).to(token.dtype)
        object_pointer = self.obj_ptr_proj(token)
        pointer = present * object_pointer + (1 - present) * self.no_obj_ptr
        chosen = candidates[rows, best].unsqueeze(1)
        logits = torch.where((object_score > 0)[..., None, None], chosen, NO_OBJ_SCORE)
        return SliceOutput(
            candidates, iou, best, object_score, chosen, logits, pointer, (self.no_obj_ptr.expand_as(pointer), object_pointer)
        )

    def remember(self, features: SliceFeatures, output: SliceOutput, masks: Tensor | None = None) -> Memory:
        """Write a memory of this slice. masks (B, 1, H, W): the user's, at full resolution, instead of the logits."""
        size = (self.input_size, self.input_size)
        if masks is not None:
            logits = masks.float() * (2 * MASK_LOGIT) - MASK_LOGIT
        else:
            logits = F.interpolate(output.logits.float(), size=size, mode="bilinear", align_corners=False)
        top = features.top.flatten(2).permute(2, 0, 1)
        spatial, _ = self._encode_new_memory([top], [features.top.shape[-2:]], logits, output.object_score, masks is not None)
        cover = masks if masks is not None else output.logits.detach().sigmoid()
        confidence = output.iou.detach().gather(1, output.best[:, None]).squeeze(1)
        traces = object_stats(features.top.detach(), cover, output.object_score.detach(), confidence)
        return Memory(spatial, output.pointer, output.chosen, traces, features.detail)


def set_input_size(model: SlmSam2, input_size: int) -> None:
    """Let a network take slices of `input_size` from now on; memories of other sizes cannot be read any more. ValueError."""
    if input_size <= 0 or input_size % 32:
        raise ValueError(f"input_size is {input_size}; it must be a positive multiple of 32")
    edge = input_size // model.backbone_stride
    model.image_size, model.sam_image_embedding_size = input_size, edge
    prompts = model.sam_prompt_encoder
    prompts.image_embedding_size, prompts.mask_input_size = (edge, edge), (4 * edge, 4 * edge)
    prompts.input_image_size = (input_size, input_size)
