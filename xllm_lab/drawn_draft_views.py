"""Planned steps as a draft policy meets them, drawn by number for `contract`.

Small and unkind: no room, a block that ends here, requests about to end, counts of nothing and of thousands, methods
that the host lacks, equal arrivals, drafting that is free and drafting that takes longer than the step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.draft import METHODS, RECENT_VERIFICATIONS, Tally


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnDecoding:
    """A `DecodingView`."""

    id: RequestId
    arrival_us: int
    priority: int
    tpot_slo_us: int | None
    num_prompt_tokens: int
    num_tokens: int
    most_drafts: int
    tallies: dict[str, Tally] = field(default_factory=dict)

    @property
    def num_computed_tokens(self) -> int:
        return self.num_tokens - 1

    def tally(self, method: str) -> Tally:
        return self.tallies.get(method, Tally())


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnTimes:
    """A `DraftTimesView`.

    Attributes:
        cheap_rows: up to so many tokens in the step, one more costs next to nothing.
    """

    step_us: float
    token_us: float
    kv_read_us: float
    cheap_rows: int
    call_us: float
    depth_us: float

    def row_us(self, num_tokens: int, num_computed_tokens: int) -> float:
        return self.token_us * (0.01 if num_tokens < self.cheap_rows else 1) + self.kv_read_us * num_computed_tokens

    def draft_us(self, method: str, num_requests: int, depth: int) -> float:
        return self.call_us + self.depth_us * depth if method in ("draft_model", "mtp") else 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnDraftView:
    """A `DraftView`, and its number."""

    number: int
    now_us: int
    decoding: list[DrawnDecoding]
    num_tokens: int
    num_waiting: int
    tokens_left: int
    blocks_left: int
    block_size: int
    methods: list[str]
    times: DrawnTimes | None
    tallies: dict[str, Tally]

    def tally(self, method: str) -> Tally:
        return self.tallies.get(method, Tally())


def drawn_draft_view(number: int) -> DrawnDraftView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"draft view {number}")
    block_size = rng.choice((1, 2, 4, 16))
    decoding = [_request(rng, RequestId(i), block_size) for i in rng.sample(range(50), rng.choice((0, 1, 1, 2, 5, 12)))]
    return DrawnDraftView(
        number=number,
        now_us=1000,
        decoding=decoding,
        num_tokens=len(decoding) + rng.choice((0, 0, 0, 1, 500)),
        num_waiting=rng.choice((0, 0, 1, 9)),
        tokens_left=rng.choice((0, 1, 3, 20, 1000)),
        blocks_left=rng.choice((0, 0, 1, 2, 50)),
        block_size=block_size,
        methods=rng.sample(METHODS, rng.choice((0, 1, 1, 2, 4))),
        times=_times(rng, len(decoding)),
        tallies={m: _tally(rng, 5000) for m in METHODS},
    )


def _request(rng: random.Random, request_id: RequestId, block_size: int) -> DrawnDecoding:
    # Its last block is full, or has room for one draft; or anything.
    edge = block_size * rng.randint(1, 4) - rng.choice((0, 1))
    num_tokens = max(2, rng.choice((edge, rng.randint(2, 300))))
    return DrawnDecoding(
        id=request_id,
        arrival_us=rng.choice((0, 0, 100, 500)),
        priority=rng.choice((1, 2, 2, 3)),
        tpot_slo_us=rng.choice((None, 20, 100)),
        num_prompt_tokens=rng.randint(1, num_tokens - 1),
        num_tokens=num_tokens,
        most_drafts=rng.choice((0, 1, 2, 15)),
        tallies={m: _tally(rng, RECENT_VERIFICATIONS) for m in METHODS},
    )


def _tally(rng: random.Random, most: int) -> Tally:
    """So many verifications or fewer, of drafts that end sooner or later, and of which none, some, or all are kept."""
    drafted: list[int] = []
    accepted: list[int] = []
    left, agreed = rng.choice((0, 1, most, rng.randint(0, most))), rng.choice((0.0, 0.5, 0.95, 1.0))
    kept = left
    while left and len(drafted) < 15 and rng.random() < 0.8:
        kept = min(left, sum(rng.random() < agreed for _ in range(min(kept, 50))))
        drafted.append(left)
        accepted.append(kept)
        left = rng.choice((left, left // 2))
    return Tally(tuple(drafted), tuple(accepted))


def _times(rng: random.Random, num_requests: int) -> DrawnTimes:
    token_us, kv_read_us = rng.choice((0.0, 1.0, 30.0)), rng.choice((0.0, 0.01))
    return DrawnTimes(
        step_us=rng.choice((10.0, 1000.0)) + token_us * num_requests,
        token_us=token_us,
        kv_read_us=kv_read_us,
        cheap_rows=rng.choice((0, 4, 16)),
        call_us=rng.choice((0.0, 5.0, 5000.0)),
        depth_us=rng.choice((0.0, 20.0)),
    )
