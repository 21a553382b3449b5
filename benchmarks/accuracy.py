"""How far is the simulator from the engine, on a window it was not calibrated on, at three loads?

    python benchmarks/accuracy.py --out runs/accuracy > benchmarks/accuracy_CPU_DATE.md

Window A, replayed at capacity, calibrates. Window B is replayed three times on the engine at 30, 60 and 90 % of the
measured capacity and simulated once. All four take turns: on a shared machine even processor time drifts by a quarter
within minutes, and both sides of the comparison must have seen the same machine. A row is within its bound if the error
is at most 10 % or twice the engine's own run-to-run spread.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import xllm_lab as lab
from xllm_lab import provenance, transforms
from xllm_lab.arrivals import with_arrivals
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.metrics import summarize
from xllm_lab.runs import Run
from xllm_lab.sim.compare import Row
from xllm_lab.wording import metric_label, metric_text

LOADS = (0.3, 0.6, 0.9)
METRICS = ("ttft_us", "tpot_us", "e2e_us", "output_throughput_per_s")
SETTINGS = {"block_size": 32, "num_kv_blocks": 1024, "max_tokens_per_batch": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=Path("traces/chat.jsonl"))
    parser.add_argument("--requests", type=int, default=24, help="per window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--async-scheduling", default="off", help="how steps are planned")
    parser.add_argument("--shapes", default="eager", help="which steps run in captured graphs")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    whole = lab.read_trace(o.trace)
    learn, held_out = (transforms.part(whole, k * o.requests, (k + 1) * o.requests) for k in (0, 1))
    engine = Engine(EngineOptions(threads=1, clock="virtual", timer="cpu"))
    replay = partial(
        lab.replay, settings={**SETTINGS, "async_scheduling": o.async_scheduling}, shapes=o.shapes, engine=engine
    )
    full = replay(with_arrivals(learn, [0] * o.requests), out=o.out / "full")
    capacity_per_s = o.requests / summarize(full.records).makespan_s
    paced = transforms.scale_rate_to(learn, capacity_per_s)
    learnt: list[Run] = []
    measured: dict[float, list[Run]] = {load: [] for load in LOADS}
    for repeat in range(o.repeats):
        learnt.append(replay(paced, out=o.out / f"paced-{repeat}"))
        for load, runs in measured.items():
            workload = transforms.scale_rate_to(held_out, load * capacity_per_s)
            runs.append(replay(workload, out=o.out / f"{load}-{repeat}"))
    fitted = lab.calibrate(learnt)
    print(heading(o, engine, capacity_per_s))
    print(f"Step time, held-out folds: error {fitted.residual.mape_frac:.1%}, sum {fitted.residual.bias_frac:+.1%}.\n")
    print("| load | metric | engine | spread | simulator | error | within |\n|---|---|---|---|---|---|---|")
    outside = 0
    for load, runs in measured.items():
        simulated = lab.simulate(runs[0], fitted, out=o.out / f"{load}-simulated")
        rows = [row for row in lab.compare(simulated, runs) if row.metric.startswith(METRICS)]
        outside += sum(not row.is_within for row in rows)
        print("\n".join(line(load, row) for row in rows))
        assert all(lab.parity(run).is_identical for run in runs)
    print(f"\n{outside} rows outside their bound; parity identical on every engine run.")


def heading(o: argparse.Namespace, engine: Engine, capacity_per_s: float) -> str:
    model = engine.describe()
    return (
        f"# Simulator accuracy on held-out windows\n\n"
        f"Command: `python benchmarks/accuracy.py --trace {o.trace} --requests {o.requests} --repeats {o.repeats} "
        f"--async-scheduling {o.async_scheduling} --shapes {o.shapes}`  \n"
        f"Commit {provenance.commit()}; torch {provenance.versions()['torch']}; {model['device']}; "
        f"{model['name']} {model['dtype']}; processor time, virtual clock.  \n"
        f"Windows of {o.requests} requests; capacity {capacity_per_s:.3f} requests/s (window A, all at once).\n"
    )


def line(load: float, row: Row) -> str:
    spread = "-" if row.spread_frac is None else f"{row.spread_frac:.1%}"
    error = "-" if row.error_frac is None else f"{row.error_frac:+.1%}"
    engine, simulated = (metric_text(row.metric, value) for value in (row.engine, row.simulated))
    label, within = metric_label(row.metric), "yes" if row.is_within else "**no**"
    return f"| {load:.0%} | {label} | {engine} | {spread} | {simulated} | {error} | {within} |"


if __name__ == "__main__":
    main()
