"""Views, and whole scenes, drawn by number for `contract`: small and adversarial, what a policy may meet.

Views need no scheduler, and are consistent: blocks add up, every request fits the pool alone. And they are unkind:
equal arrivals and priorities, pools that are nearly full, prompts half computed, preempted requests, shared and idle
cached prefixes. They are mutable and hash by identity, as the hosts' live objects do, so that a policy which writes or
hashes is seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import RequestId, blocks_to_take, ceil_div, is_decoding
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.workload import Priority, Prompt, Request, Slo, Workload

# 5 us a step, 1 us a token, 1/100 us per token in KV.
STEP_TIME = StepTime(tuple({"eager_us": 5.0, "token_us": 1.0, "kv_read_us": 0.01}.get(t, 0.0) for t in TERMS))
NOW_US = 1000


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnRequest:
    """A `RequestView`."""

    id: RequestId
    arrival_us: int
    priority: int
    ttft_slo_us: int | None
    tpot_slo_us: int | None
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    num_blocks: int
    is_running: bool = False
    num_idle_blocks: int = 0
    num_private_blocks: int = 0
    admitted_us: int = 0
    first_token_us: int | None
    num_preemptions: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnView:
    """A `BatchView`, and its number."""

    number: int
    now_us: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    max_tokens_per_batch: int
    max_seqs_per_batch: int
    running: list[DrawnRequest] = field(default_factory=list)
    waiting: list[DrawnRequest] = field(default_factory=list)
    draining: list[DrawnRequest] = field(default_factory=list)
    step_time: StepTime = STEP_TIME

    @property
    def decoding(self) -> list[DrawnRequest]:
        return type(self.running)(r for r in self.running if is_decoding(r))

    @property
    def prefilling(self) -> list[DrawnRequest]:
        return type(self.running)(r for r in self.running if not is_decoding(r))

    @property
    def num_decode_blocks(self) -> int:
        return sum(blocks_to_take(self, r, 1) for r in self.decoding)

    def find(self, request: RequestId) -> DrawnRequest | None:
        return next((r for r in (*self.running, *self.waiting) if r.id == request), None)


def drawn_view(number: int) -> DrawnView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"view {number}")
    num_blocks = rng.randint(2, 40)
    view = DrawnView(
        number=number,
        now_us=NOW_US,
        block_size=rng.choice((1, 2, 4, 16)),
        num_blocks=num_blocks,
        num_free_blocks=num_blocks,
        max_tokens_per_batch=rng.choice((1, 3, 8, 20, 64, 200)),
        max_seqs_per_batch=rng.randint(1, 8),
    )
    ids = [RequestId(i) for i in rng.sample(range(50), 16)]
    num_running = rng.randint(0, 8)
    for request_id in ids[:num_running]:
        _run_one_more(rng, view, request_id)
    for request_id in ids[num_running : num_running + rng.randint(0, 6)]:
        _queue_one_more(rng, view, request_id)
    _drain_some(random.Random(f"draining {number}"), view)
    return view


def drawn_scene(number: int) -> tuple[InstanceConfig, Workload]:
    """The instance and the workload of that number: a few requests that crowd a small pool."""
    rng = random.Random(f"scene {number}")
    config = InstanceConfig(
        max_tokens_per_batch=rng.choice((1, 7, 16, 60)),
        max_seqs_per_batch=rng.randint(1, 4),
        block_size=4,
        num_kv_blocks=rng.choice((12, 13, 16, 30)),
        enable_prefix_cache=rng.random() < 0.5,
        async_scheduling=rng.choice(ASYNC_SCHEDULING),
    )
    return config, Workload(requests=tuple(_drawn_request(rng, i) for i in range(rng.randint(1, 8))))


def _drawn_request(rng: random.Random, number: int) -> Request:
    hashes = tuple(range(rng.randint(0, 8)))
    return Request(
        id=RequestId(number),
        arrival_us=rng.choice((0, 0, 10, 60)),
        prompt=Prompt(num_tokens=rng.randint(1, 35), block_hashes=hashes, hash_block_tokens=4),
        output_tokens=rng.randint(1, 12),
        priority=rng.choice(tuple(Priority)),
        slo=Slo(ttft_us=rng.choice((None, 5, 100)), tpot_us=rng.choice((None, 1, 40))),
    )


def _run_one_more(rng: random.Random, view: DrawnView, request_id: RequestId) -> None:
    """A running request that shares its first blocks with the one before it, or none; not if the pool is too full."""
    request = _request(rng, view, request_id)
    most = request.num_tokens - 1
    decodes = request.num_tokens > request.num_prompt_tokens and rng.random() < 0.8
    request.num_computed_tokens = most if decodes else rng.randint(1, most)
    request.num_blocks = ceil_div(request.num_computed_tokens, view.block_size)
    full = request.num_computed_tokens // view.block_size
    neighbour = view.running[-1] if view.running else None
    shared = 0
    # Only a neighbour that shares nothing yet: then every shared block has two users, and sums stay easy.
    if neighbour is not None and neighbour.num_private_blocks == neighbour.num_blocks and rng.random() < 0.3:
        shared = rng.randint(0, min(full, neighbour.num_computed_tokens // view.block_size))
    if request.num_blocks - shared > view.num_free_blocks:
        return
    if neighbour is not None:
        neighbour.num_private_blocks -= shared
    request.num_private_blocks = request.num_blocks - shared
    request.admitted_us = rng.choice((request.arrival_us, 600, 900))
    request.is_running = True
    view.num_free_blocks -= request.num_private_blocks
    view.running.append(request)


def _drain_some(rng: random.Random, view: DrawnView) -> None:
    """Of some views a decoding request or two have all their tokens scheduled."""
    for request in rng.sample(view.decoding, min(len(view.decoding), rng.choice((0, 0, 1, 2)))):
        view.running.remove(request)
        view.draining.append(request)


def _queue_one_more(rng: random.Random, view: DrawnView, request_id: RequestId) -> None:
    """A waiting request: fresh or preempted, with a cached prefix of which some blocks are idle, or without."""
    request = _request(rng, view, request_id)
    used = view.num_blocks - view.num_free_blocks
    most = min((request.num_tokens - 1) // view.block_size, view.num_blocks)
    request.num_blocks = rng.choice((0, rng.randint(0, most)))
    # A cached prefix is held at its root and idle towards its leaf; what is held is among the used blocks.
    least_idle = max(0, request.num_blocks - used)
    most_idle = min(request.num_blocks, view.num_free_blocks)
    request.num_idle_blocks = rng.randint(least_idle, max(least_idle, most_idle))
    request.num_computed_tokens = request.num_blocks * view.block_size
    if request.num_tokens > request.num_prompt_tokens:
        request.num_preemptions = rng.randint(1, 4)
    view.waiting.append(request)


def _request(rng: random.Random, view: DrawnView, request_id: RequestId) -> DrawnRequest:
    num_tokens = rng.randint(2, min(60, view.num_blocks * view.block_size))
    num_prompt_tokens = rng.choice((num_tokens, rng.randint(1, num_tokens)))
    return DrawnRequest(
        id=request_id,
        arrival_us=rng.choice((0, 0, 100, 500)),
        priority=rng.choice((1, 2, 2, 3)),
        ttft_slo_us=rng.choice((None, 300, 1010, 2000)),
        tpot_slo_us=rng.choice((None, 20, 100)),
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        num_computed_tokens=0,
        num_blocks=0,
        first_token_us=rng.choice((510, 700)) if num_tokens > num_prompt_tokens else None,
        num_preemptions=rng.choice((0, 0, 1, 3)),
    )
