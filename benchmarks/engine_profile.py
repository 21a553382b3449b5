"""How far are step times of a machine profile from those of the engine it was made on?

    python benchmarks/engine_profile.py --dtypes bfloat16 float32

Profiles SmolLM2's operators here (`xllm-lab profile`), then serves requests on the engine and prices every step of that
run with the profile. Processor time on both sides. One JSON object for each dtype: the mean absolute error of a step,
the error of the sum, for steps of decodes alone and for those with prompts, and which share was extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.machine_profile import Grid, num_shapes, write_machine_profile
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records, StepRecord
from xllm_lab.sim.cost import CostModel, batch_of
from xllm_lab.sim.machine import profiled_machine
from xllm_lab.step_time import Chunk
from xllm_lab.workload import Prompt, Request, RequestId, Workload, stream

GRID = Grid()
CONFIG = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=32, block_size=16, num_kv_blocks=1500, max_model_len=2048
)


def workload(num_requests: int) -> Workload:
    """Prompts of 16 to 600 tokens and outputs of 8 to 80, in the course of half a minute."""
    draw = stream(0, "engine profile")
    return Workload(
        requests=tuple(
            Request(
                id=RequestId(i),
                arrival_us=int(draw.integers(0, 30_000_000)),
                prompt=Prompt(num_tokens=round(16 * (600 / 16) ** draw.random())),
                output_tokens=int(draw.integers(8, 81)),
            )
            for i in range(num_requests)
        )
    )


def errors(steps: list[StepRecord], cost: CostModel) -> dict[str, Any]:
    """Of predictions against the device's part of measured steps."""
    kinds: dict[str, list[tuple[float, float]]] = {"decodes": [], "with prompts": []}
    num_extrapolated = 0
    for step in steps:
        chunks = [Chunk(n, c) for n, c in zip(step.num_tokens, step.num_computed_tokens, strict=True)]
        batch = batch_of(chunks, step.num_logits)
        price = cost.step(batch)
        num_extrapolated += price.is_extrapolated
        assert step.device_us is not None
        kinds["with prompts" if batch.prefills else "decodes"].append((price.us, step.device_us))
    found: dict[str, Any] = {"extrapolated_frac": round(num_extrapolated / len(steps), 3)}
    for kind, pairs in kinds.items():
        predicted, measured = np.array(pairs).T
        found[kind] = {
            "steps": len(pairs),
            "measured_s": round(measured.sum() / 1e6, 2),
            "mean_abs_error_frac": round(float(np.abs(predicted / measured - 1).mean()), 3),
            "sum_error_frac": round(float(predicted.sum() / measured.sum() - 1), 3),
        }
    predicted, measured = np.array([p for pairs in kinds.values() for p in pairs]).T
    found["sum_error_frac"] = round(float(predicted.sum() / measured.sum() - 1), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=60)
    o = parser.parse_args()
    for dtype in o.dtypes:
        engine = Engine(EngineOptions(device="cpu", dtype=dtype, timer="cpu"))
        with tempfile.TemporaryDirectory() as folder:
            start_s = time.process_time()
            write_machine_profile(engine, Path(folder, "bundle"), GRID)
            took_s = time.process_time() - start_s
            machine = profiled_machine(Path(folder, "bundle"))
        records = Records()
        engine.serve(workload(o.requests), CONFIG, Policies(DecodeFirst()), records)
        told = {"dtype": dtype, "shapes": num_shapes(GRID), "profile_cpu_s": round(took_s, 1)}
        print(json.dumps(told | errors(records.steps, machine.cost)), flush=True)


if __name__ == "__main__":
    main()
