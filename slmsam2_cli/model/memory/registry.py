"""The memory policies that a plan can name.

To add one:

1. Write a frozen dataclass in a module of this folder, with everything that `MemoryPolicy` and `PlannedPolicy` of interface.py declare.
   fifo.py is the shortest example.
2. List the class in POLICY_CLASSES below.
3. Add its name and flags to POLICY_STREAMS of planning/plan.py, which may not import the network; tests/model/memory/test_policies.py
   compares the two. Settings of its own are fields of NetworkPlan there, named in its `omitted_at_default`; `from_plan` reads them.
"""

from __future__ import annotations

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.interface import PlannedPolicy
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLong, ShortLongSelfSort
from slmsam2_cli.planning.plan import NetworkPlan

POLICY_CLASSES: tuple[type[PlannedPolicy], ...] = (
    Fifo,
    ShortLong,
    SelfSort,
    ShortLongSelfSort,
)
POLICIES: dict[str, type[PlannedPolicy]] = {policy.name: policy for policy in POLICY_CLASSES}


def build_policy(network: NetworkPlan, memories: int, pointers: int) -> PlannedPolicy:
    """Build the policy that a plan names.

    memories: rows of the network's temporal table. pointers: the most object pointers that the network reads.

    Raises: ValueError, with the known names, for an unknown policy.
    """
    if network.policy not in POLICIES:
        raise ValueError(f"unknown memory policy {network.policy!r}. Known policies: {', '.join(POLICIES)}")
    return POLICIES[network.policy].from_plan(network, memories, pointers)
