"""slmsam2 finetune: dataset + plan -> fine-tuned model.   Reads plan.json, prepared/.

Writes finetuned/{split.json,model.safetensors,log.csv,log.jsonl,progress.png,validation.json,held_out_*.png,state}, tensorboard/ where
that is installed, and adapter.safetensors for a plan with adapters.

Plans and preprocesses first what is missing. A run that is interrupted after its cross-validation leaves a usable model; any run is
resumed with --continue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, PreprocessResult, PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import Dataset, read_dataset
from slmsam2_cli.device import DeviceName, choose_device, describe, is_out_of_memory, needs_one_thread, torch_threads
from slmsam2_cli.errors import DONE, DatasetError, DeviceError, OutputError, PlanError, TrainingError, UsageError
from slmsam2_cli.inference.load_model import fuser_of, match_fuser, matching_label_unet, read_split
from slmsam2_cli.io import atomic
from slmsam2_cli.model import zoo
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import RANDOM, Checkpoint, HeldOutResult, Provenance, load_base_weights
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import RGB_CHANNELS, Plan, TrainingPlan, read_plan, write_plan
from slmsam2_cli.planning.rules import choose_training, decide, training_for
from slmsam2_cli.training.background import pieces_at_once
from slmsam2_cli.training.calibrate import calibrate_model
from slmsam2_cli.training.cross_validation import FILE as FOLDS_FILE
from slmsam2_cli.training.cross_validation import (
    CrossValidation,
    delete_folds,
    plan_folds,
    print_validation,
    settings_after_folds,
    validate,
)
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import check_workers
from slmsam2_cli.training.interrupts import ResumableError, finetuning_bytes, graceful_stop, memory_advice, memory_warning, resumable
from slmsam2_cli.training.learner import Progress, fraction_done
from slmsam2_cli.training.monitoring import Log, draw_progress, tensorboard_log
from slmsam2_cli.training.state import (
    FinetuneOptions,
    Run,
    backup_path,
    delete_state,
    find_state,
    image_digests,
    load_state,
    save_model,
    save_state,
    training_images_of,
)
from slmsam2_cli.training.trainer import Learner, RunControl, absent_labels, init_learner, new_model, run_training, training_data_of
from slmsam2_cli.workspace import Workspace

SAVE_EVERY_S = 120.0
SPLIT_VERSION = 2  # format_version of split.json
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
    """Fine-tune a network on `cases` training cases. Returns the exit code 0.

    Raises: DatasetError when training cases are invalid, unless `skip_invalid`; PlanError, WeightsError, TrainingError, DeviceError,
    OutputError, UsageError.
    """
    if cases < 1:
        raise UsageError(f"-n {cases}: at least one training case is needed")
    if resume and overwrite:
        raise UsageError("--continue and --overwrite cannot be combined")
    chosen = choose_device(device)
    options = FinetuneOptions(cases, weights, minutes, steps, seed, workers)
    if resume:
        options = _saved_options(workspace, options)
    pretrained = load_base_weights(options.weights)
    data = read_dataset(dataset)
    try:
        with atomic.lock_folder(workspace.root):
            plan = _plan(data, workspace, network, pretrained)
            new_model(plan, pretrained)  # raises an error now, not after preprocessing, when the weights do not fit
            prepared = _prepare(data, plan, workspace, skip_invalid)
            run = _make_run(plan, data, prepared, options, pretrained)
            if _already_finished(workspace, run, resume, overwrite):
                return DONE
            check_workers(run.plan.training.workers, chosen)
            if warning := memory_warning(run.plan, workspace.fingerprint, len(run.cases), chosen):
                console.warn(warning)
            used = [case for case in prepared.cases if case.id in run.cases]
            skipped = tuple(problem.case for problem in prepared.problems)
            with torch_threads(1 if needs_one_thread(run.plan.network.size, chosen) else None):
                _finetune(_Session(run, used, skipped, workspace, chosen, options), resume)
    except ResumableError:
        raise
    except OutputError as error:
        raise OutputError(f"{error}. Fix this and try again, or choose a workspace you can write to with -w") from None
    except (RuntimeError, MemoryError, TrainingError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(f"out of memory. {memory_advice(workspace.plan, chosen)}") from None
    return DONE


def _read_split(workspace: Workspace) -> dict[str, Any]:
    """Read split.json; empty when there is none.

    Raises: UsageError when it is of another format_version.
    """
    split = read_split(workspace)
    if split and (found := split.get("format_version")) != SPLIT_VERSION:
        raise UsageError(
            f"split.json: format_version {found} is not supported (supported: {SPLIT_VERSION}). Use --overwrite to train again"
        )
    return split


def _saved_options(workspace: Workspace, options: FinetuneOptions) -> FinetuneOptions:
    """Return the options with which a run was started; pretrained weights from a file must be named again."""
    saved = _read_split(workspace).get("options")
    if not isinstance(saved, dict) or set(saved) != {field.name for field in fields(FinetuneOptions)}:
        return options
    started = FinetuneOptions(**saved)
    if started.weights == _FROM_FILE and options.weights in ("auto", RANDOM):
        raise UsageError("this run started from a file of weights. Name the same file again: --continue --weights FILE")
    started = replace(started, weights=options.weights) if started.weights == _FROM_FILE else started
    console.say(f"resuming with -n {started.cases} --seed {started.seed} --weights {Path(started.weights).name}")
    return started


def _plan(data: Dataset, workspace: Workspace, network: str | None, pretrained: Checkpoint | None) -> Plan:
    """Read the workspace's plan, or make one for the requested network, else that of the weights, with the fuser of the weights."""
    network = network or (pretrained.network.size if pretrained and pretrained.network else None)
    if workspace.plan.exists():
        plan = read_plan(workspace.plan)
        if data.channels != plan.channels:
            raise PlanError(
                f"plan.json is for the channels {', '.join(plan.channels)}, but the dataset has {', '.join(data.channels)}. "
                "Run slmsam2 plan --overwrite"
            )
        if network and network != plan.network.size:
            raise PlanError(f"plan.json is for network {plan.network.size}. Run slmsam2 plan --network {network} first")
        _warn_channel_order(plan, pretrained)
        return match_fuser(plan, pretrained) if pretrained else plan
    with console.progress("Analysing dataset", len(data.training)) as advance:
        fingerprint, problems = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{data.name}: none of its {len(problems)} training cases is usable", problems)
    plan = decide(fingerprint, network, (fuser_of(pretrained) if pretrained else None) or "gated")
    write_fingerprint(workspace.fingerprint, fingerprint)
    write_plan(workspace.plan, plan)
    console.say(
        f"wrote {workspace.plan.name}: slices along {plan.geometry.slice_axis}, input {plan.geometry.input_size} px, {plan.modality} "
        "(slmsam2 plan shows the reasons)"
    )
    _warn_channel_order(plan, pretrained)
    return plan


def _warn_channel_order(plan: Plan, pretrained: Checkpoint | None) -> None:
    """Warn where the pretrained model was trained on equally many channels with other names."""
    before = pretrained.plan if pretrained else None
    if before is None or before.modality != plan.modality or before.channels == plan.channels:
        return
    if len(before.channels) != len(plan.channels) or len(plan.channels) <= RGB_CHANNELS:
        return
    console.warn(f"the channels {', '.join(plan.channels)} are used as the pretrained model's {', '.join(before.channels)}, in this order")


def _prepare(data: Dataset, plan: Plan, workspace: Workspace, skip_invalid: bool) -> PreprocessResult:
    """Preprocess all training cases that are not up to date."""
    with console.progress("Preprocessing", len(data.training)) as advance:
        settings = PreprocessSettings(plan.geometry, plan.intensity)
        result = prepare_all(data, settings, workspace.prepared, log=console.say, advance=advance)
    if result.problems and not (skip_invalid and result.cases):
        raise DatasetError(
            f"{data.name}: {len(result.problems)} training cases are invalid; no training was run. Fix them, or use --skip-invalid",
            result.problems,
        )
    for problem in result.problems:
        console.warn(f"skipped: {problem}")
    return result


def _make_run(plan: Plan, data: Dataset, prepared: PreprocessResult, options: FinetuneOptions, pretrained: Checkpoint | None) -> Run:
    """Draw the training cases by the seed from all usable ones, and fit the training settings to their number."""
    usable = sorted(case.id for case in prepared.cases if case.labels is not None and len(case.labels) > 1 and case.labels.any())
    if options.cases > len(usable):
        console.warn(f"only {len(usable)} usable training cases (requested {options.cases}): all are used for training, none is held out")
    order = np.random.default_rng(options.seed).permutation(len(usable))
    picked = tuple(sorted(usable[i] for i in order[: options.cases]))
    images = {case.id: image_digests(case, data) for case in prepared.cases}
    known_images = training_images_of(pretrained)
    known = tuple(case for case in images if case not in picked and known_images & set(images[case]))
    if known:
        console.warn(f"{len(known)} more cases were in the pretrained model's training set and are not counted as held out")
    training = training_for(plan, len(picked), pretrained is None)
    changes = {name: getattr(options, name) or getattr(training, name) for name in ("minutes", "steps", "workers")} | {"seed": options.seed}
    final_plan = plan.model_copy(update={"training": TrainingPlan.model_validate(training.model_dump() | changes)})
    held_out = tuple(case for case in images if case not in {*picked, *known})
    files = tuple(sorted(d for case in prepared.cases if case.id in picked for d in case.record["inputs"].values()))
    picked_images = tuple(d for case in picked for d in images[case])
    return Run(final_plan, picked, known, held_out, picked_images, files, pretrained, options.weights)


def _already_finished(workspace: Workspace, run: Run, resume: bool, overwrite: bool) -> bool:
    """Return whether this run is finished.

    Raises: UsageError when the model or the state of another run would be lost.
    """
    if overwrite or not workspace.split.exists():
        return False
    split = _read_split(workspace)
    if split.get("run") == run.digest and split.get("finished") and workspace.model.exists():
        console.say(f"this run is already finished: {workspace.model} (use --overwrite to train again)")
        return True
    if resume:
        return False
    state = _state(workspace)
    folds_started = (workspace.finetuned / FOLDS_FILE).exists() and not split.get("finished")
    if folds_started or state.exists() or backup_path(state).exists():
        raise UsageError("there is an unfinished run. Resume it with slmsam2 finetune --continue, or start again with --overwrite")
    if workspace.model.exists():
        raise UsageError(
            "the workspace holds a model of another run (plan, cases, their files, seed, weights, steps or minutes differ). "
            "Use --overwrite, or another workspace with -w"
        )
    return False


def _state(workspace: Workspace) -> Path:
    return workspace.finetuned / "state.safetensors"


@dataclass(frozen=True)
class _Session:
    """A run, its prepared cases, the ids of skipped cases, and where and how it is run."""

    run: Run
    used: Sequence[PreparedCase]
    skipped: tuple[str, ...]
    workspace: Workspace
    device: torch.device
    options: FinetuneOptions


def _finetune(session: _Session, resume: bool) -> None:
    """Run cross-validation, then train on all cases."""
    run, workspace, state = session.run, session.workspace, _state(session.workspace)
    if run.pretrained is None:
        console.warn("--weights random trains from scratch on these cases only; for testing, not for clinical data")
    training_data_of(session.used, run.plan)  # raises an error when there is nothing to train on
    if absent := absent_labels(session.used, run.plan):
        labels = ", ".join(absent)
        console.warn(f"{labels}: absent from all training cases and will not be learned. Use another --seed to select other cases")
    if resume:
        split = _read_split(workspace)
        before_first_state = split.get("run") == run.digest and not split.get("finished")
        resume = state.exists() or backup_path(state).exists() or not before_first_state
        if resume:
            find_state(state, Learner, run.digest)  # raises an error when it does not fit
    else:  # so that --continue does not resume a run that --overwrite gave up
        delete_state(state)
        delete_folds(workspace.finetuned)
    processes = f", {run.plan.training.workers} processes" if run.plan.training.workers > 1 else ""
    console.say(f"training on {len(run.cases)} case(s) on {describe(session.device)}{processes}: {', '.join(run.cases)}")
    _write_split(session, finished=False)  # from here on the run can be resumed, however it ends
    with resumable("slmsam2 finetune"), graceful_stop() as stopped:
        default_steps = choose_training(run.plan.network.size, len(session.used)).value.steps
        steps_fixed = run.plan.training.steps != default_steps
        needed = finetuning_bytes(run.plan, workspace.fingerprint, len(session.used))
        job = CrossValidation(run, session.device, workspace.finetuned, SAVE_EVERY_S, steps_fixed, stopped, needed)
        validation = validate(job, session.used)
        if stopped() and validation is None:
            console.say("stopped during cross-validation. Resume with slmsam2 finetune --continue")
            return
        _train_on_all(session, validation, resume, stopped)


def _train_on_all(session: _Session, validation: HeldOutResult | None, resume: bool, stopped: Callable[[], bool]) -> None:
    """Train on all cases with the settings that cross-validation chose, or keep the pretrained model; save and calibrate the model."""
    run, used, workspace, state, plan = session.run, session.used, session.workspace, _state(session.workspace), session.run.plan
    if validation is not None:
        print_validation(validation, len(used))
        if validation.label_unet is False:
            plan = plan.model_copy(update={"training": plan.training.model_copy(update={"label_unet": False})})
    kept = run.pretrained if validation is not None and validation.kept == "pretrained" else None
    training_data = training_data_of(used, plan)
    training = settings_after_folds(run.plan.training, len(plan_folds(run, used)[0]), validation)
    learner = init_learner(plan, run.pretrained, training_data, session.device)
    if resume and (warning := load_state(state, learner, run.digest)):
        console.warn(warning)
    if not resume:
        save_state(state, learner, run.digest)
    log = Log(workspace.finetuned / "log.csv", from_step=learner.step)
    if kept is not None:
        learner.ema.label_unet = matching_label_unet(kept, run.plan)
    elif not stopped():
        _train(learner, training_data, training, session, log, stopped)
    _save(session, learner, validation)
    _write_log(log, run)
    finished = kept is not None or fraction_done(learner, training) >= 1
    if finished and (calibration := _calibrate(session, learner, stopped)):
        _save(session, learner, validation, calibration)
    elif stopped() or not finished:
        finished = False
        save_state(state, learner, run.digest)
        console.say(f"stopped at step {learner.step}; the model so far is saved. Resume with slmsam2 finetune --continue")
    _write_split(session, finished)
    if finished:
        delete_state(state)


def _train(
    learner: Learner, training_data: TrainingData, training: TrainingPlan, session: _Session, log: Log, stopped: Callable[[], bool]
) -> None:
    """Train on all cases; every step is logged."""
    run = session.run

    def on_step(progress: Progress) -> str:
        row = {"step": progress.step, "seconds": round(learner.seconds, 2), "learning_rate": progress.learning_rate} | progress.losses
        log.add(row)
        record(row)
        return f"step {progress.step}, loss {log.recent_loss():.3f}, {learner.step / max(learner.seconds, 1e-3):.1f} steps/s"

    with tensorboard_log(log.path.with_name("tensorboard"), learner.step) as record:
        state = _state(session.workspace)
        control = RunControl("training", state, run.digest, SAVE_EVERY_S, on_step, on_save=lambda: _write_log(log, run))
        try:
            run_training(learner, training_data, training, stopped, control)
        except TrainingError:
            _write_log(log, run)  # shows what led to the error
            raise


def _write_log(log: Log, run: Run) -> None:
    """Write the log so far, and its plot."""
    log.write()
    if log.rows:
        title = f"{run.plan.dataset_name}: {run.plan.network.size}, {len(run.cases)} case{'s' * (len(run.cases) > 1)}"
        try:
            draw_progress(log.path.with_name("progress.png"), log, title)
        except Exception as error:  # noqa: BLE001 - nothing about a picture may make a run fail
            console.warn(f"progress.png could not be drawn: {error or type(error).__name__}")
            console.trace(error)


def _write_split(session: _Session, finished: bool) -> None:
    """Write split.json: the training cases, the held-out cases, and what --continue needs."""
    run, options = session.run, session.options
    if options.weights not in ("auto", RANDOM) and not zoo.is_name(options.weights):
        options = replace(options, weights=_FROM_FILE)
    split: dict[str, Any] = {
        "format_version": SPLIT_VERSION,
        "training": sorted([*run.cases, *run.known]),
        "held_out": list(run.held_out),
        "skipped": list(session.skipped),
        "seed": run.plan.training.seed,
        "options": asdict(options),
        "run": run.digest,
        "finished": finished,
    }
    atomic.write_json(session.workspace.split, split)


def _calibrate(session: _Session, learner: Learner, stopped: Callable[[], bool]) -> Calibration | None:
    """Calibrate the confidence of the fine-tuned model, and print the result."""
    plan, cases = session.run.plan, session.used
    needed = finetuning_bytes(plan, session.workspace.fingerprint, len(cases))
    processes = pieces_at_once(plan, session.device, needed, len(cases) * len(plan.labels))
    calibration = calibrate_model(learner.ema, cases, plan, stopped, processes)
    if calibration is None:
        reason = "stopped" if stopped() else "too few slices, or calibration did not improve it"
        console.say(f"confidence not calibrated: {reason}")
    else:
        errors = f"calibration error {calibration.error_before:.3f} -> {calibration.error_after:.3f}"
        console.say(f"confidence calibrated with {calibration.slices} slices: {errors}, {calibration.note}")
    return calibration


def _save(session: _Session, learner: Learner, validation: HeldOutResult | None, calibration: Calibration | None = None) -> None:
    """Save the model with its provenance."""
    run, path = session.run, session.workspace.model
    ancestor = run.pretrained.provenance if run.pretrained else None
    provenance = Provenance(
        pretrained=run.pretrained.name if run.pretrained else RANDOM,
        pretrained_digest=run.pretrained.digest if run.pretrained else "",
        licence=ancestor.licence if ancestor else "",
        object_score_offset=ancestor.object_score_offset if ancestor else 0.0,
        random=run.pretrained is None or bool(ancestor and ancestor.random),
        seed=run.plan.training.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        training=tuple(sorted([*run.cases, *run.known])),
        training_image_digests=tuple(sorted({*run.images, *(ancestor.training_image_digests if ancestor else ())})),
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
        validation=validation,
    )
    digest = save_model(path, learner.ema, run.plan, provenance, run.pretrained, calibration)
    if calibration is None:
        waited = f", {learner.data_wait_s / learner.seconds:.0%} of it waiting for data" if learner.seconds else ""
        console.say(f"model: {path} ({learner.step} steps, {learner.seconds:.0f} s{waited}, weights {digest[:12]})")
