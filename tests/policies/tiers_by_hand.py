"""The real tiers of one instance without its steps: requests come and go by hand, and copies are done at once."""

from __future__ import annotations

from collections.abc import Sequence

from tests.small_runs import COPY_TIME, STEP_TIME
from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import CopyTime
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import BlockKey, Ledger
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.records import Records
from xllm_lab.request_state import RequestState, new_record
from xllm_lab.step_time import StepTime
from xllm_lab.tiering_of import tiering_of
from xllm_lab.workload import Prompt, Request, RequestId, prompt_token_ids

SIZE = 4


class TiersByHand:
    """A prompt is told by the names of its blocks, of four tokens each; a token follows them.

    Attributes:
        now_us: passes only when somebody moves it.
        records: of the copies.
        stored: what the store has; None: there is none.
    """

    def __init__(
        self,
        policy: CachePolicy,
        *,
        num_blocks: int,
        step_time: StepTime = STEP_TIME,
        copy_time: CopyTime = COPY_TIME,
        stored: set[BlockKey] | None = None,
    ) -> None:
        self.stored, self.has_store = stored, stored is not None
        config = InstanceConfig(block_size=SIZE, num_kv_blocks=num_blocks)
        tiering = tiering_of(policy, config, self, step_time=step_time, copy_time=copy_time)
        assert tiering is not None, "a policy that uses the host"
        self.tiering, self.ledger, self.records = tiering, Ledger(num_blocks, SIZE), Records()
        tiering.serve(self.ledger, self.records, 0)
        self.now_us = self._num_requests = 0
        self._under_way: list[Copy] = []

    def launch(self, copy: Copy) -> None:
        self._under_way.append(copy)

    def request(self, names: Sequence[int]) -> RequestState:
        """One that waits, and comes later than those before."""
        prompt = Prompt(num_tokens=len(names) * SIZE + 1, block_hashes=tuple(names), hash_block_tokens=SIZE)
        request = Request(
            id=RequestId(self._num_requests), arrival_us=self._num_requests, prompt=prompt, output_tokens=1
        )
        self._num_requests += 1
        ids = prompt_token_ids(request, vocab_size=1000, seed=0)
        return RequestState(request, ids, self.ledger, new_record(request))

    def uses(self, names: Sequence[int]) -> bool:
        """A request has its prompt in KV and ends; False if there is no room."""
        state = self.request(names)
        keys, (num_cached, num_idle) = state.block_keys(len(names)), self.ledger.lookup(state.block_keys(len(names)))
        if len(names) - num_cached > self.ledger.num_free_blocks - num_idle:
            return False
        self.ledger.attach(state.id, keys)
        self.tiering.found(keys, num_cached, self.now_us)
        self.ledger.grow(state.id, len(names) * SIZE)
        self.ledger.publish(state.id, num_cached, keys[num_cached:])
        self.tiering.uses.add(keys[num_cached:], num_cached, self.now_us)
        self.ledger.release(state.id)
        return True

    def fills_the_device(self) -> None:
        """Somebody takes all of it, and leaves nothing that could be found."""
        self.ledger.attach(RequestId(-1), [])
        self.ledger.extend(RequestId(-1), self.ledger.num_free_blocks)
        self.ledger.release(RequestId(-1))

    def asks(self, waiting: Sequence[RequestState] = (), *, outstanding: int = 0) -> list[Copy]:
        """What the policy wants copied now; it is done at once."""
        self.tiering.plan(waiting, self.now_us, outstanding)
        self.audit()
        copies, self._under_way = self._under_way, []
        for copy in copies:
            self.tiering.done(CopyEnd(copy.number, self.now_us + 1, self._num_done(copy)))
            self.audit()
        return copies

    def _num_done(self, copy: Copy) -> int:
        if self.stored is not None and copy.kind in ("save", "push"):
            self.stored.update(copy.keys)
        if copy.kind != "prefetch":
            return len(copy.keys)
        assert self.stored is not None, "a prefetch without a store"
        return next((n for n, key in enumerate(copy.keys) if key not in self.stored), len(copy.keys))

    def audit(self) -> None:
        self.ledger.audit()
        self.tiering.audit()

    def on_device(self, names: Sequence[int]) -> int:
        """Leading blocks of a prompt that the device has."""
        return self.ledger.lookup(self.request(names).block_keys(len(names)))[0]

    def in_host(self, names: Sequence[int]) -> int:
        """Leading blocks of a prompt that the host has."""
        return self.tiering.host.num_leading(self.request(names).block_keys(len(names)))
