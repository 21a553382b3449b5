"""A cache policy at work in one instance: what it sees of the tiers, and what its plans do to them.

    before a step is planned    decide: the policy; check; act: pin, reserve, launch copies
    a copy is done              offloaded and prefetched blocks can be found in the host, restored ones on the device

The policy is asked whenever there is something that could be copied, and only then. It does not decide on pushes:
those are of requests that go on elsewhere, and wait for them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from xllm_lab.block_uses import BlockUses
from xllm_lab.copied_in_vain import CopiedInVain
from xllm_lab.copies import Copier, Copy, CopyEnd, CopyRecord
from xllm_lab.copy_time import CopyTime
from xllm_lab.errors import PolicyError
from xllm_lab.host_tier import HostTier
from xllm_lab.ledger import BlockKey, Ledger
from xllm_lab.policies.cache import CachePlan, CachePolicy, CopyKind
from xllm_lab.policies.cache_checks import cache_violations
from xllm_lab.policies.catalog import policy_name
from xllm_lab.records import Recorder
from xllm_lab.request_state import RequestState
from xllm_lab.step_time import StepTime
from xllm_lab.tiers_view import TiersView, Waiting
from xllm_lab.workload import RequestId

# Nobody waits for what is saved, and who waits for a push could as well compute anew; but a store that hangs must not
# hold a thread and its blocks for ever.
SAVE_TIMEOUT_US, PUSH_TIMEOUT_US = 5_000_000, 2_000_000


class _UnderWay(NamedTuple):
    """A copy, and what it holds besides its own blocks: the device's blocks before those that are restored."""

    copy: Copy
    record: CopyRecord
    pinned: tuple[int, ...]


class Tiering:
    """The tiers of one instance, and who decides on them.

    Attributes:
        ledger: the device's blocks; a new one when the instance failed.
        host: the host's.
        copier: who copies.
        copy_time, step_time: what the policy is told.
        num_copies: asked for so far.
    """

    def __init__(
        self,
        policy: CachePolicy,
        copier: Copier,
        *,
        num_host_blocks: int,
        step_time: StepTime | None = None,
        copy_time: CopyTime | None = None,
    ) -> None:
        self.policy, self.step_time, self.copy_time = policy, step_time, copy_time
        self.copier, self._num_host_blocks = copier, num_host_blocks
        self.num_copies = 0
        self._recorder: Recorder | None = None
        self._instance = 0

    def serve(self, ledger: Ledger, recorder: Recorder, instance: int) -> None:
        """An instance begins, or begins anew: with empty tiers, and copies that were under way forgotten."""
        self.ledger, self._recorder, self._instance = ledger, recorder, instance
        self.host = HostTier(self._num_host_blocks)
        self._under_way: dict[int, _UnderWay] = {}
        self._fetched_by: dict[BlockKey, int] = {}  # what is being restored or prefetched, by which copy
        self._followers: dict[int, list[RequestId]] = {}  # who waits for each
        self._num_pushes: Counter[RequestId] = Counter()
        self.uses = BlockUses()
        self._seen_version = -1, -1
        self._is_anything_new = False
        self._in_vain = CopiedInVain()

    def num_under_way(self, kind: CopyKind) -> int:
        """Blocks in copies."""
        return sum(len(c.copy.keys) for c in self._under_way.values() if c.copy.kind == kind)

    @property
    def is_copying(self) -> bool:
        return bool(self._under_way)

    def found(self, keys: Sequence[BlockKey], num_cached: int, now_us: int) -> None:
        """A request begins to run: of its keys it found so many on the device, and the host may have others, too."""
        self.uses.add(keys[:num_cached], 0, now_us)
        self.host.touch(keys)
        self._forget()

    def could_copy(self, waiting: Sequence[RequestState]) -> bool:
        """Whether the policy has anything to decide."""
        version = self.ledger.version, self.host.version
        if version != self._seen_version:
            self._seen_version = version
            self._is_anything_new = next(self.idle_blocks(), None) is not None or (
                self.copier.has_store and next(self.host.unsaved(), None) is not None
            )
        return self._is_anything_new or any(self._num_hosted(s) or self._unasked(s) for s in waiting)

    def plan(self, waiting: Sequence[RequestState], now_us: int, num_outstanding_tokens: int) -> list[RequestId]:
        """Ask the policy, and begin what it wants. Returns who waits for a copy from now on.

        Raises:
            PolicyError: an illegal plan; nothing was changed.
        """
        following: list[RequestState] = []
        asking: list[RequestState] = []
        for state in waiting:
            (following if self._follows(state) else asking).append(state)
        if not self.could_copy(asking):
            return [s.id for s in following]
        view = TiersView(
            now_us=now_us,
            num_free_blocks=self.ledger.num_free_blocks,
            num_clean_blocks=self.ledger.num_clean_blocks,
            num_outstanding_tokens=num_outstanding_tokens,
            waiting=[self._shown(s) for s in asking],
            tiering=self,
        )
        plan = self._decided(view)
        # Pinned before anything is reserved, which may evict; copied to the host last, when it is known what of it is
        # read.
        wanted = [(block, key) for block in plan.offload if (key := self.ledger.uncopied_key(block)) is not None]
        self.ledger.pin(plan.offload)
        restoring = [(s, self._cached(s), plan.restore[s.id]) for s in asking if s.id in plan.restore]
        if restoring:
            self._keep_for(asking, restoring[-1][0])
        for _, before, _ in restoring:
            self.ledger.pin(before)
        for state, before, num_blocks in restoring:
            if self._follows(state):  # one whose copy began just now shares its prompt
                self.ledger.unpin(before, goes_first=False)
            else:
                self._restore(state, before, num_blocks, now_us, plan)
            following.append(state)
        if plan.save:
            self._save(plan.save, now_us, plan.reason)
        victims = deque(plan.evict)
        if wanted:
            self._offload(wanted, now_us, plan.reason, victims)
        following += [s for s in asking if s.id in plan.prefetch and self._prefetch(s, now_us, plan, victims)]
        return [s.id for s in following]

    def stepped(self) -> None:
        """A step is planned: nothing was copied in vain."""
        self._in_vain.stepped()

    def refuse_to_starve(self, live: Collection[RequestId], now_us: int) -> None:
        """No step can be planned, and none is under way.

        Raises:
            PolicyError: so much was copied since one was that it will go on.
        """
        if not live:
            self._in_vain.stepped()
        num_all = self.ledger.num_blocks + self.host.num_slots
        if self._in_vain.is_for_ever(next(iter(self._under_way), self.num_copies), self.num_copies, num_all):
            raise PolicyError(
                f"cache policy {policy_name(self.policy)} leaves {len(live)} requests waiting for ever, first of them "
                f"request {min(live)}: from {self._in_vain.since_us} to {now_us} us no step could run, and it copied "
                f"{self._in_vain.num_blocks} blocks, of {num_all} that device and host have"
            )

    def push(self, request: RequestId, blocks: Sequence[int], keys: Sequence[BlockKey], now_us: int) -> None:
        """Give computed blocks of a request to the store, for who goes on with it elsewhere."""
        assert self.copier.has_store, f"request {request} is pushed nowhere"
        self.ledger.pin(blocks)
        self._num_pushes[request] += 1
        number, timeout_us = self.num_copies, PUSH_TIMEOUT_US
        copy = Copy(number, "push", request, tuple(blocks), (), tuple(keys), now_us, timeout_us)
        self._launch(copy, "goes on elsewhere")

    def is_pushing(self, request: RequestId) -> bool:
        """Whether some of its blocks are still on their way to the store."""
        return request in self._num_pushes

    def done(self, end: CopyEnd) -> list[RequestId]:
        """A copy ended. Returns who waited for it. Nobody remembers one of an instance that failed meanwhile."""
        if end.number not in self._under_way:
            return []
        copy, record, pinned = self._under_way.pop(end.number)
        record.end_us, record.num_moved_tokens = end.end_us, end.num_blocks * self.ledger.block_size
        match copy.kind:
            case "offload":
                # As they were offloaded, least recently used first: ends of prompts before their beginnings.
                self.ledger.unpin(copy.blocks[::-1], goes_first=True)
                self.host.filled(copy.slots[::-1])
            case "restore":
                self.ledger.keep(copy.blocks, copy.keys)
                self.ledger.unpin(pinned, goes_first=False)
                self.host.release(copy.slots)
            case "save":
                self.host.release(copy.slots)
            case "prefetch":
                self.host.filled(copy.slots[: end.num_blocks], is_saved=True)
                self.host.not_filled(copy.slots[end.num_blocks :])
            case "push":
                self.ledger.unpin(copy.blocks, goes_first=False)
                return self._pushed(copy)
        if end.number not in self._followers:
            return []
        for key in copy.keys:
            del self._fetched_by[key]
        return self._followers.pop(end.number)

    def _pushed(self, copy: Copy) -> list[RequestId]:
        """Who was waiting for its last push."""
        assert copy.request is not None, "somebody's blocks are pushed"
        self._num_pushes[copy.request] -= 1
        if self._num_pushes[copy.request]:
            return []
        del self._num_pushes[copy.request]
        return [copy.request]

    def idle_blocks(self) -> Iterator[tuple[int, BlockKey]]:
        """Of the device, that nobody uses, that were not copied since, and that the host lacks."""
        return ((block, key) for block, key in self.ledger.uncopied() if key not in self.host)

    def audit(self) -> None:
        """Assert that what is copied is what is pinned and reserved."""
        self.host.audit()
        offloading = [b for c in self._under_way.values() for b in c.copy.blocks if c.copy.kind == "offload"]
        assert len(offloading) == len(set(offloading)), "a block is offloaded twice at once"
        fetched = [k for c in self._under_way.values() for k in c.copy.keys if c.copy.number in self._followers]
        assert sorted(fetched) == sorted(self._fetched_by), "what is fetched is not what copies fetch"
        assert len(fetched) == len(set(fetched)), "a block is fetched twice at once"

    def _decided(self, view: TiersView) -> CachePlan:
        plan = self.policy.decide(view)
        if broken := cache_violations(view, plan):
            raise PolicyError(f"cache policy {policy_name(self.policy)} at {view.now_us} us: {'; '.join(broken)}")
        return plan

    def _shown(self, state: RequestState) -> Waiting:
        idle = state.num_idle_blocks
        return Waiting(
            *(state.id, state.arrival_us, state.priority, state.num_tokens),
            *(state.num_blocks, idle, self._num_hosted(state), len(self._unasked(state))),
        )

    def _num_hosted(self, state: RequestState) -> int:
        """Blocks right behind those on the device that the host has."""
        return self.host.num_leading(state.reusable_keys()[state.num_blocks :])

    def _unasked(self, state: RequestState) -> Sequence[BlockKey]:
        """Keys behind those that device and host have, which the store was not asked for."""
        if not self.copier.has_store or state.has_asked_store:
            return ()
        behind = state.reusable_keys()[state.num_blocks + self._num_hosted(state) :]
        return behind[: next((n for n, key in enumerate(behind) if key in self.host), len(behind))]

    def _follows(self, state: RequestState) -> bool:
        """Whether its first block that is not on the device is being restored, or the first one that the host lacks,
        too, is being prefetched; then it waits for that copy."""
        keys, num = state.reusable_keys(), state.num_blocks
        copy = self._fetched_by.get(keys[num]) if num < len(keys) else None
        if copy is None and self.copier.has_store:
            num += self._num_hosted(state)
            copy = self._fetched_by.get(keys[num]) if num < len(keys) else None
            state.has_asked_store = state.has_asked_store or copy is not None
        if copy is None:
            return False
        self._followers[copy].append(state.id)
        return True

    def _save(self, slots: Sequence[int], now_us: int, reason: str) -> None:
        keys = self.host.read_slots(slots)
        self.host.saves(slots)
        self._launch(Copy(self.num_copies, "save", None, (), tuple(slots), keys, now_us, SAVE_TIMEOUT_US), reason)

    def _make_room(self, num_blocks: int, victims: deque[int]) -> list[int]:
        """Blocks of the host that are given up; one that the same plan restores from stays."""
        evicted = []
        while victims and self.host.num_free_slots < num_blocks:
            if self.host.evict(slot := victims.popleft()):
                evicted.append(slot)
        return evicted

    def _offload(self, wanted: Sequence[tuple[int, BlockKey]], now_us: int, reason: str, victims: deque[int]) -> None:
        """As many as there is room for."""
        evicted = self._make_room(len(wanted), victims)
        room = min(len(wanted), self.host.num_free_slots)
        blocks, keys = tuple([b for b, _ in wanted[:room]]), tuple([k for _, k in wanted[:room]])
        self.ledger.unpin([b for b, _ in wanted[room:]], goes_first=False)
        if blocks:
            slots = tuple([self.host.fill(key) for key in keys])
            self._launch(Copy(self.num_copies, "offload", None, blocks, slots, keys, now_us), reason, evicted=evicted)

    def _prefetch(self, state: RequestState, now_us: int, plan: CachePlan, victims: deque[int]) -> bool:
        """Whether it waits now: for its own blocks, or for another's that shares its prompt."""
        if self._follows(state):
            return True
        wanted = self._unasked(state)[: plan.prefetch[state.id]]
        evicted = self._make_room(len(wanted), victims)
        keys = tuple(wanted[: self.host.num_free_slots])
        if not keys:
            return False
        state.has_asked_store = True
        self.host.touch(state.reusable_keys())
        self.uses.add(keys, state.num_blocks + self._num_hosted(state), now_us)
        slots = tuple([self.host.fill(key) for key in keys])
        number, timeout_us = self.num_copies, plan.prefetch_timeout_us
        self._fetched_by |= dict.fromkeys(keys, number)
        self._followers[number] = [state.id]
        copy = Copy(number, "prefetch", state.id, (), slots, keys, now_us, timeout_us)
        self._launch(copy, plan.reason, evicted=evicted)
        return True

    def _keep_for(self, waiting: Sequence[RequestState], last: RequestState) -> None:
        """Room for restored blocks is made of what nobody waits for, if there is enough of that.

        Or requests that cannot run yet would take each other's blocks for ever.
        """
        for state in reversed(waiting[: waiting.index(last) + 1]):
            self.ledger.touch(self._cached(state))

    def _cached(self, state: RequestState) -> tuple[int, ...]:
        """Blocks of its prompt that the device has."""
        found = [self.ledger.find(key) for key in state.reusable_keys()[: state.num_blocks]]
        return tuple([block for block in found if block is not None])

    def _restore(
        self, state: RequestState, before: tuple[int, ...], num_blocks: int, now_us: int, plan: CachePlan
    ) -> None:
        found = len(before)
        assert found == state.num_blocks, f"request {state.id} has {state.num_blocks} blocks cached, {found} are pinned"
        mine = tuple(state.reusable_keys()[found : found + num_blocks])
        slots = self.host.read(mine)
        blocks = tuple(self.ledger.reserve(num_blocks))
        copy = Copy(self.num_copies, "restore", state.id, blocks, slots, mine, now_us)
        self._fetched_by |= dict.fromkeys(mine, copy.number)
        self._followers[copy.number] = [state.id]
        self._launch(copy, plan.reason, pinned=before)

    def _launch(
        self,
        copy: Copy,
        reason: str,
        *,
        pinned: tuple[int, ...] = (),
        evicted: Sequence[int] = (),
    ) -> None:
        self.num_copies += 1
        record = CopyRecord(
            copy=copy.number,
            kind=copy.kind,
            request=copy.request,
            blocks=list(copy.blocks),
            slots=list(copy.slots),
            num_tokens=len(copy.keys) * self.ledger.block_size,
            num_moved_tokens=None,
            num_held_blocks=len(copy.blocks) + len(pinned),
            evicted=list(evicted),
            asked_us=copy.asked_us,
            end_us=None,
            reason=reason,
            instance=self._instance,
        )
        self._in_vain.launched(len(copy.keys), copy.asked_us)
        self._under_way[copy.number] = _UnderWay(copy, record, pinned)
        assert self._recorder is not None, "an instance serves"
        self._recorder.copy(record)
        self.copier.launch(copy)

    def _forget(self) -> None:
        """Uses of what is nowhere any more, now and then."""
        if len(self.uses) > 2 * (self.ledger.num_blocks + self.host.num_slots):
            self.uses.keep(lambda key: key in self.host or self.ledger.find(key) is not None)
