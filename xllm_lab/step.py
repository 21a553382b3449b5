"""A step: what a host has to run, and when it is over, what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.shapes import ShapePlan, eagerly

EAGERLY = eagerly("no graphs")


class ScheduledChunk(NamedTuple):
    """One request's part of a step: its tokens [num_computed_tokens, num_computed_tokens + num_tokens)."""

    id: RequestId
    num_tokens: int
    num_computed_tokens: int
    samples: bool  # reaches the end of the known tokens, so the next one is drawn


class Draft(NamedTuple):
    """What one request drafted for a step.

    Attributes:
        num_asked: as many as its policy asked for.
        token_ids: guesses at what follows its last known token; in a simulated run placeholders. Maybe none.
    """

    id: RequestId
    method: str
    num_asked: int
    token_ids: tuple[int, ...]


class Work(NamedTuple):
    """What a step was for host and device, microseconds.

        host     |plan, prepare|                 |plan, prepare|
        device                 |---- device -----|     gap     |---- device ----|

    Attributes:
        host_us: planning it and preparing its inputs, drafting included.
        device_us: running it, its tokens drawn.
        gap_us: the device had nothing to do before it, since the step before; None after an idle host.
    """

    host_us: int
    device_us: int
    gap_us: int | None


class PageRun(NamedTuple):
    """Pages [page, page + num_pages) of a slot, and the blocks [block, block + num_pages) that they are to show."""

    slot: int
    page: int
    block: int
    num_pages: int


class PageMoves(NamedTuple):
    """What a step does to the mapping of virtual KV.

    Attributes:
        maps: before it runs, because it needs them.
        ahead: while it runs, for steps to come.
        unmaps: then, too; their `block` is -1.
        num_reused: pages that it began to need and that showed the right block already.
        mapped_tokens: that pages mapped after it could hold, of all slots.
        table_tokens: of those, that the pages of running requests could hold.
        kv_tokens: of those, that are there; prefixes that several share count for each.
    """

    maps: tuple[PageRun, ...] = ()
    ahead: tuple[PageRun, ...] = ()
    unmaps: tuple[PageRun, ...] = ()
    num_reused: int = 0
    mapped_tokens: int = 0
    table_tokens: int = 0
    kv_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the step leaves the mapping as it is."""
        return not (self.maps or self.ahead or self.unmaps)

    def later(self, num_tokens: int) -> PageMoves:
        """The same when so many tokens more are there, which enter no page."""
        return self._replace(kv_tokens=self.kv_tokens + num_tokens)


class StepExperts(NamedTuple):
    """Where the experts lie in a step.

    Attributes:
        placement: how often they had been put elsewhere before.
        slots: of each layer with experts, the expert in each slot of all devices.
        activates: the decision that begins with this step; None: they lay so before.
    """

    placement: int
    slots: tuple[tuple[int, ...], ...]
    activates: int | None = None


class Decodes:
    """The decodes of a step. `kv_tokens` and `max_kv_tokens` are those in KV before it: their sum, the longest."""

    __slots__ = ("clock", "ids", "kv_tokens", "max_kv_tokens", "offsets")

    def __init__(
        self, ids: tuple[RequestId, ...], offsets: tuple[int, ...], clock: int, kv_tokens: int, max_kv_tokens: int
    ) -> None:
        self.ids = ids
        self.offsets = offsets
        self.clock = clock
        self.kv_tokens = kv_tokens
        self.max_kv_tokens = max_kv_tokens

    def later(self, num_ticks: int) -> Decodes:
        """The same requests, `num_ticks` ticks on."""
        kv_tokens = self.kv_tokens + num_ticks * len(self.ids)
        return Decodes(self.ids, self.offsets, self.clock + num_ticks, kv_tokens, self.max_kv_tokens + num_ticks)


NO_DECODES = Decodes((), (), 0, 0, 0)


@dataclass(slots=True)
class Step:
    """What a host has to run, blocks allocated.

    Attributes:
        index: 0, 1, 2, ... of its instance, without gaps.
        start_us: when it starts; a step that was planned ahead gets it late.
        decodes: requests that compute one token, kept as a whole.
        others: the rest, after the decodes in packing order; those with drafts first, which compute them, too.
        turns: per chunk of `others`, how often its request had lost its KV when the step was planned.
        holds_for, keeps_free_blocks: for how many further steps the policy would plan the same, see `BatchPlan`.
        num_waiting, num_used_blocks, num_idle_blocks: after the plan; blocks of requests that end meanwhile included.
        shape: the captured graph that it runs in, or that it runs eagerly; so do its repeats.
        drafts: of everyone who asked for some.
        rows_apart: in its graph each row of drafts is a sequence of its own, that shares its request's blocks.
        draft_us: how long the host waited for drafts, where it was measured. What a draft model computed beside earlier
            steps is not in it.
        pages: of virtual KV; None where KV is paged.
        map_us: how long the host waited for `pages.maps`, where it was measured.
        beside_us: how long the rest of `pages` took beside the step, where it was measured.
        experts: where they lie; None where they are not divided among devices.
        expert_rows_LP: once it is over, what each slot had to do in each of its repeats, see `Mover.row_units`; None if
            nobody counted.
        repeats_until_us: its repeats end with the first that ends at or after this, as something may be decided then.
        held_up_us: how long it waited for a change of experts to take hold, where that is known.
        num_accepted: once it is over: of each of `drafts`, how many tokens were kept.
        num_copies: between tiers, asked for since the instance began until the step was planned.
        num_repeats: how many further steps, all alike, the host may run in one go.
        ends_us: once it is over: its end, and those of the repeats that were run; one begins where the one before ends.
        used_blocks, idle_blocks: then, `num_used_blocks` and `num_idle_blocks` of each.
        work: then, what was measured.
    """

    index: int
    start_us: int
    decodes: Decodes
    others: tuple[ScheduledChunk, ...]
    turns: tuple[int, ...]
    admitted: tuple[RequestId, ...]
    preempted: tuple[RequestId, ...]
    reason: str
    holds_for: int
    keeps_free_blocks: int
    num_waiting: int
    num_used_blocks: int
    num_idle_blocks: int
    instance: int
    shape: ShapePlan = EAGERLY
    drafts: tuple[Draft, ...] = ()
    rows_apart: bool = False
    draft_us: int | None = None
    pages: PageMoves | None = None
    map_us: int | None = None
    beside_us: int | None = None
    experts: StepExperts | None = None
    expert_rows_LP: npt.NDArray[np.int64] | None = None  # noqa: N815
    repeats_until_us: int | None = None
    held_up_us: int | None = None
    num_accepted: tuple[int, ...] = ()
    num_copies: int = 0
    num_repeats: int = 0
    ends_us: Sequence[int] = ()
    used_blocks: Sequence[int] = ()
    idle_blocks: Sequence[int] = ()
    work: Work | None = None

    @property
    def chunks(self) -> tuple[ScheduledChunk, ...]:
        """All of it, request by request."""
        decodes = self.decodes
        clock, members = decodes.clock, zip(decodes.ids, decodes.offsets, strict=True)
        grown = (ScheduledChunk(i, 1, offset + clock, True) for i, offset in members)
        return (*grown, *self.others)

    @property
    def num_logits(self) -> int:
        num_drafts = sum(len(d.token_ids) for d in self.drafts)
        return len(self.decodes.ids) + sum(c.samples for c in self.others) + num_drafts

    @property
    def num_new_tokens(self) -> int:
        """Tokens that it adds to KV, drafts included."""
        return len(self.decodes.ids) + sum([c.num_tokens for c in self.others])
