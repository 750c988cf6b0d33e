"""SLM-SAM 2: SAM 2.1 with a long and a short memory, for slices of a volume instead of frames of a video.

The modules are those of `sam2`; what differs is where memory is read. One slice passes through

    encode     slice (B, 3, H, W) -> features at strides 4, 8 and 16
    condition  memory attention of the features at stride 16 (h = H / 16) to the stored slices that the policy chooses (memory/)
    decode     mask decoder, and refiner (refiner.py): mask logits, predicted IoU, object score, object pointer
    remember   memory encoder: the memory of this slice, for later slices

`track` is condition and decode. An annotated slice skips both: `condition_on_mask` turns its mask into the same output. The state of a
pass lies in a `MemoryBank` that the caller owns, never on the module. Chen et al., "SLM-SAM 2", IEEE TMI 2025, arXiv:2505.01854; Ravi
et al., "SAM 2", arXiv:2408.00714.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from sam2.modeling.sam2_utils import MLP, get_1d_sine_pe
from torch import Tensor, nn

from slmsam2_cli.model import adapters
from slmsam2_cli.model.batch import select
from slmsam2_cli.model.block_matching import warp_to_slice
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.fusion import Fuser
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.memory.features import ObjectStats, memory_scores, object_stats
from slmsam2_cli.model.memory.interface import MemoryPolicy, MemoryRead, ReadContext
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.refiner import REFINER_UPSCALE, PriorSlice, Refiner, RefinerFeatures
from slmsam2_cli.model.sam2_config import SIZE_OPTIONS, DecoderSize, SizeOptions, sam2_parts
from slmsam2_cli.planning.plan import NetworkPlan

ABSENT_LOGIT = float(NO_OBJ_SCORE)  # mask logit of every pixel of a slice without the object
MASK_LOGIT = 10.0  # annotated masks become logits of +-10, as in SAM 2
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class SliceFeatures:
    """Output of the image encoder for B slices.

    top (B, C, h, w): at stride 16, with its position encoding. fine: (B, C/8, 4h, 4w) and (B, C/4, 2h, 2w), for the mask decoder.
    refiner_features: None without a refiner.
    """

    top: Tensor
    top_position: Tensor
    fine: tuple[Tensor, Tensor]
    refiner_features: RefinerFeatures | None = None

    def at(self, index: Tensor | slice) -> SliceFeatures:
        """Select some of the B slices."""
        return select(self, index)


@dataclass
class SliceOutput:
    """Output of the mask decoder for B objects on one slice. Masks have n = 4h pixels, 16h with a refiner.

    candidates (B, M, n, n): mask logits. iou (B, M): predicted IoU of each. best (B,): index of the chosen candidate. object_score
    (B, 1): logit. chosen (B, 1, n, n): logits of the chosen candidate. logits (B, 1, n, n): the same, `ABSENT_LOGIT` for an absent
    object. pointer (B, C). pointers: (of an absent, of a present object); None for an annotated mask.
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
    """Return the output with other mask logits (B, 1, n, n) and object score (B, 1).

    With an empty mask the object is absent: its score becomes -1 or stays lower, and the pointer is that of an absent object.
    """
    empty = (chosen <= 0).flatten(1).all(dim=1, keepdim=True)
    object_score = torch.where(empty, object_score.clamp(max=-1.0), object_score).to(output.object_score)
    present = object_score > 0
    logits = torch.where(present[..., None, None], chosen, ABSENT_LOGIT)
    pointer = torch.where(present, output.pointers[1], output.pointers[0]) if output.pointers is not None else output.pointer
    return replace(output, chosen=chosen, logits=logits, object_score=object_score, pointer=pointer)


@dataclass
class Memory:
    """One stored slice: spatial (B, C_mem, h, w), pointer (B, C), chosen mask logits (B, 1, n, n), statistics of the objects.

    refiner_features: None without a refiner.
    """

    spatial: Tensor
    pointer: Tensor
    chosen: Tensor
    stats: ObjectStats
    refiner_features: RefinerFeatures | None = None


@dataclass
class MemoryBank:
    """The state of a pass for B objects: conditioning (annotated) slices, and tracked slices in the order of writing."""

    conditioning: dict[int, Memory] = field(default_factory=dict)
    tracked: dict[int, Memory] = field(default_factory=dict)

    def __getitem__(self, slice_: int) -> Memory:
        """Return the memory of a slice, the tracked one first.

        Raises: KeyError when the slice is not stored.
        """
        return self.tracked[slice_] if slice_ in self.tracked else self.conditioning[slice_]

    def __contains__(self, slice_: int) -> bool:
        """Return whether a slice is stored."""
        return slice_ in self.tracked or slice_ in self.conditioning

    def at(self, index: Tensor) -> MemoryBank:
        """Select some of the B objects."""
        return select(self, index)

    def write(self, slice_: int, memory: Memory) -> None:
        """Store a tracked slice as the newest one, in place of an older memory of it."""
        self.tracked.pop(slice_, None)
        self.tracked[slice_] = memory


@dataclass
class RefinerInput:
    """What the refiner reads: the features of this slice, the previous slice, and the conditioning slices."""

    current: RefinerFeatures
    previous: PriorSlice
    conditioning: list[PriorSlice]


class SlmSam2(SAM2Base):  # type: ignore[misc]
    """SAM 2.1 and, for policies with a short memory, a second memory-attention stack and a fuser.

    With `fifo` and `selfsort` the state dict has exactly SAM 2.1's keys (nano also `carry_gain` and `refiner.*`).
    input_size, mask_size: edge of the input and of the masks in pixels; masks are a quarter of the input, or as large with a refiner.
    calibration: of these weights' confidence, for policies that need scores; None if not calibrated, and in training.
    label_unet: segments the labels of a dataset without a prompt; None without one. `track` does not use it, inference/label_prior.py does.

    Raises: ValueError when the input size is no positive multiple of 32.
    """

    def __init__(self, network: NetworkPlan, input_size: int, size_options: SizeOptions | None = None) -> None:
        _check_input_size(input_size)
        self.size_options = size_options if size_options is not None else SIZE_OPTIONS[network.size]
        self._decoder_size: DecoderSize = self.size_options.decoder
        super().__init__(**sam2_parts(network.size, input_size, self.size_options.widths))
        self.network, self.input_size = network, input_size
        self.calibration: Calibration | None = None
        self.label_unet: LabelUNet | None = None
        self.policy = build_policy(network, self.num_maskmem, self.max_obj_ptrs_in_encoder)
        self.carry_gain = nn.Parameter(torch.tensor(0.25)) if self.size_options.carry_mask else None
        self.refiner = Refiner(self.hidden_dim // 8, self.hidden_dim) if self.size_options.refine else None
        upscale = REFINER_UPSCALE if self.refiner is not None else 1  # from the decoder's logits (B, M, 4h, 4w) to masks (B, M, n, n)
        self.mask_size = input_size // 4 * upscale
        self.downsample_logits = nn.AvgPool2d(upscale) if upscale > 1 else nn.Identity()
        self.upsample_logits = nn.Upsample(scale_factor=upscale, mode="bilinear", align_corners=False) if upscale > 1 else nn.Identity()
        if network.has_short_stream:
            self.short_memory_attention = copy.deepcopy(self.memory_attention)
            self.stream_fuser = Fuser(network.fuser, self.hidden_dim)
        self.register_buffer("_mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    def _build_sam_heads(self) -> None:
        """Build prompt encoder, mask decoder and pointer heads as `SAM2Base` does, but as wide as `DecoderSize` says."""
        width, edge, size = self.hidden_dim, self.image_size // self.backbone_stride, self._decoder_size
        self.sam_prompt_embed_dim, self.sam_image_embedding_size = width, edge
        self.sam_prompt_encoder = PromptEncoder(
            embed_dim=width, image_embedding_size=(edge, edge), input_image_size=(self.image_size,) * 2, mask_in_chans=16
        )
        self.sam_mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=size.mlp, num_heads=size.heads),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=size.iou_hidden,
            use_high_res_features=self.use_high_res_features_in_sam,
            iou_prediction_use_sigmoid=self.iou_prediction_use_sigmoid,
            pred_obj_scores=self.pred_obj_scores,
            pred_obj_scores_mlp=self.pred_obj_scores_mlp,
            use_multimask_token_for_obj_ptr=self.use_multimask_token_for_obj_ptr,
        )
        self.obj_ptr_proj = MLP(width, width, width, 3)
        self.obj_ptr_tpos_proj = nn.Linear(width, self.mem_dim)

    def encode(self, frames: Tensor) -> SliceFeatures:
        """Encode B slices (B, 3, H, W) in [0, 1] with `SAM2Base.forward_image`, and compute the refiner's features.

        Slices of other numbers of channels go through the projection of the modality in use.

        Raises: ValueError when slices have another number of channels than the projection reads (3 without one).
        """
        rgb = adapters.to_rgb(self, frames)
        normalised = (rgb - self._mean) / self._std
        output = self.forward_image(normalised)
        s0, s1, top = output["backbone_fpn"][-3:]
        refiner_features = None
        if self.refiner is not None:
            refiner_features = self.refiner.extract_features(normalised, s0, rgb.detach().mean(1, keepdim=True))
        return SliceFeatures(top, output["vision_pos_enc"][-1], (s0, s1), refiner_features)

    def condition_on_mask(self, features: SliceFeatures, masks: Tensor) -> SliceOutput:
        """Turn annotated masks (B, 1, H, W) in {0, 1} into the output of their slice, as `SAM2Base._use_mask_as_output` does.

        With a refiner, masks have the size of the input, and logits are proportional to the share of a pixel that the mask covers.
        """
        low, _, iou, _, _, pointer, object_score = self._use_mask_as_output(features.top, list(features.fine), masks.float())
        if self.refiner is not None:
            size = (self.mask_size, self.mask_size)
            share = F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
            low = (2 * share - 1) * MASK_LOGIT
        return SliceOutput(low, iou, low.new_zeros(len(low), dtype=torch.long), object_score, low, low, pointer)

    def track(self, features: SliceFeatures, bank: MemoryBank, context: ReadContext, policy: MemoryPolicy | None = None) -> SliceOutput:
        """Segment B objects on one slice from memory: `condition`, then `decode_after`.

        features: of the slice, once per object. policy: instead of the network's; the weights are the same.
        """
        conditioned = self.condition(features, bank, context, policy)
        before = context.slice - context.step
        previous = bank[before] if self.carry_gain is not None and before in bank else None
        return self.decode_after(conditioned, features, bank, previous)

    def decode_after(self, conditioned: Tensor, features: SliceFeatures, bank: MemoryBank, previous: Memory | None) -> SliceOutput:
        """Decode with the mask of the previous slice as dense prompt, then refine; without a previous slice do neither.

        conditioned (B, C, h, w): from `condition`. previous: memory of the previous slice.
        """
        if previous is None:
            return self.decode(conditioned, features.fine, None)
        known = [
            PriorSlice(m.refiner_features, m.chosen.detach().float().sigmoid(), m.stats.object_score.float().sigmoid()[:, None])
            for m in (previous, *bank.conditioning.values())
            if m.refiner_features is not None
        ]
        refine = None
        if features.refiner_features is not None and previous.refiner_features is not None and len(known) > 1:
            refine = RefinerInput(features.refiner_features, known[0], known[1:])
        return self.decode(conditioned, features.fine, previous.chosen, refine)

    def prune(self, bank: MemoryBank, context: ReadContext, policy: MemoryPolicy | None = None) -> None:
        """Delete what no later slice will read once `context.slice` is stored, so that memory does not grow with the volume."""
        policy = policy or self.policy
        kept = {s for one in self._contexts(policy, bank, context) for s in policy.keep(one)}
        for dropped in bank.tracked.keys() - kept:
            del bank.tracked[dropped]

    def condition(self, features: SliceFeatures, bank: MemoryBank, context: ReadContext, policy: MemoryPolicy | None = None) -> Tensor:
        """Attend to what the policy reads, and fuse long and short memory (Chen et al., arXiv:2505.01854) -> (B, C, h, w).

        A policy that needs scores may read other slices for each object; objects that read the same slices form one batch.
        """
        policy = policy or self.policy
        groups: dict[tuple[MemoryRead, ...], list[int]] = {}
        for obj, one in enumerate(self._contexts(policy, bank, context, features)):
            groups.setdefault(policy.read(one), []).append(obj)
        parts = []
        for (long, *short), objects in groups.items():
            here, stored = features, bank
            if len(groups) > 1:
                index = torch.tensor(objects, device=features.top.device)
                here, stored = features.at(index), bank.at(index)
            part = self._attend(self.memory_attention, here, stored, long, context.slices)
            if short:
                part = self.stream_fuser(part, self._attend(self.short_memory_attention, here, stored, short[0], context.slices))
            parts.append(part)
        if len(groups) == 1:
            return parts[0]
        order = torch.tensor([obj for objects in groups.values() for obj in objects], device=features.top.device).argsort()
        return torch.cat(parts)[order]

    def _contexts(
        self, policy: MemoryPolicy, bank: MemoryBank, context: ReadContext, features: SliceFeatures | None = None
    ) -> list[ReadContext]:
        """Add each object's scores to the context: one per object, or one for all objects if the policy needs no scores.

        The confidence of annotated slices is not calibrated.
        """
        if not policy.needs_scores:
            return [context]
        stats = {s: bank[s].stats for s in (*bank.conditioning, *bank.tracked)}
        top = features.top if features is not None else None
        scores = [memory_scores(stats, obj, top) for obj in range(len(next(iter(stats.values())).object_score))]
        if self.calibration is not None:
            scores = [one.calibrated(bank.tracked, self.calibration) for one in scores]
        return [replace(context, scores=one) for one in scores]

    def _attend(self, attention: nn.Module, features: SliceFeatures, bank: MemoryBank, read: MemoryRead, slices: int) -> Tensor:
        """Attend from the slice, (h*w, B, C), to the memory tokens of one read, (N, B, C_mem) -> (B, C, h, w).

        As in `SAM2Base._prepare_memory_conditioned_features`, a spatial memory is h*w tokens with the encoding of their temporal row, and
        a pointer is C / C_mem tokens with the encoding of its distance divided by min(slices, 16) - 1 (by 1 for a volume of one slice).
        """
        batch, width, h, w = features.top.shape
        spatial = [bank[s].spatial.flatten(2).permute(2, 0, 1) for s, _ in read.spatial]
        position = self.memory_encoder.position_encoding(bank[read.spatial[0][0]].spatial).flatten(2).permute(2, 0, 1)
        memory, memory_position = [torch.cat(spatial)], [torch.cat([position + self.maskmem_tpos_enc[row] for _, row in read.spatial])]
        split = self.hidden_dim // self.mem_dim
        if read.pointers:
            pointers = torch.stack([bank[s].pointer for s, _ in read.pointers])
            memory.append(pointers.reshape(-1, batch, split, self.mem_dim).permute(0, 2, 1, 3).flatten(0, 1))
            distances = torch.tensor([d for _, d in read.pointers], dtype=torch.float32, device=pointers.device)
            code = get_1d_sine_pe(distances / max(1, min(slices, self.max_obj_ptrs_in_encoder) - 1), dim=self.hidden_dim)
            pointer_position = self.obj_ptr_tpos_proj(code).unsqueeze(1).expand(-1, batch, self.mem_dim)
            memory_position.append(pointer_position.repeat_interleave(split, dim=0))
        dtype = features.top.dtype
        attended: Tensor = attention(
            curr=[features.top.flatten(2).permute(2, 0, 1)],
            curr_pos=[features.top_position.flatten(2).permute(2, 0, 1)],
            memory=torch.cat([tokens.to(dtype) for tokens in memory]),
            memory_pos=torch.cat([encoding.to(dtype) for encoding in memory_position]),
            num_obj_ptr_tokens=split * len(read.pointers),
        )
        return attended.permute(1, 2, 0).reshape(batch, width, h, w)

    def decode(
        self, conditioned: Tensor, fine: tuple[Tensor, Tensor], previous_mask: Tensor | None, refine: RefinerInput | None = None
    ) -> SliceOutput:
        """Decode masks, predicted IoU, object score and pointer of B objects, as `SAM2Base._forward_sam_heads` does.

        conditioned (B, C, h, w): from `condition`. fine: of `SliceFeatures`. previous_mask (B, 1, n, n): mask logits of the previous
        slice, a dense prompt and a residual of the logits. refine: None to leave the refiner out.
        """
        inside = previous_mask.detach().sigmoid() if previous_mask is not None else None
        if refine is not None and inside is not None:  # move the previous mask to where block matching finds it on this slice
            grey = refine.previous.features.grey
            warped = warp_to_slice(refine.current.grey, grey, torch.cat([inside, grey], dim=1))
            inside = warped[:, :1]
        residual = (2 * inside - 1).to(conditioned.dtype) * MASK_LOGIT if inside is not None else None
        batch, device = len(conditioned), conditioned.device
        no_points = torch.zeros(batch, 1, 2, device=device), -torch.ones(batch, 1, dtype=torch.int32, device=device)
        prompt = self.downsample_logits(residual) if residual is not None else None
        sparse, dense = self.sam_prompt_encoder(points=no_points, boxes=None, masks=prompt)
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
        if residual is not None and self.carry_gain is not None:
            candidates = candidates + self.carry_gain * residual.float()
        if refine is not None and self.refiner is not None and inside is not None:
            priors = (refine.previous, refine.conditioning)
            delta, present, quality = self.refiner(refine.current, conditioned, candidates, warped, *priors)
            candidates, object_score = candidates + delta.float(), object_score + present
            iou = (torch.logit(iou.float(), eps=1e-4) + quality.float()).sigmoid()
        return self.choose_candidate(candidates, iou, tokens, object_score)

    def choose_candidate(self, candidates: Tensor, iou: Tensor, tokens: Tensor, object_score: Tensor) -> SliceOutput:
        """Choose the candidate of the highest predicted IoU; an absent object gets an empty mask and SAM 2's no-object pointer.

        candidates (B, M, n, n): mask logits. iou (B, M). tokens (B, M or 1, C): of the mask decoder. object_score (B, 1): logit.
        """
        rows = torch.arange(len(candidates), device=candidates.device)
        best = iou.argmax(dim=-1)
        token = tokens[rows, best] if tokens.size(1) > 1 else tokens[:, 0]
        present = (object_score > 0).to(token.dtype)
        object_pointer = self.obj_ptr_proj(token)
        pointer = present * object_pointer + (1 - present) * self.no_obj_ptr
        chosen = candidates[rows, best].unsqueeze(1)
        logits = torch.where((object_score > 0)[..., None, None], chosen, NO_OBJ_SCORE)
        pointers = (self.no_obj_ptr.expand_as(pointer), object_pointer)
        return SliceOutput(candidates, iou, best, object_score, chosen, logits, pointer, pointers)

    def remember(self, features: SliceFeatures, output: SliceOutput, masks: Tensor | None = None) -> Memory:
        """Encode the memory of this slice with `SAM2Base._encode_new_memory`, and compute the statistics of its objects.

        masks (B, 1, H, W): annotated masks at full resolution in {0, 1}, used instead of the logits.
        """
        size = (self.input_size, self.input_size)
        if masks is not None:
            logits = masks.float() * (2 * MASK_LOGIT) - MASK_LOGIT
        else:
            logits = F.interpolate(output.logits.float(), size=size, mode="bilinear", align_corners=False)
        top = features.top.flatten(2).permute(2, 0, 1)
        spatial, _ = self._encode_new_memory([top], [features.top.shape[-2:]], logits, output.object_score, masks is not None)
        cover = masks if masks is not None else output.logits.detach().sigmoid()
        confidence = output.iou.detach().gather(1, output.best[:, None]).squeeze(1)
        stats = object_stats(features.top.detach(), cover, output.object_score.detach(), confidence)
        return Memory(spatial, output.pointer, output.chosen, stats, features.refiner_features)


def _check_input_size(input_size: int) -> None:
    """Raise ValueError when the edge is no positive multiple of 32."""
    if input_size <= 0 or input_size % 32:
        raise ValueError(f"input_size is {input_size}; it must be a positive multiple of 32")


def set_input_size(model: SlmSam2, input_size: int) -> None:
    """Change the edge of the slices that a network takes; no weight depends on it. Memories of another size cannot be read any more.

    Raises: ValueError when the edge is no positive multiple of 32.
    """
    _check_input_size(input_size)
    edge = input_size // model.backbone_stride
    model.mask_size = model.mask_size * input_size // model.input_size
    model.input_size = model.image_size = input_size
    model.sam_image_embedding_size = edge
    prompts = model.sam_prompt_encoder
    prompts.image_embedding_size, prompts.mask_input_size = (edge, edge), (4 * edge, 4 * edge)
    prompts.input_image_size = (input_size, input_size)
