"""One network, slices of several sizes: everything that depends on the edge of a slice, and nothing that is learned, changes."""

from __future__ import annotations

from slmsam2_cli.model.slmsam2 import SlmSam2


def set_frame(model: SlmSam2, frame_px: int) -> None:
    """Let a network take slices of `frame_px` from now on; memories of other sizes cannot be read any more. ValueError."""
    if frame_px <= 0 or frame_px % 32:
        raise ValueError(f"frame_px is {frame_px}; it must be a positive multiple of 32")
    edge = frame_px // model.backbone_stride
    model.image_size, model.sam_image_embedding_size = frame_px, edge
    prompts = model.sam_prompt_encoder
    prompts.image_embedding_size, prompts.mask_input_size = (edge, edge), (4 * edge, 4 * edge)
    prompts.input_image_size = (frame_px, frame_px)
