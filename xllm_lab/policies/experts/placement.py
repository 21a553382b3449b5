"""Where experts lie: the first placement, loads of devices under one, and slots that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xllm_lab.policies.experts import Slots


def contiguous(num_experts: int, num_devices: int, num_redundant_experts: int = 0) -> tuple[int, ...]:
    """Neighbouring experts on each device, and behind them, where there is room, copies of the next device's first.

    Raises:
        ValueError: experts do not divide evenly, or a device would have an expert twice.
    """
    if num_experts < 1 or num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"{num_experts} experts do not divide among {num_devices} devices, a multiple is accepted")
    share = num_experts // num_devices
    most = num_experts - share
    if not 0 <= num_redundant_experts <= most:
        raise ValueError(f"num_redundant_experts is {num_redundant_experts}, 0 to {most} is accepted")
    per_device = share + num_redundant_experts
    return tuple((d * share + i) % num_experts for d in range(num_devices) for i in range(per_device))


def by_device(slots: Slots, num_devices: int) -> list[Slots]:
    """The slots of each device."""
    size = len(slots) // num_devices
    return [slots[d * size : (d + 1) * size] for d in range(num_devices)]


def num_copies(slots: Slots, num_experts: int) -> list[int]:
    """Slots of each expert."""
    counts = [0] * num_experts
    for expert in slots:
        counts[expert] += 1
    return counts


def peak(slots: Slots, loads: Sequence[int], num_devices: int) -> Fraction:
    """Load of the most loaded device if the copies of an expert share its load evenly."""
    copies = num_copies(slots, len(loads))
    return max(sum((Fraction(loads[e], copies[e]) for e in own), Fraction()) for own in by_device(slots, num_devices))


def moved_slots(before: Slots, after: Slots) -> int:
    """Slots that get other weights."""
    return sum(old != new for old, new in zip(before, after, strict=True))


def settled(wanted: Sequence[Sequence[int]], before: Slots) -> tuple[int, ...]:
    """The experts wanted on each device, as slots: who was on a device already keeps its slot there."""
    slots = list[int]()
    for own, old in zip(wanted, by_device(before, len(wanted)), strict=True):
        staying = set(own) & set(old)
        coming = iter([expert for expert in own if expert not in staying])
        kept = set[int]()
        for expert in old:
            stays = expert in staying and expert not in kept
            kept.add(expert)
            slots.append(expert if stays else next(coming))
    return tuple(slots)
