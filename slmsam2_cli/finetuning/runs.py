"""What one fine-tuning run is: its plan, its cases, its base, and the options that decided them."""

from __future__ import annotations

from dataclasses import dataclass

from slmsam2_cli.data.dataset import Dataset
from slmsam2_cli.data.prepared import PreparedCase
from slmsam2_cli.model.checkpoint import Checkpoint
from slmsam2_cli.planning.plan import Plan, digest_of


@dataclass(frozen=True)
class Run:
    """What one fine-tuning run is. `digest` changes when its plan, its cases, their files or its base do.

    cases: ids it learns from; known: ids that its base has learned from already; unseen: all others; images: SHA-256 of the
    image files of `cases`; files: of these and of their labels.
    """

    plan: Plan
    cases: tuple[str, ...]
    known: tuple[str, ...]
    unseen: tuple[str, ...]
    images: tuple[str, ...]
    files: tuple[str, ...]
    base: Checkpoint | None
    weights: str

    @property
    def digest(self) -> str:
        base = self.base.digest if self.base else self.weights
        plan = self.plan.model_dump(mode="json", exclude={"reasons", "asked"})
        cases = {"cases": list(self.cases), "files": list(self.files)}
        return digest_of({"plan": plan, "base": base, "recogniser": self.plan.training.recogniser} | cases)


def learned_by(base: Checkpoint | None) -> frozenset[str]:
    """SHA-256 of the images that a base has learned from."""
    return frozenset(base.provenance.learned_from if base and base.provenance else ())


def image_digests(prepared: PreparedCase, data: Dataset) -> list[str]:
    """SHA-256 of a case's image files, as recorded when it was prepared; the label is not one of them."""
    case = next(case for case in data.training if case.id == prepared.id)
    label = case.label.relative_to(data.root).as_posix() if case.label else ""
    return [digest for name, digest in prepared.record["inputs"].items() if name != label]


@dataclass(frozen=True)
class Wish:
    """The options that decide which run it is; an interrupted run keeps them for --continue."""

    cases: int
    weights: str
    minutes: float | None
    steps: int | None
    seed: int
    processes: int | None
