"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_lab import transforms, verbs
from xllm_lab.errors import ConfigError
from xllm_lab.formats import read_trace
from xllm_lab.workload import Slo, Workload

if TYPE_CHECKING:
    from xllm_lab.engine.engine import EngineOptions


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
    group.add_argument("--rate-per-s", type=float, metavar="R", help="stretch arrivals to this mean rate")
    group.add_argument("--ttft-slo-ms", type=float, metavar="MS")
    group.add_argument("--tpot-slo-ms", type=float, metavar="MS")
    group.add_argument("--e2e-slo-ms", type=float, metavar="MS")


def configuration_options(parser: argparse.ArgumentParser, default_policy: str | None = verbs.DEFAULT_POLICY) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument("--policy", default=default_policy, help="see `xllm-lab policies`")
    group.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="a knob of the instance or the policy"
    )


def engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="smollm2-135m", help="a name, a folder with config.json, or a .gguf file")
    group.add_argument("--device", default="auto")
    group.add_argument("--dtype", default="auto")
    group.add_argument("--threads", type=int, default=1)
    group.add_argument("--clock", default="virtual", help="wall, or virtual: jump over idle gaps")
    group.add_argument("--timer", default="wall", help="what a virtual clock counts: wall or cpu time")


def workload(path: Path, o: argparse.Namespace) -> Workload:
    w = read_trace(path, format=o.format)
    if o.window_s:
        w = transforms.window(w, round(o.window_s[0] * 1e6), round(o.window_s[1] * 1e6))
    if o.requests is not None:
        w = transforms.head(w, o.requests)
    if o.length_scale is not None:
        w = transforms.scale_length(w, o.length_scale)
    if o.max_prompt_tokens is not None or o.max_output_tokens is not None:
        w = transforms.clip_length(w, max_prompt_tokens=o.max_prompt_tokens, max_output_tokens=o.max_output_tokens)
    if o.rate_per_s is not None:
        w = transforms.scale_rate_to(w, o.rate_per_s)
    promises = {k: getattr(o, f"{k}_slo_ms") for k in ("ttft", "tpot", "e2e")}
    if any(v is not None for v in promises.values()):
        w = transforms.with_slo(w, Slo(**{f"{k}_us": v and round(v * 1000) for k, v in promises.items()}))
    return w


def settings(o: argparse.Namespace) -> dict[str, str]:
    pairs = [text.partition("=") for text in o.set]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--set {name!r} is not accepted; accepted: KNOB=VALUE")
    return {name: value for name, _, value in pairs}


def engine(o: argparse.Namespace) -> EngineOptions:
    from xllm_lab.engine.engine import EngineOptions

    return EngineOptions(model=o.model, device=o.device, dtype=o.dtype, threads=o.threads, clock=o.clock, timer=o.timer)
