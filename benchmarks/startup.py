"""From nothing to the first token, and how much memory that takes: CPU and wall seconds, MB.

    python benchmarks/startup.py --dtypes float32 bfloat16 --repeats 3

Each start is a process of its own, one thread, with the model on disk and the kernels compiled; the first of each dtype
also converts the weights, unless the cache folder has them. One JSON object a start: seconds since the process began
at the end of each stage, resident memory then, and the peak as a multiple of weights and KV pool.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BLOCK_TOKENS = 16


def start(dtype: str, kv_tokens: int, began_s: float) -> dict[str, Any]:
    """Serves one prompt of 64 tokens, from here on."""
    stages: dict[str, dict[str, float]] = {}

    def ends(stage: str) -> None:
        rss_mb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        stages[stage] = {
            "cpu_s": round(time.process_time(), 2),
            "wall_s": round(time.time() - began_s, 2),
            "rss_mb": round(rss_mb),
        }

    import torch  # noqa: F401

    ends("torch")
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.engine.weights import expected_shapes
    from xllm_lab.instance_config import InstanceConfig
    from xllm_lab.policies.batch.decode_first import DecodeFirst
    from xllm_lab.policies.of_instance import Policies
    from xllm_lab.records import Records
    from xllm_lab.workload import Prompt, Request, RequestId, Workload

    ends("imports")
    engine = Engine(EngineOptions(device="cpu", dtype=dtype))
    ends("model")
    config = InstanceConfig(
        max_tokens_per_batch=2048,
        max_seqs_per_batch=64,
        block_size=BLOCK_TOKENS,
        num_kv_blocks=kv_tokens // BLOCK_TOKENS,
        max_model_len=1024,
    )
    one = Request(id=RequestId(0), arrival_us=0, prompt=Prompt(num_tokens=64), output_tokens=1)
    engine.serve(Workload(requests=(one,)), config, Policies(DecodeFirst()), Records())
    ends("first token")
    model = engine.model.config
    num_weights = sum(math.prod(shape) for shape in expected_shapes(model).values())
    weights_mb = num_weights * engine.model.model.dtype.itemsize / 1e6
    pool_mb = kv_tokens * model.kv_bytes_per_token(engine.model.model.dtype) / 1e6
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "dtype": dtype,
        "kv_tokens": kv_tokens,
        "stages": stages,
        "weights_mb": round(weights_mb),
        "kv_pool_mb": round(pool_mb),
        "peak_mb": round(peak_mb),
        "peak_frac": round(peak_mb / (weights_mb + pool_mb), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, default=49152, help="of the pool")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.began is not None:
        print(json.dumps(start(o.dtypes[0], o.kv_tokens, o.began)))
        return
    for dtype in o.dtypes * o.repeats:
        arguments = ["--dtypes", dtype, "--kv-tokens", str(o.kv_tokens), "--began", str(time.time())]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
