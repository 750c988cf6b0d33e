"""Define the paths in the workspace, the folder that all commands of a dataset share. Nothing is read or written here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths inside a workspace folder (default `DATASET/slmsam2`)."""

    root: Path

    @property
    def fingerprint(self) -> Path:
        return self.root / "fingerprint.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def plan_page(self) -> Path:
        return self.root / "plan.html"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    @property
    def finetuned(self) -> Path:
        return self.root / "finetuned"

    @property
    def split(self) -> Path:
        return self.finetuned / "split.json"

    @property
    def model(self) -> Path:
        return self.finetuned / "model.safetensors"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @classmethod
    def of(cls, dataset: Path, workspace: Path | None) -> Workspace:
        """Return the given workspace, else the default inside the dataset."""
        return cls(workspace if workspace is not None else dataset / "slmsam2")
