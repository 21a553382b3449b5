"""How fast is this machine right now? Operations of a bare `heapq` loop per CPU second.

    python benchmarks/calibration.py

One operation pops the earliest of 64 timers (time, number, event) and pushes it again, later: the least that any
discrete-event simulator written in Python does per event. CPU seconds times this figure is a cost in operations, and
that compares between machines, and between the hours of one machine whose caches and clock others share.
"""

from __future__ import annotations

import heapq
import random
import time

NUM_TIMERS = 64
NUM_OPERATIONS = 300_000


def heapq_per_s(rounds: int = 5) -> float:
    """Pop-and-push operations per CPU second, the best of `rounds`: what disturbs can only slow down."""
    return max(_round() for _ in range(rounds))


def _round() -> float:
    draws = random.Random(1)
    gaps = [draws.uniform(0.01, 1.01) for _ in range(4096)]
    timers = [(gaps[i], i, None) for i in range(NUM_TIMERS)]
    heapq.heapify(timers)
    # Local names, as any loop that is meant to be fast has them.
    pop, push = heapq.heappop, heapq.heappush
    start = time.process_time()
    for number in range(NUM_TIMERS, NUM_TIMERS + NUM_OPERATIONS):
        due, _, event = pop(timers)
        push(timers, (due + gaps[number & 4095], number, event))
    return NUM_OPERATIONS / (time.process_time() - start)


if __name__ == "__main__":
    print(f"{heapq_per_s():,.0f} heapq operations per CPU second")
