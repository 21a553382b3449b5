"""CPU seconds that the simulator pays for a workload, beside this machine's `heapq` rate, and Vidur's figures if given.

    python benchmarks/speed.py azure --trace TRACE.csv --instances 1 4 --peer vidur.jsonl
    python benchmarks/speed.py fixed --instances 4
    python benchmarks/speed.py chat --requests 1000000 --instances 64

`azure` is set up as Vidur is in `vidur_peer.py`, and so is `chat`; `fixed` as NVIDIA's Dynamo replay is by default.
`--peer` takes what `vidur_peer.py` printed, and adds how many times as many `heapq` operations Vidur needed. One JSON
object a line. Only serving is timed; the workload is made before.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration import heapq_per_s
from linear_cost import LIKE_DYNAMO, LIKE_VIDUR, LinearCost
from workloads import MAX_MODEL_LEN, azure_conversation, chat, fixed_length

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import Workload

CHATS_PER_S = 1.3  # per instance: Azure's rate over four


@dataclass(frozen=True, slots=True)
class Setup:
    """What every instance is, and how long its steps take."""

    config: InstanceConfig
    policy: DecodeFirst
    cost: LinearCost


AS_VIDUR = Setup(
    InstanceConfig(
        max_tokens_per_batch=512,
        max_seqs_per_batch=128,
        block_size=16,
        num_kv_blocks=7424,  # what Vidur's memory planner gives a 7B model on 80 GB
        enable_prefix_cache=False,
        max_model_len=MAX_MODEL_LEN,
    ),
    # Vidur keeps 1 % of the blocks free and weighs a fresh prompt by its own blocks alone.
    DecodeFirst(max_tokens_per_chunk=512, watermark_frac=0.99, footprint_margin=1.0),
    LIKE_VIDUR,
)
# Defaults of `MockEngineArgs` in ai-dynamo/dynamo, lib/mocker; no two prompts of this workload share a prefix.
AS_DYNAMO = Setup(
    InstanceConfig(
        max_tokens_per_batch=8192,
        max_seqs_per_batch=256,
        block_size=64,
        num_kv_blocks=16_384,
        enable_prefix_cache=False,
        max_model_len=MAX_MODEL_LEN,
    ),
    DecodeFirst(max_tokens_per_chunk=8192, watermark_frac=0.99, footprint_margin=1.0),
    LIKE_DYNAMO,
)


def simulate_fleet(workload: Workload, num_instances: int, setup: Setup) -> tuple[int, int]:
    """Serve on equal instances behind a round robin: the number of steps, and when the last one ended."""
    num_steps = end_us = 0
    for first in range(num_instances):
        part = replace(workload, requests=workload.requests[first::num_instances])
        predicted = Predicted(setup.cost)
        records = run_simulation(part, setup.config, setup.policy, predicted, vocab_size=32_000)
        num_steps += predicted.num_steps
        end_us = max(end_us, records.steps[-1].end_us)
    return num_steps, end_us


def timed(workload: Workload, num_instances: int, setup: Setup) -> dict[str, Any]:
    """One run's counts, CPU seconds, and cost in operations of the `heapq` loop timed before and after it."""
    before = heapq_per_s()
    start = time.process_time()
    num_steps, end_us = simulate_fleet(workload, num_instances, setup)
    cpu_s = time.process_time() - start
    rate_per_s = (before + heapq_per_s()) / 2
    return {
        "workload": workload.source,
        "num_instances": num_instances,
        "num_requests": len(workload.requests),
        "num_steps": num_steps,
        "simulated_s": end_us / 1e6,
        "cpu_s": cpu_s,
        "requests_per_cpu_s": len(workload.requests) / cpu_s,
        "heapq_per_s": round(rate_per_s),
        "heapq_per_step": cpu_s * rate_per_s / num_steps,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def times_fewer(ours: dict[str, Any], peers: list[dict[str, Any]]) -> dict[str, float]:
    """Operations of the peer's cheapest run on as many instances over ours."""
    theirs = [p["loop_cpu_s"] * p["heapq_per_s"] for p in peers if p["num_replicas"] == ours["num_instances"]]
    return {"times_fewer_than_vidur": min(theirs) / (ours["cpu_s"] * ours["heapq_per_s"])} if theirs else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("workload", choices=("azure", "fixed", "chat"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--instances", type=int, nargs="+", default=[4])
    parser.add_argument("--peer", type=Path)
    o = parser.parse_args()
    if (o.workload == "azure") != (o.trace is not None):
        parser.error("--trace goes with azure, and azure with --trace")
    if o.peer is not None and o.workload != "azure":
        parser.error("--peer was measured on azure; it compares with nothing else")
    peers = [json.loads(line) for line in o.peer.read_text().splitlines()] if o.peer else []
    for num_instances in o.instances:
        setup = AS_DYNAMO if o.workload == "fixed" else AS_VIDUR
        ours = timed(made(o, num_instances), num_instances, setup)
        print(json.dumps(ours | times_fewer(ours, peers)), flush=True)


def made(o: argparse.Namespace, num_instances: int) -> Workload:
    if o.workload == "azure":
        return azure_conversation(o.trace)
    return fixed_length(o.requests) if o.workload == "fixed" else chat(o.requests, CHATS_PER_S * num_instances)


if __name__ == "__main__":
    main()
