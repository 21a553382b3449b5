"""A cache policy at work in one instance: what it sees of the tiers, and what its plans do to them.

    before a step is planned    decide: the policy; check; act: pin, reserve, launch copies
    a copy is done              offloaded and prefetched blocks can be found in the host, restored ones on the device

The policy is asked whenever there is something that could be copied, and only then. It does not decide on pushes:
those are of requests that go on elsewhere, and wait for them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xllm_lab.copies import Copier, Copy, CopyEnd, CopyRecord
from xllm_lab.copy_time import CopyTime
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.host_tier import HostTier
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import BlockKey, Ledger
from xllm_lab.policies.cache import CachedBlock, CachePlan, CachePolicy, CopyKind
from xllm_lab.policies.cache.device_only import DeviceOnly
from xllm_lab.policies.cache_checks import cache_violations
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Recorder
from xllm_lab.request_state import RequestState
from xllm_lab.step_time import StepTime
from xllm_lab.workload import RequestId

# Nobody waits for what is saved, and who waits for a push could as well compute anew; but a store that hangs must not
# hold a thread and its blocks for ever.
SAVE_TIMEOUT_US, PUSH_TIMEOUT_US = 5_000_000, 2_000_000
# Blocks copied with no step in between, in times of all that both tiers have. A policy that comes to rest needs no more
# than four: each block once down, up, to the store and from there. Ours need 0.2.
MOST_TIMES_IN_VAIN = 10


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


class _Use:
    """Of a key: how often requests had its block, when one began to last, and how many blocks are before it."""

    __slots__ = ("depth", "last_used_us", "num_uses")

    def __init__(self, depth: int) -> None:
        self.depth, self.last_used_us, self.num_uses = depth, 0, 0


class _UnderWay(NamedTuple):
    """A copy, and what it holds besides its own blocks: the device's blocks before those that are restored."""

    copy: Copy
    record: CopyRecord
    pinned: tuple[int, ...]


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
        return (self.tiering.described(block, key) for block, key in self.tiering.idle_blocks())

    def is_idle(self, block: int) -> bool:
        key = self.tiering.ledger.uncopied_key(block)
        return key is not None and key not in self.tiering.host

    def is_hosted(self, block: int) -> bool:
        return self.tiering.host.is_unread(block)

    def hosted(self) -> Iterator[CachedBlock]:
        return (self.tiering.described(slot, key) for slot, key in self.tiering.host.unread())

    def unsaved(self) -> Iterator[CachedBlock]:
        tiering = self.tiering
        return (tiering.described(slot, key) for slot, key in tiering.host.unsaved() if self.has_store)

    def is_unsaved(self, block: int) -> bool:
        return self.has_store and self.tiering.host.is_unsaved(block)


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
        self._uses: dict[BlockKey, _Use] = {}
        self._seen_version = -1, -1
        self._is_anything_new = False
        # Since a step was planned: blocks copied, and how often all copies that were under way had ended.
        self._num_in_vain = self._num_rounds = self._in_vain_since_us = 0
        self._last_of_round = -1

    def num_under_way(self, kind: CopyKind) -> int:
        """Blocks in copies."""
        return sum(len(c.copy.keys) for c in self._under_way.values() if c.copy.kind == kind)

    @property
    def is_copying(self) -> bool:
        return bool(self._under_way)

    def found(self, keys: Sequence[BlockKey], num_cached: int, now_us: int) -> None:
        """A request begins to run: of its keys it found so many on the device, and the host may have others, too."""
        self.used(keys[:num_cached], 0, now_us)
        self.host.touch(keys)
        self._forget()

    def used(self, keys: Sequence[BlockKey], first_block: int, began_us: int) -> None:
        """A request that began to run then has blocks from `first_block` of its own on.

        It does not matter when it computed them, or steps could not be skipped.
        """
        for depth, key in enumerate(keys, first_block):
            use = self._uses.get(key)
            if use is None:
                use = self._uses[key] = _Use(depth)
            use.num_uses += 1
            use.last_used_us = max(use.last_used_us, began_us)

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
        self._num_in_vain = self._num_rounds = 0

    def refuse_to_starve(self, live: Collection[RequestId], now_us: int) -> None:
        """No step can be planned, and none is under way.

        Once all copies have ended everything is free, and somebody can run; but the policy is asked first, and may take
        it all again, for ever.

        Raises:
            PolicyError: so much was copied that it will. No number proves it.
        """
        if not live:
            self._num_in_vain = self._num_rounds = 0
        if next(iter(self._under_way), self.num_copies) > self._last_of_round:
            self._num_rounds, self._last_of_round = self._num_rounds + 1, self.num_copies - 1
        num_all = self.ledger.num_blocks + self.host.num_slots
        # Many rounds, as fast copies beside a slow one prove nothing.
        if min(self._num_rounds, self._num_in_vain // num_all) > MOST_TIMES_IN_VAIN:
            raise PolicyError(
                f"cache policy {policy_name(self.policy)} leaves {len(live)} requests waiting for ever, first of them "
                f"request {min(live)}: from {self._in_vain_since_us} to {now_us} us no step could run, and it copied "
                f"{self._num_in_vain} blocks, of {num_all} that device and host have"
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

    def described(self, block: int, key: BlockKey) -> CachedBlock:
        use = self._uses[key]
        return CachedBlock(block, use.num_uses, use.last_used_us, use.depth)

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
        self.used(keys, state.num_blocks + self._num_hosted(state), now_us)
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
        if not self._num_in_vain:
            self._in_vain_since_us = copy.asked_us
        self._num_in_vain += len(copy.keys)
        self._under_way[copy.number] = _UnderWay(copy, record, pinned)
        assert self._recorder is not None, "an instance serves"
        self._recorder.copy(record)
        self.copier.launch(copy)

    def _forget(self) -> None:
        """Uses of what is nowhere any more, now and then."""
        if len(self._uses) > 2 * (self.ledger.num_blocks + self.host.num_slots):
            self._uses = {k: u for k, u in self._uses.items() if k in self.host or self.ledger.find(k) is not None}


def num_host_blocks(policy: CachePolicy, config: InstanceConfig) -> int:
    """Blocks that the host has room for."""
    return int(getattr(policy, "host_blocks_factor", 0.0) * config.num_kv_blocks)


def tiering_of(
    policy: CachePolicy,
    config: InstanceConfig,
    copier: Copier | None,
    *,
    step_time: StepTime | None = None,
    copy_time: CopyTime | None = None,
) -> Tiering | None:
    """The policy at work; None where nothing is ever copied.

    Raises:
        ConfigError: the host has room for no block, there is no prefix cache, or a policy has no times that it needs.
    """
    if isinstance(policy, DeviceOnly):
        return None
    name, room = policy_name(policy), num_host_blocks(policy, config)
    if room < 1:
        raise ConfigError(
            f"cache policy {name}: the host has room for no block; accepted: a host_blocks_factor of at least "
            f"{1 / config.num_kv_blocks:.3g}"
        )
    if config.kv_layout == "virtual":
        raise ConfigError(f"cache policy {name}: kv_layout is 'virtual', whose pages are not copied; accepted: 'paged'")
    if not config.enable_prefix_cache:
        raise ConfigError(f"cache policy {name}: enable_prefix_cache is false; accepted: true")
    if getattr(policy, "needs_step_time", False) and step_time is None:
        raise ConfigError(f"cache policy {name} needs step times, none are given; accepted: a machine's calibration")
    if getattr(policy, "needs_copy_time", False) and not copy_time:
        raise ConfigError(
            f"cache policy {name} needs copy times, none are given; accepted: a calibration on runs with copies, or a "
            "link's rate"
        )
    if copier is None:
        raise ConfigError(f"cache policy {name} is not served here; accepted: device-only")
    if copier.has_store and getattr(policy, "needs_copy_time", False) and not (copy_time and copy_time.has_store):
        raise ConfigError(
            f"cache policy {name} needs copy times of the store, none are given; accepted: a calibration on runs with "
            "one, or a store's rate"
        )
    return Tiering(policy, copier, num_host_blocks=room, step_time=step_time, copy_time=copy_time or None)


def refuse_link_without_copies(bytes_per_s: float | None, policies: Policies) -> None:
    """ConfigError for the rate of a link to the host over which nothing is ever copied."""
    if bytes_per_s is not None and isinstance(policies.cache, DeviceOnly):
        raise ConfigError(
            f"a link to the host of {bytes_per_s:g} bytes/s is given, and cache policy device-only copies nothing; "
            "accepted: with another cache policy"
        )
