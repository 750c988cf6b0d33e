"""Accuracy of fine-tuning: this package against SAM 2 and SLM-SAM 2 as published, with the same weights, volumes and prompts.

    python benchmarks/accuracy.py ../shared/data RESULTS.jsonl [--sets Task04_Hippocampus ...] [--arms ours ...] [-n 1 5] [--seeds 0 1]
    python benchmarks/accuracy.py --table RESULTS.jsonl [--unchosen]
    python benchmarks/accuracy.py --list

Every run (set, n, seed, arm) trains on the cases that `slmsam2 finetune -n N --seed S` selects, and segments all others from one prompt
per case and label, its middle slice. One line per run is added to RESULTS.jsonl. Runs that it already holds are skipped, so a stopped
command resumes where it was. All arms start from the bundled nano, with the plan of `slmsam2 plan` (ROI crops twice as wide as the
annotation). SAM 2 is that network without short memory, whose memory holds both sides of the annotated slice, as its predictor does (not
fine-tuned: untuned-fifo). SLM-SAM 2 as published starts from it; its short memory is a copy of the long one and is added to it. Phantom_MR
and Phantom_CT are generated again from a fixed seed.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import published
import torch
from pairing import bounds_of, cases_of, gained, patient_of, values
from zero_shot import CHOSEN_ON

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import MIN_TOGETHER, predict
from slmsam2_cli.dataset.cache import PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.evaluation.metrics import Pair, measure
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import read_labels
from slmsam2_cli.model.checkpoint import (
    Checkpoint,
    Header,
    Provenance,
    load_base_weights,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.measure import measure as measure_dataset
from slmsam2_cli.planning.plan import Plan, write_plan
from slmsam2_cli.planning.rules import decide, training_for
from slmsam2_cli.training import clips, trainer
from slmsam2_cli.training.losses import slice_loss
from slmsam2_cli.workspace import Workspace

SETS = ("Task04_Hippocampus", "Sarcoma_MR_T1", "Sarcoma_CT", "Phantom_MR", "Phantom_CT")
PHANTOM_CASES = 13
SHORT = ("short_memory_attention.", "stream_fuser.")
PLANNED, LONG, SAM2, SLM, FIFO, OURS = "untuned", "untuned-fifo", "sam2-published", "slm-published", "fifo-ours", "ours"
TOGETHER, UNTUNED_TOGETHER = "together", "untuned-together"
UNTUNED = (PLANNED, LONG, UNTUNED_TOGETHER)
COMPARED, PLAIN_ARM = (SAM2, SLM, FIFO, OURS, TOGETHER), "plain"
KEYS = ("Dice", "HD95_penalised", "assd_mm_penalised", "over_slices", "under_slices")
COLUMNS = (
    "arm",
    "steps",
    "seconds",
    "Dice",
    "without the annotated slice",
    "HD95 mm",
    "ASSD mm",
    "false slices",
    "missed",
    "error removed",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train a model.

    network, training: changes of the plan, as a user would edit them, except steps, a factor on the plan's; long: start without the
    short memory; published: use the published recipe; patches: further changes of the code; together: the cases that are segmented also
    learn from each other's prompts.
    """

    title: str
    network: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    long: bool = False
    published: bool = False
    patches: tuple[Callable[[], Any], ...] = ()
    together: bool = False


def true_object_score_in_memory() -> Any:
    """Write memory in training with the true object score instead of the predicted one."""
    remember, truth = SlmSam2.remember, dict[str, torch.Tensor]()

    def loss(output: Any, target: torch.Tensor, *rest: Any) -> Any:
        truth["object_score"] = 20 * (target.flatten(1).amax(dim=1, keepdim=True) > 0).float() - 10
        return slice_loss(output, target, *rest)

    def remember_truth(self: SlmSam2, features: Any, output: Any, masks: Any = None) -> Any:
        if self.training and masks is None:
            output = replace(output, object_score=truth["object_score"].to(output.object_score))
        return remember(self, features, output, masks)

    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(trainer, "slice_loss", loss))
    patches.enter_context(mock.patch.object(SlmSam2, "remember", remember_truth))
    return patches


def no_previous_mask() -> Any:
    """Hide the previous mask from decoder and refiner, but not from the teacher, whose object score is the target."""
    original, make = SlmSam2.decode_after, trainer._teacher

    def decode_after(self: SlmSam2, conditioned: Any, features: Any, bank: Any, passed: Any) -> Any:
        return self.decode(conditioned, features.fine, None)

    def teacher(model: SlmSam2) -> SlmSam2:
        made = make(model)
        made.decode_after = MethodType(original, made)  # type: ignore[method-assign]
        return made

    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(SlmSam2, "decode_after", decode_after))
    patches.enter_context(mock.patch.object(trainer, "_teacher", teacher))
    return patches


PLAIN = {"label_unet": False, "validation": "none"}  # so that arms differ in one thing only
ARMS = {
    PLANNED: Arm("nano, pretrained only"),
    LONG: Arm("SAM 2's memory, pretrained only", {"policy": "fifo", "shared_memory": True}, long=True, published=True),
    SAM2: Arm("SAM 2, published recipe", {"policy": "fifo", "shared_memory": True}, long=True, published=True),
    SLM: Arm("SLM-SAM 2, as published", {"fuser": "sum", "shared_memory": True}, long=True, published=True),
    FIFO: Arm("SAM 2's memory, our recipe", {"policy": "fifo"}, long=True),
    OURS: Arm("ours"),
    TOGETHER: Arm("ours, together", together=True),
    UNTUNED_TOGETHER: Arm("nano, pretrained only, together", together=True),
    "plain": Arm("plain: ours without label U-Net and cross-validation", training=PLAIN),
    "label-unet": Arm("plain, with label U-Net", training={"validation": "none"}),
    "object-score-ground-truth": Arm("plain, object score learns ground truth", training=PLAIN | {"object_score_target": "ground_truth"}),
    "published-clips": Arm(
        "plain, published clips",
        training=PLAIN,
        patches=(
            lambda: mock.patch.object(clips.ClipSampler, "strides", published.PublishedSampler.strides),
            lambda: mock.patch.object(clips.ClipSampler, "_start", published.PublishedSampler._start),
            lambda: mock.patch.object(clips.ClipSampler, "_longest", published.PublishedSampler._longest),
            lambda: mock.patch.object(clips.ClipSampler, "_runs", upwards(clips.ClipSampler._runs)),
        ),
    ),
    "no-strides": Arm(
        "plain, no slice skipped", training=PLAIN, patches=(lambda: mock.patch.object(clips.ClipSampler, "strides", {1: 1.0}),)
    ),
    "sum": Arm("plain, summed streams", {"fuser": "sum"}, PLAIN, long=True),
    "fifo": Arm("plain, SAM 2's memory", {"policy": "fifo"}, PLAIN, long=True),
    "selfsort": Arm("plain, self-sorting bank", {"policy": "selfsort"}, PLAIN, long=True),
    "no-carry": Arm("plain, previous mask not carried", training=PLAIN, patches=(no_previous_mask,)),
    "true-object-score": Arm("plain, true object score in memory", training=PLAIN, patches=(true_object_score_in_memory,)),
    "frozen-encoder": Arm("plain, encoder frozen", training=PLAIN | {"strategy": "frozen-encoder"}),
    "decoder+memory": Arm("plain, decoder and memory", training=PLAIN | {"strategy": "decoder+memory"}),
    "adapters": Arm("plain, adapters", training=PLAIN | {"strategy": "adapters"}),
    "half-steps": Arm("plain, half the steps", training=PLAIN | {"steps": 0.5}),
    "twice-steps": Arm("plain, twice the steps", training=PLAIN | {"steps": 2.0}),
}


def upwards(runs: Callable[..., list[tuple[int, bool]]]) -> Callable[..., list[tuple[int, bool]]]:
    return lambda self, *window: [(label, reverse) for label, reverse in runs(self, *window) if not reverse]


def base_of(arm: Arm, folder: Path) -> tuple[str, Checkpoint]:
    """Return the value of --weights, and the weights that it names."""
    base = load_base_weights("auto")
    assert base is not None and base.network is not None and base.provenance is not None
    if not arm.long:
        return "auto", base
    state = {name: tensor for name, tensor in base.state.items() if not name.startswith(SHORT)}
    file = folder / "long-memory.safetensors"
    network = base.network.model_copy(
        update={"policy": "fifo", "shared_memory": arm.network.get("shared_memory", False)}
    )  # as SAM 2's predictor, also without fine-tuning
    save_weights(file, state, Header(network, base.provenance))
    found = load_base_weights(str(file))
    assert found is not None
    return str(file), found


def plan_of(root: Path, arm: Arm, base: Checkpoint) -> Plan:
    """Return the plan of a data set with the changes of an arm."""
    fingerprint, _ = measure_dataset(read_dataset(root))
    plan = decide(fingerprint, "nano")
    assert base.network is not None
    plan = plan.model_copy(
        update={
            "network": base.network.model_copy(update={"policy": "shortlong", **arm.network}),
            "training": plan.training.model_copy(update={k: v for k, v in arm.training.items() if k != "steps"}),
        }
    )
    if arm.published:  # as SAM 2's predictor
        plan = plan.model_copy(update={"inference": plan.inference.model_copy(update={"max_empty_slices": None})})
    return plan


def run(root: Path, arm: Arm, count: int, seed: int) -> Row:
    """Train one model, predict, and return steps, seconds and scores."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as patched:
        for patch in arm.patches:
            patched.enter_context(patch())
        folder = Path(name)
        weights, base = base_of(arm, folder)
        space, plan = Workspace(folder / "workspace"), plan_of(root, arm, base)
        write_plan(space.plan, plan)
        data, started, steps = read_dataset(root), time.perf_counter(), 0
        if count == 0:
            held_out = [case.id for case in data.training]
            predict(None, folder / "masks", dataset=root, workspace=space, weights=weights, report=False, together=arm.together)
        elif arm.published:
            cases = prepare_all(data, PreprocessSettings(plan.geometry, plan.intensity), space.prepared).cases
            selected = selected_cases(
                [case.id for case in cases if case.labels is not None and len(case.labels) > 1 and case.labels.any()], count, seed
            )
            held_out = [case.id for case in cases if case.id not in selected]
            model = SlmSam2(plan.network, plan.geometry.input_size)
            load_weights(model, base)
            steps = published.train(model, [case for case in cases if case.id in selected], plan, seed)
            save(space, model, plan, selected, held_out)
        else:
            limit = round(arm.training["steps"] * training_for(plan, count).steps) if "steps" in arm.training else None
            finetune(root, space, cases=count, weights=weights, seed=seed, steps=limit)
            provenance = read_checkpoint(space.model).provenance
            steps = provenance.steps if provenance is not None else 0
            split: Any = atomic.read_json(space.split, "split")
            held_out = split["held_out"]
        seconds = time.perf_counter() - started
        if count:
            together = arm.together and len(held_out) >= MIN_TOGETHER
            predict(None, folder / "masks", dataset=root, workspace=space, report=False, together=together)
        return {"steps": steps, "seconds": round(seconds, 1) if count else 0, "scores": list(scores(root, folder / "masks", held_out))}


def selected_cases(ids: Sequence[str], count: int, seed: int) -> set[str]:
    """Return the cases that `slmsam2 finetune` would select."""
    usable = sorted(ids)
    order = np.random.default_rng(seed).permutation(len(usable))
    return {usable[i] for i in order[:count]}


def save(space: Workspace, model: SlmSam2, plan: Plan, selected: set[str], held_out: list[str]) -> None:
    provenance = Provenance(pretrained="nano", training=tuple(sorted(selected)))
    save_checkpoint(space.model, model, plan, provenance)
    atomic.write_json(space.split, {"training": sorted(selected), "held_out": held_out, "skipped": [], "finished": True})


def scores(root: Path, masks: Path, held_out: Sequence[str]) -> Iterator[Row]:
    """Score every held-out case and label that it holds. `rest`: Dice without the annotated slice."""
    data: Any = read_dataset(root)
    manifest: Any = json.loads((masks / "manifest.json").read_text(encoding="utf-8"))["cases"]
    for case in (case for case in data.training if case.id in held_out):
        metadata = manifest[case.id]
        truth = read_labels(case.label, case=case.id, root=data.root)
        found = read_labels(masks / metadata["output"], case=case.id, root=masks).voxels
        for value in data.labels:
            if not (truth.voxels == value).any():
                continue
            pair = Pair.of(truth.voxels == value, found == value, truth.grid.spacing_mm, metadata["array_axis"])
            score = measure(pair, metadata["annotated_slices"].get(str(value), ()))
            assert score.unprompted is not None
            yield {"case": case.id, "label": value, "rest": score.unprompted["Dice"], **{key: rounded(score.all[key]) for key in KEYS}}


def rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def dataset_of(data: Path, name: str, folder: Path) -> Path:
    if not name.startswith("Phantom_"):
        return data / name
    write_phantom_dataset(folder / name, cases=PHANTOM_CASES, test_cases=0, seed=7, modality=name.removeprefix("Phantom_"))
    return folder / name


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def unchosen(row: Row) -> Row:
    """Return a row without the cases on which choices were made."""
    return row | {"scores": [score for score in row["scores"] if score["case"] not in CHOSEN_ON.get(row["set"], ())]}


def table(rows: Sequence[Row]) -> str:
    """Return one block per set and n: means over cases, then over labels; differences are paired by case.

    First the main arms, against SAM 2; then the arms that differ from the plain one in one thing, against that.
    """
    lines = []
    for compared, against in ((COMPARED, SAM2), ([arm for arm in ARMS if arm not in (*UNTUNED, *COMPARED)], PLAIN_ARM)):
        for name, count in dict.fromkeys((row["set"], row["n"]) for row in rows if row["n"]):
            found = {arm: [row for row in rows if (row["set"], row["n"], row["arm"]) == (name, count, arm)] for arm in compared}
            lines += block(f"{name}, n = {count}", {arm: own for arm, own in found.items() if own}, rows, against)
    return "\n".join([*lines, "", *overall(rows)])


def block(title: str, found: dict[str, list[Row]], rows: Sequence[Row], against: str) -> list[str]:
    """Return one table over the seeds that all of its arms have. The error that is removed is a share of 1 - Dice of `against`."""
    if not found:
        return []
    seeds = set.intersection(*({row["seed"] for row in own} for own in found.values()))
    found = {arm: [row for row in own if row["seed"] in seeds] for arm, own in found.items()}
    if against == SAM2:
        name = next(iter(found.values()))[0]["set"] if seeds else ""
        found = {arm: [row for row in rows if (row["set"], row["arm"]) == (name, arm)] for arm in UNTUNED} | found
    shared = cases_of([own for own in found.values() if own]) if seeds else []
    if not shared:
        return []
    columns = [*COLUMNS, f"Dice - {ARMS[against].title} (95 %)"]
    head = f"{title}; {len({case for case, _ in shared})} cases, seeds {', '.join(map(str, sorted(seeds)))}"
    lines = ["", head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    theirs = values(found[against], shared, "Dice") if found.get(against) else None
    for arm, own in found.items():
        if not own:
            continue
        means = [float(np.nanmean(np.nanmean(values(own, shared, key), axis=0))) for key in ("Dice", "rest", *KEYS[1:])]
        steps, seconds = np.mean([row["steps"] for row in own]), np.mean([row["seconds"] for row in own])
        gain = gained(values(own, shared, "Dice"), theirs) if theirs is not None and arm != against else ""
        shown = " | ".join(f"{mean:.{digits}f}" for mean, digits in zip(means, (3, 3, 1, 2, 2, 2)))
        their = float(np.nanmean(np.nanmean(theirs, axis=0))) if theirs is not None else 1.0
        removed = f"{(means[0] - their) / (1 - their):.1%}" if gain else ""
        lines.append(f"| {ARMS[arm].title} | {steps:.0f} | {seconds:.0f} | {shown} | {removed} | {gain} |")
    return lines


def overall(rows: Sequence[Row]) -> list[str]:
    """Return differences of the arms: means over the sets and seeds that both arms have.

    Intervals resample patients together with all of their scans, because the same sarcomas were scanned in CT and in MR.
    """
    lines = ["| n | arm | against | sets | Dice (95 %) | ratio of false slices |", "|---|---|---|---|---|---|"]
    for count in sorted({row["n"] for row in rows if row["n"]}):
        for arm, other in ((OURS, SAM2), (OURS, SLM), (OURS, FIFO), (SLM, SAM2), (FIFO, SAM2), (TOGETHER, SAM2), (TOGETHER, OURS)):
            gains: list[dict[str, float]] = []
            false: list[list[float]] = []
            for name in dict.fromkeys(row["set"] for row in rows):
                both = [
                    {row["seed"]: row for row in rows if (row["set"], row["n"], row["arm"]) == (name, count, each)} for each in (arm, other)
                ]
                if seeds := both[0].keys() & both[1].keys():
                    pair = [[own[seed] for seed in seeds] for own in both]
                    shared = cases_of(pair)
                    dices, slices = ([values(own, shared, key) for own in pair] for key in ("Dice", "over_slices"))
                    each = np.nanmean(dices[0] - dices[1], axis=1)
                    gains.append(dict(zip(sorted({patient_of(case) for case, _ in shared}), each, strict=True)))
                    false.append([float(np.nanmean(np.nanmean(one, axis=0))) for one in slices])
            if gains:
                times, low, high = np.sum(false, axis=0), *bounds_of(gains)
                ratio = f"{times[0] / times[1]:.2f}" if times[1] else "-"
                mean = np.mean([np.mean(list(own.values())) for own in gains])
                shown = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
                lines.append(f"| {count} | {ARMS[arm].title} | {ARMS[other].title} | {len(gains)} | {shown} | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--arms", nargs="+", default=[*UNTUNED, SAM2, SLM, FIFO, OURS], choices=list(ARMS))
    parser.add_argument("-n", "--cases", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", type=Path, help="print the tables of a file of results and exit")
    parser.add_argument("--unchosen", action="store_true", help="leave out of the table the cases on which choices were made")
    parser.add_argument("--list", action="store_true", help="list the arms and exit")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {arm.title}" for name, arm in ARMS.items()))
        return
    if options.table:
        rows = read(options.table)
        print(table([unchosen(row) for row in rows] if options.unchosen else rows))
        return
    if options.data is None or options.results is None:
        parser.error("DATA and RESULTS are required")
    wanted = [(s, n, seed, arm) for seed in options.seeds for s in options.sets for n in options.cases for arm in options.arms]
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: dataset_of(options.data, name, Path(folder)) for name in options.sets}
        for name, count, seed, arm in wanted:
            n, draw = (0, 0) if arm in UNTUNED else (count, seed)
            key = {"set": name, "n": n, "seed": draw, "arm": arm}
            if any(all(row[k] == v for k, v in key.items()) for row in read(options.results)):
                continue
            row = key | run(roots[name], ARMS[arm], n, draw)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{key}: {row['steps']} steps, {row['seconds']:.0f} s, Dice {np.mean([s['Dice'] for s in row['scores']]):.3f}", flush=True
            )
    print(table(read(options.results)))


if __name__ == "__main__":
    main()
