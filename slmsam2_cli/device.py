"""Which device the work runs on, and in which precision. Torch is imported only when a device is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from slmsam2_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(name: DeviceName = "auto") -> torch.device:
    """The device asked for, or the best one there is. Raises DeviceError when it is absent."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if name not in available:
        raise DeviceError(f"--device {name}: unknown. Use auto, cpu, cuda or mps")
    if not available[name]:
        reason = "this torch was built without CUDA" if name == "cuda" and torch.version.cuda is None else "no such device was found"
        raise DeviceError(f"--device {name}: {reason}. Use --device auto, or install a torch build for it")
    return torch.device(name)


@contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """What is computed inside, to learn from, is in bfloat16 on a GPU, and as it is elsewhere.

    Without attention by cuDNN, whose gradients are not always finite (on an H200 a run diverged by it, docs/decisions.md).
    """
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def describe(device: torch.device) -> str:
    """One line for logs and manifests, without names of users or hosts."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python or torch, on any device, raises where memory is short."""
    signs = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in f"{type(error).__name__}: {error}" for sign in signs)
