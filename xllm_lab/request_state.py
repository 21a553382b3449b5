"""A live request: counters that the scheduler moves, and everything else derived from them."""

from __future__ import annotations

import numpy as np

from xllm_lab.ledger import BlockKey, Ledger, block_key
from xllm_lab.records import RequestRecord
from xllm_lab.workload import Request, RequestId, TokenIds


class RequestState:
    """A live request. Policies see it as a `RequestView`; only the scheduler writes to it."""

    __slots__ = (
        "_keys",
        "_ledger",
        "_lookup",
        "_lookup_version",
        "admitted_us",
        "is_running",
        "num_computed",
        "prompt_ids",
        "record",
        "request",
    )

    def __init__(self, request: Request, prompt_ids: TokenIds, ledger: Ledger) -> None:
        self.request = request
        self.prompt_ids = prompt_ids
        self.num_computed = 0
        self.is_running = False
        self.admitted_us = 0
        self.record = RequestRecord(
            id=request.id,
            arrival_us=request.arrival_us,
            prompt_tokens=request.prompt.num_tokens,
            priority=request.priority,
            ttft_slo_us=request.slo.ttft_us,
            tpot_slo_us=request.slo.tpot_us,
            e2e_slo_us=request.slo.e2e_us,
        )
        self._ledger = ledger
        self._keys: list[BlockKey] = []
        self._lookup = (0, 0)
        self._lookup_version = -1

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def arrival_us(self) -> int:
        return self.request.arrival_us

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
    def num_prompt_tokens(self) -> int:
        return self.request.prompt.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.request.prompt.num_tokens + len(self.record.output_token_ids)

    @property
    def num_computed_tokens(self) -> int:
        return self.num_computed if self.is_running else self._cached()[0] * self._ledger.block_size

    @property
    def num_blocks(self) -> int:
        return len(self._ledger.block_table(self.id)) if self.is_running else self._cached()[0]

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

    def token_ids(self, start: int, end: int) -> TokenIds:
        """Tokens [start, end), prompt and output, shape [end - start]."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        output = np.asarray(self.record.output_token_ids[max(0, start - num_prompt) : end - num_prompt], dtype=np.int32)
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
        if self._lookup_version != self._ledger.version:
            self._lookup = self._ledger.lookup(self.reusable_keys())
            self._lookup_version = self._ledger.version
        return self._lookup
