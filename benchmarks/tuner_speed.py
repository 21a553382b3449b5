"""How long do 200 trials of 2,000 requests take, and how much of that is the study and its book?

    python benchmarks/tuner_speed.py --out FOLDER [--trials 200] [--requests 2000] [--workers 2]

Chats (`workloads.py`) on one Ascend part by the roofline model, at a rate that the default serves. CPU seconds of the
coordinator are drawing, the journal, the store of evaluations and their transport; those of the workers are simulating,
and starting once. Wall time is what a user waits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from workloads import chat

from xllm_lab import provenance
from xllm_lab.candidate import Candidate
from xllm_lab.hardware import hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import Calibration, Residual
from xllm_lab.sim.machine import model_of, roofline_machine
from xllm_lab.step_time import TERMS
from xllm_lab.transforms import with_slo
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.workers import Processes
from xllm_lab.workload import Slo


def machine(device: str, model: str) -> Calibration:
    """What `tune` takes, from the roofline model; its residual says that nothing was measured."""
    found = roofline_machine(hardware(device), model_of(model))
    return Calibration(
        step_time=found.step_time,
        highest=(1e15,) * len(TERMS),
        residual=Residual(mape_frac=0.0, p90_frac=0.0, bias_frac=0.0, num_steps=0),
        model=dict(found.model),
        hardware={},
        runs=(f"roofline of {model} on {device}",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate-per-s", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="ascend-910b3")
    parser.add_argument("--model", default="qwen3-8b")
    o = parser.parse_args()
    workload = with_slo(chat(o.requests, o.rate_per_s, o.seed), Slo(ttft_us=2_000_000, tpot_us=50_000))
    instance = InstanceConfig(num_kv_blocks=2048, max_seqs_per_batch=128)
    default = Candidate(instance=instance, policies=Policies(make_policy("batch", "decode-first")))
    began, pool = time.monotonic(), Processes(o.workers)
    study = tune(
        *([workload], machine(o.device, o.model), Space(default)),
        num_trials=o.trials,
        seed=o.seed,
        out=o.out,
        num_workers=o.workers,
        workers=pool,
    )
    wall_s, own = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    pool.close(wait=True)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s, workers_s = own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime
    told = {
        "trials": len(study.trials),
        "requests": o.requests,
        "workers": o.workers,
        "wall_s": round(wall_s, 1),
        "coordinator_cpu_s": round(own_s, 1),
        "workers_cpu_s": round(workers_s, 1),
        "coordinator_frac": round(own_s / (own_s + workers_s), 4),
        "requests_per_cpu_s": round(o.requests * o.trials / (own_s + workers_s)),
        "default_per_s": study.default.goodput_per_s,
        "best_per_s": study.best.goodput_per_s,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "load": os.getloadavg(),
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
