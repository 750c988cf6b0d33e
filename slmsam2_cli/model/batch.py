"""Select from, and join, values that hold tensors of B objects or slices: dataclasses, and tuples and dicts inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def select(value: T, index: Tensor | slice) -> T:
    """Select some of the B objects or slices in every tensor; what is no tensor stays."""
    selected: T = _each(lambda tensor: tensor[index], [value])
    return selected


def join(values: Sequence[T]) -> T:
    """Concatenate values of the same kind along their objects or slices, as `select` had divided them."""
    joined: T = values[0] if len(values) == 1 else _each(lambda *tensors: torch.cat(tensors), values)
    return joined


def _each(change: Callable[..., Tensor], values: Sequence[Any]) -> Any:
    """Apply `change` to the tensors that have the same place in all values."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(*values)
    if isinstance(first, tuple):
        return tuple(_each(change, parts) for parts in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _each(change, [value[key] for value in values]) for key in first}
    if is_dataclass(first):
        kind: Any = type(first)
        return kind(**{f.name: _each(change, [getattr(value, f.name) for value in values]) for f in fields(first)})
    return first
