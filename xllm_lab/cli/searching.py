"""Options of `tune`: what is sought, where its book is, who evaluates, and what the engine may be asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xllm_lab.errors import ConfigError


def searching_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--limit", nargs="*", default=[], metavar="METRIC=MOST", help="as ttft_us.p99=2e6; others are out"
    )
    group.add_argument("--second-axis", metavar="METRIC", help="to be small beside: tpot_us.p99, say, or cost")
    group = parser.add_argument_group("execution")
    group.add_argument("--storage", metavar="URL", help="a database, as Optuna takes it; else a journal in the folder")
    group.add_argument("--executor", default="processes", help="who evaluates: processes, or ray")
    group.add_argument("--evaluations", type=Path, metavar="FOLDER", help="of all studies; else one beside --out")
    group = parser.add_argument_group("rising fidelity")
    group.add_argument(
        "--engine-budget",
        type=int,
        metavar="N",
        help="search through all levels, and measure N configurations in the end; 0 stops before the engine",
    )
    group.add_argument(
        "--recorded", type=Path, metavar="RUN", help="an engine run whose outputs say what lookups draft"
    )
    group.add_argument("--engine-requests", type=int, default=64, metavar="N", help="the trace's last, for the engine")
    group.add_argument("--slice", type=int, default=500, metavar="N", help="requests that are simulated first")
    group.add_argument("--model", default="smollm2-135m", help="that the engine serves")
    group.add_argument("--device", default="auto")
    group.add_argument("--dtype", default="auto")
    group.add_argument("--threads", type=int, default=1)
    group.add_argument("--clock", default="virtual", help="wall, or virtual: jump over idle gaps")
    group.add_argument("--timer", default="wall", help="what a virtual clock counts: wall or cpu time")


def searching(o: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `verbs.tune`."""
    known: dict[str, Any] = {
        "limits": dict(map(_limit, o.limit)),
        "second_axis": o.second_axis,
        "storage": o.storage,
        "executor": o.executor,
        "evaluations": o.evaluations,
    }
    if o.engine_budget is None:
        return known
    known |= {"engine_budget": o.engine_budget, "recorded": o.recorded}
    known |= {"engine_requests": o.engine_requests, "slice_requests": o.slice}
    if o.engine_budget:
        from xllm_lab.engine.engine import EngineOptions

        served = {name: getattr(o, name) for name in ("model", "device", "dtype", "threads", "clock", "timer")}
        known["engine"] = EngineOptions(**served, host_link_bytes_per_s=o.host_link)
    return known


def _limit(said: str) -> tuple[str, float]:
    metric, _, most = said.partition("=")
    try:
        return metric, float(most)
    except ValueError:
        raise ConfigError(f"--limit {said!r}; accepted: METRIC=NUMBER, as ttft_us.p99=2e6") from None
