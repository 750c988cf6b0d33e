"""From a plan's word to a memory policy."""

from __future__ import annotations

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import MemoryPolicy
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLong, ShortLongSelfSort
from slmsam2_cli.planning.plan import NetworkPlan


def policy_of(network: NetworkPlan, memories: int, pointers: int) -> MemoryPolicy:
    """The policy a plan names. memories: rows of the network's temporal table; pointers: how many it was made to read."""
    if network.policy in ("fifo", "shortlong"):
        long = Fifo(memories, pointers, network.presence_gate, network.two_sided)
        return ShortLong(long) if network.has_short_stream else long
    bank = bank_of(network, memories)
    return ShortLongSelfSort(bank) if network.has_short_stream else bank


def bank_of(network: NetworkPlan, memories: int) -> SelfSort:
    """The self-sorting bank with a plan's settings, whichever policy the plan names."""
    return SelfSort(
        network.bank_slices,
        network.bank_read,
        network.bank_confidence,
        network.bank_similarity,
        row=memories - 1,
        presence_gate=network.presence_gate,
        two_sided=network.two_sided,
    )
