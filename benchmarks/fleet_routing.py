"""Which routing policy serves sessions of several turns best, on three engine processes and in the simulator?

    python benchmarks/fleet_routing.py > rows.jsonl
    python benchmarks/fleet_routing.py --table rows.jsonl

Sessions begin with one of a few system prompts; each turn's prompt is the one before, an answer and a question. The
working set of all sessions is larger than one instance's KV, and fits into three. The engine serves in lockstep on
processor time. The simulator is calibrated on runs of another seed, and then told nothing but the trace and the fleet.
The model is random and small: what is compared is where requests go, not what they say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xllm_lab import provenance, verbs
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import EngineOptions
from xllm_lab.engine.model_config import from_transformers
from xllm_lab.engine.weights import expected_shapes
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.runs import Run
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.parity import parity
from xllm_lab.summary_of_run import summarize_run
from xllm_lab.workload import Prompt, Request, RequestId, Workload, stream

ROUTES = ("round-robin", "least-loaded", "cache-aware", "cache-aware-corrected", "prefix-affinity")
NUM_INSTANCES, HEARTBEAT_US = 3, 20_000
BLOCK_TOKENS, KV_BLOCKS = 16, 400
NUM_AGENTS, SYSTEM_TOKENS = 4, 128
SETTINGS = {
    "block_size": BLOCK_TOKENS,
    "num_kv_blocks": KV_BLOCKS,
    "max_model_len": 1024,
    "max_tokens_per_batch": 512,
    "max_seqs_per_batch": 16,
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def sessions(num: int, rate_per_s: float, think_s: float, seed: int) -> Workload:
    """Poisson beginnings; 3 to 6 turns with exponential pauses between them; prompts of whole blocks.

    A turn adds an answer and a question, together 2 to 5 blocks that are the session's own.
    """
    rng = stream(seed, "sessions")
    popularity = [1 / (k + 1) for k in range(NUM_AGENTS)]
    turns: list[tuple[int, tuple[int, ...], int]] = []
    begins_us, next_hash = 0.0, NUM_AGENTS * SYSTEM_TOKENS
    for _ in range(num):
        begins_us += rng.exponential(1e6 / rate_per_s)
        agent = int(rng.choice(NUM_AGENTS, p=[p / sum(popularity) for p in popularity]))
        hashes = [agent * SYSTEM_TOKENS + k for k in range(SYSTEM_TOKENS // BLOCK_TOKENS)]
        turn_us = begins_us
        for _ in range(int(rng.integers(3, 7))):
            grown = int(rng.integers(2, 6))
            hashes += range(next_hash, next_hash + grown)
            next_hash += grown
            turns.append((round(turn_us), tuple(hashes), int(rng.integers(8, 25))))
            turn_us += rng.exponential(think_s * 1e6)
    requests = tuple(
        Request(
            id=RequestId(number),
            arrival_us=us,
            prompt=Prompt(
                num_tokens=len(hashes) * BLOCK_TOKENS + 5, block_hashes=hashes, hash_block_tokens=BLOCK_TOKENS
            ),
            output_tokens=output,
        )
        for number, (us, hashes, output) in enumerate(sorted(turns))
    )
    return Workload(requests=requests, source=f"{num} sessions, {rate_per_s}/s, seed {seed}", seed=seed)


def write_model(folder: Path) -> Path:
    """A checkpoint of random weights, the same every time."""
    generator = torch.Generator().manual_seed(7)
    shapes = expected_shapes(from_transformers(MODEL, source="the benchmark's model"))
    save_file(
        {n: torch.randn(s, generator=generator) * (1.0 if len(s) == 1 else 0.05) for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return folder


def fleet(route: str) -> FleetConfig:
    return FleetConfig(num_instances=NUM_INSTANCES, heartbeat_us=HEARTBEAT_US, route=make_policy("route", route, {}))


def row(run: Run, host: str, route: str, seed: int) -> dict[str, Any]:
    """What is compared of a run."""
    summary, records = summarize_run(run), run.records
    served = [sum(r.instance == k for r in records.requests) for k in range(NUM_INSTANCES)]
    assert summary.ttft_us is not None, "requests were served"
    return {
        "host": host,
        "route": route,
        "seed": seed,
        "requests": len(records.requests),
        "prefix_hit_frac": summary.prefix_hit_frac,
        "ttft_p50_ms": summary.ttft_us.p50 / 1e3,
        "ttft_p90_ms": summary.ttft_us.p90 / 1e3,
        "served": served,
        "makespan_s": summary.makespan_s,
        "busy_frac": summary.busy_frac / NUM_INSTANCES,
    }


def measure(o: argparse.Namespace) -> None:
    """Every policy on engine and simulator, seed by seed."""
    options = EngineOptions(device="cpu", dtype="float32", clock="virtual", timer="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        model = write_model(_made(where / "model"))
        with EngineFleet(replace(options, model=str(model)), NUM_INSTANCES) as engines:

            def served(route: str, seed: int) -> Run:
                work = sessions(o.sessions, o.rate_per_s, o.think_s, seed)
                out = where / f"engine-{route}-{seed}"
                return verbs.replay(
                    work, out=out, engine=engines, fleet=fleet(route), settings=SETTINGS, progress=False
                )

            fitted = verbs.calibrate([served(route, o.seeds[0] + 1000) for route in ("round-robin", "prefix-affinity")])
            for seed in o.seeds:
                for route in ROUTES:
                    run = served(route, seed)
                    found = parity(run)
                    assert found.is_identical, found
                    _print(row(run, "engine", route, seed))
                    _print(row(_simulated(run, fitted, where / f"sim-{route}-{seed}"), "simulator", route, seed))


def _simulated(run: Run, fitted: Calibration, out: Path) -> Run:
    return verbs.simulate(run, fitted, out=out)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _print(value: dict[str, Any]) -> None:
    print(json.dumps({**value, "commit": provenance.commit()[:9]}), flush=True)


def table(path: Path) -> str:
    """Means over the seeds with the least and the largest, best first; and whether both hosts order alike."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = ["| policy | hits, engine | simulator | P90 TTFT ms, engine | simulator |", "|---|---|---|---|---|"]
    cells = {
        (r, h, m): [x[m] for x in rows if x["route"] == r and x["host"] == h]
        for r in ROUTES
        for h in ("engine", "simulator")
        for m in ("prefix_hit_frac", "ttft_p90_ms")
    }
    ranked = sorted(ROUTES, key=lambda r: statistics.mean(cells[r, "engine", "ttft_p90_ms"]))
    for r in ranked:
        told = [_cell(cells[r, h, m]) for m in ("prefix_hit_frac", "ttft_p90_ms") for h in ("engine", "simulator")]
        lines.append(f"| {r} | {' | '.join(told)} |")
    for m, best in (("prefix_hit_frac", -1), ("ttft_p90_ms", 1)):
        means = {h: {r: best * statistics.mean(cells[r, h, m]) for r in ROUTES} for h in ("engine", "simulator")}
        orders = [sorted(ROUTES, key=mean.__getitem__) for mean in means.values()]
        simulated = "the same" if orders[0] == orders[1] else ", ".join(orders[1])
        lines.append(f"\n{m}, best first: engine {', '.join(orders[0])}; simulator {simulated}")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    digits = 3 if max(values) < 1 else 1
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Measure, or draw the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--rate-per-s", type=float, default=8.0, help="sessions that begin in a second")
    parser.add_argument("--think-s", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", type=Path, metavar="ROWS")
    o = parser.parse_args()
    if o.table is not None:
        sys.stdout.write(table(o.table) + "\n")
    else:
        measure(o)


if __name__ == "__main__":
    main()
