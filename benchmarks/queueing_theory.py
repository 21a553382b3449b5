"""Does the simulator wait as queueing theory says?

    python benchmarks/queueing_theory.py > benchmarks/queueing_theory_DATE.md

A hundred independent runs a row, each from the steady state; the interval is Student's t at 99 %. A row holds if theory
lies within the interval. What theory is, and how runs begin, is in `xllm_lab/sim/queueing_theory.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from xllm_lab import provenance
from xllm_lab.sim.queueing_theory import (
    Estimate,
    Fixed,
    Memoryless,
    PerStep,
    PerToken,
    Service,
    TwoLengths,
    bus,
    bus_wait_us,
    mean_wait_us,
    queue,
    served,
    waits_us,
)

# Requests a run: the nearer to saturation, the longer a queue remembers.
LOADS = {0.3: 200, 0.5: 300, 0.7: 600, 0.8: 1000, 0.9: 2500, 0.95: 5000}
QUEUES: dict[str, Service] = {"M/D/1": Fixed(), "M/M/1": Memoryless(), "M/G/1, two lengths": TwoLengths()}
BUS_RATES = (0.2, 1.0, 4.0)
STEP_US = 10_000


def rows(num_runs: int, scale: float) -> Iterator[tuple[str, float, Estimate]]:
    """(what, theory in us, what the simulator does)"""
    for name, service in QUEUES.items():
        for utilisation, count in LOADS.items():
            runs = (queue(service, utilisation, int(scale * count), seed) for seed in range(num_runs))
            waits = [float(waits_us(served(run, PerToken(), max_seqs_per_batch=1)).mean()) for run in runs]
            yield f"{name} at {utilisation:.0%}", mean_wait_us(service, utilisation), Estimate.of(waits)
    for rate in BUS_RATES:
        buses = (bus(rate, STEP_US, int(scale * 2000), seed) for seed in range(num_runs))
        waits = [float(waits_us(served(b, PerStep(STEP_US), max_seqs_per_batch=10**6)).mean()) for b in buses]
        yield f"batch of all, {rate:g} a step", bus_wait_us(rate, STEP_US), Estimate.of(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--scale", type=float, default=1.0, help="of the requests a run")
    o = parser.parse_args()
    print(f"`python benchmarks/queueing_theory.py --runs {o.runs} --scale {o.scale:g}`, {o.runs} runs a row, ", end="")
    print(f"commit {provenance.commit()[:12]}, {provenance.hardware()['cpu']}\n")
    print(
        "| queue | theory, us | simulator, us | error | 99 % interval | holds |\n| --- | --: | --: | --: | --: | --- |"
    )
    began_s = time.process_time()
    for name, theory, got in rows(o.runs, o.scale):
        told = f"{got.mean:,.0f} | {got.mean / theory - 1:+.1%} | ±{got.half_width / theory:.1%}"
        print(f"| {name} | {theory:,.0f} | {told} | {'yes' if got.holds(theory) else 'NO'} |", flush=True)
    print(f"{time.process_time() - began_s:.0f} CPU s", file=sys.stderr)


if __name__ == "__main__":
    main()
