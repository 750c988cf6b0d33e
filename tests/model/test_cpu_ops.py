"""The faster layers for CPUs: the same keys, outputs and gradients."""

import copy

import pytest
import torch
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import nn

from slmsam2_cli.model.cpu_ops import FusedLayerNorm2d, MemoryCrossAttention, PointwiseConv2d, keep_freed_memory, optimise_for_cpu
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
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


class OnAGpu(torch.Tensor):
    """A tensor that says where it is by its class."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_position_encodings_that_sam2_has_put_on_a_gpu_come_back():
    model = SlmSam2(NetworkPlan(size="nano"), 64)
    rotating = [module for module in model.modules() if isinstance(module, RoPEAttention)]
    cached = [module for module in model.modules() if isinstance(module, PositionEmbeddingSine)]
    assert rotating and cached
    for module in rotating:
        module.freqs_cis = module.freqs_cis.as_subclass(OnAGpu)
    for module in cached:
        module.cache = {(4, 4): torch.zeros(1, 4, 4).as_subclass(OnAGpu)}
    optimise_for_cpu(model)
    assert all(type(module.freqs_cis) is torch.Tensor for module in rotating)
    assert all(type(encoding) is torch.Tensor for module in cached for encoding in module.cache.values())


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


@pytest.mark.parametrize(("px", "size"), [(64, "nano"), (320, "tiny")])  # 320 px: several blocks of queries and of keys
def test_memory_cross_attention_has_the_output_of_sam2s_layer(px, size):
    torch.manual_seed(0)
    plain = SlmSam2(NetworkPlan(size=size, policy="fifo"), px).eval()
    quick = copy.deepcopy(plain)
    optimise_for_cpu(quick)
    assert sum(isinstance(layer, MemoryCrossAttention) for layer in quick.modules()) == len(quick.memory_attention.layers)
    with torch.inference_mode():
        features = plain.encode(torch.rand(1, 3, px, px)).at(torch.tensor([0, 0]))
        masks = (torch.rand(2, 1, px, px) > 0.5).float()
        memory = plain.remember(features, plain.condition_on_mask(features, masks))
        bank = MemoryBank({0: memory}, {1: memory, 2: memory})
        expected, found = (
            model.condition(features, bank, ReadContext(3, 1, bank.conditioning, bank.tracked, 9)) for model in (plain, quick)
        )
    assert torch.allclose(found, expected, atol=1e-5)


def test_kept_memory_changes_no_result():
    a = torch.rand(1 << 20)
    expected = a * 2 + a
    with keep_freed_memory():
        assert torch.equal(a * 2 + a, expected)
    assert torch.equal(a * 2 + a, expected)
