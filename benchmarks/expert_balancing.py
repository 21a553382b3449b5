"""Do interval, redundant experts and gate that were chosen on one trace of loads beat xLLM's defaults on another?

    python benchmarks/expert_balancing.py tune --drift-hours 4
    python benchmarks/expert_balancing.py scale

The loads are drawn (Zipf with drift and bursts), since no trace of a production router is public. `tune` tries every
combination on one draw and holds the best against the defaults on other draws, with as many slots and with any number.
`scale` takes the time of pricing one tick of thousands of devices.

A token's work in one expert is that of DeepSeek-V3's widths, 88 MFLOP, at 40 % of an Ascend 910B's 320 TFLOP/s; weights
in 8 bits arrive at 20 GB/s beside the steps. The steps' other parts are left out: fractions are of time in experts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.experts.placement import contiguous
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.sim.experts.balancing import Balanced, Devices, balance
from xllm_lab.sim.experts.loads import ExpertLoads, ZipfLoads
from xllm_lab.sim.experts.shares import ExpertPrice, Placement, experts_us

EXPERT_PARAMS = 3 * 7168 * 2048
PRICE = ExpertPrice(layer_us=30.0, token_us=2 * EXPERT_PARAMS / (0.4 * 320e12) * 1e6)
DEVICES = Devices(
    num_devices=16,
    expert_bytes=EXPERT_PARAMS,
    link_bytes_per_s=20e9,
    boundary_us=100_000,
    activation_us=20_000,
)
PROCESS = ZipfLoads(
    num_layers=2,
    num_experts=64,
    experts_per_token=8,
    tokens_per_step=2048,
    steps_per_tick=200,
    tick_us=10_000_000,
    exponent=0.8,
    burst_frac=0.0002,
    burst_ticks=30,
)
TICKS = 2 * 360  # of 10 s: two hours
INTERVALS_S = (30, 100, 300, 1000)
GATES = (0.0, 0.05, 0.1)
REDUNDANT = (0, 1, 2)
DEFAULTS: dict[str, Any] = {}
HELD_OUT = range(1, 7)


def configurations(redundant: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Knobs to try."""
    for interval_s, gate, slots in itertools.product(INTERVALS_S, GATES, redundant):
        yield {
            "interval_us": interval_s * 1_000_000,
            "min_peak_gain_frac": gate,
            "num_redundant_experts": slots,
        }


def run(name: str, knobs: dict[str, Any], loads: ExpertLoads) -> Balanced:
    """One policy over one trace."""
    return balance(make_policy("experts", name, knobs), loads, DEVICES, PRICE)


def told(run: Balanced, static: Balanced) -> str:
    """What a row of the table says of a run."""
    return (
        f"{1 - run.total_us / static.total_us:.2%} less time, peak/mean {run.peak_to_mean.mean():.3f}, "
        f"{len(run.published)} changes, {run.moved_slots} slots, {run.redundant_bytes / 1e9:.2f} GB"
    )


def tune(name: str, process: ZipfLoads) -> None:
    """Choose on seed 0, compare on the others."""
    recorded = process.drawn(TICKS, seed=0)
    static = balance(STATIC, recorded, DEVICES, PRICE)
    print(f"{name}: recorded, static {static.total_us / 1e6:.0f} s, peak/mean {static.peak_to_mean.mean():.3f}")
    print(f"  defaults                {told(run(name, DEFAULTS, recorded), static)}")
    chosen = {}
    for what, redundant in (("as many slots", (1,)), ("any slots", REDUNDANT)):
        best = min(configurations(redundant), key=lambda knobs: run(name, knobs, recorded).total_us)
        chosen[what] = best
        print(f"  {what:15s} {best}: {told(run(name, best, recorded), static)}")
    for what, knobs in chosen.items():
        gains, noise = [], []
        for seed in HELD_OUT:
            loads = process.drawn(TICKS, seed=seed)
            default, tuned = (run(name, k, loads).total_us for k in (DEFAULTS, knobs))
            gains.append(1 - tuned / default)
            noise.append(balance(STATIC, loads, DEVICES, PRICE).total_us)
        error = statistics.stdev(gains) / len(gains) ** 0.5
        print(
            f"  held out, {what}: {statistics.mean(gains):.2%} less than the defaults, standard error {error:.2%}, "
            f"least {min(gains):.2%}, most {max(gains):.2%} of {len(gains)} traces; "
            f"static times scatter by {statistics.stdev(noise) / statistics.mean(noise):.2%}"
        )


def scale() -> None:
    """Milliseconds of processor time to price one tick."""
    for num_devices, num_experts, num_layers in ((64, 256, 58), (1024, 2048, 58), (4096, 8192, 58)):
        loads = np.random.default_rng(0).integers(0, 1000, (1, num_layers, num_experts))
        slots = [contiguous(num_experts, num_devices, 1)] * num_layers
        begun = time.process_time()
        placement = Placement(slots, num_experts=num_experts, num_devices=num_devices)
        placed = time.process_time()
        for _ in range(10):
            experts_us(placement.device_tokens(loads), np.ones(1, np.int64), PRICE)
        done = time.process_time()
        shape = f"{num_devices} devices, {num_experts} experts, {num_layers} layers"
        print(f"{shape}: {(done - placed) * 100:.1f} ms a tick, {(placed - begun) * 1e3:.0f} ms for a new placement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "scale"))
    parser.add_argument("--policy", default="xllm-balanced")
    parser.add_argument("--drift-hours", type=float, default=4.0, help="after which standings are correlated by 1/e")
    arguments = parser.parse_args()
    if arguments.what == "tune":
        tune(arguments.policy, replace(PROCESS, drift_ticks=arguments.drift_hours * 360))
    else:
        scale()


if __name__ == "__main__":
    main()
