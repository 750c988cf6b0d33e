"""Fingerprints of cases that nobody had to measure."""

from __future__ import annotations

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Extent, Fingerprint, LabelFingerprint


def case(name="a", shape=(10, 100, 100), span=20):
    """One label on rows and columns 40 to 40 + span - 1, on slices 2 to 7."""
    extents = dict(zip(AXES, (Extent(first=2, last=7, slices=6), *(Extent(first=40, last=39 + span, slices=span),) * 2), strict=True))
    label = LabelFingerprint(voxels=10, extents=extents, overlap=dict.fromkeys(AXES, 0.5), copied=dict.fromkeys(AXES, 0.5))
    return CaseFingerprint(
        id=name,
        stored_shape=shape,
        orientation="LPS",
        shape=shape,
        spacing_mm=(3.0, 1.0, 1.0),
        content_mm=tuple(n * mm for n, mm in zip(shape, (3.0, 1.0, 1.0), strict=True)),
        channels=(ChannelFingerprint(whole=None, foreground=None),),
        labels={1: label},
    )


def known(*cases):
    return Fingerprint(
        tool_version="1", dataset_name="d", channels=("MRI",), labels={1: "organ"}, ignore=None, cases=cases, foreground=(None,)
    )
