"""Segment a volume from one annotated slice. The Python functions of `api.py` are imported when first used, because they need torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmsam2_cli.api import SlmSam2, build, load, propagate, segment, segment_images

__all__ = ["SlmSam2", "build", "load", "propagate", "segment", "segment_images"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slmsam2_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
