"""One round of balancing: what was counted, what would be better, and whether that is worth publishing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from xllm_lab.policies.experts import ExpertLayerView, ExpertsPlan, ExpertsView
from xllm_lab.policies.experts.placement import by_device, peak, settled

# The experts of each device, from the layer's loads.
Place = Callable[[Sequence[int]], Sequence[Sequence[int]]]


def faded(windows: Iterable[Sequence[int]], decay_frac: float) -> list[int]:
    """Counts of windows, newest first, as one: each older one counts for `decay_frac` of the next."""
    total = list[int]()
    for counts in reversed(list(windows)):
        total = [count + int(old * decay_frac) for count, old in zip(counts, total or [0] * len(counts), strict=True)]
    return total


def since_change(layer: ExpertLayerView, decay_frac: float) -> tuple[list[int], list[int]]:
    """Loads of experts and of slots since the layer's experts lie as they do; empty if nothing was counted."""
    windows = [window for window in layer.windows if window.slot_tokens]
    return faded((w.expert_tokens for w in windows), decay_frac), faded((w.slot_tokens for w in windows), decay_frac)


def measured_gain_frac(slots: Sequence[int], loads: list[int], slot_loads: list[int], num_devices: int) -> Fraction:
    """By which part the peak would fall if experts lay in `slots`, against what slots had.

    As xLLM reckons it: the peak now is measured, the one to come is of even shares, scaled to as many tokens.
    """
    now = max(sum(own) for own in by_device(slot_loads, num_devices))
    then = peak(slots, loads, num_devices) * Fraction(sum(slot_loads), sum(loads))
    return (now - then) / now


def xllm_round(
    view: ExpertsView, place: Place, *, decay_frac: float, min_peak_gain_frac: float, reason: str
) -> ExpertsPlan:
    """Every layer is placed anew; a layer changes whose peak falls by that part, and falls at all."""
    plan = {}
    for layer in view.layers:
        loads, slot_loads = since_change(layer, decay_frac)
        if not any(slot_loads):
            continue
        slots = settled(place(loads), layer.slots)
        gain = measured_gain_frac(slots, loads, slot_loads, view.num_devices)
        if slots != tuple(layer.slots) and gain > 0 and gain >= min_peak_gain_frac:
            plan[layer.id] = slots
    return ExpertsPlan(slots=plan, reason=reason if plan else "no gain")
