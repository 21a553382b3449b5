"""When do instances that only compute prompts, and others that only go on from there, serve more than equal ones?

    python benchmarks/disaggregation.py simulate > rows.jsonl         # a grid, in the simulator
    python benchmarks/disaggregation.py engine >> rows.jsonl          # some points of it, on engine processes, too
    python benchmarks/disaggregation.py shift --instances 4 --ratios 8 0.25 >> shift.jsonl   # the shape changes midway
    python benchmarks/disaggregation.py table rows.jsonl

At equal numbers of instances, of a load (requests that come in a second, as a part of what the fleet could serve) and a
shape (how many tokens of a prompt for each token of an answer): tokens per second of requests that were served within
their TTFT and TPOT, colocated, with every static split, and with instances that change sides. Promises are times what
an idle instance takes. The crossover is the shape from which on the best split serves more than equal
instances do, at each load.

KV goes ahead of who is handed over, by a store: on the engine a directory in shared memory; --no-store has prompts
computed again. The engine serves in lockstep on processor time, on its own copy of the workload; the simulator is
calibrated on runs of another seed, colocated and split. Alone, the simulator sweeps a machine of figures: --hardware,
--model-config, --store-rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from xllm_lab import provenance, verbs
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import EngineOptions
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.hardware import hardware
from xllm_lab.metrics import meets_slo, summarize
from xllm_lab.policies.catalog import make_policy, policy_name
from xllm_lab.policies.roles import RolesPolicy
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.roles.slo_flip import SloFlip
from xllm_lab.policies.roles.static import Static
from xllm_lab.records import Records
from xllm_lab.request_columns import columns_of
from xllm_lab.run_writer import ROLES_FILE
from xllm_lab.runs import Run
from xllm_lab.sim.cost import Batch, CostModel
from xllm_lab.sim.machine import Deployment, Machine, fitted_machine, model_of, roofline_machine, with_host_link
from xllm_lab.sim.parity import parity
from xllm_lab.step_time import Chunk
from xllm_lab.workload import Prompt, Request, RequestId, Slo, Workload, stream


@dataclass(frozen=True)
class Scale:
    """How large requests are, and what instances have.

    Attributes:
        total_tokens: prompt and answer together, whatever the ratio.
        num_requests: of a point for each instance.
    """

    total_tokens: int
    num_requests: int
    settings: dict[str, int]


SCALES = {
    "figures": Scale(
        2048, 250, {"block_size": 16, "num_kv_blocks": 8000, "max_tokens_per_batch": 2048, "max_seqs_per_batch": 128}
    ),
    "tiny": Scale(
        96, 40, {"block_size": 8, "num_kv_blocks": 400, "max_tokens_per_batch": 128, "max_seqs_per_batch": 16}
    ),
    "smollm2-135m": Scale(
        128, 30, {"block_size": 16, "num_kv_blocks": 600, "max_tokens_per_batch": 256, "max_seqs_per_batch": 16}
    ),
}


@dataclass(frozen=True)
class Point:
    """A fleet's size, and the load that it gets.

    Attributes:
        load: of what the instances could do if each step were full, see `busy_us`.
        ratio: tokens of a prompt for each of an answer.
        ttft_slack, tpot_slack: promises, as times what an idle instance takes: for a mean prompt, for a token.
    """

    num_instances: int
    load: float
    ratio: float
    seed: int
    ttft_slack: float
    tpot_slack: float


def lengths(point: Point, scale: Scale) -> tuple[int, int]:
    """Mean tokens of a prompt and of an answer; at least one and two."""
    prompt = round(scale.total_tokens * point.ratio / (1 + point.ratio))
    return max(1, prompt), max(2, scale.total_tokens - prompt)


def busy_us(cost: CostModel, prompt: int, output: int, num_seqs: int) -> float:
    """What one request takes of an instance: its prompt alone, and its part of steps of half as many as can be."""
    seqs = max(1, num_seqs // 2)
    context = prompt + output // 2
    decode_us = cost.step(Batch((), seqs, seqs * context, context, seqs)).us / seqs
    return cost.step(Batch((Chunk(prompt, 0),), 0, 0, 0, 1)).us + (output - 1) * decode_us


def workload(point: Point, scale: Scale, cost: CostModel) -> Workload:
    """Poisson arrivals; lengths uniform within a quarter of their means; promises of an idle instance."""
    prompt, output = lengths(point, scale)
    one_us = cost.step(Batch((), 1, prompt + output, prompt + output, 1)).us
    slo = Slo(
        ttft_us=round(point.ttft_slack * cost.step(Batch((Chunk(prompt, 0),), 0, 0, 0, 1)).us),
        tpot_us=round(point.tpot_slack * one_us),
    )
    gap_us = busy_us(cost, prompt, output, scale.settings["max_seqs_per_batch"]) / (point.load * point.num_instances)
    rng, now_us = stream(point.seed, "disaggregation"), 0.0
    requests = []
    for number in range(scale.num_requests * point.num_instances):
        now_us += rng.exponential(gap_us)
        own = [max(least, round(mean * rng.uniform(0.75, 1.25))) for mean, least in ((prompt, 1), (output, 2))]
        requests.append(
            Request(
                id=RequestId(number),
                arrival_us=round(now_us),
                prompt=Prompt(num_tokens=own[0]),
                output_tokens=own[1],
                slo=slo,
            )
        )
    return Workload(requests=tuple(requests), source=f"{point}", seed=point.seed)


def roles(num_instances: int) -> Iterator[tuple[str, RolesPolicy]]:
    """Everybody the same, every split, and one that finds its own."""
    yield "colocated", Colocated()
    for num_prefill in range(1, num_instances):
        yield f"{num_prefill} of {num_instances}", Static(num_prefill=num_prefill)
    yield "slo-flip", SloFlip()


def fleet(point: Point, policy: RolesPolicy, work: Workload) -> FleetConfig:
    """Heartbeats and decisions on roles as often as a load of this pace needs: of the time it lasts, a 200th."""
    lasts_us = max(1000, work.requests[-1].arrival_us)
    if isinstance(policy, SloFlip):
        policy = replace(policy, min_dwell_us=max(1, lasts_us // 20), min_return_us=max(1, lasts_us // 4))
    return FleetConfig(
        num_instances=point.num_instances,
        heartbeat_us=max(1, lasts_us // 1000),
        route=make_policy("route", "least-loaded", {"load": "tokens"}),
        roles=policy,
        role_interval_us=max(1, lasts_us // 200),
        role_window_us=max(1, lasts_us // 10),
    )


def _print_rows(slacks: Sequence[float], run: Run, who: tuple[str, str], point: Point, work: Workload) -> None:
    """Of a run by (host, roles), for each promise: nobody decides by it, so one run tells of all; who flips does."""
    one_us = point_tpot_us(work) / point.tpot_slack
    for slack in slacks if who[1] != "slo-flip" else [point.tpot_slack]:
        records = run.records
        for record in records.requests:
            record.tpot_slo_us = round(slack * one_us)
        _print(row(records, *who, replace(point, tpot_slack=slack), work))


def point_tpot_us(work: Workload) -> int:
    """Promised to all."""
    promised = work.requests[0].slo.tpot_us
    assert promised is not None
    return promised


def row(records: Records, host: str, name: str, point: Point, work: Workload) -> dict[str, Any]:
    """What is compared of a run."""
    summary = summarize(records)
    prompt, output = (statistics.mean(n) for n in zip(*_lengths(work), strict=True))
    return {
        "host": host,
        "roles": name,
        **{k: getattr(point, k) for k in ("num_instances", "load", "ratio", "seed", "ttft_slack", "tpot_slack")},
        "prompt_tokens": round(prompt, 1),
        "output_tokens": round(output, 1),
        "goodput_per_s": summary.goodput_per_s,
        "good_frac": summary.slo_attainment_frac,
        "ttft_p90_ms": None if summary.ttft_us is None else summary.ttft_us.p90 / 1e3,
        "tpot_p90_ms": None if summary.tpot_us is None else summary.tpot_us.p90 / 1e3,
        "handed_over": sum(r.handed_over_us is not None for r in records.requests),
        "commit": provenance.commit()[:9],
    }


def _lengths(work: Workload) -> list[tuple[int, int]]:
    return [(r.prompt.num_tokens, r.output_tokens) for r in work.requests]


def points(o: argparse.Namespace) -> Iterator[Point]:
    for num_instances in o.instances:
        for load in o.loads:
            for ratio in o.ratios:
                for seed in o.seeds:
                    yield Point(num_instances, load, ratio, seed, o.ttft_slack, o.tpot_slack[0])


def _chosen(o: argparse.Namespace, num_instances: int) -> list[tuple[str, RolesPolicy]]:
    return [(name, policy) for name, policy in roles(num_instances) if o.flips or name != "slo-flip"]


def sweep(o: argparse.Namespace) -> None:
    """Every point in the simulator, on a machine of figures."""
    machine = roofline_machine(hardware(o.hardware), model_of(o.model_config), Deployment())
    if not o.no_store:
        machine = with_host_link(machine, o.store_rate)
    with tempfile.TemporaryDirectory() as scratch:
        for point in points(o):
            work = workload(point, SCALES["figures"], machine.cost)
            for name, policy in _chosen(o, point.num_instances):
                out = Path(scratch) / "run"
                store = None if o.no_store else f"sim:?bytes_per_s={o.store_rate:g}&latency_us=500"
                run = _simulated(machine, work, fleet(point, policy, work), "figures", out, store=store)
                _print_rows(o.tpot_slack, run, ("simulator", name), point, work)
                _forget(out)


def measure(o: argparse.Namespace) -> None:
    """Every point on engine processes, and in a simulator that was calibrated on others."""
    scale = SCALES.get(o.model, SCALES["tiny"])
    for num_instances in o.instances:
        with _engines(o, num_instances) as (engines, scratch):
            own = [p for p in points(o) if p.num_instances == num_instances]
            if o.calibrated_on:
                machine = fitted_machine(verbs.calibrate(o.calibrated_on))
            else:
                machine = _calibrated(engines, scale, scratch, own)
            hosts = Hosts(engines, machine, scratch)
            for point in own:
                work = workload(point, scale, machine.cost)
                for name, policy in _chosen(o, num_instances):
                    whole = fleet(point, policy, work)
                    for host, run in _on_both(o, hosts, work, whole):
                        _print_rows(o.tpot_slack, run, (host, name), point, work)


@contextlib.contextmanager
def _engines(o: argparse.Namespace, num_instances: int) -> Iterator[tuple[EngineFleet, Path]]:
    """Processes that share a store, and a folder for what they write."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        shared = None if o.no_store else stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        options = EngineOptions(
            model=o.model,
            device="cpu",
            dtype="float32",
            clock="virtual",
            timer="cpu",
            store=None if shared is None else f"dir:{shared}?bytes=4GiB",
        )
        yield stack.enter_context(EngineFleet(options, num_instances)), Path(scratch)


@dataclass(frozen=True)
class Hosts:
    """What serves, what predicts it, and where both write."""

    engines: EngineFleet
    machine: Machine
    scratch: Path


def _on_both(o: argparse.Namespace, hosts: Hosts, work: Workload, whole: FleetConfig) -> Iterator[tuple[str, Run]]:
    """A run of each host, the engine's of proven parity; gone when the next is asked for."""
    out = hosts.scratch / "run"
    run = _served(hosts.engines, work, whole, SCALES.get(o.model, SCALES["tiny"]), out)
    found = parity(run)
    assert found.is_identical, found
    yield "engine", run
    _forget(out)
    yield "simulator", _simulated(hosts.machine, work, whole, o.model, out, store=None if o.no_store else "sim:")
    _forget(out)


def shift(o: argparse.Namespace) -> None:
    """The shape of the load changes midway: who keeps its promises before, right after, and later, on both hosts.

    Each half is as long as its requests take, and is judged by the requests that came in its first and last third.
    """
    scale, num_instances = SCALES.get(o.model, SCALES["tiny"]), o.instances[0]
    with _engines(o, num_instances) as (engines, scratch):
        shapes = [Point(num_instances, o.loads[0], r, o.seeds[0], o.ttft_slack, o.tpot_slack[0]) for r in o.ratios]
        machine = _calibrated(engines, scale, scratch, shapes)
        hosts = Hosts(engines, machine, scratch)
        for seed in o.seeds:
            work, ends_us = _one_after_another([workload(replace(p, seed=seed), scale, machine.cost) for p in shapes])
            for name, policy in roles(num_instances):
                whole = fleet(shapes[0], policy, work)
                for host, run in _on_both(o, hosts, work, whole):
                    _print({"host": host, "roles": name, "seed": seed, **_kept(run, ends_us)})


def _one_after_another(halves: Sequence[Workload]) -> tuple[Workload, list[int]]:
    """And when the last request of each comes."""
    requests: list[Request] = []
    ends_us: list[int] = []
    for half in halves:
        start_us = ends_us[-1] if ends_us else 0
        for r in half.requests:
            requests.append(replace(r, id=RequestId(len(requests)), arrival_us=start_us + r.arrival_us))
        ends_us.append(requests[-1].arrival_us)
    return Workload(requests=tuple(requests), source="shift", seed=halves[0].seed), ends_us


def _kept(run: Run, ends_us: Sequence[int]) -> dict[str, Any]:
    """Of the requests that came in the first and the last third of each half, those served as promised; and flips."""
    kept = []
    for start_us, end_us in pairwise([0, *ends_us]):
        third_us = (end_us - start_us) / 3
        for since_us in (start_us, end_us - third_us):
            came = [r for r in run.records.requests if since_us <= r.arrival_us <= since_us + third_us]
            kept.append(round(sum(int(meets_slo(columns).sum()) for columns in columns_of(came)) / len(came), 3))
    changes = pq.read_table(run.path / ROLES_FILE).to_pylist() if (run.path / ROLES_FILE).exists() else []
    return {
        "kept_frac": kept,
        "ends_us": ends_us,
        "flips": [c for c in changes if c["us"]],
        "commit": provenance.commit()[:9],
    }


def _calibrated(engines: EngineFleet, scale: Scale, scratch: Path, some: Sequence[Point]) -> Machine:
    """On loads of another seed, first at any pace, then at the extremes of what is to be measured, split and not."""
    guess = _first_guess(engines, scale, scratch)
    extremes = {min(some, key=lambda p: p.ratio), max(some, key=lambda p: p.ratio), max(some, key=lambda p: p.load)}
    runs = []
    for number, point in enumerate(sorted(extremes, key=lambda p: (p.ratio, p.load))):
        work = workload(replace(point, seed=point.seed + 1000), scale, guess.cost)
        for policy in (Colocated(), Static()):
            out = scratch / f"calibration-{number}-{policy_name(policy)}"
            runs.append(_served(engines, work, fleet(point, policy, work), scale, out))
    return fitted_machine(verbs.calibrate(runs))


def _first_guess(engines: EngineFleet, scale: Scale, scratch: Path) -> Machine:
    half = scale.total_tokens // 2
    requests = tuple(
        Request(id=RequestId(k), arrival_us=1000 * k, prompt=Prompt(num_tokens=half // 2 + k), output_tokens=half // 2)
        for k in range(24)
    )
    work = Workload(requests=requests, seed=9)
    whole = FleetConfig(num_instances=len(engines.processes.instances))
    return fitted_machine(verbs.calibrate([_served(engines, work, whole, scale, scratch / "guess")]))


def _served(engines: EngineFleet, work: Workload, whole: FleetConfig, scale: Scale, out: Path) -> Run:
    settings = {**scale.settings, "max_model_len": min(2 * scale.total_tokens, engines.model["max_model_len"])}
    _empty(engines.options.store)
    cache = None if engines.options.store is None else "lru"
    return verbs.replay(work, out=out, engine=engines, fleet=whole, settings=settings, progress=False, cache=cache)


def _simulated(
    machine: Machine, work: Workload, whole: FleetConfig, model: str, out: Path, *, store: str | None
) -> Run:
    scale = SCALES.get(model, SCALES["tiny"])
    settings = {**scale.settings, "max_model_len": 2 * scale.total_tokens}
    cache = None if store is None else "lru"
    return verbs.simulate(
        work, machine, out=out, fleet=whole, settings=settings, keep_steps=False, store=store, cache=cache
    )


def _empty(store: str | None) -> None:
    """What the run before left there would be found."""
    if store is not None:
        for file in Path(store.removeprefix("dir:").partition("?")[0]).rglob("*.kv"):
            file.unlink()


def _forget(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def table(path: Path) -> str:
    """Of each host and fleet: goodput of the best split over that of equal instances, by ratio and load; crossovers."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines: list[str] = []
    for host, num, slack in sorted({(r["host"], r["num_instances"], r["tpot_slack"]) for r in rows}):
        own = [r for r in rows if (r["host"], r["num_instances"], r["tpot_slack"]) == (host, num, slack)]
        ratios, loads = (sorted({r[name] for r in own}) for name in ("ratio", "load"))
        whose = f"{host}, {num} instances, TPOT within {slack:g} times an idle one's"
        lines += ["", f"{whose}: goodput of the best split, of equal instances' (and of slo-flip)", ""]
        lines += ["| load | " + " | ".join(f"{ratio:g}:1" for ratio in ratios) + " | crosses at |"]
        lines += ["|---" * (len(ratios) + 2) + "|"]
        for load in loads:
            gains = [_gains(own, load, ratio) for ratio in ratios]
            told = [f"{best:.2f}, {split} ({flip:.2f})" for best, split, flip in gains]
            lines.append(f"| {load:g} | {' | '.join(told)} | {_crossover(ratios, [g[0] for g in gains])} |")
    return "\n".join(lines)


def _gains(rows: Sequence[dict[str, Any]], load: float, ratio: float) -> tuple[float, str, float]:
    """The best split's and slo-flip's goodput over that of equal instances, means over seeds; and which split it is.

    Who changes sides counts as nan if it was left out.
    """
    here = [r for r in rows if (r["load"], r["ratio"]) == (load, ratio)]
    mean = {
        name: statistics.mean(r["goodput_per_s"] for r in here if r["roles"] == name)
        for name in {r["roles"] for r in here}
    }
    split = max((name for name in mean if " of " in name), key=lambda name: (mean[name], name))
    equal = mean["colocated"]
    return (*(_over(mean[split], equal), split), _over(mean.get("slo-flip", math.nan), equal))


def _over(one: float, other: float) -> float:
    return one / other if other else float("inf") if one else 1.0


def _crossover(ratios: Sequence[float], gains: Sequence[float]) -> str:
    """Between which ratios the gain passes 1, on a logarithmic scale; each time that it does."""
    found = []
    for (a, b), (x, y) in zip(pairwise(ratios), pairwise(gains), strict=True):
        if (x - 1) * (y - 1) < 0 and max(x, y) < float("inf"):
            found.append(f"{a * (b / a) ** ((1 - x) / (y - x)):.2g}:1")
    return ", ".join(found) or ("always" if min(gains) > 1 else "never")


def main() -> None:
    """Sweep, measure, or draw the table of either."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_subparsers(dest="verb", required=True)
    num_instances = {"simulate": [2, 3, 4], "engine": [2], "shift": [4]}
    for name, ratios, loads in (
        ("simulate", [0.1, 0.3, 1.0, 3.0, 10.0, 30.0], [0.3, 0.5, 0.7, 0.9]),
        ("engine", [0.3, 3.0, 20.0], [0.5, 0.8]),
        ("shift", [8.0, 0.25], [0.5]),
    ):
        one = verb.add_parser(name)
        one.add_argument("--instances", type=int, nargs="+", default=num_instances[name])
        one.add_argument("--loads", type=float, nargs="+", default=loads)
        one.add_argument("--ratios", type=float, nargs="+", default=ratios)
        one.add_argument("--no-flips", dest="flips", action="store_false", help="leave out who changes sides")
        one.add_argument("--no-store", action="store_true", help="KV does not go ahead: prompts are computed again")
        one.add_argument("--seeds", type=int, nargs="+", default=[0])
        one.add_argument("--ttft-slack", type=float, default=8.0, metavar="X", help="times an idle instance's TTFT")
        # Where decodes are bound by memory many cost hardly more than one; on a CPU they do.
        tpot = 1.6 if name == "simulate" else 4.0
        one.add_argument(
            "--tpot-slack", type=float, nargs="+", default=[tpot], metavar="X", help="times an idle instance's TPOT"
        )
        if name == "simulate":
            one.add_argument("--hardware", default="ascend-910b3")
            one.add_argument("--model-config", default="qwen3-8b")
            one.add_argument(
                "--store-rate", type=float, default=25e9, metavar="BYTES_PER_S", help="and of the host's link"
            )
        else:
            one.add_argument("--model", default="smollm2-135m", help="or the folder of a model")
            runs = "engine runs; without them some are made first"
            one.add_argument("--calibrated-on", type=Path, nargs="*", default=[], metavar="RUN", help=runs)
    verb.add_parser("table").add_argument("rows", type=Path)
    o = parser.parse_args()
    if o.verb == "table":
        sys.stdout.write(table(o.rows) + "\n")
    elif o.verb == "simulate":
        sweep(o)
    elif o.verb == "shift":
        shift(o)
    else:
        measure(o)


if __name__ == "__main__":
    main()
