"""What tiers of KV are worth to conversations that do not fit on the device, by cache policy and speed of the link.

    python benchmarks/kv_tiers.py --out runs/tiers

Sessions take turns whose prompts are the conversation so far, of made-up tokens; together they have four times the
device's KV. SmolLM2 in float32 on one core, a virtual clock in processor time. Links are emulated, each way, at a
fraction and at multiples of the rate at which fetching a token's KV takes as long as computing it. All runs of a speed
come one after another, without tiers first and last, so that the machine's drift shows.

Then the simulator, calibrated on the engine's runs of that speed, serves the same. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.reuse_aware import ReuseAware
from xllm_lab.policies.cache.watermark import Watermark
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.runs import Run
from xllm_lab.sim.calibrate import calibrate
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.parity import parity
from xllm_lab.sim.simulator import simulate
from xllm_lab.workload import Prompt, Request, RequestId, Workload

FIRST_TOKENS, TURN_TOKENS, OUTPUT_TOKENS = 160, 64, 8
SPEEDS = {"slow": 0.25, "even": 1.0, "fast": 8.0}  # of the rate of breaking even
PLAIN, AGAIN = "device-only", "device-only again"
POLICIES: Mapping[str, CachePolicy] = {
    PLAIN: DEVICE_ONLY,
    "lru": Lru(),
    "watermark": Watermark(),
    "reuse-aware": ReuseAware(),
    "cost-aware": CostAware(),
    AGAIN: DEVICE_ONLY,
}


class Outcome(NamedTuple):
    """Of one run; times in milliseconds."""

    hit_frac: float
    ttft_mean: float
    ttft_p90: float
    tokens_per_s: float


def sessions(num_sessions: int, num_turns: int, gap_us: int) -> Workload:
    """Turn by turn, each session's after the one before it; a shuffled order would find more on the device."""
    rng = np.random.default_rng(11)
    longest = FIRST_TOKENS + TURN_TOKENS * (num_turns - 1)
    said = [tuple(rng.integers(1000, 40_000, longest).tolist()) for _ in range(num_sessions)]
    requests = []
    for i in range(num_sessions * num_turns):
        turn, session = divmod(i, num_sessions)
        tokens = said[session][: FIRST_TOKENS + TURN_TOKENS * turn]
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        arrival_us = int(gap_us * (i + rng.random()))
        requests.append(Request(id=RequestId(i), arrival_us=arrival_us, prompt=prompt, output_tokens=OUTPUT_TOKENS))
    return Workload(requests=tuple(requests))


def outcome(records: Records) -> Outcome:
    ttft_ms = [(r.token_times_us[0] - r.arrival_us) / 1e3 for r in records.requests]
    span_us = max(r.finish_us or 0 for r in records.requests) - min(r.arrival_us for r in records.requests)
    return Outcome(
        summarize(records).prefix_hit_frac or 0.0,
        float(np.mean(ttft_ms)),
        float(np.percentile(ttft_ms, 90)),
        sum(r.output_tokens + r.prompt_tokens for r in records.requests) / span_us * 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.6, help="of what the device can compute without tiers")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    o = parser.parse_args()
    longest = FIRST_TOKENS + TURN_TOKENS * (o.turns - 1) + OUTPUT_TOKENS
    blocks = -(-longest // 16) * o.sessions // 4
    config = InstanceConfig(
        max_tokens_per_batch=256, max_seqs_per_batch=8, block_size=16, num_kv_blocks=blocks, max_model_len=1024
    )
    plain = Engine(EngineOptions(device="cpu", dtype="float32", timer="cpu"))
    step_time = plain.measure_step_time(config)
    mean_tokens = FIRST_TOKENS + TURN_TOKENS * (o.turns - 1) // 2
    prompt_us = step_time.request_us(mean_tokens, 0)
    kv_bytes = plain.describe()["kv_bytes_per_token"]
    even = kv_bytes / (prompt_us / mean_tokens) * 1e6
    gap_us = int(prompt_us / o.load)
    work = sessions(o.sessions, o.turns, gap_us)
    print(
        f"{o.sessions} sessions of {o.turns} turns, prompts of {FIRST_TOKENS} to {longest - OUTPUT_TOKENS} tokens, "
        f"{OUTPUT_TOKENS} generated; {blocks} blocks of 16 tokens on the device; a request each {gap_us / 1e3:.0f} ms; "
        f"a prompt token computes in {prompt_us / mean_tokens:.0f} us and has {kv_bytes} bytes of KV: links break even "
        f"at {even / 1e6:.0f} MB/s\n"
    )
    for speed, factor in SPEEDS.items():
        engine = Engine(EngineOptions(device="cpu", dtype="float32", timer="cpu", host_link_bytes_per_s=even * factor))
        runs: dict[str, Run] = {}
        for name in o.policies:
            policies = Policies(DecodeFirst(), cache=POLICIES[name])
            runs[name] = engine.replay(
                work, config, policies, out=o.out / speed / name.replace(" ", "-"), step_time=step_time
            )
        print(f"### {speed}: {even * factor / 1e6:.0f} MB/s\n")
        table(runs, work, config, o.out / speed)


def table(runs: Mapping[str, Run], work: Workload, config: InstanceConfig, out: Path) -> None:
    machine = fitted_machine(calibrate(list(runs.values())))
    print(f"Copies were fitted as {machine.copy_time.weights}; parity is checked on each run.\n")
    print("| cache policy | hit frac | TTFT mean ms | P90 ms | tokens/s | restored | simulated | error | P90 | error |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    ranking: dict[str, tuple[float, float]] = {}
    for name, run in runs.items():
        assert parity(run).is_identical, f"{run.path}: the simulator decides otherwise"
        policies = run.manifest.instance_policies()
        simulated = simulate(work, config, policies, machine, out=out / f"sim-{name.replace(' ', '-')}")
        is_, says = outcome(run.records), outcome(simulated.records)
        restored = sum(c.num_tokens for c in run.records.copies if c.kind == "restore")
        print(
            f"| {name} | {is_.hit_frac:.3f} | {is_.ttft_mean:.1f} | {is_.ttft_p90:.1f} | {is_.tokens_per_s:.0f} "
            f"| {restored} | {says.ttft_mean:.1f} | {says.ttft_mean / is_.ttft_mean - 1:+.1%} "
            f"| {says.ttft_p90:.1f} | {says.ttft_p90 / is_.ttft_p90 - 1:+.1%} |"
        )
        ranking[name] = is_.ttft_mean, says.ttft_mean
    for which, host in enumerate(("engine", "simulator")):
        order = sorted((name for name in ranking if name != AGAIN), key=lambda name: ranking[name][which])
        print(f"\n{host}: {' < '.join(order)}", end="")
    print(flush=True)
    print()


if __name__ == "__main__":
    main()
