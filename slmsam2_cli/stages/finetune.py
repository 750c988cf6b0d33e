"""Stage 3: data set + plan -> tuned model.   Reads plan.json, prepared/.

Writes finetuned/{split.json,model.safetensors,log.csv,log.jsonl,progress.png,state}, and adapter.safetensors for a plan with adapters.

Plans and prepares by itself what has not been planned or prepared. An interrupted run leaves a usable model and goes on
with --continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.dataset import Dataset, read_dataset
from slmsam2_cli.data.prepared import Outcome, PreparedCase, prepare_all
from slmsam2_cli.device import DeviceName, choose_device, describe
from slmsam2_cli.errors import DONE, DatasetError, DeviceError, OutputError, PlanError, UsageError
from slmsam2_cli.finetuning.calibrating import calibrated_on
from slmsam2_cli.finetuning.clips import ClipSampler
from slmsam2_cli.finetuning.curves import draw_progress
from slmsam2_cli.finetuning.keeping import keep
from slmsam2_cli.finetuning.learner import share_done
from slmsam2_cli.finetuning.log import Log
from slmsam2_cli.finetuning.loop import Learner, new_learner, train
from slmsam2_cli.finetuning.recognising import SliceSampler, new_recogniser
from slmsam2_cli.finetuning.resume import load_state, previous_of, save_state
from slmsam2_cli.finetuning.room import shortage
from slmsam2_cli.finetuning.stopping import stoppable
from slmsam2_cli.finetuning.strategies import prepare
from slmsam2_cli.inference.ready import fuser_of, with_fuser_of
from slmsam2_cli.model import zoo
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import RANDOM, Checkpoint, Provenance, base_weights, fit
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.channels import COLOURS
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan, TrainingPlan, digest_of, read_plan, write_plan
from slmsam2_cli.planning.rules import decide, training_for
from slmsam2_cli.workspace import Workspace

SAVE_EVERY_S = 120.0
_A_FILE = "file"


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

    Raises DatasetError (bad training cases, unless `skip_bad`), PlanError, WeightsError, TrainingError, DeviceError,
    OutputError, UsageError.
    """
    if cases < 1:
        raise UsageError(f"-n {cases}: at least one training volume is needed")
    if resume and overwrite:
        raise UsageError("--continue and --overwrite contradict each other. Give one of them")
    chosen = choose_device(device)
    wish = Wish(cases, weights, minutes, steps, seed)
    if resume:
        wish = _kept_wish(workspace, wish)
    base = base_weights(wish.weights)
    data = read_dataset(dataset)
    try:
        with store.one_writer(workspace.root):
            plan = _plan(data, workspace, network, base)
            _model(plan, base)
            ready = _prepare(data, plan, workspace, skip_bad)
            run = _run_of(plan, data, ready, wish, base)
            if _finished(workspace, run, resume, overwrite):
                return DONE
            if warning := shortage(run.plan, workspace.fingerprint, len(run.cases), chosen):
                console.warn(warning)
            _tune(run, ready, workspace, chosen, wish, resume)
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    except torch.OutOfMemoryError:
        raise DeviceError(
            "out of memory. Set training.clips_per_step or training.clip_slices lower in plan.json, or use --device cpu"
        ) from None
    return DONE


def _kept_wish(workspace: Workspace, given: Wish) -> Wish:
    """The options of the run to go on with; a base that is a file has to be named again."""
    split = store.read_json(workspace.split, "the split") if workspace.split.exists() else None
    kept = split.get("options") if isinstance(split, dict) else None
    if not isinstance(kept, dict) or set(kept) != {field.name for field in fields(Wish)}:
        return given
    wish = Wish(**kept)
    if wish.weights == _A_FILE and given.weights in ("auto", RANDOM):
        raise UsageError("this run started from a file of weights. Name the same file again: --continue --weights FILE")
    wish = replace(wish, weights=given.weights) if wish.weights == _A_FILE else wish
    console.say(f"going on with -n {wish.cases} --seed {wish.seed} --weights {Path(wish.weights).name}")
    return wish


def _plan(data: Dataset, workspace: Workspace, network: str | None, base: Checkpoint | None) -> Plan:
    """The workspace's plan, or a fresh one when there is none; for the network named, else the base's, and with the base's fuser."""
    network = network or (base.network.size if base and base.network else None)
    if workspace.plan.exists():
        plan = read_plan(workspace.plan)
        if data.channels != plan.channels:
            raise PlanError(f"plan.json knows the channels {plan.channels}, the data set has {data.channels}. Run slmsam2 plan --overwrite")
        if network and network != plan.network.size:
            raise PlanError(f"plan.json is for network {plan.network.size}. Run slmsam2 plan --network {network} first")
        _mind_the_order(plan, base)
        return with_fuser_of(plan, base) if base else plan
    with console.progress("measuring", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    plan = decide(fingerprint, network, (fuser_of(base) if base else None) or "gated")
    write_fingerprint(workspace.fingerprint, fingerprint)
    write_plan(workspace.plan, plan)
    console.say(f"planned: slices along {plan.geometry.slice_axis}, {plan.geometry.frame_px} px, {plan.modality} (slmsam2 plan says why)")
    _mind_the_order(plan, base)
    return plan


def _mind_the_order(plan: Plan, base: Checkpoint | None) -> None:
    """A line where the base has learned to read as many channels, but under other names."""
    before = base.plan if base else None
    if before is None or before.modality != plan.modality or before.channels == plan.channels:
        return
    if len(before.channels) != len(plan.channels) or len(plan.channels) <= COLOURS:
        return
    console.warn(f"the channels {', '.join(plan.channels)} are taken for the base's {', '.join(before.channels)}, in this order")


def _model(plan: Plan, base: Checkpoint | None, seed: int = 0) -> SlmSam2:
    """The plan's network with the base's weights, or with random ones drawn from the seed, ready for the plan's strategy.

    WeightsError when the weights do not fit; PlanError when there are none for the strategy to build on.
    """
    if base is None and plan.training.strategy != "full":
        raise PlanError(
            f"training.strategy is {plan.training.strategy}, which trains a part of the network, but --weights random has no other part. "
            "Start from trained weights, or set it to full in plan.json"
        )
    torch.manual_seed(seed)
    model = SlmSam2(plan.network, plan.geometry.frame_px)
    if base is not None:
        fit(model, base)
    for note in prepare(model, plan.training, plan.modality, len(plan.channels)):
        console.detail(note)
    return model


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


def _run_of(plan: Plan, data: Dataset, ready: Outcome, wish: Wish, base: Checkpoint | None) -> Run:
    """The split, drawn from the seed over all cases that can teach propagation, and the training settings for that many."""
    usable = sorted(case.id for case in ready.cases if case.labels is not None and len(case.labels) > 1 and case.labels.any())
    if wish.cases > len(usable):
        console.warn(f"-n {wish.cases}, but only {len(usable)} training case(s) can be learned from: all are, and none is left to test on")
    order = np.random.default_rng(wish.seed).permutation(len(usable))
    picked = tuple(sorted(usable[i] for i in order[: wish.cases]))
    images = {case.id: _image_digests(case, data) for case in ready.cases}
    learned = set(base.provenance.learned_from) if base and base.provenance else set()
    known = tuple(case for case in images if case not in picked and learned & set(images[case]))
    if known:
        console.warn(f"{len(known)} more case(s) were learned from by {base.name if base else 'the base'} and do not count as unseen")
    training = training_for(plan, len(picked), base is None)
    changes = {"seed": wish.seed, "minutes": wish.minutes or training.minutes, "steps": wish.steps or training.steps}
    settled = plan.model_copy(update={"training": TrainingPlan.model_validate(training.model_dump() | changes)})
    unseen = tuple(case for case in images if case not in {*picked, *known})
    return Run(settled, picked, known, unseen, tuple(d for case in picked for d in images[case]), base, wish.weights)


def _image_digests(prepared: PreparedCase, data: Dataset) -> list[str]:
    """SHA-256 of a case's image files, as recorded when it was prepared; the label is not one of them."""
    case = next(case for case in data.training if case.id == prepared.id)
    label = case.label.relative_to(data.root).as_posix() if case.label else ""
    return [digest for name, digest in prepared.record["inputs"].items() if name != label]


def _finished(workspace: Workspace, run: Run, resume: bool, overwrite: bool) -> bool:
    """Whether this very run is done already. UsageError when another one's model or state would be lost."""
    if overwrite or not workspace.split.exists():
        return False
    split = store.read_json(workspace.split, "the split")
    same = isinstance(split, dict) and split.get("run") == run.digest
    if same and split.get("finished") and workspace.model.exists():
        console.say(f"this run is finished already: {workspace.model} (train again with --overwrite)")
        return True
    if resume:
        return False
    if _state(workspace).exists() or previous_of(_state(workspace)).exists():
        raise UsageError("an unfinished run is here. Go on with slmsam2 finetune --continue, or start anew with --overwrite")
    if workspace.model.exists():
        raise UsageError(
            "the workspace holds a model of another run (plan, cases, seed, base, steps or minutes differ). "
            "Use --overwrite, or another workspace with -w"
        )
    return False


def _unfinished(workspace: Workspace, run: Run) -> bool:
    """Whether the split is of this run, which was ended before it had a state: it can begin where it was, at step 0."""
    split = store.read_json(workspace.split, "the split") if workspace.split.exists() else None
    return isinstance(split, dict) and split.get("run") == run.digest and not split.get("finished")


def _state(workspace: Workspace) -> Path:
    return workspace.finetuned / "state.safetensors"


def _tune(run: Run, ready: Outcome, workspace: Workspace, device: torch.device, wish: Wish, resume: bool) -> None:
    model = _model(run.plan, run.base, run.plan.training.seed)
    if run.base is None:
        console.warn("--weights random: everything is learned from these volumes alone; for trials and tests, not for clinical data")
    used = [case for case in ready.cases if case.id in run.cases]
    sampler = ClipSampler(used, tuple(run.plan.labels), run.plan.geometry, run.plan.ignore)
    slices = None
    if run.plan.training.recogniser:
        slices = SliceSampler(used, tuple(run.plan.labels), run.plan.geometry.stack_px, run.plan.ignore)
        model.recogniser = new_recogniser(slices, len(run.plan.channels), run.plan.training.seed)
    learner = new_learner(model.to(device), run.plan.training, run.base is None)
    state = _state(workspace)
    begun = state.exists() or previous_of(state).exists() or not _unfinished(workspace, run)
    if resume and begun and (warning := load_state(state, learner, run.digest)):
        console.warn(warning)
    console.say(f"training on {len(run.cases)} volume(s) on {describe(device)}: {', '.join(run.cases)}")
    skipped = tuple(problem.case for problem in ready.problems)
    for old in () if resume else (state, previous_of(state)):
        old.unlink(missing_ok=True)  # of a run that --overwrite gave up: not to be gone on with by this one's split
    _write_split(workspace, run, wish, skipped, finished=False)
    if not (resume and begun):
        save_state(state, learner, run.digest)  # from here on, however it ends, there is something to continue
    log = Log(workspace.finetuned / "log.csv", from_step=learner.step)
    with stoppable() as stopped:
        _follow(learner, sampler, slices, run, state, log, stopped)
        _save(workspace, run, learner)
        _note(log, run)
        finished = share_done(learner, run.plan.training) >= 1
        if not finished:
            save_state(state, learner, run.digest)
            console.say(f"stopped at step {learner.step}; the model so far is saved. Go on with slmsam2 finetune --continue")
        elif calibration := _calibrate(learner, used, run.plan, stopped):
            _save(workspace, run, learner, calibration)
        _write_split(workspace, run, wish, skipped, finished)
    for old in (state, previous_of(state)) if finished else ():
        old.unlink(missing_ok=True)


def _follow(
    learner: Learner,
    sampler: ClipSampler,
    slices: SliceSampler | None,
    run: Run,
    state: Path,
    log: Log,
    stopped: Callable[[], bool],
) -> None:
    """Train with a progress bar; save the state every few minutes."""
    saved, shown = time.monotonic(), learner.step
    whole = 1000
    with console.progress("training", whole) as advance:
        bar = 0
        for progress in train(learner, sampler, run.plan.training, stopped, slices):
            row = {"step": progress.step, "seconds": round(learner.seconds, 2), "learning_rate": progress.learning_rate}
            log.add(row | progress.losses)
            now_at = int(progress.done * whole)
            advance(now_at - bar, f"step {progress.step}, loss {log.recent():.3f}")
            bar = now_at
            if time.monotonic() - saved > SAVE_EVERY_S:
                save_state(state, learner, run.digest)
                _note(log, run)
                saved = time.monotonic()
    if learner.step == shown:
        console.say("nothing was left to train")


def _note(log: Log, run: Run) -> None:
    """The log so far, and its picture."""
    log.write()
    if log.rows:
        title = f"{run.plan.dataset_name}: {run.plan.network.size}, {len(run.cases)} volume{'s' * (len(run.cases) > 1)}"
        try:
            draw_progress(log.path.with_name("progress.png"), log.columns, log.values(), title)
        except Exception as error:  # noqa: BLE001 - nothing about a picture may make a run fail
            console.warn(f"progress.png could not be drawn: {error or type(error).__name__}")
            console.trace(error)


def _write_split(workspace: Workspace, run: Run, wish: Wish, skipped: tuple[str, ...], finished: bool) -> None:
    """split.json: which cases were learned from, which count as unseen, and what --continue needs."""
    kept = wish if wish.weights in ("auto", RANDOM) or zoo.is_name(wish.weights) else replace(wish, weights=_A_FILE)
    split = {
        "format_version": 1,
        "training": sorted([*run.cases, *run.known]),
        "unseen": list(run.unseen),
        "skipped": list(skipped),
        "seed": run.plan.training.seed,
        "options": asdict(kept),
        "run": run.digest,
        "finished": finished,
    }
    store.write_json(workspace.split, split)


def _calibrate(learner: Learner, cases: Sequence[PreparedCase], plan: Plan, stopped: Callable[[], bool]) -> Calibration | None:
    """What the tuned model's confidence is worth, said in a line."""
    found = calibrated_on(learner.average, cases, plan, stopped)
    if found is None:
        console.say(
            f"confidence stays uncalibrated: {'stopped' if stopped() else 'too few slices to compare it with, or no table that says more'}"
        )
    else:
        console.say(
            f"confidence calibrated on {found.slices} slices: calibration error {found.error_before:.3f} -> {found.error_after:.3f}, "
            f"{found.note}"
        )
    return found


def _save(workspace: Workspace, run: Run, learner: Learner, calibration: Calibration | None = None) -> None:
    ancestor = run.base.provenance if run.base else None
    provenance = Provenance(
        base=run.base.name if run.base else RANDOM,
        base_digest=run.base.digest if run.base else "",
        licence=ancestor.licence if ancestor else "",
        random=run.base is None or bool(ancestor and ancestor.random),
        seed=run.plan.training.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        training=tuple(sorted([*run.cases, *run.known])),
        learned_from=tuple(sorted({*run.images, *(ancestor.learned_from if ancestor else ())})),
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
    )
    digest = keep(workspace.model, learner.average, run.plan, provenance, run.base, calibration)
    if calibration is None:
        console.say(f"model: {workspace.model} ({learner.step} steps, {learner.seconds:.0f} s, weights {digest[:12]})")
