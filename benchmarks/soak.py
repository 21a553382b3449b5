"""Half an hour of bursts on the engine: does anything leak, grow, or get lost?

    python benchmarks/soak.py --minutes 30

Rounds follow one another in one process, each on a new scheduler and KV pool: async scheduling off, on and
length_aware in turns, and every batch policy. A round's requests come in bursts that the pool has no room for, so that
running ones lose their KV; some clients go away, some requests can never run, some stop at an end of text, and half
share prefixes. Before every step the KV ledger is audited; after every round all blocks must be free and the records
must obey the laws of `tests/laws.py`. Memory is read after each round, and must not have grown since the warm-up. One
line a minute, one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for the laws

import numpy as np

from tests.laws import obey_the_laws
from xllm_lab.arrivals import gamma_bursts
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.records import FinishReason, Records
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import WorkloadFeed
from xllm_lab.step import Step
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Slo, Workload, prompt_token_ids, stream

MAY_GROW_FRAC = 0.02
_HASH_TOKENS = 32
# So many, or hardly anybody would stop within the tokens it asks for.
_STOPS = tuple(range(0, 4096, 8))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large and how fast a round is, to suit a model.

    Attributes:
        most_prompt_tokens, most_output_tokens: of a request that can run.
        patience_us: of an impatient client, at most.
    """

    num_requests: int = 48
    rate_per_s: float = 4.0
    most_prompt_tokens: int = 320
    most_output_tokens: int = 64
    patience_us: int = 20_000_000
    max_tokens_per_batch: int = 256
    max_seqs_per_batch: int = 16
    block_size: int = 16
    num_kv_blocks: int = 72
    max_model_len: int = 2048

    def config(self, number: int) -> InstanceConfig:
        return InstanceConfig(
            max_tokens_per_batch=self.max_tokens_per_batch,
            max_seqs_per_batch=self.max_seqs_per_batch,
            block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            max_model_len=self.max_model_len,
            enable_prefix_cache=number % 4 != 3,
            async_scheduling=ASYNC_SCHEDULING[number % len(ASYNC_SCHEDULING)],
        )


class AuditedScheduler(Scheduler):
    """Audits its ledger before it plans."""

    def plan(self, now_us: int) -> Step | None:
        self.ledger.audit()
        return super().plan(now_us)


@dataclass
class Tally:
    """What the rounds were made of; a soak that never preempts shows little."""

    rounds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    def add(self, mode: str, records: Records) -> None:
        self.rounds[mode] += 1
        self.ends.update(str(r.finish_reason) for r in records.requests)
        self.num_requests += len(records.requests)
        self.num_steps += len(records.steps)
        self.num_tokens += sum(sum(s.num_tokens) for s in records.steps)
        self.num_preemptions += sum(r.num_preemptions for r in records.requests)
        self.num_cached_tokens += sum(r.cached_tokens for r in records.requests)

    @property
    def missing(self) -> list[str]:
        """What never happened and should have."""
        wanted = (FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED, FinishReason.REJECTED)
        seen = {mode: self.rounds[mode] for mode in ASYNC_SCHEDULING} | {reason: self.ends[reason] for reason in wanted}
        seen |= {"preemptions": self.num_preemptions, "prefix hits": self.num_cached_tokens}
        return [name for name, times in seen.items() if not times]


def workload(number: int, scale: Scale) -> Workload:
    """The requests of a round, a function of its number."""
    draw = stream(number, "soak")
    arrivals = gamma_bursts(scale.num_requests, scale.rate_per_s, 4.0, seed=number)
    return Workload(requests=tuple(_request(i, us, draw, scale) for i, us in enumerate(arrivals)), seed=number)


def _request(i: int, arrival_us: int, draw: np.random.Generator, scale: Scale) -> Request:
    prompt_tokens = round(8 * (scale.most_prompt_tokens / 8) ** draw.random())
    output_tokens = int(draw.integers(1, scale.most_output_tokens + 1))
    chance = draw.random()
    if chance < 0.04:  # more than the pool, less than the context
        prompt_tokens = scale.num_kv_blocks * scale.block_size + 1
    elif chance < 0.08:
        prompt_tokens = scale.max_model_len
    is_shared, is_drawn, is_promised = (bool(draw.random() < 0.5) for _ in range(3))
    hashes = tuple(range(int(draw.integers(1, 4)))) if is_shared else ()
    patience_us = int(draw.integers(0, scale.patience_us)) if draw.random() < 0.2 else None
    return Request(
        id=RequestId(i),
        arrival_us=arrival_us,
        prompt=Prompt(num_tokens=prompt_tokens, block_hashes=hashes, hash_block_tokens=_HASH_TOKENS),
        output_tokens=output_tokens,
        cancel_us=None if patience_us is None else arrival_us + patience_us,
        sampling=Sampling(temperature=1.2, stop_token_ids=_STOPS, ignore_eos=False) if is_drawn else Sampling(),
        slo=Slo(ttft_us=2_000_000, tpot_us=200_000) if is_promised else Slo(),
    )


class Round(NamedTuple):
    """Which way of scheduling it took, and what came of it."""

    mode: str
    records: Records


def rounds(engine: Engine, scale: Scale) -> Iterator[Round]:
    """Without end; each has been checked when it comes.

    Raises:
        AssertionError: a block leaked, a request is unaccounted for, or a record breaks a law.
    """
    names = tuple(policies("batch"))
    step_time = engine.measure_step_time(scale.config(0))
    for number in count():
        yield _round(engine, scale, number, make_policy("batch", names[number % len(names)]), step_time)


def _round(engine: Engine, scale: Scale, number: int, policy: BatchPolicy, step_time: StepTime) -> Round:
    config, sent, records = scale.config(number), workload(number, scale), Records()
    vocab_size = engine.model.config.vocab_size
    scheduler = AuditedScheduler(config, policy, records, step_time=step_time)
    engine.serve_on(scheduler, WorkloadFeed(sent), lambda r: prompt_token_ids(r, vocab_size=vocab_size, seed=sent.seed))
    scheduler.ledger.audit()
    assert scheduler.ledger.num_used_blocks == 0, f"round {number} leaks {scheduler.ledger.num_used_blocks} KV blocks"
    assert scheduler.num_live == 0, f"round {number} leaves {scheduler.num_live} requests"
    obey_the_laws(sent, config, records.sort(), vocab_size=vocab_size)
    return Round(config.async_scheduling, records)


class Reading(NamedTuple):
    """Of this process, between two rounds."""

    at_s: float
    rss_mb: float
    num_threads: int
    num_files: int


def reading(start_s: float) -> Reading:
    """Resident memory is of now, not the peak."""
    own = Path("/proc/self")
    rss_pages = int((own / "statm").read_text().split()[1])
    rss_mb = rss_pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return Reading(
        time.monotonic() - start_s, rss_mb, len(list((own / "task").iterdir())), len(list((own / "fd").iterdir()))
    )


def slope_mb_per_hour(readings: list[Reading]) -> float:
    """Least squares."""
    hours, rss_mb = np.array([r.at_s for r in readings]) / 3600, np.array([r.rss_mb for r in readings])
    return float(np.polyfit(hours, rss_mb, 1)[0])


def soak(engine: Engine, scale: Scale, *, minutes: float, warm_up_minutes: float) -> dict[str, object]:
    """Rounds for so long, a line a minute; what came of it."""
    tally, readings, start_s, told_minute = Tally(), list[Reading](), time.monotonic(), -1
    for mode, records in rounds(engine, scale):
        tally.add(mode, records)
        readings.append(reading(start_s))
        minute = int(readings[-1].at_s // 60)
        if minute > told_minute:
            told_minute = minute
            ends = ", ".join(f"{n} {reason}" for reason, n in sorted(tally.ends.items()))
            print(
                f"{readings[-1].at_s / 60:5.1f} min, {sum(tally.rounds.values()):3d} rounds, RSS "
                f"{readings[-1].rss_mb:7.1f} MB, {ends}, {tally.num_preemptions} preemptions",
                flush=True,
            )
        if readings[-1].at_s >= minutes * 60:
            break
    warm = [r for r in readings if r.at_s >= warm_up_minutes * 60]
    fifth = max(1, len(warm) // 5)
    first_mb, last_mb = (float(np.median([r.rss_mb for r in part])) for part in (warm[:fifth], warm[-fifth:]))
    return {
        "minutes": round(readings[-1].at_s / 60, 1),
        "rounds": dict(tally.rounds),
        "requests": tally.num_requests,
        "ends": dict(tally.ends),
        "steps": tally.num_steps,
        "tokens": tally.num_tokens,
        "preemptions": tally.num_preemptions,
        "cached_prompt_tokens": tally.num_cached_tokens,
        "leaked_blocks": 0,  # or a round would have failed
        "rss_mb_after_warm_up": round(first_mb, 1),
        "rss_mb_at_the_end": round(last_mb, 1),
        "rss_mb_range": [round(f(r.rss_mb for r in warm), 1) for f in (min, max)],
        "slope_mb_per_hour": round(slope_mb_per_hour(warm), 1),
        "threads": [warm[0].num_threads, warm[-1].num_threads],
        "files": [warm[0].num_files, warm[-1].num_files],
        "never_happened": tally.missing,
        "is_flat": last_mb <= first_mb * (1 + MAY_GROW_FRAC),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-minutes", type=float, default=5.0)
    parser.add_argument("--model", default=EngineOptions().model)
    parser.add_argument("--dtype", default="bfloat16")
    o = parser.parse_args()
    engine = Engine(EngineOptions(model=o.model, device="cpu", dtype=o.dtype))
    found = soak(engine, Scale(), minutes=o.minutes, warm_up_minutes=o.warm_up_minutes)
    print(json.dumps(found, indent=2))
    if found["never_happened"] or not found["is_flat"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
