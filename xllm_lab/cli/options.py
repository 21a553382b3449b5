"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab import arrivals, transforms, verbs
from xllm_lab.errors import ConfigError
from xllm_lab.formats import read_trace
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.of_instance import BESIDE
from xllm_lab.settings import DEFAULT
from xllm_lab.workload import ClosedLoop, Slo, Workload

if TYPE_CHECKING:
    from xllm_lab.engine.engine import EngineOptions

ARRIVALS = ("uniform", "poisson", "gamma")


def trace_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("trace", type=Path, nargs=nargs)
    transform_options(parser)


def transform_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trace")
    group.add_argument("--format", help="of the trace; else found from its content")
    group.add_argument("--window-s", nargs=2, type=float, metavar=("START", "END"), help="arrivals in [START, END)")
    group.add_argument("--requests", type=int, metavar="N", help="the first N")
    group.add_argument("--length-scale", type=float, metavar="X", help="prompts and outputs X times as long")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="cut longer prompts")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="cut longer outputs")
    group.add_argument("--sample-frac", type=float, metavar="X", help="keep this fraction, drawn with --trace-seed")
    group.add_argument("--rate-per-s", type=float, metavar="R", help="stretch arrivals to this mean rate")
    group.add_argument("--arrivals", choices=ARRIVALS, help="new arrival times at --rate-per-s")
    group.add_argument("--cv", type=float, default=3.0, help="of the gaps of gamma arrivals; 1 is Poisson")
    group.add_argument("--trace-seed", type=int, default=0, metavar="N", help="of --arrivals and --sample-frac")
    group.add_argument("--clients", type=int, metavar="N", help="closed loop: N clients, one request each at a time")
    group.add_argument("--think-ms", type=float, default=0.0, metavar="MS", help="of a client, between requests")
    group.add_argument("--ttft-slo-ms", type=float, metavar="MS")
    group.add_argument("--tpot-slo-ms", type=float, metavar="MS")
    group.add_argument("--e2e-slo-ms", type=float, metavar="MS")


def configuration_options(parser: argparse.ArgumentParser, *, of_a_run: bool = False) -> None:
    """Policies and knobs. `of_a_run`: those that are not given are a run's own."""
    group = parser.add_argument_group("configuration")
    for decides, default in DEFAULT.policies:
        name = policy_name(default)
        option = "--policy" if decides == "batch" else f"--{decides}"
        else_what = f"the run's, or {name}" if of_a_run else name
        group.add_argument(
            option, metavar="NAME", help=f"{decides} policy, one of `xllm-lab policies`; else {else_what}"
        )
    knob = "a knob of the instance or of a policy; DECISION.KNOB, as draft.depth, where several have one of that name"
    group.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help=knob)


def configuration(o: argparse.Namespace) -> dict[str, Any]:
    """What the verbs take of `configuration_options`."""
    return {"policy": o.policy, "settings": settings(o), **{decides: getattr(o, decides) for decides in BESIDE}}


def engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="smollm2-135m", help="a name, a folder with config.json, or a .gguf file")
    group.add_argument("--device", default="auto")
    group.add_argument("--dtype", default="auto")
    group.add_argument("--threads", type=int, default=1)
    group.add_argument("--clock", default="virtual", help="wall, or virtual: jump over idle gaps")
    group.add_argument("--timer", default="wall", help="what a virtual clock counts: wall or cpu time")
    group.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="processes that share the model")
    group.add_argument(
        "--expert-parallel", action="store_true", help="experts lie whole on those processes, or on a fleet's instances"
    )
    group.add_argument("--expert-dispatch", default="all-gather", metavar="WAY", help="all-gather, or all-to-all")
    group.add_argument("--redundant-experts", type=int, default=0, metavar="N", help="slots of each beside its own")
    ready = "experts that are not copied by then stay where they are"
    group.add_argument("--prepare-timeout-s", type=float, default=30.0, metavar="S", help=ready)
    group.add_argument("--rank-timeout-s", type=float, default=300.0, metavar="S", help="one waits so long for another")
    group.add_argument("--check-ops", action="store_true", help="hold operators' calls against their documented limits")
    group.add_argument(
        "--host-link",
        type=float,
        metavar="BYTES_PER_S",
        help="KV goes to the host and back as over such a link",
    )
    group.add_argument(
        "--store", metavar="STORE", help="KV below the host: dir:/PATH?bytes=20GiB, or mooncake://127.0.0.1:50051"
    )
    group.add_argument("--draft-model", metavar="M", help="for --draft: as --model, or layers of it, layers:0-9,28-29")
    group.add_argument("--graph-pool-mib", type=int, metavar="N", help="of captured graphs; else what is free")


def workload(path: Path, o: argparse.Namespace) -> Workload:
    w = read_trace(path, format=o.format)
    if o.window_s:
        start_us, end_us = (_microseconds("--window-s", s, 1e6) for s in o.window_s)
        w = transforms.window(w, start_us, end_us)
    if o.requests is not None:
        w = transforms.head(w, o.requests)
    if o.length_scale is not None:
        w = transforms.scale_length(w, o.length_scale)
    if o.max_prompt_tokens is not None or o.max_output_tokens is not None:
        w = transforms.clip_length(w, max_prompt_tokens=o.max_prompt_tokens, max_output_tokens=o.max_output_tokens)
    w = _arriving(w, o)
    promises = {
        f"{k}_us": _microseconds(f"--{k}-slo-ms", ms, 1e3)
        for k in ("ttft", "tpot", "e2e")
        if (ms := getattr(o, f"{k}_slo_ms")) is not None
    }
    return transforms.with_slo(w, Slo(**promises)) if promises else w


def _arriving(w: Workload, o: argparse.Namespace) -> Workload:
    if o.sample_frac is not None:
        w = transforms.sample(w, frac=o.sample_frac, seed=o.trace_seed)
    if o.arrivals is not None:
        if o.rate_per_s is None:
            raise ConfigError(f"--arrivals {o.arrivals} needs --rate-per-s")
        num = len(w.requests)
        times = {
            "uniform": lambda: arrivals.uniform(num, o.rate_per_s),
            "poisson": lambda: arrivals.poisson(num, o.rate_per_s, o.trace_seed),
            "gamma": lambda: arrivals.gamma_bursts(num, o.rate_per_s, o.cv, o.trace_seed),
        }
        w = arrivals.with_arrivals(w, times[o.arrivals]())
    elif o.rate_per_s is not None:
        w = transforms.scale_rate_to(w, o.rate_per_s)
    if o.clients is not None:
        loop = ClosedLoop(num_clients=o.clients, think_us=_microseconds("--think-ms", o.think_ms, 1e3))
        w = replace(w, closed_loop=loop)
    return w


def _microseconds(option: str, value: float, unit_us: float) -> int:
    if not math.isfinite(value):
        raise ConfigError(f"{option} is {value}, a finite number is accepted")
    return round(value * unit_us)


def refuse_transforms(o: argparse.Namespace, beside: str) -> None:
    """ConfigError if an option asks to change a trace that is taken as it is."""
    parser = argparse.ArgumentParser()
    transform_options(parser)
    usual = vars(parser.parse_args([]))
    if given := [f"--{name.replace('_', '-')}" for name, value in usual.items() if getattr(o, name) != value]:
        raise ConfigError(f"{', '.join(given)} beside {beside}, which has its requests; accepted: with a trace")


def settings(o: argparse.Namespace) -> dict[str, str]:
    pairs = [text.partition("=") for text in o.set]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--set {name!r} is not accepted; accepted: KNOB=VALUE")
    return {name: value for name, _, value in pairs}


def engine(o: argparse.Namespace) -> EngineOptions:
    from xllm_lab.engine.engine import EngineOptions

    return EngineOptions(
        model=o.model,
        device=o.device,
        dtype=o.dtype,
        threads=o.threads,
        clock=o.clock,
        timer=o.timer,
        check_ops=o.check_ops,
        graph_pool_bytes=None if o.graph_pool_mib is None else o.graph_pool_mib * 2**20,
        tensor_parallel=o.tensor_parallel,
        expert_parallel=o.expert_parallel,
        expert_dispatch=o.expert_dispatch,
        num_redundant_experts=o.redundant_experts,
        rank_timeout_s=o.rank_timeout_s,
        prepare_timeout_s=o.prepare_timeout_s,
        draft_model=o.draft_model,
        host_link_bytes_per_s=o.host_link,
        store=o.store,
    )


def followed(o: argparse.Namespace) -> bool:
    """Whether torchrun started this process as a rank other than 0; it has then served rank 0 to its end."""
    return o.tensor_parallel > 1 and verbs.follow()


def served_fleet_options(parser: argparse.ArgumentParser) -> None:
    """Of a fleet of engine processes, beside `machine.fleet_options`."""
    group = parser.add_argument_group("engine processes")
    group.add_argument("--registry", default="embedded", metavar="URL", help="embedded, or etcd://HOST:PORT/PREFIX")
    group.add_argument("--listen", default="127.0.0.1", metavar="HOST", help="where all of them listen; else loopback")
