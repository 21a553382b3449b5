"""A live request: counters that the scheduler moves, and everything else derived from them.

A token is counted when the step that draws it is planned, as vLLM does, so that the next step can be planned while
this one runs; the record gets it when that step is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm_lab.ledger import BlockKey, Ledger, block_key
from xllm_lab.policies.draft import Tally
from xllm_lab.records import RequestRecord
from xllm_lab.tallies import RecentTallies, count
from xllm_lab.workload import Request, RequestId, TokenIds

if TYPE_CHECKING:
    from xllm_lab.lockstep import Lockstep


# With the last known token a sequence then has at most 16 query tokens. torch_npu's fused attention takes no more where
# keys are latent (`query_rope`, its documentation in 2.13.0); of plain heads, all that we have, it takes any number.
MOST_DRAFTS = 15
# Of a request that is in none of the scheduler's lists.
NO_QUEUE: list[Any] = []


class RequestState:
    """A live request. Policies see it as a `RequestView`; only the scheduler and its lockstep write to it.

    Attributes:
        most_output_tokens: it leaves with so many: all it asked for, or one, if it goes on elsewhere.
        queue: the scheduler's list that it is in.
        is_draining: all its tokens are scheduled, some are not there yet.
        lockstep: the one that it is a member of.
        offset, joined, ticket: its place there.
        num_published: full blocks that the prefix cache knows.
        hands_over: it goes on elsewhere after its next token.
        num_pushed: full blocks that were given to the store, for who goes on with it.
        has_asked_store: for what device and host had not of its prompt.
    """

    __slots__ = (
        "_computed",
        "_drawn",
        "_keys",
        "_ledger",
        "_lookup",
        "_lookup_version",
        "_table",
        "_tallies",
        "admission_order",
        "admitted_us",
        "arrival_order",
        "arrival_us",
        "hands_over",
        "has_asked_store",
        "id",
        "is_draining",
        "is_running",
        "joined",
        "lockstep",
        "most_output_tokens",
        "num_prompt_tokens",
        "num_published",
        "num_pushed",
        "offset",
        "prompt_ids",
        "queue",
        "record",
        "request",
        "ticket",
    )

    def __init__(
        self,
        request: Request,
        prompt_ids: TokenIds,
        ledger: Ledger,
        record: RequestRecord,
        *,
        hands_over: bool = False,
    ) -> None:
        self.request = request
        self.id = request.id
        self.arrival_us = record.arrival_us
        # `arrival_key` and `admission_key` of the policies' interface, made once.
        self.arrival_order: tuple[int, ...] = (record.arrival_us, request.id)
        self.admission_order: tuple[int, ...] = (0, *self.arrival_order)
        self.num_prompt_tokens = request.prompt.num_tokens
        self.prompt_ids = prompt_ids
        self.record = record
        self.hands_over, self.num_pushed = hands_over and request.output_tokens > record.output_tokens + 1, 0
        self.most_output_tokens = record.output_tokens + 1 if hands_over else request.output_tokens
        self.queue: list[Any] = NO_QUEUE
        self.is_running = self.is_draining = self.has_asked_store = False
        self.admitted_us = 0
        self.offset = self.joined = self.ticket = self.num_published = 0
        self._computed = 0
        self._drawn = record.output_tokens
        self.lockstep: Lockstep | None = None
        self._ledger = ledger
        self._table: Sequence[int] = ()
        self._keys: list[BlockKey] = []
        self._lookup = (0, 0)
        self._lookup_version = -1
        self._tallies: RecentTallies | None = None

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def ttft_slo_us(self) -> int | None:
        return self.request.slo.ttft_us

    @property
    def tpot_slo_us(self) -> int | None:
        return self.request.slo.tpot_us

    @property
    def num_drawn(self) -> int:
        """Output tokens that are there or in a step under way."""
        return self._drawn if self.lockstep is None else self.num_tokens - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        if self.lockstep is not None:
            return self.num_computed_tokens + 1  # who decodes is one token behind
        return self.num_prompt_tokens + self._drawn

    @property
    def num_computed_tokens(self) -> int:
        if self.lockstep is not None:
            return self.offset + self.lockstep.clock
        return self._computed if self.is_running else self._cached()[0] * self._ledger.block_size

    @property
    def num_blocks(self) -> int:
        return len(self._table) if self.is_running else self._cached()[0]

    @property
    def num_idle_blocks(self) -> int:
        return 0 if self.is_running else self._cached()[1]

    @property
    def num_private_blocks(self) -> int:
        return self._ledger.num_private_blocks(self.id)

    @property
    def first_token_us(self) -> int | None:
        return self.record.first_token_us

    @property
    def num_preemptions(self) -> int:
        return self.record.num_preemptions

    @property
    def is_decoding(self) -> bool:
        """As `policies.api.is_decoding`, of a running request."""
        return self.lockstep is not None or (self._drawn > 0 and self._computed == self.num_tokens - 1)

    @property
    def most_drafts(self) -> int:
        """A step draws one token more than it has drafts; the last one needs none."""
        return min(MOST_DRAFTS, self.most_output_tokens - self.num_drawn - 1)

    def tally(self, method: str) -> Tally:
        return Tally() if self._tallies is None else self._tallies.of(method)

    def join(self, lockstep: Lockstep, offset: int) -> None:
        assert self.lockstep is None, f"request {self.id} joins twice"
        assert self.is_decoding, f"request {self.id} joins and does not decode"
        self.offset, self.joined, self.lockstep = offset, lockstep.clock, lockstep

    def leave(self) -> None:
        """It counts for itself from now on."""
        computed = self.num_computed_tokens
        self.lockstep, self.ticket = None, 0
        self._computed, self._drawn = computed, computed + 1 - self.num_prompt_tokens

    def admit(self, now_us: int) -> int:
        """It holds KV from now on; returns how many tokens of it the prefix cache supplied."""
        self._table = self._ledger.attach(self.id, self.reusable_keys())
        self.is_running = True
        self.num_published = len(self._table)
        self._computed = self.num_published * self._ledger.block_size
        self.admitted_us = now_us
        self.admission_order = (now_us, *self.arrival_order)
        return self._computed

    def compute(self, num_tokens: int) -> bool:
        """A step with its next tokens is planned; returns whether that reaches the end, so that one more is drawn."""
        self._computed += num_tokens
        draws = self._computed == self.num_prompt_tokens + self._drawn
        self._drawn += draws
        return draws

    def speculate(self, num_drafts: int) -> None:
        """A step with its last token and drafts behind it is planned; counted as if all of them will be kept."""
        self._computed += 1 + num_drafts
        self._drawn += 1 + num_drafts

    def settle(self, method: str, num_drafts: int, num_accepted: int) -> None:
        """That step is over; what was not kept never was."""
        rejected = num_drafts - num_accepted
        self._computed -= rejected
        self._drawn -= rejected
        if self._tallies is None:
            self._tallies = RecentTallies()
        self._tallies.add(method, num_drafts, num_accepted)
        count(self.record.num_drafted, self.record.num_accepted, num_drafts, num_accepted)

    def lose_kv(self) -> None:
        """It waits again; a token that was still being computed is drawn anew."""
        self.is_running = False
        self._computed = self.num_published = 0
        self._drawn = self.record.output_tokens

    def recount(self) -> None:
        """It waits, and a token came that it had lost sight of."""
        self._drawn = self.record.output_tokens
        self._lookup_version = -1

    def token_ids(self, start: int, end: int) -> TokenIds:
        """Tokens [start, end), prompt and output, shape [end - start].

        Outputs that the host never told are the request's own placeholder, which nobody shares.
        """
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        known = self.record.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        output = np.full(end - max(start, num_prompt), placeholder(self.id), dtype=np.int32)
        output[: len(known)] = known
        return np.concatenate([self.prompt_ids[start:num_prompt], output]) if start < num_prompt else output

    def block_keys(self, num_blocks: int) -> list[BlockKey]:
        """Keys of the first `num_blocks` blocks, all full."""
        size = self._ledger.block_size
        while len(self._keys) < num_blocks:
            start = len(self._keys) * size
            previous = self._keys[-1] if self._keys else b""
            self._keys.append(block_key(previous, self.token_ids(start, start + size)))
        return self._keys[:num_blocks]

    def reusable_keys(self) -> list[BlockKey]:
        """Keys of all full blocks but for the last token, which must be computed for its logits."""
        if not self._ledger.enable_prefix_cache:
            return []
        return self.block_keys((self.num_tokens - 1) // self._ledger.block_size)

    def _cached(self) -> tuple[int, int]:
        if not self._ledger.enable_prefix_cache:
            return 0, 0
        if self._lookup_version != self._ledger.version:
            self._lookup = self._ledger.lookup(self.reusable_keys())
            self._lookup_version = self._ledger.version
        return self._lookup


def placeholder(request: RequestId) -> int:
    """The token that stands for every output of a simulated request; no tokenizer has negative ones."""
    return -1 - request


def new_record(request: Request) -> RequestRecord:
    """The record of a request that has just arrived."""
    return RequestRecord(
        id=request.id,
        arrival_us=request.arrival_us,
        prompt_tokens=request.prompt.num_tokens,
        priority=request.priority,
        ttft_slo_us=request.slo.ttft_us,
        tpot_slo_us=request.slo.tpot_us,
        e2e_slo_us=request.slo.e2e_us,
    )
