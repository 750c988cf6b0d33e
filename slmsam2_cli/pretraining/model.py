"""The network of a recipe with its first, random weights; and its weights as they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from slmsam2_cli.model.faster import make_faster
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.pretraining.recipe import Recipe

PRESENCE_BIAS = "sam_mask_decoder.pred_obj_score_head.layers.2.bias"


def build(recipe: Recipe, device: torch.device) -> SlmSam2:
    """Weights are drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = SlmSam2(recipe.network, recipe.frame_px)
    model.to(device)
    make_faster(model)
    return model


def kept(model: SlmSam2, shift: float) -> dict[str, Tensor]:
    """Name -> weights on the CPU, in half precision, as they are written; `shift` is added to every presence score."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state[PRESENCE_BIAS] = state[PRESENCE_BIAS] + shift
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
