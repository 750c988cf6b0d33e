"""The device that the work runs on, and its precision. Torch is imported only when a device is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from slmsam2_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(name: DeviceName = "auto") -> torch.device:
    """Return the named device; auto: CUDA, else MPS, else the CPU.

    Raises: DeviceError when the device is unknown or not available.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if name not in available:
        raise DeviceError(f"--device {name}: unknown device. Use auto, cpu, cuda or mps")
    if not available[name]:
        reason = "this torch was built without CUDA" if name == "cuda" and torch.version.cuda is None else "no such device found"
        raise DeviceError(f"--device {name}: {reason}. Use --device auto, or install a torch build for this device")
    return torch.device(name)


def needs_one_thread(network_size: str, device: torch.device) -> bool:
    """Return whether the tensors are too small for several threads: those of nano, on a CPU."""
    return network_size == "nano" and device.type == "cpu"


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads during a block; None: with as many as before."""
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """Compute in bfloat16 on a GPU, for training; elsewhere precision stays as it is.

    cuDNN's attention is switched off meanwhile: its gradients are not always finite, and a run on an H200 diverged (docs/experiments).
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
    """Describe a device in one line for logs and manifests, without names of users or hosts."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, of Python or of torch on any device."""
    signs = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in f"{type(error).__name__}: {error}" for sign in signs)
