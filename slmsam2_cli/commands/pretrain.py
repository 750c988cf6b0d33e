"""Before everything: recipe -> base weights.   Reads a recipe.   Writes RUN/{recipe.json,log.csv,checks.csv,nano.safetensors,state}, and
started_from.json where it did not start from random weights.

Needs no data: the volumes are procedural. An interrupted run leaves usable weights and goes on with --continue.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from slmsam2_cli import console
from slmsam2_cli.device import DeviceName, choose_device, describe
from slmsam2_cli.errors import DONE, DeviceError, TrainingError, UsageError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import Checkpoint, Header, Provenance, load_base_weights, save_weights
from slmsam2_cli.pretraining.recipe import NANO, SMOKE, Recipe, read_recipe
from slmsam2_cli.pretraining.step import kept
from slmsam2_cli.pretraining.train import Pretrainer, Step, new_learner, train
from slmsam2_cli.pretraining.validation import Check, check, held_out
from slmsam2_cli.training.interrupts import graceful_stop
from slmsam2_cli.training.learner import fraction_done
from slmsam2_cli.training.monitoring import COLUMNS, LABEL_UNET_COLUMN, Log
from slmsam2_cli.training.state import backup_path, load_state, save_state

SAVE_EVERY_S = 120.0
WEIGHTS, RECIPE, STATE, STARTED_FROM = "nano.safetensors", "recipe.json", "state.safetensors", "started_from.json"
LICENCE, BASE = "Apache-2.0", "procedural volumes"
_LOG = (*COLUMNS[:2], "phase", "length", "clips", *(name for name in COLUMNS[2:] if name != LABEL_UNET_COLUMN), "clips_per_s")
_CHECKS = ("step", "seconds", *Check.__dataclass_fields__)


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
    """Train base weights by a recipe, into the folder `run`. The exit code: 0.

    weights: to start from, a name or a file, instead of random ones; their digest goes into the header of what comes of them.
    commit: of the code, as a note in the weights' header. Raises PlanError (recipe), WeightsError (nothing to continue),
    TrainingError, DeviceError, OutputError, LockError, UsageError.
    """
    if recipe is not None and smoke:
        raise UsageError("--recipe and --smoke both name a recipe. Give one of them")
    if resume and overwrite:
        raise UsageError("--continue and --overwrite contradict each other. Give one of them")
    if resume and (recipe is not None or smoke or seed is not None or weights is not None):
        raise UsageError(
            "--continue goes on by the recipe, seed and weights that the run was started with. "
            "Leave --recipe, --smoke, --seed and --weights out"
        )
    start = load_base_weights(weights) if weights is not None else None
    chosen = choose_device(device)
    with atomic.lock_folder(run):
        wanted = _kept(run) if resume else read_recipe(recipe or (SMOKE if smoke else NANO))
        wanted = _apply_options(wanted, minutes, steps, seed)
        if not resume and not overwrite:
            _check_output(run)
        try:
            _train(run, wanted, chosen, resume, start, commit, _use_processes(wanted, chosen, threads))
        except torch.OutOfMemoryError:
            raise DeviceError("out of memory. Set slices_per_step lower in the recipe, or use --device cpu") from None
    return DONE


def _use_processes(recipe: Recipe, device: torch.device, threads: int | None) -> bool:
    """Whether there are threads enough for a process a part; sets those of this one."""
    if device.type != "cpu":
        return False
    threads = threads if threads is not None else torch.get_num_threads()
    several = 1 < recipe.parts <= threads
    torch.set_num_threads(1 if several else threads)
    return several


def _kept(run: Path) -> Recipe:
    if not (run / RECIPE).is_file():
        raise UsageError(f"nothing to continue in {run}. Run slmsam2 pretrain without --continue")
    return read_recipe(run / RECIPE)


def _apply_options(recipe: Recipe, minutes: float | None, steps: int | None, seed: int | None) -> Recipe:
    """The recipe with what the command line says. --steps alone lifts the recipe's limit in minutes, so that a run can be repeated."""
    changes = {"steps": steps, "minutes": minutes, "seed": seed}
    kept = recipe.model_dump() | ({"minutes": None} if steps is not None and minutes is None else {})
    return Recipe.model_validate(kept | {name: value for name, value in changes.items() if value is not None})


def _check_output(run: Path) -> None:
    if (run / STATE).exists() or backup_path(run / STATE).exists():
        raise UsageError(f"{run}: holds an unfinished run. Resume with slmsam2 pretrain --continue, or start again with --overwrite")
    if (run / WEIGHTS).exists():
        raise UsageError(f"{run}: holds the weights of another run. Choose another folder with -o, or add --overwrite")


def _train(
    run: Path, recipe: Recipe, device: torch.device, resume: bool, start: Checkpoint | None, commit: str, use_processes: bool
) -> None:
    learner, state = new_learner(recipe, device, start), run / STATE
    if resume and (warning := load_state(state, learner, recipe.digest)):
        console.warn(warning)
    if not resume:
        for old in (state, backup_path(state)):
            old.unlink(missing_ok=True)
        (run / STARTED_FROM).unlink(missing_ok=True)
    if start is not None:
        atomic.write_json(run / STARTED_FROM, {"name": start.name, "digest": start.digest})
    atomic.write_json(run / RECIPE, recipe.model_dump(mode="json"))
    where = f"cpu ({recipe.parts} processes)" if use_processes else describe(device)
    parameters = sum(p.numel() for p in learner.model.parameters())
    console.say(f"training {recipe.network.size} ({parameters / 1e6:.2f} million parameters, {recipe.input_size} px) on {where}")
    log, checks = Log(run / "log.csv", learner.step, _LOG), Log(run / "checks.csv", learner.step, _CHECKS)
    with graceful_stop() as stopped:
        try:
            _follow(learner, recipe, run, commit, log, checks, train(learner, recipe, stopped, use_processes))
        except TrainingError:
            log.write()  # what led there
            raise
        log.write()
        finished = fraction_done(learner, recipe) >= 1
        if finished:
            _check(learner, recipe, checks)
        else:
            save_state(state, learner, recipe.digest)
        _save(run / WEIGHTS, learner, recipe, commit)
        if not finished:
            console.say(f"stopped at step {learner.step}; state and weights so far are saved. Resume with slmsam2 pretrain --continue")
    if finished:
        state.unlink(missing_ok=True)
        backup_path(state).unlink(missing_ok=True)


def _follow(learner: Pretrainer, recipe: Recipe, run: Path, commit: str, log: Log, checks: Log, steps: Iterator[Step]) -> None:
    """Train with a progress bar; save the state every few minutes, and the weights so far whenever they are checked."""
    state = run / STATE
    saved, checked, whole = time.monotonic(), learner.seconds, 1000
    with console.progress("training", whole) as advance:
        bar = 0
        for step in steps:
            log.add(_row(learner, recipe, step))
            now_at = int(step.done * whole)
            advance(
                now_at - bar, f"step {step.step}, {step.length} slices, loss {log.recent():.3f}, {step.clips / step.seconds:.1f} clips/s"
            )
            bar = now_at
            if learner.seconds - checked >= 60 * recipe.checks.every_minutes and step.done < 1:
                _check(learner, recipe, checks)
                _save(run / WEIGHTS, learner, recipe, commit)
                checked = learner.seconds
            if time.monotonic() - saved > SAVE_EVERY_S:
                save_state(state, learner, recipe.digest)
                log.write()
                saved = time.monotonic()


def _row(learner: Pretrainer, recipe: Recipe, step: Step) -> dict[str, float]:
    row = {"step": step.step, "seconds": round(learner.seconds, 2), "phase": recipe.phases.index(recipe.phase(step.done)) + 1}
    row |= {"length": step.length, "clips": step.clips, "learning_rate": step.learning_rate, "clips_per_s": step.clips / step.seconds}
    return row | step.losses


def _check(learner: Pretrainer, recipe: Recipe, checks: Log) -> None:
    """Measure the average on clips that nothing is learned from, and say so."""
    found = check(learner.average, held_out(recipe, learner.average.device))
    checks.add({"step": learner.step, "seconds": round(learner.seconds, 1)} | asdict(found))
    checks.write()
    console.say(
        f"step {learner.step}, {learner.seconds / 60:.1f} min: Dice {found.dice:.3f} "
        f"(first mask copied {found.copy:.3f}, memory emptied {found.carried:.3f}, ends told {found.told:.3f}), "
        f"object score {found.object_score:.3f}, beyond ends {found.beyond:.3f}, missed {found.missed:.3f}"
    )


def _save(path: Path, learner: Pretrainer, recipe: Recipe, commit: str) -> None:
    """The averaged weights in half precision, with everything that is needed to make them again."""
    started = atomic.read_json(path.parent / STARTED_FROM, "ancestor") if (path.parent / STARTED_FROM).exists() else {}
    provenance = Provenance(
        pretrained=BASE,
        pretrained_digest=started.get("digest", "") if isinstance(started, dict) else "",
        licence=LICENCE,
        seed=recipe.seed,
        steps=learner.step,
        seconds=round(learner.seconds, 1),
        versions={name: version(name) for name in ("torch", "sam2", "numpy")},
    )
    notes = {"recipe": recipe.model_dump_json()} | ({"commit": commit} if commit else {})
    digest = save_weights(path, kept(learner.average, recipe.object_score_shift), Header(recipe.network, provenance, notes=notes))
    console.say(f"weights: {path} ({learner.step} steps, {learner.seconds:.0f} s, {path.stat().st_size / 1e6:.1f} MB, {digest[:12]})")
