"""Faster layers for CPUs, with the same arithmetic and weights (docs/experiments/2026-11-22-pretraining-step-time.md).

SAM 2 computes its layer norm over channels in six elementwise operations, and its 1x1 convolutions with a general kernel whose backward
pass is slow; torch has one kernel for each. Its attention to memory multiplies values that are four times as wide as the memory they
were projected from.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_POINTWISE = ((1, 1), (1, 1), (0, 0), 1)  # kernel size, stride, padding, groups
_QUERIES, _KEYS = 256, 512  # of a block of attention weights, which then fits a core's cache
_LEAST = -80.0  # logits further below the largest count as this: weights are 1e-35 anyway, and exp is 25 times slower for subnormal ones
_MIB = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of glibc's mallopt
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
_RETURN = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 64 * _MIB))  # what glibc arrives at by itself


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process for its next tensors, instead of returning it to the system, which clears it every time.

    Encoding slices of 1024 px frees and requests hundreds of megabytes per layer. With glibc only; elsewhere nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    try:
        for parameter, value in _KEEP:
            libc.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in _RETURN:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


class SharedPositionEncoding(PositionEmbeddingSine):  # type: ignore[misc]
    """SAM 2's position encoding, one tensor for all slices of a batch instead of a copy for each."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoding (B, C, H, W) of features (B, C', H, W)."""
        size = (x.shape[-2], x.shape[-1])
        if size not in self.cache:
            self._pe(1, x.device, *size)
        encoding: Tensor = self.cache[size]
        return encoding.to(x.device).expand(len(x), -1, -1, -1)


class FusedLayerNorm2d(LayerNorm2d):  # type: ignore[misc]
    """Layer norm over the channels, `sam2_utils.LayerNorm2d` with one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) -> (B, C', H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class MemoryCrossAttention(RoPEAttention):  # type: ignore[misc]
    """Attention with one head from a slice to memory, which averages memory tokens (C_mem channels) before it projects them to values.

    Attention weights sum to 1, so the average of projected tokens is the projection of their average. Used for inference in float32;
    otherwise SAM 2's own layer.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """Attend from slices (B, N, C) to memory with position encoding k (B, M, C_mem) and without, v -> (B, N, C).

        num_k_exclude_rope: number of tokens at the end of k that have no place on the slice.
        """
        tokens = q.shape[1]
        plain = q.dtype == v.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if torch.is_grad_enabled() or q.device.type != "cpu" or not plain or self.freqs_cis.shape[0] != tokens:
            attended: Tensor = super().forward(q, k, v, num_k_exclude_rope)
            return attended
        queries, keys = self.q_proj(q), self.k_proj(k)
        _rotate(queries, self.freqs_cis)
        _rotate(keys[:, : keys.shape[1] - num_k_exclude_rope], self.freqs_cis)
        queries *= queries.shape[-1] ** -0.5
        if tokens <= _QUERIES and keys.shape[1] <= _KEYS:
            averages = (queries @ keys.mT).softmax(dim=-1) @ v
        else:
            averages = torch.stack([_attend_in_blocks(*one) for one in zip(queries, keys, v, strict=True)])
        projected: Tensor = self.out_proj(self.v_proj(averages))
        return projected


def _rotate(tokens: Tensor, rotations: Tensor) -> None:
    """Encode positions in tokens (B, r * N, C) in place, by complex rotations (N, C / 2)."""
    places = len(rotations)
    pairs = tokens.view(len(tokens), tokens.shape[1] // places, places, tokens.shape[2] // 2, 2)
    torch.view_as_complex(pairs).mul_(rotations)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Average values (M, D) by the softmax over M of queries (N, C) times keys (M, C) -> (N, D).

    Blocks of keys follow each other, with the largest logit and the sum of exponentials so far (Milakov and Gimelshein, arXiv:1805.02867).
    """
    parts = []
    for block in torch.split(queries, _QUERIES * torch.get_num_threads()):
        largest, total = block.new_full((len(block), 1), -torch.inf), block.new_zeros(len(block), 1)
        average = block.new_zeros(len(block), values.shape[1])
        for some_keys, some_values in zip(torch.split(keys, _KEYS), torch.split(values, _KEYS), strict=True):
            weights = block @ some_keys.T
            larger = torch.maximum(largest, weights.amax(1, keepdim=True))
            weights.sub_(larger).clamp_(min=_LEAST).exp_()
            shrink = largest.sub_(larger).exp_()
            total.mul_(shrink).add_(weights.sum(1, keepdim=True))
            average.mul_(shrink).addmm_(weights, some_values)
            largest = larger
        parts.append(average.div_(total))
    return torch.cat(parts)


def _reads_memory(attention: Any) -> bool:
    """Return whether a layer attends with one head to tokens with fewer channels than a slice has."""
    return bool(attention.num_heads == 1 and attention.kv_in_dim < attention.embedding_dim)


def optimise_for_cpu(model: nn.Module) -> None:
    """Replace the layers of a network by the faster ones, in place, and store its weights channels last.

    SAM 2 puts the position encodings that it computes in advance on the GPU where there is one, and `to` leaves them there.
    """
    for module in model.modules():
        if isinstance(module, RoPEAttention):
            module.freqs_cis = module.freqs_cis.cpu()
        elif isinstance(module, PositionEmbeddingSine):
            module.cache = {size: encoding.cpu() for size, encoding in module.cache.items()}
        if type(module) is RoPEAttention and _reads_memory(module):
            module.__class__ = MemoryCrossAttention
        elif type(module) is PositionEmbeddingSine:
            module.__class__ = SharedPositionEncoding
        elif type(module) is LayerNorm2d:
            module.__class__ = FusedLayerNorm2d
        elif type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding, module.groups) == _POINTWISE:
            module.__class__ = PointwiseConv2d
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_device(model: Network, device: torch.device) -> Network:
    """Move a network to a device for inference, in place; on a CPU, give it the faster layers."""
    model.to(device).eval()
    if device.type == "cpu":
        optimise_for_cpu(model)
    return model
