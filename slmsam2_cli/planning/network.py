"""The part of a plan that says which network runs: size, memory policy, fuser."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NetworkSize = Literal["nano", "tiny", "small", "base_plus", "large"]
PolicyName = Literal["fifo", "shortlong"]
FuserName = Literal["gated", "sum"]


class NetworkPlan(BaseModel):
    """Which network, and how it remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NetworkSize = Field("nano", description="network size; nano is made for CPUs, the others are SAM 2.1's")
    policy: PolicyName = Field("shortlong", description="memory policy: fifo (SAM 2) or shortlong (SLM-SAM 2)")
    fuser: FuserName = Field("gated", description="how the two streams meet: gated (exact SAM 2 at step 0) or sum (as published)")
