"""What a cache policy sees of the tiers of one instance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from xllm_lab.copy_time import CopyTime
from xllm_lab.policies.cache import CachedBlock
from xllm_lab.step_time import StepTime
from xllm_lab.workload import RequestId

if TYPE_CHECKING:
    from xllm_lab.tiering import Tiering


class Waiting(NamedTuple):
    """A `WaitingView`."""

    id: RequestId
    arrival_us: int
    priority: int
    num_tokens: int
    num_device_blocks: int
    num_idle_blocks: int
    num_host_blocks: int
    num_unasked_blocks: int


@dataclass(slots=True, kw_only=True)
class TiersView:
    """A `CacheView`."""

    now_us: int
    num_free_blocks: int
    num_clean_blocks: int
    num_outstanding_tokens: int
    waiting: Sequence[Waiting]
    tiering: Tiering

    @property
    def block_size(self) -> int:
        return self.tiering.ledger.block_size

    @property
    def num_blocks(self) -> int:
        return self.tiering.ledger.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self.tiering.host.num_slots

    @property
    def num_free_host_blocks(self) -> int:
        return self.tiering.host.num_free_slots

    @property
    def num_offloading(self) -> int:
        return self.tiering.num_under_way("offload")

    @property
    def num_restoring(self) -> int:
        return self.tiering.num_under_way("restore")

    @property
    def has_store(self) -> bool:
        return self.tiering.copier.has_store

    @property
    def num_saving(self) -> int:
        return self.tiering.num_under_way("save")

    @property
    def num_prefetching(self) -> int:
        return self.tiering.num_under_way("prefetch")

    @property
    def step_time(self) -> StepTime | None:
        return self.tiering.step_time

    @property
    def copy_time(self) -> CopyTime | None:
        return self.tiering.copy_time

    def idle(self) -> Iterator[CachedBlock]:
        return (self.tiering.uses.of(block, key) for block, key in self.tiering.idle_blocks())

    def is_idle(self, block: int) -> bool:
        key = self.tiering.ledger.uncopied_key(block)
        return key is not None and key not in self.tiering.host

    def is_hosted(self, block: int) -> bool:
        return self.tiering.host.is_unread(block)

    def hosted(self) -> Iterator[CachedBlock]:
        return (self.tiering.uses.of(slot, key) for slot, key in self.tiering.host.unread())

    def unsaved(self) -> Iterator[CachedBlock]:
        tiering = self.tiering
        return (tiering.uses.of(slot, key) for slot, key in tiering.host.unsaved() if self.has_store)

    def is_unsaved(self, block: int) -> bool:
        return self.has_store and self.tiering.host.is_unsaved(block)
