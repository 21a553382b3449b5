"""A pages policy at work: what a step needs mapped is found, and the policy says what besides. Alike in both hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger
from xllm_lab.lockstep import Lockstep
from xllm_lab.policies.api import ceil_div
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.pages import PagesPolicy
from xllm_lab.policies.pages.on_demand import ON_DEMAND
from xllm_lab.policies.pages_checks import pages_violations
from xllm_lab.request_state import RequestState
from xllm_lab.slots import FreeSlot, Slots
from xllm_lab.step import PageMoves, PageRun, Step
from xllm_lab.workload import RequestId


@dataclass(slots=True)
class PageCounts:
    """Pages, in all steps.

    Attributes:
        mapped: on the way of a step that needed them; the step waited.
        ahead, hit: mapped ahead; and of those, found right when they were entered.
        reused: needed, and found as an earlier request had left them.
        unmapped: given up.
    """

    mapped: int = 0
    ahead: int = 0
    hit: int = 0
    reused: int = 0
    unmapped: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def num_slots(config: InstanceConfig) -> int:
    """Slots that are always enough.

    Nobody shares the last block of its table when it is given, so no more requests hold KV than there are blocks; and
    each may have followed one that still has a row in a step under way.
    """
    return config.num_kv_blocks * (1 if config.async_scheduling == "off" else 2)


def pages_per_slot(config: InstanceConfig) -> int:
    """Of the longest context, and a token more: the row in vain of a request that ended."""
    return ceil_div(config.max_model_len + 1, config.block_size)


class VirtualKv:
    """The slots of one instance, and the policy that looks after them.

    Attributes:
        policy: what decides.
        slots: the bookkeeping.
        counts: of steps that were planned.
    """

    def __init__(self, policy: PagesPolicy, config: InstanceConfig) -> None:
        self.policy, self._config = policy, config
        self.counts = PageCounts()
        self.slots = Slots(num_slots(config), pages_per_slot(config))
        self._guessed: set[tuple[int, int]] = set()
        self._holds_for = 0

    def reset(self) -> None:
        """The instance lost everything."""
        self.slots = Slots(num_slots(self._config), pages_per_slot(self._config))
        self._guessed.clear()

    def place(
        self, step: Step, ledger: Ledger, lockstep: Lockstep, singles: Sequence[RequestState], kv_tokens: int
    ) -> None:
        """Say of a planned step what is mapped for it, and beside it. PolicyError if the policy plans what is illegal.

        Args:
            singles: requests that decode, and are not in the lockstep yet.
            kv_tokens: of all running requests, after the step.
        """
        maps, num_reused = self._follow(ledger)
        view = _View(self.slots, lockstep, singles, self._config.block_size)
        plan = self.policy.decide(view)
        if broken := pages_violations(view, plan):
            raise PolicyError(f"pages policy {policy_name(self.policy)} at step {step.index}: {'; '.join(broken)}")
        ahead = self._map_ahead(view, ledger, plan.num_ahead) if plan.num_ahead else []
        unmaps = self.slots.reclaim(plan.reclaim) if plan.reclaim else []
        self._forget_guesses(unmaps)
        self._holds_for = plan.holds_for
        self.counts.mapped += sum([run.num_pages for run in maps])
        self.counts.ahead += len(ahead)
        self.counts.unmapped += sum([run.num_pages for run in unmaps])
        size = self._config.block_size
        slots = self.slots
        step.pages = PageMoves(
            *(tuple(maps), tuple(ahead), tuple(unmaps)),
            num_reused=num_reused,
            mapped_tokens=slots.num_mapped * size,
            table_tokens=slots.num_used * size,
            kv_tokens=kv_tokens,
        )

    def most_repeats(self, most: int, step: Step, ahead: Step | None) -> int:
        """How many of `most` repeats of a step, in which nobody takes a block, map and unmap nothing either."""
        if not self.slots.is_settled or (ahead is not None and ahead.pages is not None and not ahead.pages.is_empty):
            return 0
        return min(most, self._holds_for)

    def _follow(self, ledger: Ledger) -> tuple[list[PageRun], int]:
        """What running requests need mapped now, and how many pages they need and have."""
        assert ledger.changed is not None, "the ledger tells whose tables changed"
        maps: list[PageRun] = []
        num_reused = 0
        for request, first in ledger.changed.items():
            table = ledger.block_table(request)
            if not table:
                continue  # gone, or it comes in this very step and has nothing yet
            before = self.slots.num_table_pages(request)
            found_runs, found = self.slots.follow(request, table, first)
            maps += found_runs
            self._forget_guesses(found_runs)
            num_reused += self._count_found(self.slots.slot(request), [page for page in found if page >= before])
        ledger.changed.clear()
        return maps, num_reused

    def _count_found(self, slot: int, found: list[int]) -> int:
        for page in found:
            if (slot, page) in self._guessed:
                self._guessed.remove((slot, page))
                self.counts.hit += 1
            else:
                self.counts.reused += 1
        return len(found)

    def _forget_guesses(self, changed: Sequence[PageRun]) -> None:
        if self._guessed:
            self._guessed.difference_update((r.slot, r.page + k) for r in changed for k in range(r.num_pages))

    def _map_ahead(self, view: _View, ledger: Ledger, num_requests: int) -> list[PageRun]:
        entering = list(islice(view.entering(), num_requests))
        made = []
        for (request, steps), block in zip(entering, ledger.next_blocks(len(entering)), strict=False):
            run = self.slots.guess(request, block, is_next=steps == 1)
            if run is not None:
                made.append(run)
                self._guessed.add((run.slot, run.page))
        return made


class _View:
    """A `PagesView` over live objects."""

    def __init__(self, slots: Slots, lockstep: Lockstep, singles: Sequence[RequestState], block_size: int) -> None:
        self._slots, self._lockstep, self._singles, self.block_size = slots, lockstep, singles, block_size
        self._free: list[FreeSlot] | None = None

    @property
    def free_slots(self) -> Sequence[FreeSlot]:
        if self._free is None:
            self._free = self._slots.free_slots()
        return self._free

    @property
    def num_mapped_pages(self) -> int:
        return self._slots.num_mapped

    @property
    def num_used_pages(self) -> int:
        return self._slots.num_used

    @property
    def steps_to_entering(self) -> int | None:
        for _, steps in self.entering():
            return steps
        return None

    def num_entering(self, num_steps: int) -> int:
        count = 0
        for _, steps in self.entering():
            if steps > num_steps:
                break
            count += 1
        return count

    def entering(self) -> Iterator[tuple[RequestId, int]]:
        """Decoding requests that have tokens to come, in the order in which they take blocks; after how many steps."""
        size = self.block_size
        singles: dict[int, list[RequestState]] = {}
        for state in self._singles:
            singles.setdefault(-state.num_computed_tokens % size, []).append(state)
        for ticks in range(size):
            for state in (*self._lockstep.due(ticks), *singles.get(ticks, ())):
                if state.num_drawn < state.most_output_tokens:
                    yield state.id, ticks + 1


def virtual_kv_of(policy: PagesPolicy, config: InstanceConfig) -> VirtualKv | None:
    """The policy at work; None where KV is paged, and nobody needs to ask.

    Raises:
        ConfigError: a policy that would never be asked.
    """
    if config.kv_layout == "virtual":
        return VirtualKv(policy, config)
    if policy != ON_DEMAND:
        raise ConfigError(
            f"pages is {policy_name(policy)!r}, and kv_layout {config.kv_layout!r} maps no pages; accepted: pages "
            f"{policy_name(ON_DEMAND)!r}, or kv_layout 'virtual'"
        )
    return None
