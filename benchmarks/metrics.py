"""Speed and memory of the metrics against other tools: the same two masks, one process, alternating; medians and their ratios.

    pip install -e '.[bench]'
    python benchmarks/metrics.py [--repeats 9] [--slow] [--threads 1]

Every tool gets whole masks in its own format (bool arrays, or tensors made before) and has to find the organ itself. "All" means
Dice, HD95, ASSD and NSD at 2 mm. If a tool defines HD95 as ours and returns another value, the run stops. --slow adds tools
that take many seconds on a large volume. Tools that are not installed are listed and skipped.
Floor: reading every byte of both masks once, which no tool can avoid (a bitwise or over both).
Memory: peak allocation beyond the two masks, by tracemalloc, which includes every NumPy array.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from organs import KIDNEY, LIVER, SMALL, Organ, pair

from slmsam2_cli.evaluation.metrics import Pair, measure
from slmsam2_cli.evaluation.surface import border

OURS = "slmsam2, all"
PEERS = {  # distribution -> module
    "exacta": "exacta",
    "MONAI": "monai",
    "surface-distance-based-measures": "surface_distance",
    "MedPy": "medpy",
    "panoptica": "panoptica",
}
Run = Callable[[], float]  # -> HD95
Contest = dict[str, tuple[Run, bool]]  # tool -> (its function, whether its HD95 is defined as ours)


def contest(organ: Organ, reference: np.ndarray, prediction: np.ndarray, slow: bool) -> Contest:
    """Return the function of each installed tool for the two masks."""
    masks = reference, prediction, organ.spacing_mm
    runs: Contest = {OURS: (partial(_ours, *masks), True)}
    if _installed("exacta"):
        runs |= _exacta(*masks)
    if _installed("monai"):
        runs |= _monai(*masks)
    if _installed("surface_distance"):
        runs["surface-distance, all"] = partial(_surface_distance, *masks), False
    if slow and _installed("medpy"):
        runs["MedPy, HD95 alone"] = partial(_medpy, *masks), False
    if slow and _installed("panoptica"):
        runs["panoptica, HD95 alone"] = partial(_panoptica, *masks), False
    return runs


def _ours(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    found = measure(Pair.of(reference, prediction, spacing)).all
    assert None not in (found["Dice"], found["assd_mm"], found["nsd@2"])
    return float(found["HD95"] or 0)


def _exacta(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> Contest:
    import exacta.functional as tool

    masks = prediction[np.newaxis].view(np.uint8), reference[np.newaxis].view(np.uint8)
    labels = {"num_classes": 2, "include_background": False}

    def hd95() -> float:
        return float(tool.hd95(*masks, spacing=spacing, **labels)[0, 0])

    def everything() -> float:
        wanted = {"dice": {}, "hd95": {}, "assd": {}, "nsd": {"tolerance": 2.0}}
        return float(tool.evaluate(*masks, metrics=wanted, spacing=spacing, **labels)["hd95"][0, 0])

    return {"exacta (C++), HD95 alone": (hd95, True), "exacta (C++), all": (everything, True)}


def _monai(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> Contest:
    import torch
    from monai import metrics as tool

    masks = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]

    def hd95() -> float:
        return float(tool.compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing))

    def everything() -> float:
        tool.compute_dice(*masks)
        tool.compute_average_surface_distance(*masks, include_background=True, symmetric=True, spacing=spacing)
        tool.compute_surface_dice(*masks, class_thresholds=[2.0], include_background=True, spacing=spacing)
        return hd95()

    return {"MONAI, HD95 alone": (hd95, True), "MONAI, all": (everything, True)}


def _surface_distance(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    import surface_distance as tool

    distances = tool.compute_surface_distances(reference, prediction, spacing)
    tool.compute_dice_coefficient(reference, prediction)
    tool.compute_average_surface_distance(distances)
    tool.compute_surface_dice_at_tolerance(distances, 2.0)
    return float(tool.compute_robust_hausdorff(distances, 95))


def _medpy(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    from medpy.metric import binary as tool

    return float(tool.hd95(prediction, reference, voxelspacing=spacing))


def _panoptica(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    from panoptica.metrics.hausdorff_distance import _compute_instance_hausdorff_distance95 as tool

    return float(tool(reference, prediction, voxelspacing=spacing))


def seconds(runs: Contest, floor: Run, repeats: int) -> dict[str, float]:
    """Return median seconds after a warm-up round; tools alternate, and slow ones run fewer times."""
    times: dict[str, list[float]] = {name: [] for name in ("floor", *runs)}
    first = 0.0
    for repeat in range(repeats + 1):
        for name, (run, same) in (("floor", (floor, False)), *runs.items()):
            if repeat > 2 and statistics.median(times[name]) > 8:
                continue
            started = time.perf_counter()
            hd95 = run()
            if repeat:
                times[name].append(time.perf_counter() - started)
            first = hd95 if name == OURS else first
            if same and abs(hd95 - first) > 1e-4:
                raise SystemExit(f"HD95 differs: {name} {hd95} mm, slmsam2 {first} mm")
    return {name: statistics.median(found) for name, found in times.items()}


def peak(run: Run) -> int:
    """Return the peak of allocated bytes, beyond those before the call."""
    run()
    tracemalloc.start()
    run()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def rows(organ: Organ, options: argparse.Namespace) -> Iterator[str]:
    """Yield a description of the organ and the Markdown table of its comparison."""
    reference, prediction = pair(organ)
    runs = contest(organ, reference, prediction, options.slow)
    found = measure(Pair.of(reference, prediction, organ.spacing_mm))
    cut = Pair.of(reference, prediction, organ.spacing_mm).reference.size
    memory = peak(runs[OURS][0])
    borders = int(border(reference).sum() + border(prediction).sum())
    yield f"\n{organ.name}: {found.all['ref_ml']:.3g} ml, both borders {borders} voxels, " + ", ".join(
        f"{name} {found.all[name]:.3g}" for name in ("Dice", "HD95", "assd_mm", "hd_mm", "nsd@2")
    )
    yield (
        f"memory beyond the masks {memory / 1e6:.1f} MB; the two masks are {2 * reference.size / 1e6:.1f} MB, "
        f"a float32 crop {4 * cut / 1e6:.1f} MB\n"
    )
    yield "| | ms | times slmsam2 |\n|---|---|---|"
    taken = seconds(runs, lambda: float(_every_byte(reference) + _every_byte(prediction)), options.repeats)
    for name, value in sorted(taken.items(), key=lambda item: item[1]):
        yield f"| {name} | {1000 * value:.3g} | {value / taken[OURS]:.2f} |"


def _every_byte(mask: np.ndarray) -> bool:
    return bool(np.bitwise_or.reduce(mask.view(np.uint8), axis=None))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _about(threads: int) -> str:
    versions = [f"{d} {importlib.metadata.version(d)}" for d, module in PEERS.items() if _installed(module)]
    missing = [d for d, module in PEERS.items() if not _installed(module)]
    known = [f"Python {platform.python_version()}", f"NumPy {np.__version__}", f"SciPy {importlib.metadata.version('scipy')}", *versions]
    return f"{', '.join(known)}; {threads} thread(s)" + (f"; not installed: {', '.join(missing)}" if missing else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="Threads of other tools; ours uses one.")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # read by the tools when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(options.threads)})
    print(_about(options.threads))
    for organ in (LIVER, KIDNEY, SMALL):
        for row in rows(organ, options):
            print(row, flush=True)


if __name__ == "__main__":
    main()
