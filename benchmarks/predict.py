"""Time of prediction on a CPU against stock SAM 2 (`SAM2VideoPredictor`: a folder of JPEGs, one session per object).

    python benchmarks/predict.py DATA OUT.json [--parts a b c d e f] [--rounds 3] [--slices 12] [--volume-slices 80] [--px 1024]
                                 [--device cpu] [--stock-slices N]

One process, one thread; both sides alternate, medians of wall and of CPU seconds. Both have the same random weights of `tiny`: no time
depends on their values, but the object must be present (in part c absent, so that a pass stops after a known number of slices).

a   one object, float32, the same outputs            d   3 objects (tiny) and 3 and 35 (nano as planned) against one object
b   the same in bfloat16, where the CPU has units    e   slmsam2 predict as planned against the stock pipeline, equal prompts
c   stopping, object on 30 % of the slices           f   16 volumes with 1, 2, ... workers, alone and beside two busy programs

Floors: FLOPs of our side at the speed of a matrix product of one core, and the bytes that its matrix products, convolutions and
attentions read and write, at memory speed; tensors below 1 MiB are taken to lie in a cache. Part f needs a quiet machine.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from busy import busy_programs
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from slmsam2_cli.dataset.phantom import nifti_bytes
from slmsam2_cli.inference.propagation import ABSENT, AnnotatedSlice, PropagationOptions, propagate
from slmsam2_cli.model.cpu_ops import keep_freed_memory, optimise_for_cpu
from slmsam2_cli.model.sam2_config import sam2_parts
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.planning.rules import MIN_EMPTY_SLICES

OCCUPANCY, VOLUMES, BUSY, BF16_UNITS = 0.3, 16, 2, 1.3  # BF16_UNITS: bfloat16 products at least so many times as fast as float32
PHANTOM, LABELS = (160, 192, 224), 35
CACHED_BYTES = 1 << 20
PRESENT = 5.0  # bias of the object score
Array = np.ndarray[Any, Any]
Seconds = tuple[float, float]  # wall, CPU
Row = dict[str, Any]
attention_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class WorkCounter(TorchDispatchMode):
    """Counts FLOPs, and bytes that the operations with FLOPs read and write, without tensors that a cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in flop_registry and func._overloadpacket is not attention_kernel:
            with self:  # inference mode does not split operations into those that are counted
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is attention_kernel:
            (batch, heads, queries, width), keys = args[0].shape, args[1].shape[2]
            self.flops += 4 * batch * heads * queries * keys * width
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if packet is attention_kernel or packet in flop_registry:
            tensors = [one for one in tree_flatten((args, result))[0] if isinstance(one, torch.Tensor)]
            self.bytes += sum(size for one in tensors if (size := one.nelement() * one.element_size()) >= CACHED_BYTES)
        return result


def best(action: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least CPU seconds of several runs, which other programs disturb least."""
    return min(timed(action)[0][1] for _ in range(repeats))


def machine() -> Row:
    """Measure this machine: GFLOP/s of one core's matrix product in float32 and bfloat16, GB/s of a copy; and name its CPU."""
    one, big, copy = torch.rand(1024, 1024), torch.rand(1 << 26), torch.rand(1 << 26)
    half, small = one.to(torch.bfloat16), 256  # a product without units for it is slow
    product = 2 * 1024**3 / best(lambda: one @ one) / 1e9
    half_product = 2 * small * 1024**2 / best(lambda: half[:small] @ half) / 1e9
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return {
        "cpu": platform.processor() or platform.machine(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "gflops": product,
        "bf16_gflops": half_product,
        "gbytes": 2 * big.nbytes / best(lambda: copy.copy_(big)) / 1e9,
        "bf16_units": half_product >= BF16_UNITS * product,
    }


def timed(action: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Run; return wall and CPU seconds of this process, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Seconds], dict[str, Any], list[Row]]:
    """Run the sides in turn. Return their medians, their last results, and every round."""
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    results = {}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            seconds, results[name] = timed(sides[name])
            taken[name].append(seconds)
            print(f"  round {number + 1}, {name}: {seconds[0]:.1f} s, CPU {seconds[1]:.1f} s", file=sys.stderr, flush=True)
    medians = {name: tuple(statistics.median(column) for column in zip(*one)) for name, one in taken.items()}
    return medians, results, [{"side": name, "seconds": one} for name, one in taken.items()]  # type: ignore[return-value]


def floor(action: Callable[[], Any], found: Row) -> tuple[Row, Any]:
    """Run once, to warm up too; return the work, and the least seconds that it takes on this machine."""
    with WorkCounter() as counter:
        result = action()
    compute, memory = counter.flops / found["gflops"] / 1e9, counter.bytes / found["gbytes"] / 1e9
    return {"GFLOP": counter.flops / 1e9, "GB": counter.bytes / 1e9, "floor": max(compute, memory)}, result


# Both sides on a folder of slices ------------------------------------------------------------------------------------------------------


class Networks:
    """Our network and the stock predictor with the same random weights. bias: of the object score."""

    def __init__(self, px: int, device: str, bias: float = PRESENT, shared_memory: bool = False) -> None:
        torch.manual_seed(0)
        self.ours = SlmSam2(NetworkPlan(size="tiny", policy="fifo", shared_memory=shared_memory), px).eval().to(device)
        head = self.ours.sam_mask_decoder.pred_obj_score_head.layers[-1]
        torch.nn.init.zeros_(head.weight)  # the object score is the bias
        torch.nn.init.constant_(head.bias, bias)
        self.stock = SAM2VideoPredictor(**sam2_parts("tiny", px)).eval().to(device)
        self.stock.load_state_dict(self.ours.state_dict())
        if device == "cpu":
            optimise_for_cpu(self.ours)


def stock_session(
    predictor: SAM2VideoPredictor, folder: Path, slice_: int, mask: torch.Tensor, limit: int | None = None
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Propagate one object in both directions. Return low-resolution logits (h, w) and the mask (H, W) of each slice.

    limit: slices in each direction at most.
    """
    state = predictor.init_state(str(folder))
    predictor.add_new_mask(state, slice_, 1, mask)
    masks = {}
    for reverse in (False, True):
        for t, _, logits in predictor.propagate_in_video(state, slice_, limit, reverse):
            masks[t] = logits[0, 0] > 0
    (stored,) = state["output_dict_per_obj"].values()
    outputs = stored["cond_frame_outputs"] | stored["non_cond_frame_outputs"]
    return {t: (outputs[t]["pred_masks"][0, 0].float().cpu(), mask) for t, mask in masks.items()}


def read_jpegs(folder: Path, px: int) -> torch.Tensor:
    """Read a folder of JPEGs as frames (T, 3, px, px) in [0, 1], as stock SAM 2 does."""
    images = [Image.open(path).convert("RGB").resize((px, px)) for path in sorted(folder.glob("*.jpg"))]
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255.0 for one in images])


def our_session(
    model: SlmSam2, folder: Path, objects: Mapping[int, tuple[int, torch.Tensor]], max_empty_slices: int | None = None
) -> dict[int, torch.Tensor]:
    """Propagate objects, label -> (annotated slice, mask (px, px)). Return label -> logits (T, h, w)."""
    frames = read_jpegs(folder, model.input_size)
    drawn = {label: [AnnotatedSlice(slice_, mask)] for label, (slice_, mask) in objects.items()}
    options = PropagationOptions(batch=1, max_empty_slices=max_empty_slices, low_resolution_prompts=True)
    with keep_freed_memory():
        return {label: one.logits for label, one in propagate(model, frames, drawn, options).items()}


def write_jpegs(stack: Array, folder: Path) -> None:
    """Write slices (T, H, W) as JPEGs, with intensities from the 0.5th to the 99.5th percentile."""
    folder.mkdir(parents=True, exist_ok=True)
    low, high = np.percentile(stack, (0.5, 99.5))
    grey = (255 * (stack - low) / max(high - low, 1e-6)).clip(0, 255).astype(np.uint8)
    for t, plane in enumerate(grey):
        Image.fromarray(plane).save(folder / f"{t:05d}.jpg", quality=95)


def clip(data: Path, folder: Path, slices: int, px: int) -> None:
    """Write slices of a sarcoma in MR as JPEGs of px pixels, the volume over and over when it is too short."""
    stack, _, _ = read_case(*cases_of(data / "Sarcoma_MR_T1")[0])
    chosen = torch.from_numpy(np.resize(stack, (slices, *stack.shape[1:])))[:, None]
    write_jpegs(F.interpolate(chosen, size=(px, px), mode="bilinear")[:, 0].numpy(), folder)


def rectangle(px: int, row: int, column: int) -> torch.Tensor:
    """Draw a rectangle in units of 1/64 of a slice (px, px)."""
    mask, unit = torch.zeros(px, px, dtype=torch.bool), px // 64
    mask[row * unit : (row + 20) * unit, column * unit : (column + 24) * unit] = True
    return mask


# Parts a to d --------------------------------------------------------------------------------------------------------------------------


def row(name: str, ours: Seconds, peer: Seconds, target: str, work: Row | None = None, **more: Any) -> Row:
    """Return a row of a table; a ratio above 1 is in our favour. CPU seconds of 0 were not measured."""
    ratios = {"ratio": peer[0] / ours[0]} | ({"CPU ratio": peer[1] / ours[1]} if ours[1] else {})
    return {"what": name, "ours": ours[0], "peer": peer[0], **ratios, "target": target, **(work or {}), **more}


def same_outputs(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part a: one object with SAM 2's shared memory, all slices."""
    nets, middle, mask = Networks(options.px, options.device, shared_memory=True), options.slices // 2, rectangle(options.px, 16, 20)
    sides = {
        "ours": lambda: our_session(nets.ours, folder, {1: (middle, mask)})[1],
        "stock": lambda: stock_session(nets.stock, folder, middle, mask),
    }
    work, _ = floor(sides["ours"], found)
    medians, results, rounds = alternate(sides, options.rounds)
    delta = max(float((results["ours"][t] - low.clamp(min=ABSENT)).abs().max()) for t, (low, _) in results["stock"].items() if t != middle)
    targets = "ratio >= 1.15, |Δlogit| <= 1e-4"
    return [row(f"{options.slices} slices", medians["ours"], medians["stock"], targets, work, delta_logit=delta, rounds=rounds)]


def half_precision(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part b: bfloat16 against stock in float32 and under autocast; difference of masks from ours in float32."""
    if options.device == "cpu" and not found["bf16_units"]:
        return [{"what": no_units(found), "target": "ratio >= 2.5 and >= 1.3, 1 - Dice <= 0.002"}]
    nets, middle, mask = Networks(options.px, options.device, shared_memory=True), options.slices // 2, rectangle(options.px, 16, 20)

    def ours(half: bool) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16) if half else nullcontext():
            return our_session(nets.ours, folder, {1: (middle, mask)})[1]

    def stock(half: bool) -> Any:
        with torch.autocast(options.device, torch.bfloat16) if half else nullcontext():
            return stock_session(nets.stock, folder, middle, mask)

    sides = {"ours": lambda: ours(True), "stock": lambda: stock(False), "stock, autocast": lambda: stock(True)}
    full, half = ours(False) > 0, ours(True) > 0
    dice = 2 * int((full & half).sum()) / max(1, int(full.sum()) + int(half.sum()))
    medians, _, rounds = alternate(sides, options.rounds)
    targets = {"stock": "ratio >= 2.5, 1 - Dice <= 0.002", "stock, autocast": "ratio >= 1.3"}
    return [
        row(f"bf16 : {peer}", medians["ours"], medians[peer], text, delta_dice=1 - dice, rounds=rounds) for peer, text in targets.items()
    ]


def no_units(found: Row) -> str:
    """Say that the CPU is not faster in bfloat16, with the measured speeds."""
    speeds = f"{found['bf16_gflops']:.0f} GFLOP/s, float32: {found['gflops']:.0f}"
    return f"not run: no bf16 units ({', '.join(found['instructions'])}; bfloat16: {speeds})"


def stopping(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part c: an object on 30 % of the slices; ours stops MIN_EMPTY_SLICES slices beyond its ends.

    Random weights do not find the ends of an object. So it is absent everywhere, and ours stops after as many slices as if it were not.
    """
    slices, mask = options.volume_slices, rectangle(options.px, 16, 20)
    middle, empty = slices // 2, round(OCCUPANCY * slices / 2) + MIN_EMPTY_SLICES
    nets = Networks(options.px, options.device, bias=-PRESENT)
    rows = []
    for half in (False, True):
        if half and options.device == "cpu" and not found["bf16_units"]:
            rows.append({"what": no_units(found), "target": "ratio >= 5"})
            continue

        def ours(half: bool = half) -> Any:
            with torch.autocast(options.device, torch.bfloat16) if half else nullcontext():
                return our_session(nets.ours, folder, {1: (middle, mask)}, empty)

        work, _ = floor(ours, found)
        sides = {"ours": ours, "stock": lambda: stock_session(nets.stock, folder, middle, mask)}
        medians, _, rounds = alternate(sides, options.rounds)
        name = f"{'bf16' if half else 'float32'}, {min(slices, 2 * empty + 1)} of {slices} slices"
        rows.append(row(name, medians["ours"], medians["stock"], f"ratio >= {5 if half else 2.5}", work, rounds=rounds))
    return rows


def several_objects(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part d: 3 objects on whole slices (tiny), and 3 and 35 on crops (nano as planned), as multiples of one object."""
    nets, middle = Networks(options.px, options.device), options.slices // 2
    drawn = {label: (middle, rectangle(options.px, 4 + 12 * label, 4 + 8 * label)) for label in range(3)}
    sides = {f"tiny, {n}": lambda n=n: our_session(nets.ours, folder, dict(list(drawn.items())[:n])) for n in (1, 3)}
    work, _ = floor(sides["tiny, 3"], found)
    medians, _, rounds = alternate(sides, options.rounds)
    rows = [multiple("tiny, 3", medians["tiny, 3"], medians["tiny, 1"], 1.8, work, rounds)]
    with tempfile.TemporaryDirectory() as scratch:
        counts = (1, 3, LABELS)
        for count in counts:
            write_phantom(Path(scratch), count)
        taken: dict[int, list[Row]] = {count: [] for count in counts}
        for _ in range(options.rounds):
            for count, runs in taken.items():
                runs.append(Command(Path(scratch) / f"{count}").run())
    seconds = {count: tuple(statistics.median(one[name] for one in runs) for name in ("case", "cpu")) for count, runs in taken.items()}
    return rows + [multiple(f"nano, {n}", seconds[n], seconds[1], most, {}, [taken]) for n, most in ((3, 1.8), (LABELS, 12))]


def multiple(name: str, several: Seconds, one: Seconds, most: float, work: Row, rounds: list[Row]) -> Row:
    """Return a row for several objects, with their time as a multiple of that of one."""
    target = f"times one object <= {most:g}"
    return row(f"{name} objects : 1", several, one, target, work, times=several[0] / one[0], rounds=rounds)


def write_phantom(root: Path, labels: int) -> None:
    """Write a volume as large as a head in MR, with 35 ellipsoids of one size, and annotations of the first so many."""
    rng = np.random.default_rng(0)
    image, prompts = rng.normal(100, 12, PHANTOM), np.zeros(PHANTOM, np.uint8)
    z, y, x = np.ogrid[tuple(map(slice, PHANTOM))]
    for label in range(1, LABELS + 1):
        place = divmod(label - 1, 7)
        centre = rng.integers(30, PHANTOM[0] - 30), 22 + 36 * place[0] + rng.integers(-4, 5), 18 + 31 * place[1] + rng.integers(-4, 5)
        inside = ((z - centre[0]) / 20) ** 2 + ((y - centre[1]) / 13) ** 2 + ((x - centre[2]) / 12) ** 2 < 1
        image[inside] += rng.uniform(60, 150)
        if label <= labels:
            prompts[centre[0]][inside[centre[0]]] = label
    for name, voxels in (("images", image.round().astype(np.float32)), ("prompts", prompts)):
        path = root / f"{labels}" / name / "phantom.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti_bytes(voxels, (1.0, 1.0, 1.0)))


# Parts e and f: the whole command ------------------------------------------------------------------------------------------------------


class Command:
    """`slmsam2 predict` on the images and prompts below a folder, in a process of its own."""

    def __init__(self, root: Path, *arguments: str, threads: int = 1) -> None:
        self.root, self.arguments, self.threads = root, arguments, threads

    def run(self) -> Row:
        """Return wall and CPU seconds of the command, the median seconds of a case, and when each mask was written, in seconds.

        Raises: CalledProcessError when a case fails.
        """
        where = ["-i", self.root / "images", "-p", self.root / "prompts", "-o", self.root / "masks", "--overwrite", "--no-report"]
        program = "from slmsam2_cli.cli.app import main; main()"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        }
        before, started = children_seconds(), time.perf_counter()
        command = [sys.executable, "-c", program, "predict", *map(str, where), *self.arguments]
        subprocess.run(command, check=True, cwd=self.root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall, cpu = time.perf_counter() - started, children_seconds() - before
        cases = json.loads((self.root / "masks" / "manifest.json").read_text(encoding="utf-8"))["cases"]
        written = sorted(path.stat().st_mtime for path in (self.root / "masks").glob("*.nii.gz"))
        return {"wall": wall, "cpu": cpu, "case": statistics.median(one["seconds"] for one in cases.values()), "written": written}


def children_seconds() -> float:
    """Return CPU seconds of finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cases_of(root: Path) -> list[tuple[Path, Path]]:
    """Return the (image, label) files of a data set."""
    return [(path, root / "labelsTr" / path.name) for path in sorted((root / "imagesTr").glob("*.nii.gz"))]


def read_case(image: Path, label: Path) -> tuple[Array, Array, int]:
    """Read axial slices (T, H, W), which is what is planned for these sets, their labels, and the array axis."""
    files = [nibabel.load(path) for path in (image, label)]
    voxels, labels = (np.asarray(one.dataobj) for one in files)
    axis = next(index for index, code in enumerate(nibabel.aff2axcodes(files[0].affine)) if code in "SI")
    return np.moveaxis(voxels.astype(np.float32), axis, 0), np.moveaxis(labels, axis, 0), axis


def write_inputs(cases: Sequence[tuple[Path, Path]], root: Path) -> list[int]:
    """Write images, and prompts of one annotated slice that holds all labels. Return the slices."""
    chosen = []
    for image, label in cases:
        _, labels, axis = read_case(image, label)
        values = [value for value in np.unique(labels) if value]
        held = np.min([(labels == value).sum(axis=(1, 2)) for value in values], axis=0)
        chosen.append(int(held.argmax()))
        prompt = np.zeros_like(labels)
        prompt[chosen[-1]] = labels[chosen[-1]]
        for folder in ("images", "prompts"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "images" / image.name).write_bytes(image.read_bytes())
        header = nibabel.load(label)
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(prompt, 0, axis).astype(np.uint8), header.affine), root / "prompts" / image.name)
    return chosen


def stock_pipeline(nets: Networks, case: tuple[Path, Path], slice_: int, root: Path, limit: int | None) -> Row:
    """Write JPEGs, run a session per label in both directions, write the mask. With a limit, seconds are scaled to all slices."""
    started = time.perf_counter()
    stack, labels, axis = read_case(*case)
    write_jpegs(stack, root / "jpegs")
    result, tracked, inside = np.zeros(labels.shape, np.uint8), 0, 0.0
    for value in (int(value) for value in np.unique(labels[slice_]) if value):
        (seconds, _), found = timed(
            lambda v=value: stock_session(nets.stock, root / "jpegs", slice_, torch.from_numpy(labels[slice_] == v), limit)
        )
        tracked, inside = tracked + len(found) - 1, inside + seconds
        for t, (_, mask) in found.items():
            result[t][mask.cpu().numpy()] = value
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(result, 0, axis), nibabel.load(case[1]).affine), root / "stock.nii.gz")
    whole = sum((len(stack) - 1) for value in np.unique(labels[slice_]) if value)
    return {"wall": time.perf_counter() - started - inside + inside * whole / tracked, "slices": tracked, "all slices": whole}


def whole_command(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part e: the command on one volume against the stock pipeline on the same prompts."""
    nets, rows = Networks(options.px, options.device), []
    for name in ("Task04_Hippocampus", "Sarcoma_MR_T1"):
        case = cases_of(options.data / name)[0]
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            (slice_,) = write_inputs([case], root)
            command = Command(root)
            stock_side = partial(stock_pipeline, nets, case, slice_, root, options.stock_slices)
            sides: dict[str, Callable[[], Any]] = {"ours": command.run, "stock": stock_side}
            runs = [{side: action() for side, action in sides.items()} for _ in range(options.rounds)]
        ours, stock = (statistics.median(one[side]["wall"] for one in runs) for side in sides)
        note = f"{name}, {runs[0]['stock']['all slices']} tracked slices" + (" (stock scaled)" if options.stock_slices else "")
        rows.append(row(note, (ours, 0.0), (stock, 0.0), "ratio >= 50", rounds=runs))
    return rows


def folder_of_volumes(options: argparse.Namespace, folder: Path, found: Row) -> list[Row]:
    """Part f: 16 volumes with 1, 2, ... workers, alone and beside busy programs."""
    cores = os.cpu_count() or 1
    counts, rows = sorted({1, *(2**power for power in range(1, 6) if 2**power <= cores), cores}), []
    taken: dict[tuple[int, bool], list[Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_inputs(cases_of(options.data / "Task04_Hippocampus")[:VOLUMES], root)
        for _ in range(options.rounds):
            for workers in counts:
                for busy in (False, True):
                    with busy_programs(BUSY if busy else 0):
                        taken.setdefault((workers, busy), []).append(Command(root, "--workers", str(workers)).run())
    for runs, (workers, _) in zip(taken.values(), taken):
        for one in runs:  # once all workers are at work, until the last mask: what the start takes is left out
            one["steady"] = (one["written"][-1] - one["written"][workers - 1]) / (len(one["written"]) - workers)
    names = ("wall", "steady")  # CPU seconds of worker processes are not known here
    medians = {key: {name: statistics.median(one[name] for one in runs) for name in names} for key, runs in taken.items()}
    for (workers, busy), one in medians.items():
        alone, calm = medians[1, busy], medians[workers, False]
        lost = min(workers, cores) / min(workers, cores * workers / (workers + BUSY)) if busy else 1.0
        name = f"{workers} workers : 1, {'beside busy programs' if busy else 'alone'}"
        times = {
            "slowdown": one["steady"] / calm["steady"],
            "explained slowdown": lost,
            "seconds per volume": one["steady"],
            "throughput": alone["steady"] / one["steady"],
        }
        rows.append(row(name, (one["wall"], 0.0), (alone["wall"], 0.0), "none", times, rounds=taken[workers, busy]))
    return rows


# Tables --------------------------------------------------------------------------------------------------------------------------------

PARTS = {"a": same_outputs, "b": half_precision, "c": stopping, "d": several_objects, "e": whole_command, "f": folder_of_volumes}


def table(part: str, rows: Sequence[Row]) -> str:
    """Format the rows of a part; the longest row names the columns."""
    columns = [name for name in max(rows, key=len) if name != "rounds"]
    lines = [
        f"\n{part}: {(PARTS[part].__doc__ or '').partition(chr(10))[0]}",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for one in rows:
        cells = [one.get(name, "") for name in columns]
        lines.append("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path, help="JSON file with every round")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slices", type=int, default=12, help="of the clip of parts a, b and d")
    parser.add_argument("--volume-slices", type=int, default=80, help="of the clip of part c")
    parser.add_argument("--px", type=int, default=1024, help="edge of the slices of tiny, on both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stock-slices", type=int, help="part e: stock tracks so many slices per direction, and its time is scaled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: Row = {"machine": machine(), "options": {name: str(value) for name, value in vars(options).items()}, "parts": {}}
    print(json.dumps(found["machine"]))
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.parts:
            folder = Path(scratch) / part
            clip(options.data, folder, options.volume_slices if part == "c" else options.slices, options.px)
            found["parts"][part] = PARTS[part](options, folder, found["machine"])
            print(table(part, found["parts"][part]), flush=True)
            options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
