"""How long the device waits for the host between steps of pure decoding, planned in turns and planned ahead.

    python benchmarks/host_gap.py --requests 16 --repeats 3

The same requests, all there at the start, in each mode in turns, on SmolLM2. Times are processor time of each side's
own thread, so that a neighbour on the machine does not count; steps after an idle host are left out. One JSON object a
line for each run, and at the end, per mode, the median and range of the mean gap, and what it fell by against planning
in turns. Fails if the modes' tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records, StepRecord
from xllm_lab.workload import Prompt, Request, RequestId, Workload

CONFIG = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=64, block_size=16, num_kv_blocks=1024, max_model_len=2048
)


def workload(num_requests: int) -> Workload:
    """Prompts of 64 to 184 tokens, outputs of 32 to 47, nothing shared."""
    return Workload(
        requests=tuple(
            Request(
                id=RequestId(i), arrival_us=0, prompt=Prompt(num_tokens=64 + 8 * (i % 16)), output_tokens=32 + i % 16
            )
            for i in range(num_requests)
        ),
        seed=1,
    )


def decoding(records: Records) -> list[StepRecord]:
    """Steps that only decode, and follow another step."""
    return [s for s in records.steps if s.gap_us is not None and max(s.num_tokens) == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shapes", default="eager", help="which steps run in captured graphs")
    args = parser.parse_args()
    engine = Engine(EngineOptions(device="cpu", dtype=args.dtype, timer="cpu"))
    sent = workload(args.requests)
    gaps_us: dict[str, list[float]] = {mode: [] for mode in ASYNC_SCHEDULING}
    tokens: set[tuple[tuple[int, ...], ...]] = set()
    for _ in range(args.repeats):
        for mode in ASYNC_SCHEDULING:
            records = Records()
            where, shapes = replace(CONFIG, async_scheduling=mode), make_policy("shapes", args.shapes)
            engine.serve(sent, where, Policies(DecodeFirst(), shapes=shapes), records)
            tokens.add(tuple(tuple(r.output_token_ids) for r in records.sort().requests))
            steps = decoding(records)
            gaps_us[mode].append(statistics.mean(s.gap_us or 0 for s in steps))
            found = {
                "mode": mode,
                "num_steps": len(steps),
                "gap_us": round(gaps_us[mode][-1]),
                "host_us": round(statistics.mean(s.host_us or 0 for s in steps)),
                "device_us": round(statistics.mean(s.device_us or 0 for s in steps)),
                "end_us": max(r.finish_us or 0 for r in records.requests),
            }
            print(json.dumps(found), flush=True)
    in_turns = statistics.median(gaps_us["off"])
    for mode, found_us in gaps_us.items():
        middle = statistics.median(found_us)
        print(
            f"{mode}: gap {middle:.0f} us ({min(found_us):.0f} to {max(found_us):.0f}), "
            f"{1 - middle / in_turns:.1%} less than in turns"
        )
    assert len(tokens) == 1, "the modes drew different tokens"


if __name__ == "__main__":
    main()
