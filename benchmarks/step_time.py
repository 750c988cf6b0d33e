"""Time per fine-tuning step on this machine's CPU, by threads and layers, with and without other programs that use the cores.

    python benchmarks/step_time.py [DATASET] [--threads 2] [--blocks 6] [--busy 0]

DATASET: a data set folder; without one, three synthetic phantoms. The settings alternate in blocks of six steps within one process, each
with its own learner, and train on the same data. --busy: other programs that compute meanwhile. Printed: median seconds per step, of time
and of processor time, the median ratio to the same block of one thread, and a digest of the weights. A background thread does not change
them.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from busy import busy_programs

from slmsam2_cli import console
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.dataset.cache import PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.model.checkpoint import load_base_weights
from slmsam2_cli.planning.plan import Plan, TrainingPlan, read_plan
from slmsam2_cli.training import trainer
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import ProcessGroup
from slmsam2_cli.training.trainer import init_learner, training_data_of
from slmsam2_cli.workspace import Workspace

STEPS = 6  # in a block
CPU = torch.device("cpu")
REFERENCE = "one thread"


class Setting(NamedTuple):
    """threads: of torch; cores: with two, there is a background thread; optimised: whether layers are optimised for a CPU."""

    threads: int
    cores: int
    optimised: bool = True


def new(decided: Plan, data: TrainingData, optimised: bool) -> trainer.Learner:
    """Build a learner, with or without optimised layers."""
    usual = trainer.optimise_for_cpu
    trainer.optimise_for_cpu = usual if optimised else lambda model: None
    try:
        return init_learner(decided, load_base_weights("auto"), data, CPU)
    finally:
        trainer.optimise_for_cpu = usual


def block(learner: trainer.Learner, data: TrainingData, training: TrainingPlan, setting: Setting) -> tuple[float, float]:
    """Train for a block; returns seconds and processor seconds per step."""
    torch.set_num_threads(setting.threads)
    started, used = time.perf_counter(), time.process_time()
    group = ProcessGroup(cores=setting.cores)
    for _step in zip(range(STEPS), trainer.train(learner, data, training, lambda: False, group), strict=False):
        pass
    return (time.perf_counter() - started) / STEPS, (time.process_time() - used) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6, help="two or more; the first is a warm-up")
    parser.add_argument("--busy", type=int, default=0)
    options = parser.parse_args()
    console.settings.quiet = True
    settings = {"one thread, layers of SAM 2": Setting(1, 1, optimised=False), REFERENCE: Setting(1, 1)}
    settings |= {f"{options.threads} threads": Setting(options.threads, 1), "background thread": Setting(1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        root, space = options.dataset or Path(folder) / "data", Workspace(Path(folder) / "work")
        if options.dataset is None:
            write_phantom_dataset(root, cases=3, test_cases=0, seed=0)
        plan(root, space, report=False)
        decided = read_plan(space.plan)
        cases = prepare_all(read_dataset(root), PreprocessSettings(decided.geometry, decided.intensity), space.prepared).cases[:5]
        training = decided.training.model_copy(update={"steps": STEPS * options.blocks})
        decided = decided.model_copy(update={"training": training})
        data, dropout = training_data_of(cases, decided), {}
        learners = {name: new(decided, data, setting.optimised) for name, setting in settings.items()}
        times = {name: list[tuple[float, float]]() for name in settings}
        with busy_programs(options.busy):
            for _ in range(options.blocks):
                for name, setting in settings.items():
                    torch.set_rng_state(dropout[name]) if name in dropout else torch.manual_seed(0)
                    times[name].append(block(learners[name], data, training, setting))
                    dropout[name] = torch.get_rng_state()
    print("| | seconds | processor seconds | time, ratio to one thread | weights |\n|---|---|---|---|---|")
    for name, taken in times.items():
        seconds, used = (statistics.median(values) for values in zip(*taken[1:], strict=True))
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(taken[1:], times[REFERENCE][1:], strict=True))
        print(f"| {name} | {seconds:.2f} | {used:.2f} | {ratio:.2f} | {digest(learners[name])} |")


def digest(learner: trainer.Learner) -> str:
    tensors = learner.ema.state_dict()
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()[:12]


if __name__ == "__main__":
    main()
