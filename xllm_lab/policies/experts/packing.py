"""How many copies each expert has, and on which devices they go. Loads are whole numbers, comparisons exact."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from fractions import Fraction

# What one more copy of an expert is worth, from its load and its copies.
Worth = Callable[[int, int], Fraction]


def load_per_copy(load: int, copies: int) -> Fraction:
    return Fraction(load, copies)


def load_taken_off(load: int, copies: int) -> Fraction:
    """By how much one more copy lightens each of those that there are."""
    return Fraction(load, copies * (copies + 1))


def copies_of(loads: Sequence[int], num_slots: int, most: int, worth: Worth) -> list[int]:
    """One copy of each expert, and one more, again and again, of whose is worth most: ties to the first.

    Args:
        most: copies of one expert.
    """
    assert len(loads) <= num_slots <= len(loads) * most, f"{len(loads)} experts in {num_slots} slots"
    copies = [1] * len(loads)
    queue = [(-worth(load, 1), expert) for expert, load in enumerate(loads)] if most > 1 else []
    heapq.heapify(queue)
    for _ in range(num_slots - len(loads)):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(queue, (-worth(loads[expert], copies[expert]), expert))
    return copies


def heaviest_first(loads: Sequence[int], copies: Sequence[int]) -> list[int]:
    """Experts by load of a copy, then by number."""
    return sorted(range(len(loads)), key=lambda e: (-Fraction(loads[e], copies[e]), e))


def packed(
    order: Sequence[int], loads: Sequence[int], copies: Sequence[int], num_devices: int
) -> tuple[tuple[int, ...], ...]:
    """The experts of each device, as many on each, none twice.

    Each copy of `order` goes to the least loaded device that has room and lacks the expert. Where the last ones find
    none, all are dealt out anew, as `dealt` does.
    """
    size = len(order) // num_devices
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    queue = [(0, device) for device in range(num_devices)]
    for expert in order:
        passed = []
        while queue and expert in devices[queue[0][1]]:
            passed.append(heapq.heappop(queue))
        if not queue:
            return dealt(loads, copies, num_devices)
        load, device = heapq.heappop(queue)
        devices[device].append(expert)
        if len(devices[device]) < size:
            passed.append((load + loads[expert] // copies[expert], device))
        for entry in passed:
            heapq.heappush(queue, entry)
    return tuple(map(tuple, devices))


def dealt(loads: Sequence[int], copies: Sequence[int], num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Copies dealt out in turn, the heaviest experts first: neighbours on other devices, so none twice."""
    order = [expert for expert in heaviest_first(loads, copies) for _ in range(copies[expert])]
    return tuple(tuple(order[device::num_devices]) for device in range(num_devices))
