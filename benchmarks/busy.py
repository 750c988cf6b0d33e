"""Programs that keep cores busy, for measurements of how much slower a command is beside them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPIN = "import numpy as np\na = np.ones((64, 64), np.float32)\nwhile True: a @ a"


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Let `count` programs multiply small matrices during a block, on one core each."""
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    programs = [subprocess.Popen([sys.executable, "-c", _SPIN], env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()
