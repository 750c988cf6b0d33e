"""Made-up weights in the layouts that others publish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan


def as_the_authors_name_them(state: Mapping[str, Tensor], scale: str = "gamma", layers: str = "layers.") -> dict[str, Tensor]:
    """Our published-form model under the keys of a tuned SLM-SAM 2, with the tensor that it carries and does not use."""
    renamed = {}
    for name, tensor in state.items():
        key = name.replace("short_memory_attention.", "recent_memory_attention.").replace(
            "stream_fuser.blocks.", f"recent_memory_fuser.{layers}"
        )
        renamed[key.replace("gamma", scale) if key.startswith("recent_memory_fuser.") else key] = tensor
    return renamed | {"rec_maskmem_tpos_enc": torch.zeros(7, 1, 1, 64)}


def tuned_slm_sam2(path: Path, seed: int = 0) -> Path:
    """A file as training SLM-SAM 2 leaves it, of size nano."""
    torch.manual_seed(seed)
    model = SlmSam2(NetworkPlan(size="nano", policy="shortlong", fuser="sum"), 64)
    torch.save({"model": as_the_authors_name_them(model.state_dict())}, path)
    return path
