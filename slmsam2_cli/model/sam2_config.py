"""The parts of SAM 2.1 at every size, built from the configuration files of the package `sam2`.

`nano` is the tiny configuration with the values below replaced: the same architecture with fewer channels everywhere (trunk, neck,
memory, decoder), for slices of 128 to 256 px on a CPU. The widths of prompt encoder, mask decoder and pointer heads are fixed in SAM 2's
code, so `SlmSam2` builds these with a `DecoderSize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import sam2
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from slmsam2_cli.planning.plan import NetworkSize

_CONFIG_FILES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l", "nano": "t"}


@dataclass(frozen=True)
class Widths:
    """Channels of nano: first trunk stage, neck (and everything after it), memory. Reasons: docs/explanation/network.md."""

    trunk: int = 32
    neck: int = 128
    memory: int = 32


def nano_values(widths: Widths) -> dict[str, Any]:
    """Return the values of the tiny configuration that nano replaces."""
    neck, memory = widths.neck, widths.memory
    attention = {"embedding_dim": neck, "dropout": 0.0}
    return {
        "image_encoder": {
            "trunk": {
                "embed_dim": widths.trunk,
                "stages": [1, 2, 4, 1],
                "global_att_blocks": [4, 5, 6],
                "window_spec": [8, 4, 4, 4],
            },
            "neck": {
                "d_model": neck,
                "position_encoding": {"num_pos_feats": neck},
                "backbone_channel_list": [widths.trunk * factor for factor in (8, 4, 2, 1)],
            },
        },
        "memory_attention": {
            "d_model": neck,
            "num_layers": 2,
            "layer": {
                "d_model": neck,
                "dim_feedforward": 4 * neck,
                "dropout": 0.0,  # augmentation regularises instead; on a CPU the random draws took a tenth of a step
                "self_attention": attention,
                "cross_attention": attention | {"kv_in_dim": memory},
            },
        },
        "memory_encoder": {
            "out_dim": memory,
            "in_dim": neck,
            "position_encoding": {"num_pos_feats": memory},
            "mask_downsampler": {"embed_dim": neck},
            "fuser": {"layer": {"dim": neck}},
        },
        "multimask_output_for_tracking": False,
        "use_multimask_token_for_obj_ptr": False,
    }


@dataclass(frozen=True)
class DecoderSize:
    """Widths of the mask decoder: feed-forward, attention heads, hidden layer of the IoU head."""

    mlp: int = 2048
    heads: int = 8
    iou_hidden: int = 256


@dataclass(frozen=True)
class SizeOptions:
    """Options of a network size.

    native_size: input size that it was designed for. carry_mask: the mask of the previous slice is a dense prompt of the decoder and a
    residual of its logits (docs/experiments/2026-11-22-previous-mask.md). refine: whether there is a refiner.
    widths: for nano only.
    """

    native_size: int
    decoder: DecoderSize
    carry_mask: bool
    refine: bool = False
    widths: Widths = Widths()


_STOCK = SizeOptions(native_size=1024, decoder=DecoderSize(), carry_mask=False)
SIZE_OPTIONS = {size: _STOCK for size in get_args(NetworkSize)} | {
    "nano": SizeOptions(native_size=256, decoder=DecoderSize(mlp=512, heads=4, iou_hidden=128), carry_mask=True, refine=True)
}


def sam2_parts(size: NetworkSize, input_size: int, widths: Widths | None = None) -> dict[str, Any]:
    """Build the modules and settings of a network: keyword arguments of `SAM2Base`. input_size: in pixels, a multiple of 32."""
    path = Path(sam2.__path__[0]) / "configs" / "sam2.1" / f"sam2.1_hiera_{_CONFIG_FILES[size]}.yaml"
    model = OmegaConf.load(path).model
    if size == "nano":
        model = OmegaConf.merge(model, OmegaConf.create(nano_values(widths or SIZE_OPTIONS[size].widths)))
    model.image_size = input_size
    for attention in (model.memory_attention.layer.self_attention, model.memory_attention.layer.cross_attention):
        attention.feat_sizes = [input_size // 16, input_size // 16]
    plain = OmegaConf.to_container(model, resolve=True)
    assert isinstance(plain, dict)
    modules = {name: instantiate(part) for name, part in model.items() if isinstance(part, DictConfig)}
    settings = {str(name): value for name, value in plain.items() if name not in modules and name != "_target_"}
    return settings | {str(name): module for name, module in modules.items()}
