"""The part of a plan that says which network runs: size, memory policy, fuser.

The policies are pictured in docs/explanation/memory.md. Their options are written to a plan only where they differ from
their default, so that a plan shows what somebody chose.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

NetworkSize = Literal["nano", "tiny", "small", "base_plus", "large"]
PolicyName = Literal["fifo", "shortlong", "selfsort", "shortlong+selfsort"]
FuserName = Literal["gated", "sum"]
_ALWAYS_WRITTEN = {"size", "policy", "fuser"}


class NetworkPlan(BaseModel):
    """Which network, and how it remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NetworkSize = Field(default="nano", description="network size; nano is made for CPUs, the others are SAM 2.1's")
    policy: PolicyName = Field(
        default="shortlong",
        description="memory policy: fifo (SAM 2), shortlong (SLM-SAM 2), selfsort (MedSAM-2's bank), shortlong+selfsort (both)",
    )
    fuser: FuserName = Field(default="gated", description="how the two streams meet: gated (exact SAM 2 at step 0) or sum (as published)")
    presence_gate: bool = Field(default=False, description="read only slices that surely hold the object, and the slice just passed")
    two_sided: bool = Field(default=False, description="a pass may read what the passes in the other direction have written, as in SAM 2")
    bank_slices: int = Field(default=16, description="selfsort: tracked slices in the bank, at most", ge=1, le=1024)
    bank_read: int = Field(default=6, description="selfsort: slices read from the bank, the most similar ones", ge=1, le=64)
    bank_confidence: float = Field(
        default=0.5,
        description="selfsort: confidence, calibrated or else predicted IoU, from which on a slice may enter the bank",
        ge=0,
        le=1,
    )
    bank_similarity: float = Field(default=0.5, description="selfsort: similarity to an anchor from which on it may enter", ge=-1, le=1)

    @property
    def has_short_stream(self) -> bool:
        """Whether the network carries a short memory-attention stack and a fuser."""
        return self.policy.startswith("shortlong")

    @property
    def has_bank(self) -> bool:
        """Whether the long stream reads a self-sorting bank."""
        return self.policy.endswith("selfsort")

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        options = type(self).model_fields
        return {name: v for name, v in whole(self).items() if name in _ALWAYS_WRITTEN or v != options[name].default}
