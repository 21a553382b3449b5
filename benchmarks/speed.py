"""CPU seconds that the simulator pays for a workload, beside this machine's `heapq` rate, and Vidur's figures if given.

    python benchmarks/speed.py azure --trace TRACE.csv --instances 1 4 --records none disk --peer vidur.jsonl
    python benchmarks/speed.py fixed --instances 4
    python benchmarks/speed.py chat --requests 1000000 --instances 64 --repeats 1 --watch 100000

`azure` is set up as Vidur is in `vidur_peer.py`, and so is `chat`; `fixed` as NVIDIA's Dynamo replay is by default.
Records go to disk while a run goes on, complete, and writing them is timed with it; `--records none` throws them away,
as Vidur does when it is timed, and `requests` keeps those of requests but not of steps. `--peer` takes what
`vidur_peer.py` printed, and adds how many times as many `heapq` operations Vidur needed. `--watch` prints memory every
so many requests.

One JSON object a line: the cheapest of `--repeats` runs, and the CPU seconds of all. Only serving is timed; the
workload is made before.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import heapq_per_s
from linear_cost import LIKE_DYNAMO, LIKE_VIDUR, LinearCost
from workloads import MAX_MODEL_LEN, azure_conversation, chat, fixed_length

from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.provenance import build
from xllm_lab.records import RequestRecord
from xllm_lab.run_writer import RunWriter
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.instance import Predicted
from xllm_lab.step import Step
from xllm_lab.workload import Workload

CHATS_PER_S = 1.3  # per instance: Azure's rate over four


@dataclass(frozen=True, slots=True)
class Setup:
    """What every instance is, and how long its steps take."""

    config: InstanceConfig
    policy: DecodeFirst
    cost: LinearCost


AS_VIDUR = Setup(
    InstanceConfig(
        max_tokens_per_batch=512,
        max_seqs_per_batch=128,
        block_size=16,
        num_kv_blocks=7424,  # what Vidur's memory planner gives a 7B model on 80 GB
        enable_prefix_cache=False,
        max_model_len=MAX_MODEL_LEN,
    ),
    # Vidur keeps 1 % of the blocks free and weighs a fresh prompt by its own blocks alone.
    DecodeFirst(max_tokens_per_chunk=512, watermark_frac=0.99, footprint_margin=1.0),
    LIKE_VIDUR,
)
# Defaults of `MockEngineArgs` in ai-dynamo/dynamo, lib/mocker; no two prompts of this workload share a prefix.
AS_DYNAMO = Setup(
    InstanceConfig(
        max_tokens_per_batch=8192,
        max_seqs_per_batch=256,
        block_size=64,
        num_kv_blocks=16_384,
        enable_prefix_cache=False,
        max_model_len=MAX_MODEL_LEN,
    ),
    DecodeFirst(max_tokens_per_chunk=8192, watermark_frac=0.99, footprint_margin=1.0),
    LIKE_DYNAMO,
)


class Unkept:
    """A `Recorder` that throws away what it is given."""

    def __init__(self, on_request: Callable[[], object]) -> None:
        self._on_request = on_request

    def span(self, span: Step) -> None:
        pass

    def request(self, record: RequestRecord) -> None:
        self._on_request()


class Watch:
    """Counts requests that ended, and looks at memory every so many.

    Attributes:
        rss_mib: resident memory by number of ended requests.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self.num_ended = 0
        self.rss_mib = {0: rss_mib()}

    def __call__(self) -> None:
        self.num_ended += 1
        if self._every is not None and self.num_ended % self._every == 0:
            self.rss_mib[self.num_ended] = rss_mib()
            told = f"{self.num_ended} ended, {self.rss_mib[self.num_ended]} MiB, {time.process_time():.1f} CPU s"
            print(told, file=sys.stderr, flush=True)


def rss_mib() -> int:
    """Resident memory now, of Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


@dataclass(frozen=True, slots=True)
class Served:
    """One run.

    Attributes:
        heapq_per_s: mean of before and after.
        disk_mib: of the records.
    """

    num_steps: int
    end_us: int
    cpu_s: float
    heapq_per_s: float
    disk_mib: float
    rss_mib: dict[int, int]

    @property
    def num_operations(self) -> float:
        return self.cpu_s * self.heapq_per_s


def serve(workload: Workload, num_instances: int, setup: Setup, *, keep: str, watch: int | None) -> Served:
    """Serve on equal instances behind a round robin, and say what it cost.

    Args:
        keep: `disk` for complete records, `requests` without those of steps, `none`.
        watch: look at memory whenever so many requests have ended.
    """
    watched, timing, before = Watch(watch), Predicted(setup.cost), heapq_per_s()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with ExitStack() as stack:
            recorder: Unkept | RunWriter = Unkept(watched)
            if keep != "none":
                writer = RunWriter(Path(folder), keep_steps=keep == "disk", on_request=watched)
                recorder = stack.enter_context(writer)
            fleet = Fleet(
                workload,
                FleetConfig(num_instances=num_instances, heartbeat_us=0),
                setup.config,
                Policies(setup.policy),
                timing,
                recorder=recorder,
                vocab_size=32_000,
            )
            if isinstance(recorder, RunWriter):
                recorder.low_water_us = fleet.low_water_us
            fleet.run()
        cpu_s = time.process_time() - start
        disk_mib = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
    assert watched.num_ended == len(workload.requests), "requests are left"
    rate_per_s = (before + heapq_per_s()) / 2
    return Served(timing.num_steps, fleet.now_us, cpu_s, rate_per_s, disk_mib, watched.rss_mib)


def told(workload: Workload, num_instances: int, keep: str, runs: list[Served]) -> dict[str, Any]:
    """The cheapest of several runs, in operations of the `heapq` loop timed before and after each."""
    best, num_requests = min(runs, key=lambda run: run.num_operations), len(workload.requests)
    return {
        "workload": workload.source,
        "build": build(),
        "num_instances": num_instances,
        "records": keep,
        "num_requests": num_requests,
        "num_steps": best.num_steps,
        "simulated_s": best.end_us / 1e6,
        "cpu_s": round(best.cpu_s, 3),
        "cpu_s_of_all": [round(run.cpu_s, 3) for run in runs],
        "requests_per_cpu_s": round(num_requests / best.cpu_s),
        "heapq_per_s": round(best.heapq_per_s),
        "heapq_per_request": round(best.num_operations / num_requests),
        "heapq_per_request_of_all": [round(run.num_operations / num_requests) for run in runs],
        "heapq_per_step": round(best.num_operations / best.num_steps, 2),
        "disk_mib": round(best.disk_mib, 1),
        "rss_mib": best.rss_mib,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def times_fewer(ours: dict[str, Any], peers: list[dict[str, Any]]) -> dict[str, float]:
    """Operations of the peer's cheapest run on as many instances over ours."""
    theirs = [
        p["loop_cpu_s"] * p["heapq_per_s"] / p["num_requests"]
        for p in peers
        if p["num_replicas"] == ours["num_instances"]
    ]
    return {"times_fewer_than_vidur": round(min(theirs) / ours["heapq_per_request"], 1)} if theirs else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("workload", choices=("azure", "fixed", "chat"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--instances", type=int, nargs="+", default=[4])
    parser.add_argument("--records", choices=("disk", "requests", "none"), nargs="+", default=["disk"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--watch", type=int)
    parser.add_argument("--peer", type=Path, nargs="+", default=[])
    o = parser.parse_args()
    if (o.workload == "azure") != (o.trace is not None):
        parser.error("--trace goes with azure, and azure with --trace")
    if o.peer and o.workload != "azure":
        parser.error("--peer was measured on azure; it compares with nothing else")
    if o.repeats < 1:
        parser.error(f"--repeats is {o.repeats}, at least 1 is accepted")
    peers = [json.loads(line) for file in o.peer for line in file.read_text().splitlines()]
    for num_instances in o.instances:
        workload, setup = made(o, num_instances), AS_DYNAMO if o.workload == "fixed" else AS_VIDUR
        for keep in o.records:
            runs = [serve(workload, num_instances, setup, keep=keep, watch=o.watch) for _ in range(o.repeats)]
            ours = told(workload, num_instances, keep, runs)
            print(json.dumps(ours | times_fewer(ours, peers)), flush=True)


def made(o: argparse.Namespace, num_instances: int) -> Workload:
    if o.workload == "azure":
        return azure_conversation(o.trace)
    return fixed_length(o.requests) if o.workload == "fixed" else chat(o.requests, CHATS_PER_S * num_instances)


if __name__ == "__main__":
    main()
