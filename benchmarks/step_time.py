"""Time per fine-tuning step on this machine's CPU: one thread, several threads, and a background thread with half of these.

    python benchmarks/step_time.py [DATASET] [--threads 2] [--blocks 6]

DATASET: a data set folder; without one, three synthetic phantoms. The three settings alternate in blocks of six steps within one process,
each with its own learner, and train on the same data. Printed: median seconds per step, the median ratio to the same block on one thread,
and a digest of the weights. With two threads, the first and the last setting give the same bits.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from slmsam2_cli import console
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.dataset.cache import PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.model.checkpoint import load_base_weights
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.training import trainer
from slmsam2_cli.training.trainer import init_learner, training_data_of
from slmsam2_cli.workspace import Workspace

STEPS = 6  # in a block
CPU = torch.device("cpu")
BACKGROUND_THREAD = trainer.background_thread


@contextmanager
def no_thread(device: torch.device, useful: bool = True) -> Iterator[None]:
    """Run without a second thread."""
    yield None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6, help="two or more; the first is a warm-up")
    options = parser.parse_args()
    console.settings.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        root, space = options.dataset or Path(folder) / "data", Workspace(Path(folder) / "work")
        if options.dataset is None:
            write_phantom_dataset(root, cases=3, test_cases=0, seed=0)
        plan(root, space, report=False)
        decided = read_plan(space.plan)
        cases = prepare_all(read_dataset(root), PreprocessSettings(decided.geometry, decided.intensity), space.prepared).cases[:5]
        training = decided.training.model_copy(update={"steps": STEPS * options.blocks})
        decided = decided.model_copy(update={"training": training})
        base = load_base_weights("auto")
        settings = {"one thread": (1, no_thread), f"{options.threads} threads": (options.threads, no_thread)}
        settings["background thread"] = (options.threads, BACKGROUND_THREAD)
        learners = {setting: init_learner(decided, base, training_data_of(cases, decided), CPU) for setting in settings}
        training_data, times, dropout = training_data_of(cases, decided), {setting: list[float]() for setting in settings}, {}
        for _ in range(options.blocks):
            for setting, (threads, background_thread) in settings.items():
                torch.set_num_threads(threads)
                trainer.background_thread = background_thread
                torch.set_rng_state(dropout[setting]) if setting in dropout else torch.manual_seed(0)
                started = time.perf_counter()
                for _step in zip(range(STEPS), trainer.train(learners[setting], training_data, training, lambda: False), strict=False):
                    pass
                times[setting].append((time.perf_counter() - started) / STEPS)
                dropout[setting] = torch.get_rng_state()
    print("| | seconds per step | ratio to one thread | weights |\n|---|---|---|---|")
    for setting, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken[1:], times["one thread"][1:], strict=True))
        print(f"| {setting} | {statistics.median(taken[1:]):.2f} | {ratio:.2f} | {digest(learners[setting])} |")


def digest(learner: trainer.Learner) -> str:
    tensors = learner.ema.state_dict()
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()[:12]


if __name__ == "__main__":
    main()
