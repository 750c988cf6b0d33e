"""The tensors of SAM 2's own models, as the package `sam2` builds them from its own configurations; none of our code takes part.

python tests/golden/sam2_keys.py > tests/golden/sam2.1_keys.txt
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.overrides import TorchFunctionMode

SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
GOLDEN = Path(__file__).with_name("sam2.1_keys.txt")


class LinspaceOnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **({**(kwargs or {}), "device": "cpu"} if func is torch.linspace else kwargs or {}))


def configuration(version, size):
    """The published configuration of SAM 2.0 ("") or 2.1 (".1")."""
    return OmegaConf.load(Path(sam2.__path__[0]) / "configs" / f"sam2{version}" / f"sam2{version}_hiera_{SIZES[size]}.yaml").model


def stock_shapes(version, size):
    """Tensor name -> shape, without allocating anything."""
    with torch.device("meta"), LinspaceOnCpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tuple(tensor.shape) for name, tensor in instantiate(configuration(version, size)).state_dict().items()}


def compact(shapes):
    """One line for the same tensor of several blocks: `trunk.blocks.{1,2}.norm1.weight 96`."""
    grouped = {}
    for name, shape in shapes.items():
        found = re.search(r"\.(?:blocks|layers)\.(\d+)\.", name)
        template = f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}" if found else name
        grouped.setdefault((template, "x".join(map(str, shape))), []).append(found[1] if found else "")
    return sorted(f"{template.replace('{}', '{' + ','.join(at) + '}')} {shape}".rstrip() for (template, shape), at in grouped.items())


def text():
    """The golden file: what is common to all sizes, then each size."""
    lines = {size: compact(stock_shapes(".1", size)) for size in SIZES}
    common = set.intersection(*map(set, lines.values()))
    parts = {"all": sorted(common)} | {size: [line for line in found if line not in common] for size, found in lines.items()}
    return "".join("\n".join([f"# {name}", *found]) + "\n" for name, found in parts.items())


if __name__ == "__main__":
    print(text(), end="")
