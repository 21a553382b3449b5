"""What a store did, in numbers for manifests and reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class StoreCounters:
    """Counts since a store was opened.

    Of the blocks asked for, each is a hit, a miss of one kind, or behind a miss, where nothing is
    looked at:
    `num_asked == num_hits + num_misses + num_behind_a_miss`. A put ends at the first block that failed.

    Attributes:
        num_absent: the store had none, or has forgotten it.
        num_short: less came than a block, or more; nothing, where its owner is gone.
        num_corrupted: the checksum is not that of the bytes.
        num_foreign: a whole block that is not the one asked for.
        num_failed: an error came in its place; `reasons` has it.
        num_late: not there and proven by the deadline.
        read_bytes, written_bytes: of hits, and of blocks put; envelopes included.
        num_evictions: blocks that this process removed to make room; a shelf that evicts by itself does not tell.
        num_left_behind: calls that were still going on when their deadline passed.
        reasons: what shelves said of blocks they could not read or write, and how often.
    """

    num_asked: int = 0
    num_hits: int = 0
    num_absent: int = 0
    num_short: int = 0
    num_corrupted: int = 0
    num_foreign: int = 0
    num_failed: int = 0
    num_late: int = 0
    num_behind_a_miss: int = 0
    read_bytes: int = 0
    num_puts: int = 0
    num_already_there: int = 0
    num_failed_puts: int = 0
    written_bytes: int = 0
    num_evictions: int = 0
    num_left_behind: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def num_misses(self) -> int:
        wrong = self.num_short + self.num_corrupted + self.num_foreign
        return self.num_absent + wrong + self.num_failed + self.num_late
