"""The faster layers for training on CPUs: the same keys, outputs and gradients."""

import copy

import torch
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import nn

from slmsam2_cli.model.cpu_ops import FusedLayerNorm2d, PointwiseConv2d, optimise_for_cpu
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan


def test_optimise_for_cpu_changes_neither_keys_nor_the_features_of_a_slice():
    torch.manual_seed(0)
    plain = SlmSam2(NetworkPlan(size="nano"), 64).eval()
    quick = copy.deepcopy(plain)
    optimise_for_cpu(quick)
    assert list(quick.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        one, other = (model.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))) for model in (plain, quick))
    assert torch.allclose(one.top, other.top, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.fine, other.fine))


def test_faster_layers_have_the_output_and_the_gradients_of_the_plain_ones():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 12, 1), LayerNorm2d(12), nn.Conv2d(12, 4, 3))
    quick = copy.deepcopy(plain)
    optimise_for_cpu(quick)
    assert [type(layer) for layer in quick] == [PointwiseConv2d, FusedLayerNorm2d, nn.Conv2d]
    x = torch.rand(2, 8, 6, 6)
    expected, found = plain(x), quick(x)
    assert torch.allclose(found, expected, atol=1e-5)
    for output in (expected, found):
        output.square().sum().backward()
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4) for a, b in zip(quick.parameters(), plain.parameters()))
