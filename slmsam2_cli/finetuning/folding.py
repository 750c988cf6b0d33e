"""The folds of a run, one after the other; killed at any moment, they go on where they were.

FOLDER/validation.json            the Dice of every fold at every look, and which folds are done
FOLDER/fold.safetensors           the state of the fold that is under way
FOLDER/left_out_CASE.png          masks of the volume that was left out, over its slices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.prepared import PreparedCase
from slmsam2_cli.errors import WeightsError
from slmsam2_cli.finetuning import validating
from slmsam2_cli.finetuning.learner import Progress, share_done
from slmsam2_cli.finetuning.loop import Learner
from slmsam2_cli.finetuning.overlays import draw_overlays
from slmsam2_cli.finetuning.resume import load_state, previous_of, save_state
from slmsam2_cli.finetuning.runs import Run, learned_by
from slmsam2_cli.finetuning.tuning import follow, fresh_learner, material_of
from slmsam2_cli.finetuning.validating import LOOKS, Fold, Look, concluded, fold_training, folds_of, given_up, judged
from slmsam2_cli.inference.ready import known_recogniser
from slmsam2_cli.model.recogniser import Recogniser
from slmsam2_cli.model.validation import Validation
from slmsam2_cli.planning.plan import Plan, TrainingPlan, digest_of

FILE, STATE = "validation.json", "fold.safetensors"


@dataclass
class Record:
    """validation.json: fold -> look -> Dice with and without the recogniser, and the folds that are done."""

    path: Path
    run: str
    looks: dict[str, dict[int, Look]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def write(self) -> None:
        store.write_json(self.path, {"format_version": 1, "run": self.run, "looks": self.looks, "done": self.done})


def read_record(path: Path, run: str) -> Record:
    """What there is of this very run; an empty one otherwise."""
    try:
        value: Any = store.read_json(path, "the validation") if path.exists() else {}
        if value.get("run") == run:
            looks = {name: {int(at): tuple(map(float, look)) for at, look in found.items()} for name, found in value["looks"].items()}
            return Record(path, run, looks, [name for name in value["done"] if name in looks])
    except (store.JsonError, AttributeError, KeyError, TypeError, ValueError):
        console.warn(f"{path.name} is damaged: the folds are run again")
    return Record(path, run)


def fold_state(folder: Path) -> Path:
    """Where the state of a fold that is under way is kept."""
    return folder / STATE


def forget_folds(folder: Path) -> None:
    """Nothing of the folds of an earlier run is gone on with."""
    state = fold_state(folder)
    for old in (folder / FILE, state, previous_of(state), *folder.glob("left_out_*.png")):
        old.unlink(missing_ok=True)


def planned_folds(run: Run, used: Sequence[PreparedCase]) -> tuple[tuple[Fold, ...], TrainingPlan | None]:
    """The folds, and the settings of each; none from random weights, which nothing could be kept of, nor where the plan wants none."""
    training = fold_training(run.plan.training, len(used))
    if run.base is None or run.plan.training.validation == "none" or training is None:
        return (), None
    return folds_of(used, run.plan, learned_by(run.base)), training


def base_recogniser(run: Run) -> Recogniser | None:
    """The base's own, where it knows the same labels."""
    return known_recogniser(run.base, run.plan) if run.base is not None else None


def validate(
    run: Run, used: Sequence[PreparedCase], device: torch.device, folder: Path, every_s: float, stopped: Callable[[], bool], asked: bool
) -> Validation | None:
    """Run what is left of the folds; None where there are none, nothing could be judged, or it was stopped before the end.

    asked: whether a person named the steps.
    """
    folds, training = planned_folds(run, used)
    if training is not None and not folds and folds_of(used, run.plan):
        console.say("the base has learned from these very volumes, so whether tuning makes it better cannot be told from them")
    record = read_record(folder / FILE, run.digest)
    for number, fold in enumerate(folds, start=1):
        if fold.name not in record.done and training is not None:
            with torch.random.fork_rng():  # so that the run itself goes as it would without
                _fold(run, fold, training, device, record, every_s, stopped, f"validating {number}/{len(folds)}")
        if stopped():
            return None
    state = fold_state(folder)
    for old in (state, previous_of(state)):
        old.unlink(missing_ok=True)
    return concluded({name: record.looks[name] for name in record.done if record.looks[name]}, run.plan.training, asked)


def _fold(
    run: Run,
    fold: Fold,
    training: TrainingPlan,
    device: torch.device,
    record: Record,
    every_s: float,
    stopped: Callable[[], bool],
    title: str,
) -> None:
    plan = run.plan.model_copy(update={"training": training})
    material = material_of(fold.cases, plan)
    learner = fresh_learner(plan, run.base, material, device)
    state, settings = record.path.with_name(STATE), digest_of({"run": run.digest, "fold": fold.name})
    looks, ways = record.looks.setdefault(fold.name, {}), (True, False) if training.recogniser else (False,)
    if not (0 in looks and _resumed(learner, state, settings)):
        looks.clear()
        looks[0] = (_base_score(run, learner, fold, plan),) * len(ways)
        record.write()
        save_state(state, learner, settings)
    looked = [share_done(learner, training)]

    def look(progress: Progress) -> str:
        for number, share in enumerate(LOOKS, start=1):
            if looked[0] < share <= progress.done:
                looks[number] = tuple(judged(learner.average, fold, plan, heeded=way).score for way in ways)
                record.write()
        looked[0] = progress.done
        return f"without {fold.name}: Dice {looks[0][0]:.3f}" + "".join(f", {max(looks[at]):.3f}" for at in sorted(looks) if at)

    if looked[0] < 1 and not given_up(looks) and not stopped():
        follow(
            learner,
            material,
            training,
            lambda: stopped() or given_up(looks),
            title=title,
            state=state,
            settings=settings,
            every_s=every_s,
            told=look,
        )
    if stopped():
        save_state(state, learner, settings)
        return
    if learner.step < validating.LEAST_STEPS and not given_up(looks):  # the minutes were over
        console.say(f"without {fold.name}: {learner.step} steps, too few to tell anything")
        looks.clear()
    else:
        _draw(learner, fold, plan, record)
    record.done.append(fold.name)
    record.write()
    for old in (state, previous_of(state)):
        old.unlink(missing_ok=True)


def _base_score(run: Run, learner: Learner, fold: Fold, plan: Plan) -> float:
    """Of the base as predict would use it, before anything is learned."""
    average, new = learner.average, learner.average.recogniser
    known = base_recogniser(run)
    average.recogniser = known.to(average.device) if known is not None else None
    score = judged(average, fold, plan, heeded=known is not None).score
    average.recogniser = new
    return score


def _resumed(learner: Learner, state: Path, settings: str) -> bool:
    """Whether there is a state of this very fold to go on from."""
    try:
        load_state(state, learner, settings)
    except WeightsError:
        return False
    return True


def _draw(learner: Learner, fold: Fold, plan: Plan, record: Record) -> None:
    """A picture of what was left out, for people who would rather look; nothing about it may make a run fail but a volume cut short."""
    try:
        looks = record.looks[fold.name]
        heeded = len(looks[max(looks)]) > 1 and looks[max(looks)][0] >= looks[max(looks)][1]
        last = judged(learner.average, fold, plan, heeded)
        title = f"{fold.name}, left out: Dice {looks[0][0]:.3f} before, {last.score:.3f} after"
        draw_overlays(record.path.with_name(f"left_out_{fold.held.id}.png"), fold.held, last.labels, title)
    except store.ArrayError:
        raise
    except Exception as error:  # noqa: BLE001 - nothing about a picture may make a run fail
        console.warn(f"the picture of {fold.name} could not be drawn: {error or type(error).__name__}")
        console.trace(error)
