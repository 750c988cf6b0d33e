"""The version that is written into every artifact."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("slmsam2")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+source"
