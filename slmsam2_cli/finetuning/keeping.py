"""What is kept of a tuned model: all of it, and under the strategy `adapters` the adapter alone, beside it."""

from __future__ import annotations

from pathlib import Path

from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Checkpoint, Needs, Provenance, save_adapter, save_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan

ADAPTER = "adapter.safetensors"


def keep(path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, base: Checkpoint | None, calibration: Calibration | None) -> str:
    """Write the model, and its adapter beside it; returns the digest of the model's weights. OutputError.

    An adapter names the base whose weights it was made for; an earlier one beside a model without adapters is removed. The plan that is
    written says what the model's recogniser may: that of a base that was kept goes on as it was.
    """
    if model.recogniser is not None:
        plan = plan.model_copy(update={"training": plan.training.model_copy(update={"finds": model.recogniser.raises})})
    digest = save_checkpoint(path, model, plan, provenance, calibration)
    beside = path.with_name(ADAPTER)
    if plan.training.strategy != "adapters" or base is None:
        beside.unlink(missing_ok=True)
        return digest
    save_adapter(beside, model, plan.modality, plan, provenance, Needs(name=base.name, digest=base.base_digest), calibration)
    return digest
