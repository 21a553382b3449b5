"""Tokens per CPU second and per second of a model on one process and divided over several, through gloo's loopback.

    python benchmarks/tensor_parallel.py --model smollm2-135m --ranks 1 3 --repeats 2

The same requests, all there at the start. CPU seconds are those of all processes while they serve, start-up left out.
One JSON object a line; in float32, fails if anybody's tokens differ. In bfloat16 each rank's part of a sum is rounded,
so that texts may part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.prefill_first import PrefillFirst
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_SEQS = 16
OUTPUT_TOKENS = 64
CONFIG = InstanceConfig(
    max_tokens_per_batch=1024, max_seqs_per_batch=NUM_SEQS, block_size=32, num_kv_blocks=256, max_model_len=1024
)
SENT = Workload(
    requests=tuple(
        Request(id=RequestId(i), arrival_us=0, prompt=Prompt(num_tokens=200 + 10 * i), output_tokens=OUTPUT_TOKENS)
        for i in range(NUM_SEQS)
    ),
    seed=3,
)
NUM_TOKENS = sum(r.prompt.num_tokens + r.output_tokens for r in SENT.requests)


def cpu_s(process_id: int) -> float:
    """User and system time of a process so far (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", default="eager", help="which steps run in captured graphs")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    tokens: set[tuple[tuple[int, ...], ...]] = set()
    for _ in range(args.repeats):
        for size in args.ranks:
            options = EngineOptions(model=args.model, device="cpu", dtype=args.dtype, tensor_parallel=size)
            with Engine(options) as engine:
                processes = (os.getpid(), *(() if engine.ranks is None else engine.ranks.process_ids))
                before, start_s, records = [cpu_s(p) for p in processes], time.perf_counter(), Records()
                engine.serve(SENT, CONFIG, Policies(PrefillFirst(), shapes=make_policy("shapes", args.shapes)), records)
                took_s = time.perf_counter() - start_s
                spent = [cpu_s(p) - b for p, b in zip(processes, before, strict=True)]
            tokens.add(tuple(tuple(r.output_token_ids.tolist()) for r in records.sort().requests))
            decodes_ms = [s.device_us / 1e3 for s in records.steps if max(s.num_tokens) == 1 and len(s.ids) == NUM_SEQS]
            found = {
                "ranks": size,
                "tokens_per_cpu_s": round(NUM_TOKENS / sum(spent)),
                "tokens_per_s": round(NUM_TOKENS / took_s),
                "cpu_s": [round(s, 2) for s in spent],
                "decode_step_ms": round(statistics.median(decodes_ms), 1),
                "load": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(found), flush=True)
    assert args.dtype != "float32" or len(tokens) == 1, "tokens differ"


if __name__ == "__main__":
    main()
