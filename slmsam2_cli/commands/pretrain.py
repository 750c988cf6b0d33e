"""Train pretrained weights by a recipe.   Reads a recipe.   Writes RUN/{recipe.json,log.csv,checks.csv,nano.safetensors,state.safetensors}.

RUN also gets started_from.json when the initial weights are not random. No data set is needed: training volumes are generated. An
interrupted run leaves usable weights and is resumed with --continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from slmsam2_cli import console
from slmsam2_cli.device import DeviceName, choose_device, describe
from slmsam2_cli.errors import DONE, DeviceError, TrainingError, UsageError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import Checkpoint, Header, Provenance, load_base_weights, save_weights
from slmsam2_cli.pretraining.recipe import NANO, SMOKE, Recipe, read_recipe
from slmsam2_cli.pretraining.step import export_state
from slmsam2_cli.pretraining.train import Pretrainer, new_learner, train
from slmsam2_cli.pretraining.validation import ValidationScores, score_clips, validation_clips
from slmsam2_cli.training.interrupts import graceful_stop
from slmsam2_cli.training.learner import fraction_done
from slmsam2_cli.training.monitoring import COLUMNS, LABEL_UNET_COLUMN, Log
from slmsam2_cli.training.state import backup_path, load_state, save_state

SAVE_EVERY_S = 120.0
WEIGHTS, RECIPE, STATE, STARTED_FROM = "nano.safetensors", "recipe.json", "state.safetensors", "started_from.json"
LICENCE, PRETRAINED = "Apache-2.0", "procedural volumes"
_PROGRESS_UNITS = 1000  # of the progress bar
_LOG = (*COLUMNS[:2], "phase", "length", "clips", *(name for name in COLUMNS[2:] if name != LABEL_UNET_COLUMN), "clips_per_s")
_CHECKS = ("step", "seconds", *ValidationScores.__dataclass_fields__)


@dataclass
class _Run:
    """A run in progress. folder: RUN; commit: of the code, noted in the weights; log, checks: rows per step and per validation."""

    folder: Path
    recipe: Recipe
    commit: str
    learner: Pretrainer
    log: Log
    checks: Log


def pretrain(
    run: Path,
    *,
    recipe: Path | None = None,
    weights: str | None = None,
    smoke: bool = False,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    commit: str = "",
    resume: bool = False,
    device: DeviceName = "auto",
    overwrite: bool = False,
) -> int:
    """Train pretrained weights by a recipe, in the folder `run`. Return the exit code, 0.

    weights: initial weights, a name or a file, instead of random ones; their digest is noted in the header of the result.
    commit: version of the code, noted in the header of the weights.

    Raises: PlanError when the recipe is invalid, WeightsError when the weights or the state cannot be used, UsageError when options
    conflict or RUN holds another run, TrainingError when training diverges, DeviceError, OutputError, LockError.
    """
    if recipe is not None and smoke:
        raise UsageError("--recipe and --smoke cannot be combined")
    if resume and overwrite:
        raise UsageError("--continue and --overwrite cannot be combined")
    if resume and (recipe is not None or smoke or seed is not None or weights is not None):
        raise UsageError("--continue uses the recipe, seed and weights of the run. Omit --recipe, --smoke, --seed and --weights")
    start = load_base_weights(weights) if weights is not None else None
    chosen_device = choose_device(device)
    with atomic.lock_folder(run):
        if resume and not (run / RECIPE).is_file():
            raise UsageError(f"nothing to continue in {run}. Run slmsam2 pretrain without --continue")
        settings = read_recipe(run / RECIPE if resume else recipe or (SMOKE if smoke else NANO))
        settings = _apply_options(settings, minutes, steps, seed)
        if not resume and not overwrite:
            _check_output(run)
        try:
            _train(run, settings, chosen_device, resume, start, commit, _use_processes(settings, chosen_device, threads))
        except torch.OutOfMemoryError:
            raise DeviceError("out of memory. Lower slices_per_step in the recipe, or use --device cpu") from None
    return DONE


def _use_processes(recipe: Recipe, device: torch.device, threads: int | None) -> bool:
    """Return whether there are enough threads for one process per part, and set the threads of this process."""
    if device.type != "cpu":
        return False
    threads = threads if threads is not None else torch.get_num_threads()
    several = 1 < recipe.parts <= threads
    torch.set_num_threads(1 if several else threads)
    return several


def _apply_options(recipe: Recipe, minutes: float | None, steps: int | None, seed: int | None) -> Recipe:
    """Return the recipe with the command's options. --steps alone removes the recipe's limit in minutes, so that a run can be repeated."""
    options = {"steps": steps, "minutes": minutes, "seed": seed}
    values = recipe.model_dump() | ({"minutes": None} if steps is not None and minutes is None else {})
    return Recipe.model_validate(values | {name: value for name, value in options.items() if value is not None})


def _check_output(run: Path) -> None:
    """Raise UsageError when the folder holds another run."""
    if (run / STATE).exists() or backup_path(run / STATE).exists():
        raise UsageError(f"{run} holds an unfinished run. Resume it with slmsam2 pretrain --continue, or start again with --overwrite")
    if (run / WEIGHTS).exists():
        raise UsageError(f"{run} holds the weights of another run. Use another folder with -o, or add --overwrite")


def _train(
    folder: Path, recipe: Recipe, device: torch.device, resume: bool, start: Checkpoint | None, commit: str, use_processes: bool
) -> None:
    """Train and save the weights; save the state too if the run was stopped before its end."""
    learner, state = new_learner(recipe, device, start), folder / STATE
    if resume and (warning := load_state(state, learner, recipe.digest)):
        console.warn(warning)
    if not resume:
        for old in (state, backup_path(state), folder / STARTED_FROM):
            old.unlink(missing_ok=True)
    if start is not None:
        atomic.write_json(folder / STARTED_FROM, {"name": start.name, "digest": start.digest})
    atomic.write_json(folder / RECIPE, recipe.model_dump(mode="json"))
    where = f"cpu ({recipe.parts} processes)" if use_processes else describe(device)
    parameters = sum(p.numel() for p in learner.model.parameters())
    console.say(f"training {recipe.network.size} ({parameters / 1e6:.2f} million parameters, {recipe.input_size} px) on {where}")
    log, checks = Log(folder / "log.csv", learner.step, _LOG), Log(folder / "checks.csv", learner.step, _CHECKS)
    run = _Run(folder, recipe, commit, learner, log, checks)
    with graceful_stop() as stopped:
        try:
            _run_training(run, stopped, use_processes)
        except TrainingError:
            log.write()  # the steps before the failure
            raise
        log.write()
        finished = fraction_done(learner, recipe) >= 1
        if finished:
            _validate(run)
        else:
            save_state(state, learner, recipe.digest)
        _save_weights(run)
        if not finished:
            console.say(f"stopped at step {learner.step}; state and weights are saved. Resume with slmsam2 pretrain --continue")
    if finished:
        state.unlink(missing_ok=True)
        backup_path(state).unlink(missing_ok=True)


def _run_training(run: _Run, stop: Callable[[], bool], use_processes: bool) -> None:
    """Train with a progress bar; save the state every SAVE_EVERY_S seconds, and the weights after every validation."""
    learner, recipe = run.learner, run.recipe
    saved, validated = time.monotonic(), learner.seconds
    with console.progress("training", _PROGRESS_UNITS) as advance:
        shown = 0
        for step in train(learner, recipe, stop, use_processes):
            rate = step.clips / step.seconds
            row = {"step": step.step, "seconds": round(learner.seconds, 2), "phase": recipe.phases.index(recipe.phase(step.done)) + 1}
            row |= {"length": step.length, "clips": step.clips, "learning_rate": step.learning_rate, "clips_per_s": rate}
            run.log.add(row | step.losses)
            position = int(step.done * _PROGRESS_UNITS)
            loss = run.log.recent_loss()
            advance(position - shown, f"step {step.step}, {step.length} slices, loss {loss:.3f}, {rate:.1f} clips/s")
            shown = position
            if learner.seconds - validated >= 60 * recipe.validation.every_minutes and step.done < 1:
                _validate(run)
                _save_weights(run)
                validated = learner.seconds
            if time.monotonic() - saved > SAVE_EVERY_S:
                save_state(run.folder / STATE, learner, recipe.digest)
                run.log.write()
                saved = time.monotonic()


def _validate(run: _Run) -> None:
    """Score the averaged weights on the validation clips, log the scores and print them."""
    learner = run.learner
    scores = score_clips(learner.ema, validation_clips(run.recipe, learner.ema.device))
    run.checks.add({"step": learner.step, "seconds": round(learner.seconds, 1)} | asdict(scores))
    run.checks.write()
    console.say(
        f"step {learner.step}, {learner.seconds / 60:.1f} min: Dice {scores.dice:.3f} "
        f"(copied mask {scores.dice_copied:.3f}, no memory {scores.dice_mask_only:.3f}, known extent {scores.dice_known_extent:.3f}), "
        f"object score accuracy {scores.object_score_accuracy:.3f}, false-positive slices {scores.false_positive_rate:.3f}, "
        f"missed slices {scores.missed_rate:.3f}"
    )


def _save_weights(run: _Run) -> None:
    """Save the averaged weights in half precision, with the recipe and everything else that is needed to reproduce them."""
    learner, path, origin = run.learner, run.folder / WEIGHTS, run.folder / STARTED_FROM
    started_from = atomic.read_json(origin, "initial weights") if origin.exists() else {}
    provenance = Provenance(
        pretrained=PRETRAINED,
        pretrained_digest=started_from.get("digest", "") if isinstance(started_from, dict) else "",
        licence=LICENCE,
        seed=run.recipe.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
    )
    notes = {"recipe": run.recipe.model_dump_json()} | ({"commit": run.commit} if run.commit else {})
    state = export_state(learner.ema, run.recipe.object_score_shift)
    digest = save_weights(path, state, Header(run.recipe.network, provenance, notes=notes))
    console.say(f"weights: {path} ({learner.step} steps, {learner.seconds:.0f} s, {path.stat().st_size / 1e6:.1f} MB, {digest[:12]})")
