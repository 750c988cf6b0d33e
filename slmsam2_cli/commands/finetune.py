"""Stage 3: data set + plan -> tuned model.   Reads plan.json, prepared/.

Writes finetuned/{split.json,model.safetensors,log.csv,log.jsonl,progress.png,validation.json,left_out_*.png,state}, tensorboard/ where
that is installed, and adapter.safetensors for a plan with adapters.

Plans and prepares by itself what has not been planned or prepared. A run interrupted after its folds leaves a usable model; resume any with
--continue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, PreprocessResult, PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import Dataset, read_dataset
from slmsam2_cli.device import DeviceName, choose_device, describe, is_out_of_memory
from slmsam2_cli.errors import DONE, DatasetError, DeviceError, OutputError, PlanError, TrainingError, UsageError
from slmsam2_cli.inference.load_model import fuser_of, match_fuser
from slmsam2_cli.io import atomic
from slmsam2_cli.model import zoo
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import RANDOM, Checkpoint, HeldOutResult, Provenance, load_base_weights
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import RGB_CHANNELS, Plan, TrainingPlan, read_plan, write_plan
from slmsam2_cli.planning.rules import choose_training, decide, training_for
from slmsam2_cli.training.calibrate import calibrate_model
from slmsam2_cli.training.cross_validation import FILE as FOLDS_FILE
from slmsam2_cli.training.cross_validation import (
    delete_folds,
    plan_folds,
    pretrained_label_unet,
    print_validation,
    settings_after_folds,
    validate,
)
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import check_processes
from slmsam2_cli.training.interrupts import ResumableError, graceful_stop, memory_warning, remedy, resumable
from slmsam2_cli.training.learner import Progress, fraction_done
from slmsam2_cli.training.monitoring import Log, draw_progress, events
from slmsam2_cli.training.state import (
    Run,
    RunOptions,
    backup_path,
    check_state,
    image_digests,
    keep,
    load_state,
    save_state,
    training_images_of,
)
from slmsam2_cli.training.trainer import Learner, absent_labels, follow, init_learner, new_model, training_data_of
from slmsam2_cli.workspace import Workspace

SAVE_EVERY_S = 120.0
_FROM_FILE = "file"


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
    skip_invalid: bool = False,
    device: DeviceName = "auto",
    workers: int | None = None,
    network: str | None = None,
    overwrite: bool = False,
) -> int:
    """Adapt the network to `cases` training volumes. The exit code: 0.

    Raises DatasetError (bad training cases, unless `skip_invalid`), PlanError, WeightsError, TrainingError, DeviceError,
    OutputError, UsageError.
    """
    if cases < 1:
        raise UsageError(f"-n {cases}: at least one training volume is needed")
    if resume and overwrite:
        raise UsageError("--continue and --overwrite cannot be combined")
    chosen = choose_device(device)
    options = RunOptions(cases, weights, minutes, steps, seed, workers)
    if resume:
        options = _saved_options(workspace, options)
    base = load_base_weights(options.weights)
    data = read_dataset(dataset)
    try:
        with atomic.lock_folder(workspace.root):
            plan = _plan(data, workspace, network, base)
            new_model(plan, base)
            ready = _prepare(data, plan, workspace, skip_invalid)
            run = _make_run(plan, data, ready, options, base)
            if _finished(workspace, run, resume, overwrite):
                return DONE
            check_processes(run.plan.training.workers, chosen)
            if warning := memory_warning(run.plan, workspace.fingerprint, len(run.cases), chosen):
                console.warn(warning)
            _tune(run, ready, workspace, chosen, options, resume)
    except ResumableError:
        raise
    except OutputError as error:
        raise OutputError(f"{error}. Fix that and try again, or choose a workspace you can write to with -w") from None
    except (RuntimeError, MemoryError, TrainingError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(f"out of memory. {remedy(workspace.plan, chosen)}") from None
    return DONE


def _saved_options(workspace: Workspace, given: RunOptions) -> RunOptions:
    """The options of the run to resume with; a base that is a file has to be named again."""
    split = atomic.read_json(workspace.split, "the split") if workspace.split.exists() else None
    kept = split.get("options") if isinstance(split, dict) else None
    if not isinstance(kept, dict) or set(kept) != {field.name for field in fields(RunOptions)}:
        return given
    options = RunOptions(**kept)
    if options.weights == _FROM_FILE and given.weights in ("auto", RANDOM):
        raise UsageError("this run started from a file of weights. Name the same file again: --continue --weights FILE")
    options = replace(options, weights=given.weights) if options.weights == _FROM_FILE else options
    console.say(f"going on with -n {options.cases} --seed {options.seed} --weights {Path(options.weights).name}")
    return options


def _plan(data: Dataset, workspace: Workspace, network: str | None, base: Checkpoint | None) -> Plan:
    """The workspace's plan, or a fresh one when there is none; for the network named, else the base's, and with the base's fuser."""
    network = network or (base.network.size if base and base.network else None)
    if workspace.plan.exists():
        plan = read_plan(workspace.plan)
        if data.channels != plan.channels:
            raise PlanError(f"plan.json knows the channels {plan.channels}, the data set has {data.channels}. Run slmsam2 plan --overwrite")
        if network and network != plan.network.size:
            raise PlanError(f"plan.json is for network {plan.network.size}. Run slmsam2 plan --network {network} first")
        _warn_channel_order(plan, base)
        return match_fuser(plan, base) if base else plan
    with console.progress("measuring", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    plan = decide(fingerprint, network, (fuser_of(base) if base else None) or "gated")
    write_fingerprint(workspace.fingerprint, fingerprint)
    write_plan(workspace.plan, plan)
    console.say(f"planned: slices along {plan.geometry.slice_axis}, {plan.geometry.input_size} px, {plan.modality} (slmsam2 plan says why)")
    _warn_channel_order(plan, base)
    return plan


def _warn_channel_order(plan: Plan, base: Checkpoint | None) -> None:
    """A line where the base has learned to read as many channels, but under other names."""
    before = base.plan if base else None
    if before is None or before.modality != plan.modality or before.channels == plan.channels:
        return
    if len(before.channels) != len(plan.channels) or len(plan.channels) <= RGB_CHANNELS:
        return
    console.warn(f"the channels {', '.join(plan.channels)} are taken for the base's {', '.join(before.channels)}, in this order")


def _prepare(data: Dataset, plan: Plan, workspace: Workspace, skip_invalid: bool) -> PreprocessResult:
    with console.progress("preparing", len(data.training)) as advance:
        outcome = prepare_all(data, PreprocessSettings(plan.geometry, plan.intensity), workspace.prepared, log=console.say, advance=advance)
    if outcome.problems and not (skip_invalid and outcome.cases):
        raise DatasetError(
            f"{data.name}: {len(outcome.problems)} training cases are unusable, so nothing was trained. Fix them, or use --skip-invalid",
            outcome.problems,
        )
    for problem in outcome.problems:
        console.warn(f"left out: {problem}")
    return outcome


def _make_run(plan: Plan, data: Dataset, ready: PreprocessResult, options: RunOptions, base: Checkpoint | None) -> Run:
    """The split, drawn from the seed over all cases that can teach propagation, and the training settings for that many."""
    usable = sorted(case.id for case in ready.cases if case.labels is not None and len(case.labels) > 1 and case.labels.any())
    if options.cases > len(usable):
        console.warn(
            f"-n {options.cases}, but only {len(usable)} training case(s) can be learned from: all are, and none is left to test on"
        )
    order = np.random.default_rng(options.seed).permutation(len(usable))
    picked = tuple(sorted(usable[i] for i in order[: options.cases]))
    images = {case.id: image_digests(case, data) for case in ready.cases}
    learned = training_images_of(base)
    known = tuple(case for case in images if case not in picked and learned & set(images[case]))
    if known:
        console.warn(f"{len(known)} more case(s) were learned from by {base.name if base else 'the base'} and do not count as held-out")
    training = training_for(plan, len(picked), base is None)
    changes = {name: getattr(options, name) or getattr(training, name) for name in ("minutes", "steps", "workers")} | {"seed": options.seed}
    settled = plan.model_copy(update={"training": TrainingPlan.model_validate(training.model_dump() | changes)})
    held_out = tuple(case for case in images if case not in {*picked, *known})
    files = tuple(sorted(d for case in ready.cases if case.id in picked for d in case.record["inputs"].values()))
    return Run(settled, picked, known, held_out, tuple(d for case in picked for d in images[case]), files, base, options.weights)


def _finished(workspace: Workspace, run: Run, resume: bool, overwrite: bool) -> bool:
    """Whether this very run is done already. UsageError when another one's model or state would be lost."""
    if overwrite or not workspace.split.exists():
        return False
    split = atomic.read_json(workspace.split, "the split")
    same = isinstance(split, dict) and split.get("run") == run.digest
    if same and split.get("finished") and workspace.model.exists():
        console.say(f"this run is finished already: {workspace.model} (train again with --overwrite)")
        return True
    if resume:
        return False
    folds_begun = (workspace.finetuned / FOLDS_FILE).exists() and not (isinstance(split, dict) and split.get("finished"))
    if folds_begun or _state(workspace).exists() or backup_path(_state(workspace)).exists():
        raise UsageError("an unfinished run is here. Resume with slmsam2 finetune --continue, or start again with --overwrite")
    if workspace.model.exists():
        raise UsageError(
            "the workspace holds a model of another run (plan, cases, their files, seed, base, steps or minutes differ). "
            "Use --overwrite, or another workspace with -w"
        )
    return False


def _can_start_over(workspace: Workspace, run: Run) -> bool:
    """Whether the split is of this run, which was ended before it had a state: it can begin where it was, at step 0."""
    split = atomic.read_json(workspace.split, "the split") if workspace.split.exists() else None
    return isinstance(split, dict) and split.get("run") == run.digest and not split.get("finished")


def _state(workspace: Workspace) -> Path:
    return workspace.finetuned / "state.safetensors"


def _tune(run: Run, ready: PreprocessResult, workspace: Workspace, device: torch.device, options: RunOptions, resume: bool) -> None:
    if run.base is None:
        console.warn("--weights random: everything is learned from these volumes alone; for trials and tests, not for clinical data")
    used = [case for case in ready.cases if case.id in run.cases]
    training_data_of(used, run.plan)  # is there anything to learn from?
    if absent := absent_labels(used, run.plan):
        console.warn(
            f"{', '.join(absent)}: in none of the volumes that are learned from, so nothing is learned of it (--seed draws others)"
        )
    state, folder = _state(workspace), workspace.finetuned
    begun = state.exists() or backup_path(state).exists() or not _can_start_over(workspace, run)
    if resume and begun:
        check_state(state, Learner, run.digest)
    where = describe(device) + (f", shared by {run.plan.training.workers} processes" if run.plan.training.workers > 1 else "")
    console.say(f"training on {len(run.cases)} volume(s) on {where}: {', '.join(run.cases)}")
    skipped = tuple(problem.case for problem in ready.problems)
    if not resume:  # of a run that --overwrite gave up: not to be gone on with by this one's split
        for old in (state, backup_path(state)):
            old.unlink(missing_ok=True)
        delete_folds(folder)
    _write_split(workspace, run, options, skipped, finished=False)  # from here on, however it ends, there is something to continue
    with resumable("slmsam2 finetune"), graceful_stop() as stopped:
        by_rule = choose_training(run.plan.network.size, len(used)).value.steps
        validation = validate(run, used, device, folder, SAVE_EVERY_S, stopped, asked=run.plan.training.steps != by_rule)
        if stopped() and validation is None:
            console.say("stopped before the first step of tuning on everything. Resume with slmsam2 finetune --continue")
            return
        _train_on_all(run, used, workspace, device, options, validation, skipped, resume and begun, stopped)


def _train_on_all(
    run: Run,
    used: Sequence[PreparedCase],
    workspace: Workspace,
    device: torch.device,
    options: RunOptions,
    validation: HeldOutResult | None,
    skipped: tuple[str, ...],
    begun: bool,
    stopped: Callable[[], bool],
) -> None:
    """Tune on all volumes, as the folds speak for, or keep the base."""
    state, plan = _state(workspace), run.plan
    if validation is not None:
        print_validation(validation, len(used))
        if validation.label_unet is False:
            plan = plan.model_copy(update={"training": plan.training.model_copy(update={"label_unet": False})})
    kept_base = validation is not None and validation.kept == "pretrained"
    training_data = training_data_of(used, plan)
    training = settings_after_folds(run.plan.training, len(plan_folds(run, used)[0]), validation)
    learner = init_learner(plan, run.base, training_data, device)
    if begun and (warning := load_state(state, learner, run.digest)):
        console.warn(warning)
    if not begun:
        save_state(state, learner, run.digest)
    log = Log(workspace.finetuned / "log.csv", from_step=learner.step)
    if kept_base:
        learner.average.label_unet = pretrained_label_unet(run)
    elif not stopped():
        _follow(learner, training_data, training, run, state, log, stopped)
    _save(workspace, run, learner, validation)
    _note(log, run)
    finished = kept_base or fraction_done(learner, training) >= 1
    if finished and (calibration := _calibrate(learner, used, run.plan, stopped)):
        _save(workspace, run, learner, validation, calibration)
    elif stopped() or not finished:
        finished = False
        save_state(state, learner, run.digest)
        console.say(f"stopped at step {learner.step}; the model so far is saved. Resume with slmsam2 finetune --continue")
    _write_split(workspace, run, options, skipped, finished)
    for old in (state, backup_path(state)) if finished else ():
        old.unlink(missing_ok=True)


def _follow(
    learner: Learner, training_data: TrainingData, training: TrainingPlan, run: Run, state: Path, log: Log, stopped: Callable[[], bool]
) -> None:
    """Train on everything; the log grows with every step."""

    def told(progress: Progress) -> str:
        row = {"step": progress.step, "seconds": round(learner.seconds, 2), "learning_rate": progress.learning_rate} | progress.losses
        log.add(row)
        record(row)
        return f"step {progress.step}, loss {log.recent():.3f}, {learner.step / max(learner.seconds, 1e-3):.1f} steps/s"

    with events(log.path.with_name("tensorboard"), learner.step) as record:
        try:
            follow(
                learner,
                training_data,
                training,
                stopped,
                title="training",
                state=state,
                settings=run.digest,
                every_s=SAVE_EVERY_S,
                told=told,
                saved=lambda: _note(log, run),
            )
        except TrainingError:
            _note(log, run)  # what led there
            raise


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


def _write_split(workspace: Workspace, run: Run, options: RunOptions, skipped: tuple[str, ...], finished: bool) -> None:
    """split.json: which cases were learned from, which count as held-out, and what --continue needs."""
    kept = options if options.weights in ("auto", RANDOM) or zoo.is_name(options.weights) else replace(options, weights=_FROM_FILE)
    split = {
        "format_version": 1,
        "training": sorted([*run.cases, *run.known]),
        "held_out": list(run.held_out),
        "skipped": list(skipped),
        "seed": run.plan.training.seed,
        "options": asdict(kept),
        "run": run.digest,
        "finished": finished,
    }
    atomic.write_json(workspace.split, split)


def _calibrate(learner: Learner, cases: Sequence[PreparedCase], plan: Plan, stopped: Callable[[], bool]) -> Calibration | None:
    """What the tuned model's confidence is worth, said in a line."""
    found = calibrate_model(learner.average, cases, plan, stopped)
    if found is None:
        console.say(
            f"confidence stays uncalibrated: {'stopped' if stopped() else 'too few slices to compare it with, or no table that says more'}"
        )
    else:
        console.say(
            f"confidence calibrated with {found.slices} slices: calibration error {found.error_before:.3f} -> {found.error_after:.3f}, "
            f"{found.note}"
        )
    return found


def _save(
    workspace: Workspace, run: Run, learner: Learner, validation: HeldOutResult | None, calibration: Calibration | None = None
) -> None:
    ancestor = run.base.provenance if run.base else None
    provenance = Provenance(
        pretrained=run.base.name if run.base else RANDOM,
        pretrained_digest=run.base.digest if run.base else "",
        licence=ancestor.licence if ancestor else "",
        object_score_offset=ancestor.object_score_offset if ancestor else 0.0,
        random=run.base is None or bool(ancestor and ancestor.random),
        seed=run.plan.training.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        training=tuple(sorted([*run.cases, *run.known])),
        training_image_digests=tuple(sorted({*run.images, *(ancestor.training_image_digests if ancestor else ())})),
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
        validation=validation,
    )
    digest = keep(workspace.model, learner.average, run.plan, provenance, run.base, calibration)
    if calibration is None:
        data_wait_s = f", {learner.data_wait_s / learner.seconds:.0%} of it waiting for data" if learner.seconds else ""
        console.say(f"model: {workspace.model} ({learner.step} steps, {learner.seconds:.0f} s{data_wait_s}, weights {digest[:12]})")
