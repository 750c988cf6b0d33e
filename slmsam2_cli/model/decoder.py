"""The prompt encoder, mask decoder and pointer heads, at widths that SAM 2 fixes in code and `nano` narrows."""

from __future__ import annotations

from typing import Any

from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_utils import MLP
from torch import nn

from slmsam2_cli.model.backbone import DecoderSize


def build_heads(model: Any, size: DecoderSize) -> None:
    """Give a `SAM2Base` its heads; with `DecoderSize()` they are SAM 2.1's, key for key."""
    width, edge = model.hidden_dim, model.image_size // model.backbone_stride
    model.sam_prompt_embed_dim, model.sam_image_embedding_size = width, edge
    model.sam_prompt_encoder = PromptEncoder(
        embed_dim=width, image_embedding_size=(edge, edge), input_image_size=(model.image_size,) * 2, mask_in_chans=16
    )
    model.sam_mask_decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=size.mlp, num_heads=size.heads),
        transformer_dim=width,
        iou_head_depth=3,
        iou_head_hidden_dim=size.iou_hidden,
        use_high_res_features=model.use_high_res_features_in_sam,
        iou_prediction_use_sigmoid=model.iou_prediction_use_sigmoid,
        pred_obj_scores=model.pred_obj_scores,
        pred_obj_scores_mlp=model.pred_obj_scores_mlp,
        use_multimask_token_for_obj_ptr=model.use_multimask_token_for_obj_ptr,
    )
    model.obj_ptr_proj = MLP(width, width, width, 3)
    model.obj_ptr_tpos_proj = nn.Linear(width, model.mem_dim)
