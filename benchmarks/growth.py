"""Does the simulator's cost grow linearly in requests, and in instances?

    python benchmarks/growth.py measure > growth.jsonl
    python benchmarks/growth.py draw growth.jsonl docs/simulator_growth.svg
    python benchmarks/growth.py table growth.jsonl

`measure` serves the same number of chats (`workloads.py`) per instance on 1 to 256 instances, then 10^3 to 10^6 on 4,
always at the same rate per instance, and prints what `speed.py` prints, without records. A workload of at most
`--repeat-up-to` requests is served `--repeats` times, and its cheapest run counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from speed import AS_VIDUR, CHATS_PER_S, serve, told
from workloads import chat

from xllm_lab.report.drawing import NEUTRAL, SIMULATOR, draw, legend_above

NUM_REQUESTS = (1_000, 10_000, 100_000, 1_000_000)
INSTANCES_OF_REQUESTS = 4
NUM_INSTANCES = (1, 4, 16, 64, 256)

Point = dict[str, Any]


def measure(o: argparse.Namespace) -> None:
    """Print a point a line. The least costly come first, so that an interrupted run is worth something."""
    points = [("instances", n * o.requests_per_instance, n) for n in NUM_INSTANCES]
    points += [("requests", n, INSTANCES_OF_REQUESTS) for n in NUM_REQUESTS if n <= o.most_requests]
    for panel, num_requests, num_instances in points:
        workload = chat(num_requests, CHATS_PER_S * num_instances, o.seed)
        times = o.repeats if num_requests <= o.repeat_up_to else 1
        runs = [serve(workload, num_instances, AS_VIDUR, keep="none", watch=None) for _ in range(times)]
        print(json.dumps({"panel": panel, "seed": o.seed, **told(workload, num_instances, "none", runs)}), flush=True)


def picture(points: Sequence[Point]) -> str:
    """One SVG: CPU seconds over requests, and over instances, each with the line of a constant cost."""
    panels = (
        (f"{INSTANCES_OF_REQUESTS} instances", "requests", "num_requests"),
        (f"{_per_instance(points):,} requests per instance", "instances", "num_instances"),
    )

    def paint(axes: list[Axes]) -> None:
        for axis, (title, panel, size) in zip(axes, panels, strict=True):
            _panel([(p[size], p["cpu_s"]) for p in points if p["panel"] == panel])(axis)
            axis.set_title(title, loc="left")
            axis.set_xlabel(panel)
        axes[0].set_ylabel("CPU seconds")

    return draw("simulator-growth", 620, 250, paint, ncols=2)


def _panel(points: list[tuple[int, float]]) -> Callable[[Axes], None]:
    """Sizes and CPU seconds, and the line with the cost per size of the largest point."""
    sizes, seconds = zip(*sorted(points), strict=True)
    per_size = seconds[-1] / sizes[-1]

    def paint(axis: Axes) -> None:
        axis.plot(sizes, [per_size * n for n in sizes], color=NEUTRAL, linestyle="--", linewidth=1, label="linear")
        axis.plot(sizes, seconds, "o", color=SIMULATOR, markersize=5, label="measured")
        axis.set_xscale("log")
        axis.set_yscale("log")
        legend_above(axis)

    return paint


def _per_instance(points: Sequence[Point]) -> int:
    return next(int(p["num_requests"]) // int(p["num_instances"]) for p in points if p["panel"] == "instances")


def table(points: Sequence[Point]) -> str:
    """Markdown, a row per point."""
    head = (
        "| requests | instances | steps | CPU s | all runs | ms per request | `heapq` M/CPU s | `heapq` per request |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = (
        f"| {p['num_requests']:,} | {p['num_instances']} | {p['num_steps']:,} | {p['cpu_s']:,.2f} "
        f"| {', '.join(f'{s:,.2f}' for s in p['cpu_s_of_all'])} | {p['cpu_s'] / p['num_requests'] * 1e3:.3f} "
        f"| {p['heapq_per_s'] / 1e6:.2f} | {p['heapq_per_request']:,} |"
        for p in sorted(points, key=lambda p: (p["panel"] == "instances", p["num_requests"]))
    )
    return "\n".join((head, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for_measure = verbs.add_parser("measure")
    for_measure.add_argument("--most-requests", type=int, default=NUM_REQUESTS[-1])
    for_measure.add_argument("--requests-per-instance", type=int, default=100)
    for_measure.add_argument("--repeats", type=int, default=3)
    for_measure.add_argument("--repeat-up-to", type=int, default=10_000)
    for_measure.add_argument("--seed", type=int, default=0)
    for verb in ("draw", "table"):
        verbs.add_parser(verb).add_argument("points", type=Path)
    verbs.choices["draw"].add_argument("svg", type=Path)
    o = parser.parse_args()
    if o.verb == "measure":
        measure(o)
        return
    points = [json.loads(line) for line in o.points.read_text().splitlines()]
    if o.verb == "draw":
        o.svg.write_text(picture(points) + "\n")
    else:
        print(table(points))


if __name__ == "__main__":
    main()
