"""The network of a recipe with its first, random weights."""

from __future__ import annotations

import torch

from slmsam2_cli.model.faster import make_faster
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.pretraining.recipe import Recipe


def build(recipe: Recipe, device: torch.device) -> SlmSam2:
    """Weights are drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = SlmSam2(recipe.network, recipe.frame_px)
    model.to(device)
    make_faster(model)
    return model
