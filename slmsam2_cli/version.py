"""The version: the one place it is written; the package's metadata and every artifact take it from here."""

from __future__ import annotations

VERSION = "0.1.0"
