"""What fine-tuning keeps on disk: the description of a run, its state for resuming, and the trained model.

state.safetensors           model, moving average, optimiser moments, generators; step and seconds in the header
state.previous.safetensors  the state saved before, in case the last one is damaged
model.safetensors           the fine-tuned model
adapter.safetensors         the adapter alone, under the strategy `adapters`

A resumed run ends as an uninterrupted one would.
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
ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class FinetuneOptions:
    """The command-line options that determine a run; saved in split.json for --continue."""

    cases: int
    weights: str
    minutes: float | None
    steps: int | None
    seed: int
    workers: int | None


@dataclass(frozen=True)
class Run:
    """One fine-tuning run. `digest` changes when its plan, its cases, their files or its pretrained model do.

    cases: ids of the training cases; known: ids of other cases on which its pretrained model was trained; held_out: all others; images:
    SHA-256 of the image files of `cases`; files: of these and of their labels. pretrained: None from random weights. weights: the option.
    """

    plan: Plan
    cases: tuple[str, ...]
    known: tuple[str, ...]
    held_out: tuple[str, ...]
    images: tuple[str, ...]
    files: tuple[str, ...]
    pretrained: Checkpoint | None
    weights: str

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the trained weights."""
        pretrained = self.pretrained.digest if self.pretrained else self.weights
        plan = self.plan.model_dump(mode="json", exclude={"reasons", "overrides"})
        cases = {"cases": list(self.cases), "files": list(self.files)}
        return digest_of({"plan": plan, "pretrained": pretrained, "label_unet": self.plan.training.label_unet} | cases)


def training_images_of(pretrained: Checkpoint | None) -> frozenset[str]:
    """Return the SHA-256 of the images on which a model was trained."""
    return frozenset(pretrained.provenance.training_image_digests if pretrained and pretrained.provenance else ())


def image_digests(prepared: PreparedCase, data: Dataset) -> list[str]:
    """Return the SHA-256 of a case's image files, as recorded when it was prepared; its label is not one of them."""
    case = next(case for case in data.training if case.id == prepared.id)
    label = case.label.relative_to(data.root).as_posix() if case.label else ""
    return [digest for name, digest in prepared.record["inputs"].items() if name != label]


def backup_path(path: Path) -> Path:
    """Return the path of the state that was saved before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def delete_state(path: Path) -> None:
    """Delete a state and the one saved before."""
    for old in (path, backup_path(path)):
        old.unlink(missing_ok=True)


def save_state(path: Path, learner: Learner, settings: str) -> None:
    """Save the state of a run; settings: the digest of everything that must not change before it is resumed.

    Raises: OutputError when the file cannot be written.
    """
    tensors = {f"model/{n}": t for n, t in learner.model.state_dict().items()}
    tensors |= {f"average/{n}": t for n, t in learner.ema.state_dict().items()}
    moments = learner.optimiser.state_dict()["state"]
    tensors |= {f"optimiser/{i}/{key}": torch.as_tensor(slot[key]) for i, slot in moments.items() for key in _MOMENTS}
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "settings": settings,
        "digest": tensors_digest(tensors),
        "step": str(learner.step),
        "seconds": repr(learner.seconds),
        "data_wait_s": repr(learner.data_wait_s),
    }
    content = save(tensors, header)
    if path.exists():
        os.replace(path, backup_path(path))
    atomic.write_bytes(path, content)


def load_state(path: Path, learner: Learner, settings: str) -> str:
    """Restore the latest state that can be read into a new learner. Returns a warning or "".

    Raises: WeightsError when there is no state, or it was saved with other settings.
    """
    found, tensors, header = find_state(path, type(learner), settings)
    learner.model.load_state_dict(_part(tensors, "model/"))
    learner.ema.load_state_dict(_part(tensors, "average/"))
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in _part(tensors, "optimiser/").items():
        index, key = name.split("/")
        slots.setdefault(int(index), {})[key] = tensor
    learner.optimiser.load_state_dict(learner.optimiser.state_dict() | {"state": slots})
    for weight, slot in learner.optimiser.state.items():  # stored in memory as the weights are, or steps might be rounded differently
        slot.update({key: torch.empty_like(weight).copy_(slot[key]) for key in _MOMENTS if key != "step"})
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    learner.step, learner.seconds, learner.data_wait_s = int(header["step"]), float(header["seconds"]), float(header.get("data_wait_s", 0))
    if found == path:
        return ""
    path.unlink(missing_ok=True)  # or the next save would move the damaged state over the good one
    return f"{path.name} is missing or damaged; resuming from {found.name}, step {learner.step}"


def find_state(path: Path, kind: type[Learner], settings: str) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """Read the latest state that is not damaged. Returns its path, tensors and header.

    Raises: WeightsError when there is no state, or it was saved with other settings.
    """
    for candidate in (path, backup_path(path)):
        try:
            with safe_open(candidate, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                header = file.metadata() or {}
        except (SafetensorError, OSError, ValueError):
            continue
        if header.get("digest") != tensors_digest(tensors):
            continue
        if header.get("settings") != settings:
            raise WeightsError(f"{candidate.name} was saved with another {kind.settings}. Undo the change, or start again with --overwrite")
        return candidate, tensors, header
    raise WeightsError(f"nothing to continue in {path.parent}. Run {kind.command} without --continue")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def save_model(
    path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, pretrained: Checkpoint | None, calibration: Calibration | None
) -> str:
    """Save a model, and under the strategy `adapters` its adapter next to it. Returns the digest of the model's weights.

    An adapter names the weights that it needs; an adapter of an earlier run is deleted. The plan in the file says whether the model's own
    label U-Net may add structures, which differs from the run's plan where the pretrained model was kept.

    Raises: OutputError when a file cannot be written.
    """
    if model.label_unet is not None:
        plan = plan.model_copy(update={"training": plan.training.model_copy(update={"can_add": model.label_unet.can_add})})
    digest = save_checkpoint(path, model, plan, provenance, calibration)
    adapter_path = path.with_name(ADAPTER)
    if plan.training.strategy != "adapters" or pretrained is None:
        adapter_path.unlink(missing_ok=True)
        return digest
    required = RequiredBase(name=pretrained.name, digest=pretrained.base_digest)
    save_adapter(adapter_path, model, plan, provenance, required, calibration)
    return digest
