"""What one fine-tuning run is: its plan, its cases, its base, and the options that decided them."""

from __future__ import annotations

from dataclasses import dataclass

from slmsam2_cli.model.checkpoint import Checkpoint
from slmsam2_cli.planning.plan import Plan, digest_of


@dataclass(frozen=True)
class Run:
    """What one fine-tuning run is. `digest` changes when its plan, its cases or its base do.

    cases: ids it learns from; known: ids that its base has learned from already; unseen: all others; images: SHA-256 of the
    image files of `cases`.
    """

    plan: Plan
    cases: tuple[str, ...]
    known: tuple[str, ...]
    unseen: tuple[str, ...]
    images: tuple[str, ...]
    base: Checkpoint | None
    weights: str

    @property
    def digest(self) -> str:
        base = self.base.digest if self.base else self.weights
        plan = self.plan.model_dump(mode="json", exclude={"reasons", "asked"})
        return digest_of({"plan": plan, "cases": list(self.cases), "base": base, "recogniser": self.plan.training.recogniser})


@dataclass(frozen=True)
class Wish:
    """The options that decide which run it is; an interrupted run keeps them for --continue."""

    cases: int
    weights: str
    minutes: float | None
    steps: int | None
    seed: int
    processes: int | None
