"""Stage 3: data set + plan -> tuned model.   Reads plan.json, prepared/.   Writes finetuned/{split.json,model.safetensors,log.csv,state}.

Plans and prepares by itself what has not been planned or prepared. An interrupted run leaves a usable model and goes on
with --continue.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.dataset import Dataset, read_dataset
from slmsam2_cli.data.prepared import Outcome, prepare_all
from slmsam2_cli.device import DeviceName, choose_device, describe
from slmsam2_cli.errors import DONE, DatasetError, DeviceError, OutputError, PlanError, UsageError
from slmsam2_cli.finetuning.clips import ClipSampler
from slmsam2_cli.finetuning.loop import Learner, Progress, new_learner, share_done, train
from slmsam2_cli.finetuning.resume import load_state, save_state
from slmsam2_cli.model.checkpoint import Checkpoint, Provenance, base_weights, fit, save_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan, TrainingPlan, digest_of, read_plan, write_plan
from slmsam2_cli.planning.rules import choose_training, decide
from slmsam2_cli.workspace import Workspace

SAVE_EVERY_S = 120.0
_LOG_COLUMNS = ("step", "seconds", "learning_rate", "focal", "dice", "iou", "presence", "total")


@dataclass(frozen=True)
class Run:
    """What one fine-tuning run is: its plan, its cases, where it starts. `digest` changes when any of it does."""

    plan: Plan
    cases: tuple[str, ...]
    unseen: tuple[str, ...]
    base: Checkpoint | None
    weights: str

    @property
    def digest(self) -> str:
        base = self.base.digest if self.base else self.weights
        return digest_of({"plan": self.plan.model_dump(mode="json", exclude={"reasons"}), "cases": list(self.cases), "base": base})


def finetune(
    dataset: Path,
    workspace: Workspace,
    *,
    cases: int = 5,
    weights: str = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    skip_bad: bool = False,
    device: DeviceName = "auto",
    network: str | None = None,
    overwrite: bool = False,
) -> int:
    """Adapt the network to `cases` training volumes. The exit code: 0.

    Raises DatasetError (bad training cases, unless `skip_bad`), PlanError, WeightsError, DeviceError, OutputError, UsageError.
    """
    if cases < 1:
        raise UsageError(f"-n {cases}: at least one training volume is needed")
    chosen = choose_device(device)
    base = base_weights(weights)
    data = read_dataset(dataset)
    try:
        with store.one_writer(workspace.root):
            plan = _plan(data, workspace, network)
            ready = _prepare(data, plan, workspace, skip_bad)
            run = _run_of(plan, ready, cases, seed, base, weights, minutes, steps)
            if _finished(workspace, run, resume, overwrite):
                return DONE
            _tune(run, ready, workspace, chosen, resume)
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    except torch.OutOfMemoryError:
        raise DeviceError(
            "out of memory. Set training.clips_per_step or training.clip_slices lower in plan.json, or use --device cpu"
        ) from None
    return DONE


def _plan(data: Dataset, workspace: Workspace, network: str | None) -> Plan:
    """The workspace's plan, or a fresh one when there is none."""
    if workspace.plan.exists():
        plan = read_plan(workspace.plan)
        if data.channels != plan.channels:
            raise PlanError(f"plan.json knows the channels {plan.channels}, the data set has {data.channels}. Run slmsam2 plan --overwrite")
        if network and network != plan.network.size:
            raise PlanError(f"plan.json is for network {plan.network.size}. Run slmsam2 plan --network {network} first")
        return plan
    with console.progress("measuring", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    plan = decide(fingerprint, network)
    write_fingerprint(workspace.fingerprint, fingerprint)
    write_plan(workspace.plan, plan)
    console.say(f"planned: slices along {plan.geometry.slice_axis}, {plan.geometry.frame_px} px, {plan.modality} (slmsam2 plan says why)")
    return plan


def _prepare(data: Dataset, plan: Plan, workspace: Workspace, skip_bad: bool) -> Outcome:
    with console.progress("preparing", len(data.training)) as advance:
        outcome = prepare_all(data, plan.geometry, plan.intensity, workspace.prepared, tell=console.say, advance=advance)
    if outcome.problems and not (skip_bad and outcome.cases):
        raise DatasetError(
            f"{data.name}: {len(outcome.problems)} training cases are unusable, so nothing was trained. "
            "Mend them, or leave them out with --skip-bad",
            outcome.problems,
        )
    for problem in outcome.problems:
        console.warn(f"left out: {problem}")
    return outcome


def _run_of(
    plan: Plan, ready: Outcome, cases: int, seed: int, base: Checkpoint | None, weights: str, minutes: float | None, steps: int | None
) -> Run:
    """The split, drawn from the seed over all usable labelled cases, and the training settings for that many."""
    ids = sorted(case.id for case in ready.cases if case.labels is not None)
    if cases > len(ids):
        console.warn(f"-n {cases}, but only {len(ids)} usable training case(s): all are learned from and none is left to test on")
    order = np.random.default_rng(seed).permutation(len(ids))
    picked = tuple(sorted(ids[i] for i in order[:cases]))
    training = _training(plan, len(ids), len(picked), base is None)
    changes: dict[str, Any] = {"seed": seed, "minutes": minutes or training.minutes} | ({"steps": steps} if steps else {})
    settled = plan.model_copy(update={"training": TrainingPlan.model_validate(training.model_dump() | changes)})
    return Run(settled, picked, tuple(i for i in ids if i not in picked), base, weights)


def _training(plan: Plan, planned: int, used: int, from_scratch: bool) -> TrainingPlan:
    """A person's own training settings, or the rule's for the number of volumes that are really used."""
    untouched = plan.training == choose_training(plan.network.size, planned).value
    return choose_training(plan.network.size, used, from_scratch).value if untouched else plan.training


def _finished(workspace: Workspace, run: Run, resume: bool, overwrite: bool) -> bool:
    """Whether this very run is done already. UsageError when another one's model would be lost."""
    if overwrite or not workspace.split.exists():
        return False
    split = store.read_json(workspace.split, "the split")
    same = isinstance(split, dict) and split.get("run") == run.digest
    if same and split.get("finished") and workspace.model.exists():
        console.say(f"this run is finished already: {workspace.model} (train again with --overwrite)")
        return True
    if not same and workspace.model.exists():
        raise UsageError(
            "the workspace holds a model of another run (plan, cases, seed or base differ). Use --overwrite, or another workspace with -w"
        )
    if same and not resume:
        raise UsageError("an unfinished run is here. Go on with --continue, or start anew with --overwrite")
    return False


def _tune(run: Run, ready: Outcome, workspace: Workspace, device: torch.device, resume: bool) -> None:
    torch.manual_seed(run.plan.training.seed)
    model = SlmSam2(run.plan.network, run.plan.geometry.frame_px)
    if run.base is None:
        console.warn("--weights random: everything is learned from these volumes alone; for trials and tests, not for clinical data")
    else:
        fit(model, run.base)
    sampler = ClipSampler([c for c in ready.cases if c.id in run.cases], tuple(run.plan.labels), run.plan.geometry.frame_px)
    learner = new_learner(model.to(device), run.plan.training, run.base is None)
    state = workspace.finetuned / "state.safetensors"
    if resume and (warning := load_state(state, learner, run.digest)):
        console.warn(warning)
    console.say(f"training on {len(run.cases)} volume(s) on {describe(device)}: {', '.join(run.cases)}")
    _write_split(workspace, run, finished=False)
    log = _Log(workspace.finetuned / "log.csv", keep=resume)
    with _stoppable() as stopped:
        _follow(learner, sampler, run, state, log, stopped)
        _save(workspace, run, learner)
        log.write()
        finished = share_done(learner, run.plan.training) >= 1
        _write_split(workspace, run, finished)
        if not finished:
            save_state(state, learner, run.digest)
            console.say(f"stopped at step {learner.step}; the model so far is saved. Go on with slmsam2 finetune --continue")
    if finished:
        state.unlink(missing_ok=True)
        state.with_name("state.previous.safetensors").unlink(missing_ok=True)


def _follow(learner: Learner, sampler: ClipSampler, run: Run, state: Path, log: _Log, stopped: Callable[[], bool]) -> None:
    """Train with a progress bar; save the state every few minutes."""
    saved, shown = time.monotonic(), learner.step
    whole = 1000
    with console.progress("training", whole) as advance:
        bar = 0
        for progress in train(learner, sampler, run.plan.training, stopped):
            log.add(learner, progress)
            now_at = int(progress.done * whole)
            advance(now_at - bar, f"step {progress.step}, loss {log.recent():.3f}")
            bar = now_at
            if time.monotonic() - saved > SAVE_EVERY_S:
                save_state(state, learner, run.digest)
                log.write()
                saved = time.monotonic()
    if learner.step == shown:
        console.say("nothing was left to train")


class _Log:
    """One row per step, written as log.csv whenever the state is saved."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self.rows = path.read_text(encoding="utf-8").splitlines()[1:] if keep and path.exists() else []
        self.losses: list[float] = []

    def add(self, learner: Learner, progress: Progress) -> None:
        values = {"step": progress.step, "seconds": round(learner.seconds, 2), "learning_rate": progress.learning_rate} | progress.losses
        self.rows.append(",".join(f"{values[c]:.6g}" if c in values else "" for c in _LOG_COLUMNS))
        self.losses = [*self.losses[-49:], progress.losses.get("total", float("nan"))]

    def recent(self) -> float:
        return float(np.nanmean(self.losses)) if np.isfinite(self.losses).any() else float("nan")

    def write(self) -> None:
        store.write_text(self.path, "\n".join([",".join(_LOG_COLUMNS), *self.rows]) + "\n")


def _write_split(workspace: Workspace, run: Run, finished: bool) -> None:
    split = {
        "format_version": 1,
        "training": list(run.cases),
        "unseen": list(run.unseen),
        "seed": run.plan.training.seed,
        "run": run.digest,
        "finished": finished,
    }
    store.write_json(workspace.split, split)


def _save(workspace: Workspace, run: Run, learner: Learner) -> None:
    ancestor = run.base.provenance if run.base else None
    provenance = Provenance(
        base=run.base.name if run.base else run.weights,
        base_digest=run.base.digest if run.base else "",
        random=run.base is None or bool(ancestor and ancestor.random),
        seed=run.plan.training.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        training=run.cases,
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
    )
    digest = save_checkpoint(workspace.model, learner.average, run.plan, provenance)
    console.say(f"model: {workspace.model} ({learner.step} steps, {learner.seconds:.0f} s, weights {digest[:12]})")


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that answers True; raise it when the block is done."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            signal.signal(number, before[signal.Signals(number)])
        caught.append(number)
        console.say("stopping after this step …")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(signal.Signals(caught[0]))
