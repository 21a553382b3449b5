"""What one serving instance has: budgets and KV. The same in engine and simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from xllm_lab.errors import ConfigError, RequestTooLargeError
from xllm_lab.policies.api import Choice, Flag, Knob, ceil_div
from xllm_lab.workload import Request

# The ledger keeps every block in memory. Of 128 tokens each, so many hold half a billion tokens.
MOST_KV_BLOCKS = 2**22
ASYNC_SCHEDULING = ("off", "on", "length_aware")
KV_LAYOUTS = ("paged", "virtual")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """Names, meanings and defaults are xLLM's flags at 3906f5a, where it has them.

    Attributes:
        max_tokens_per_batch: token budget of a step.
        max_seqs_per_batch: sequence budget of a step.
        block_size: tokens per KV block.
        num_kv_blocks: blocks in the pool; xLLM derives it from `max_memory_utilization` or `max_cache_size`.
        enable_prefix_cache: keep blocks of finished requests for others with the same prefix.
        max_model_len: the model's context; no prompt and output together may exceed it.
        async_scheduling: plan a step while the one before it runs, xLLM's `enable_schedule_overlap`: "off"; "on", where
            a request that ended is in one more step, in vain; or "length_aware", as in vLLM, where an end by length is
            foreseen, who is preempted keeps a token under way, and prompts can be shared once they are scheduled.
        kv_layout: how attention sees a request's KV blocks: "paged", through its block table; or "virtual", xLLM's
            xTensor, as one range of addresses into which they are mapped.
    """

    max_tokens_per_batch: Annotated[int, Knob(64, 10240, log=True), Flag("max_tokens_per_batch")] = 10240
    max_seqs_per_batch: Annotated[int, Knob(4, 200, log=True), Flag("max_seqs_per_batch")] = 200
    block_size: Annotated[int, Choice(16, 32, 64, 128), Flag("block_size")] = 128
    num_kv_blocks: Annotated[int, Knob(32, 4096, log=True)] = 256
    enable_prefix_cache: Annotated[bool, Choice(False, True), Flag("enable_prefix_cache")] = True
    max_model_len: int = 8192
    async_scheduling: Annotated[str, Flag("enable_schedule_overlap")] = "off"
    kv_layout: Annotated[str, Choice("paged", "virtual"), Flag("enable_xtensor")] = "paged"

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_batch", "max_seqs_per_batch", "block_size", "num_kv_blocks", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least 1 is accepted")
        if self.async_scheduling not in ASYNC_SCHEDULING:
            accepted = ", ".join(ASYNC_SCHEDULING)
            raise ConfigError(f"async_scheduling is {self.async_scheduling!r}, accepted: {accepted}")
        if self.kv_layout not in KV_LAYOUTS:
            raise ConfigError(f"kv_layout is {self.kv_layout!r}, accepted: {', '.join(KV_LAYOUTS)}")
        if self.num_kv_blocks > MOST_KV_BLOCKS:
            raise ConfigError(f"num_kv_blocks is {self.num_kv_blocks}, at most {MOST_KV_BLOCKS} is accepted")

    @property
    def num_kv_tokens(self) -> int:
        return self.num_kv_blocks * self.block_size

    def refuse_if_too_large(self, request: Request) -> None:
        """Raise RequestTooLargeError, with the numbers, if the request could never run to its end."""
        length = request.prompt.num_tokens + request.output_tokens
        # The last token is drawn but never computed, so it needs no room; unless a step is planned before it is known
        # to be the last, whose row is wasted.
        blocks = ceil_div(length if self.async_scheduling == "on" else length - 1, self.block_size)
        if length <= self.max_model_len and blocks <= self.num_kv_blocks:
            return
        told = (
            f"request {request.id}: {request.prompt.num_tokens} prompt and {request.output_tokens} output tokens make "
            f"{length}"
        )
        if length > self.max_model_len:
            raise RequestTooLargeError(f"{told}, the context accepts {self.max_model_len}")
        raise RequestTooLargeError(
            f"{told} or {blocks} KV blocks, the whole pool has {self.num_kv_blocks} of {self.block_size} tokens"
        )
