"""The state of a run on disk, so that an interrupted one goes on and ends as an uninterrupted one would.

state.safetensors           model, average, optimiser moments, generators; step and seconds in the header
state.previous.safetensors  the generation before, should the last be damaged

What is kept of a tuned model: all of it, and under the strategy `adapters` the adapter alone, beside it.

What one fine-tuning run is: its plan, its cases, its base, and the options that decided them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slmsam2_cli.dataset.cache import PreparedCase
from slmsam2_cli.dataset.dataset import Dataset
from slmsam2_cli.errors import WeightsError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Checkpoint, Provenance, RequiredBase, save_adapter, save_checkpoint, tensors_digest
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan, digest_of
from slmsam2_cli.training.learner import Learner

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def backup_path(path: Path) -> Path:
    """Where the generation before is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_state(path: Path, learner: Learner, settings: str) -> None:
    """Write the run's state; `settings` is the digest of everything that must not change. OutputError when not whole."""
    tensors = {f"model/{n}": t for n, t in learner.model.state_dict().items()}
    tensors |= {f"average/{n}": t for n, t in learner.average.state_dict().items()}
    moments = learner.optimiser.state_dict()["state"]
    tensors |= {f"optimiser/{i}/{key}": torch.as_tensor(slot[key]) for i, slot in moments.items() for key in _MOMENTS}
    own, texts = learner.draws()
    tensors |= {"rng/torch": torch.get_rng_state()} | {f"rng/{name}": state for name, state in own.items()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = texts | {
        "settings": settings,
        "digest": tensors_digest(tensors),
        "step": str(learner.step),
        "seconds": repr(learner.seconds),
        "waited": repr(learner.data_wait_s),
    }
    content = save(tensors, header)
    if path.exists():
        os.replace(path, backup_path(path))
    atomic.write_bytes(path, content)


def load_state(path: Path, learner: Learner, settings: str) -> str:
    """Bring a fresh learner to where the run stood. Returns a warning or "".

    WeightsError when there is nothing to resume, or what there is belongs to other settings.
    """
    candidate, tensors, header = _found(path, type(learner), settings)
    _restore(learner, tensors, header)
    if candidate == path:
        return ""
    path.unlink(missing_ok=True)  # or the next save would put the damaged one in place of the good one
    return f"{path.name} is missing or damaged; going on from {candidate.name}, step {learner.step}"


def check_state(path: Path, kind: type[Learner], settings: str) -> None:
    """WeightsError, as `load_state` would raise it."""
    _found(path, kind, settings)


def _found(path: Path, kind: type[Learner], settings: str) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The latest state that can be read."""
    for candidate in (path, backup_path(path)):
        try:
            tensors, header = _read(candidate)
        except (SafetensorError, OSError, ValueError):
            continue
        if header.get("settings") != settings:
            raise WeightsError(f"{candidate.name}: was made with another {kind.settings}. Undo the change, or start again with --overwrite")
        return candidate, tensors, header
    raise WeightsError(f"nothing to continue in {path.parent}. Run {kind.command} without --continue")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata() or {}
    if header.get("digest") != tensors_digest(tensors):
        raise ValueError("damaged")
    return tensors, header


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _restore(learner: Learner, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    learner.model.load_state_dict(_part(tensors, "model/"))
    learner.average.load_state_dict(_part(tensors, "average/"))
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in _part(tensors, "optimiser/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = tensor
    learner.optimiser.load_state_dict(learner.optimiser.state_dict() | {"state": state})
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    learner.set_generator_state(_part(tensors, "rng/"), header)
    learner.step, learner.seconds, learner.data_wait_s = int(header["step"]), float(header["seconds"]), float(header.get("waited", 0))


ADAPTER = "adapter.safetensors"


def keep(path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, base: Checkpoint | None, calibration: Calibration | None) -> str:
    """Write the model, and its adapter beside it; returns the digest of the model's weights. OutputError.

    An adapter names the base whose weights it was made for; an earlier one beside a model without adapters is removed. The plan that is
    written says what the model's label U-Net may: that of a base that was kept goes on as it was.
    """
    if model.label_unet is not None:
        plan = plan.model_copy(update={"training": plan.training.model_copy(update={"can_add": model.label_unet.can_add})})
    digest = save_checkpoint(path, model, plan, provenance, calibration)
    beside = path.with_name(ADAPTER)
    if plan.training.strategy != "adapters" or base is None:
        beside.unlink(missing_ok=True)
        return digest
    save_adapter(beside, model, plan, provenance, RequiredBase(name=base.name, digest=base.base_digest), calibration)
    return digest


@dataclass(frozen=True)
class Run:
    """What one fine-tuning run is. `digest` changes when its plan, its cases, their files or its base do.

    cases: ids it learns from; known: ids that its base has learned from already; held_out: all others; images: SHA-256 of the
    image files of `cases`; files: of these and of their labels.
    """

    plan: Plan
    cases: tuple[str, ...]
    known: tuple[str, ...]
    held_out: tuple[str, ...]
    images: tuple[str, ...]
    files: tuple[str, ...]
    base: Checkpoint | None
    weights: str

    @property
    def digest(self) -> str:
        base = self.base.digest if self.base else self.weights
        plan = self.plan.model_dump(mode="json", exclude={"reasons", "overrides"})
        cases = {"cases": list(self.cases), "files": list(self.files)}
        return digest_of({"plan": plan, "base": base, "label_unet": self.plan.training.label_unet} | cases)


def training_images_of(base: Checkpoint | None) -> frozenset[str]:
    """SHA-256 of the images that a base has learned from."""
    return frozenset(base.provenance.training_image_digests if base and base.provenance else ())


def image_digests(prepared: PreparedCase, data: Dataset) -> list[str]:
    """SHA-256 of a case's image files, as recorded when it was prepared; the label is not one of them."""
    case = next(case for case in data.training if case.id == prepared.id)
    label = case.label.relative_to(data.root).as_posix() if case.label else ""
    return [digest for name, digest in prepared.record["inputs"].items() if name != label]


@dataclass(frozen=True)
class RunOptions:
    """The options that decide which run it is; an interrupted run keeps them for --continue."""

    cases: int
    weights: str
    minutes: float | None
    steps: int | None
    seed: int
    workers: int | None
