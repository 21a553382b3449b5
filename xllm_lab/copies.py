"""Copies of KV blocks between the tiers of one instance: what is asked for, and what became of it.

    device --offload--> host --save--> store        restore and prefetch lead back;
    device -----------push-----------> store        a push is for another instance, which waits for it

asked   start            end                 of one kind, one after another, in the order in which they are asked
  |-----|----- copy -----|                   for; beside the steps
                            ^ the loop hears of it with the first answer at or after its end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from xllm_lab.ledger import BlockKey
from xllm_lab.policies.cache import CopyKind
from xllm_lab.workload import RequestId


class Copy(NamedTuple):
    """Blocks that move, in order of their tokens: blocks[i] of the device, slots[i] of the host, under keys[i].

    Attributes:
        number: 0, 1, 2, ... of its instance.
        request: who waits for it: whose blocks are restored, prefetched or pushed; None: nobody.
        blocks: none where the device has no part in it.
        slots: none where the host has no part in it.
        timeout_us: the store's answer counts for so long; what came later is a miss. None: there is no deadline.
    """

    number: int
    kind: CopyKind
    request: RequestId | None
    blocks: tuple[int, ...]
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    asked_us: int
    timeout_us: int | None = None


@dataclass(slots=True, kw_only=True)
class CopyRecord:
    """One copy of KV blocks between tiers.

    Attributes:
        copy: 0, 1, 2, ... of its instance.
        kind: "offload", from the device to the host, or "restore", back; "save", from the host to the store, or
            "prefetch", back; "push", from the device to the store.
        request: who waits for it.
        blocks, slots: of the device and of the host, where they have a part in it.
        num_tokens: whose KV was asked for.
        num_moved_tokens: whose KV is where it was to go: of what the store was asked for or given, a beginning; None
            as long as nobody knows.
        num_held_blocks: of the device that nobody is handed meanwhile: `blocks`, and those before restored ones.
        evicted: blocks of the host that were given up for it.
        asked_us, end_us: [asked_us, end_us), the time in a queue included; None: the run was over before.
        reason: the policy's word for it.
        instance: which instance of a fleet copied.
    """

    copy: int
    kind: CopyKind
    request: RequestId | None
    blocks: list[int]
    slots: list[int]
    num_tokens: int
    num_moved_tokens: int | None
    num_held_blocks: int
    evicted: list[int]
    asked_us: int
    end_us: int | None
    reason: str
    instance: int = 0


class CopyEnd(NamedTuple):
    """A copy is done, as far as it came.

    Attributes:
        num_blocks: of its blocks, the first that are where they were to go; of none but the store's it may be fewer.
    """

    number: int
    end_us: int
    num_blocks: int


class Copier(Protocol):
    """What copies; the engine's moves bytes, the simulator's takes its time.

    Attributes:
        has_store: whether there is a store below the host.
    """

    @property
    def has_store(self) -> bool: ...

    def launch(self, copy: Copy) -> None:
        """Begin, or queue it behind others of its kind. Steps that were launched before it are done first."""
        ...


NO_COPIES: Sequence[CopyEnd] = ()
