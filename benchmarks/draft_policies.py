"""At which load does speculation pay, and how far from the best fixed depth are policies that nobody told the load?

    python benchmarks/draft_policies.py measure --trace AzureLLMInferenceTrace_conv.csv > points.jsonl
    python benchmarks/draft_policies.py table points.jsonl
    python benchmarks/draft_policies.py draw points.jsonl docs/draft_policies.svg
    python benchmarks/draft_policies.py tune --trace AzureLLMInferenceTrace_conv.csv

Two machines, parts of the trace that no default was chosen on, ten loads. A load is a fraction of the rate at which the
machine serves that part without drafts when it waits at once, many times over: output tokens until the last request
leaves the queue, over the time of that. Drafts of half of the requests are kept often, those of the others seldom; what
is kept of a request's drafts depends on the request and the position alone, so policies are compared on the same luck.

`tune` searches batching and drafting together where rows are dear: at a low load whose requests are in a hurry, near
saturation, and on a trace that goes from one to the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from xllm_lab import provenance, transforms
from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.formats import azure
from xllm_lab.hardware import hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.metrics import Summary, summarize
from xllm_lab.policies.catalog import make_policy, policy_name, values_of
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.report.drawing import ENGINE, NEUTRAL, SIMULATOR, draw, legend_above
from xllm_lab.sim.acceptance import LearntAcceptance, MethodProcess, Process, Rates
from xllm_lab.sim.calibrate import Calibration, Residual
from xllm_lab.sim.machine import Machine, fitted_machine, roofline_machine
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.verbs import configure
from xllm_lab.workload import Slo, Workload

METHOD = "mtp"
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DEPTHS = (1, 2, 3, 4, 6, 8)
ADAPTIVE = ("adaptive-pruning", "acceptance-driven", "load-aware")
# Requests of the trace before this one are for choosing defaults, those from there on for this benchmark.
FIRST_HELD_OUT = 9_683
# A lone request without drafts takes 11 ms a token where rows are dear.
HURRIED_TPOT_US = 14_000
# Far more than are served at a time.
NUM_QUEUED = 2000

Point = dict[str, Any]


class Setting(NamedTuple):
    """A machine, and what is asked of it.

    Attributes:
        max_prompt_tokens: of the trace's prompts, so many are kept.
    """

    machine: Machine
    config: InstanceConfig
    slo: Slo
    max_prompt_tokens: int


def acceptance(seed: int) -> LearntAcceptance:
    """A draft behind kept ones is kept with 0.85 or 0.45 in the mean of a kind, which differ within it, too."""

    def process(first: float) -> Process:
        kept = Rates(tuple(first * 0.97**k for k in range(8)), (0.15,) * 8)
        return Process(drafted=Rates((1.0,), (0.0,)), kept=kept, num_requests=100)

    return LearntAcceptance({METHOD: MethodProcess(process(0.7), {"easy": process(0.85), "hard": process(0.45)})}, seed)


def calibration(seed: int = 0) -> Calibration:
    """A made-up machine on which a row is dear: a twentieth of a step that is otherwise empty, from the first on."""
    terms = {"eager_us": 10_000.0, "token_us": 500.0, "kv_read_us": 0.5}
    return Calibration(
        step_time=StepTime(tuple(terms.get(term, 0.0) for term in TERMS)),
        highest=(1e12,) * len(TERMS),
        residual=Residual(mape_frac=0.0, p90_frac=0.0, bias_frac=0.0, num_steps=100),
        model={"name": "made up", "vocab_size": 1000, "kv_bytes_per_token": 100},
        hardware={},
        runs=("none",),
        acceptance=acceptance(seed),
        draft_time=DraftTime({METHOD: Weights(depth_us=500.0, token_us=50.0)}),
    )


@cache
def setting(name: str, seed: int) -> Setting:
    """One of `MACHINES`: Qwen3-8B with a prediction layer on an Ascend 910B2, by roofline; or see `calibration`."""
    config = InstanceConfig(num_kv_blocks=2000, enable_prefix_cache=False, max_seqs_per_batch=128)
    if name == "dear rows":
        slo = Slo(ttft_us=1_500_000, tpot_us=45_000)
        return Setting(fitted_machine(calibration(seed)), config, slo, max_prompt_tokens=256)
    machine = roofline_machine(hardware("ascend-910b2"), known_model("qwen3-8b"))
    slo = Slo(ttft_us=1_000_000, tpot_us=40_000)
    return Setting(replace(machine, acceptance=acceptance(seed)), config, slo, max_prompt_tokens=4096)


MACHINES = ("cheap rows", "dear rows")


@cache
def requests(trace: Path, name: str, seed: int, num: int, first: int) -> Workload:
    """A part of the trace; another one for each seed."""
    part = transforms.part(azure.read(trace), first + seed * num, first + (seed + 1) * num)
    own = setting(name, seed)
    part = transforms.with_slo(transforms.clip_length(part, max_prompt_tokens=own.max_prompt_tokens), own.slo)
    return replace(part, requests=tuple(replace(r, kind="easy" if r.id % 2 else "hard") for r in part.requests))


def serve(own: Setting, workload: Workload, draft: DraftPolicy, beside: Policies | None = None) -> Records:
    return run_simulation(
        workload,
        own.config,
        replace(beside or Policies(make_policy("batch", "decode-first")), draft=draft),
        own.machine.predicts(own.config),
        vocab_size=own.machine.model["vocab_size"],
        step_time=own.machine.step_time,
        draft_time=own.machine.draft_time,
    )


@cache
def capacity_per_s(trace: Path, name: str, seed: int, num: int, first: int) -> float:
    """Requests a second without drafts while the queue is never empty: the part many times over, all at once."""
    part = requests(trace, name, seed, num, first)
    at_once = replace(part, requests=tuple(r.at(0) for r in part.requests))
    copies = -(-NUM_QUEUED // num)
    served = serve(setting(name, seed), transforms.mix(*[at_once] * copies), make_policy("draft", "off")).requests
    until_us = max(r.first_scheduled_us or 0 for r in served)
    done = sum(us <= until_us for r in served for us in r.token_times_us)
    return done / sum(r.output_tokens for r in served) * len(served) / until_us * 1e6


def drafting() -> dict[str, DraftPolicy]:
    """By name: no drafts, every fixed depth, and the adaptive policies as they are, but for the method."""
    fixed = {
        f"fixed {d}": make_policy("draft", "fixed", {"method": METHOD, "num_speculative_tokens": d}) for d in DEPTHS
    }
    adaptive = {name: make_policy("draft", name, {"method": METHOD}) for name in ADAPTIVE}
    return {"off": make_policy("draft", "off"), **fixed, **adaptive}


def points(job: tuple[str, int, float], *, trace: Path, num: int, first: int, only: Sequence[str]) -> list[Point]:
    """Of a machine, a seed and a load, what every policy does."""
    name, seed, load = job
    capacity = capacity_per_s(trace, name, seed, num, first)
    workload = transforms.scale_rate_to(requests(trace, name, seed, num, first), capacity * load)
    told = {"machine": name, "seed": seed, "load": load, "capacity_per_s": capacity}
    return [
        {**told, "policy": policy, **_told(summarize(serve(setting(name, seed), workload, draft)))}
        for policy, draft in drafting().items()
        if not only or policy in only
    ]


def _told(summary: Summary) -> Point:
    assert summary.tpot_us is not None
    assert summary.ttft_us is not None
    return {
        "goodput_per_s": summary.goodput_per_s,
        "slo_attainment_frac": summary.slo_attainment_frac,
        "tpot_us": summary.tpot_us.mean,
        "ttft_p90_us": summary.ttft_us.p90,
        "acceptance_length": summary.acceptance_length,
        "makespan_s": summary.makespan_s,
    }


def measure(o: argparse.Namespace) -> None:
    """Print a point a line."""
    jobs = [(name, seed, load) for seed in o.seeds for name in o.machines for load in o.loads]
    one = partial(points, trace=o.trace, num=o.requests, first=o.first, only=o.policies)
    with ProcessPoolExecutor(o.processes) as pool:
        for some in pool.map(one, jobs):
            for point in some:
                print(json.dumps(point), flush=True)


def traffics(trace: Path, num: int, first: int) -> dict[str, Workload]:
    """What `tune` serves, by name."""
    name = "dear rows"
    capacity, whole = capacity_per_s(trace, name, 0, num, first), requests(trace, name, 0, num, first)
    low, high = (
        transforms.scale_rate_to(transforms.part(whole, *half), capacity * load)
        for half, load in (((0, num // 2), 0.2), ((num // 2, num), 0.95))
    )
    low = transforms.with_slo(low, replace(setting(name, 0).slo, tpot_us=HURRIED_TPOT_US))
    end_us = low.requests[-1].arrival_us
    later = replace(high, requests=tuple(r.at(r.arrival_us + end_us) for r in high.requests))
    return {"load 0.2": low, "load 0.95": high, "0.2, then 0.95": transforms.mix(low, later)}


def search(o: argparse.Namespace) -> None:
    """Print a Markdown table: what a study found, and what other draft policies are worth in its place."""
    default = configure(
        settings={"num_kv_blocks": 2000, "max_seqs_per_batch": 128, "draft.method": METHOD}, draft="fixed"
    )
    print("| traffic | trials | default | best | its drafts | none in their place | best fixed in their place |")
    print("|---|---|---|---|---|---|---|")
    for name, workload in traffics(o.trace, o.requests, o.first).items():
        with tempfile.TemporaryDirectory() as folder:
            study = tune(
                [workload],
                calibration(),
                Space(default, [f"draft.{other}" for other in ("off", *ADAPTIVE)]),
                num_trials=o.trials,
                seed=o.seed,
                out=Path(folder) / "study",
                num_workers=o.processes,
            )
        best = study.best.candidate
        own = setting("dear rows", 0)._replace(config=best.instance)
        fixed = {p: d for p, d in drafting().items() if p not in ADAPTIVE}
        worth = {p: summarize(serve(own, workload, d, best.policies)).goodput_per_s for p, d in fixed.items()}
        off, depth = worth.pop("off"), max(worth, key=lambda p: worth[p])
        knobs = ", ".join(
            f"{knob} {value:.3g}" if isinstance(value, float) else f"{knob} {value}"
            for knob, value in values_of(best.policies.draft).items()
        )
        print(
            f"| {name} | {o.trials} | {study.default.goodput_per_s:,.0f} | {study.best.goodput_per_s:,.0f} "
            f"| {policy_name(best.policies.draft)}: {knobs} | {off:,.0f} | {worth[depth]:,.0f} ({depth}) |",
            flush=True,
        )


def of_load(told: Sequence[Point], machine: str, metric: str) -> Iterator[tuple[float, dict[str, list[float]]]]:
    """By load, a metric of each policy: of all seeds, in their order."""
    here = sorted((p for p in told if p["machine"] == machine), key=lambda p: (p["load"], p["seed"]))
    for load in sorted({p["load"] for p in here}):
        found: dict[str, list[float]] = {}
        for p in here:
            if p["load"] == load:
                found.setdefault(p["policy"], []).append(p[metric])
        yield load, found


def best_fixed(found: dict[str, list[float]]) -> str:
    """Of all depths, none at all included, that with the best mean over the seeds."""
    return max((p for p in found if p not in ADAPTIVE), key=lambda p: statistics.fmean(found[p]))


def loss(found: dict[str, list[float]], policy: str) -> tuple[float, float]:
    """(of the means, of the worst seed) against the best fixed depth; negative where the policy is better."""
    best = found[best_fixed(found)]
    worst = max(1 - own / other for own, other in zip(found[policy], best, strict=True))
    return 1 - statistics.fmean(found[policy]) / statistics.fmean(best), worst


def table(told: Sequence[Point]) -> str:
    """Markdown, a table a machine."""
    lines = []
    for machine in dict.fromkeys(p["machine"] for p in told):
        adaptive = [a for a in ADAPTIVE if any(p["policy"] == a for p in told)]
        lines += ["", f"### {machine}", "", f"| load | off | best fixed | | {' | '.join(adaptive)} |"]
        lines.append("|---" * (4 + len(adaptive)) + "|")
        times = dict(of_load(told, machine, "tpot_us"))
        for load, found in of_load(told, machine, "goodput_per_s"):
            best = best_fixed(found)

            def cell(policy: str, *, found: Any = found, tpot: Any = times[load]) -> str:
                return f"{statistics.fmean(found[policy]):,.0f} ({statistics.fmean(tpot[policy]) / 1e3:.1f})"

            losses = ["{}: {:.1%} (worst {:.1%})".format(cell(a), *loss(found, a)) for a in adaptive]
            lines.append(f"| {load} | {cell('off')} | {cell(best)} | {best} | {' | '.join(losses)} |")
    return "\n".join(lines[1:])


def picture(told: Sequence[Point]) -> str:
    """One SVG: goodput against no drafts over load, a panel a machine."""
    machines = list(dict.fromkeys(p["machine"] for p in told))
    styles = {
        "fixed 1": (NEUTRAL, ":"),
        "fixed 3": (NEUTRAL, "--"),
        "fixed 8": (NEUTRAL, "-"),
        "load-aware": (ENGINE, "--"),
        "adaptive-pruning": (SIMULATOR, "-"),
    }

    def paint(axes: list[Axes]) -> None:
        for axis, machine in zip(axes, machines, strict=True):
            by_load = list(of_load(told, machine, "goodput_per_s"))
            for policy, (colour, line) in styles.items():
                gains = [statistics.fmean(f[policy]) / statistics.fmean(f["off"]) for _, f in by_load]
                axis.plot([load for load, _ in by_load], gains, line, color=colour, label=policy)
            axis.set_title(machine, loc="left")
            axis.set_xlabel("load")
        axes[0].set_ylabel("goodput / goodput without drafts")
        legend_above(axes[-1])

    return draw("draft-policies", 760, 300, paint, ncols=len(machines))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for_measure = verbs.add_parser("measure")
    for_measure.add_argument("--trace", type=Path, required=True)
    for_measure.add_argument("--requests", type=int, default=200)
    for_measure.add_argument("--first", type=int, default=FIRST_HELD_OUT, help="request of the trace")
    for_measure.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    for_measure.add_argument("--loads", type=float, nargs="+", default=LOADS)
    for_measure.add_argument("--machines", nargs="+", choices=MACHINES, default=MACHINES)
    for_measure.add_argument("--policies", nargs="+", default=(), help="these alone")
    for_measure.add_argument("--processes", type=int, default=2)
    for_search = verbs.add_parser("tune")
    for_search.add_argument("--trace", type=Path, required=True)
    for_search.add_argument("--requests", type=int, default=160)
    for_search.add_argument("--first", type=int, default=FIRST_HELD_OUT, help="request of the trace")
    for_search.add_argument("--trials", type=int, default=40)
    for_search.add_argument("--seed", type=int, default=0)
    for_search.add_argument("--processes", type=int, default=2)
    for verb in ("table", "draw"):
        verbs.add_parser(verb).add_argument("points", type=Path)
    verbs.choices["draw"].add_argument("svg", type=Path)
    o = parser.parse_args()
    if o.verb in {"measure", "tune"}:
        print(f"commit {provenance.commit()[:12]}, {provenance.hardware()['cpu']}", file=sys.stderr)
        (measure if o.verb == "measure" else search)(o)
        return
    told = [json.loads(line) for line in o.points.read_text().splitlines()]
    if o.verb == "table":
        print(table(told))
    else:
        o.svg.write_text(picture(told) + "\n")


if __name__ == "__main__":
    main()
