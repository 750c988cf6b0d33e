"""What a tuned model and its base were worth on volumes that neither had learned from, as the model's file records it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Validation(BaseModel):
    """left_out: what nothing was learned from, in each short run; base, tuned: mean Dice there, before and after; steps: of the run on
    everything that these led to, 0 where there was none; recogniser: whether it helped there, None where there is none; kept: which of
    the two the file holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    left_out: tuple[str, ...]
    base: float
    tuned: float
    steps: int
    recogniser: bool | None = None
    kept: Literal["base", "tuned"]
