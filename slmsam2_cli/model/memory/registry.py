"""From a plan's word to a memory policy."""

from __future__ import annotations

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import MemoryPolicy
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLong, ShortLongSelfSort
from slmsam2_cli.planning.plan import NetworkPlan


def build_policy(network: NetworkPlan, memories: int, pointers: int) -> MemoryPolicy:
    """The policy a plan names. memories: rows of the network's temporal table; pointers: how many it was made to read."""
    if network.policy in ("fifo", "shortlong"):
        long = Fifo(memories, pointers, network.object_score_gate, network.shared_memory)
        return ShortLong(long) if network.has_short_stream else long
    bank = build_bank(network, memories)
    return ShortLongSelfSort(bank) if network.has_short_stream else bank


def build_bank(network: NetworkPlan, memories: int) -> SelfSort:
    """The self-sorting bank with a plan's settings, whichever policy the plan names."""
    return SelfSort(
        network.bank_slices,
        network.bank_read,
        network.bank_confidence,
        network.bank_similarity,
        row=memories - 1,
        object_score_gate=network.object_score_gate,
        shared_memory=network.shared_memory,
    )
