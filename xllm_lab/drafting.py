"""What a draft policy is asked of a planned step, and who makes the drafts. The same in engine and simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from xllm_lab.draft_time import DraftTime
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.draft import METHODS, DraftPlan, DraftPolicy, Tally
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.draft_checks import draft_violations
from xllm_lab.request_state import RequestState
from xllm_lab.step_time import StepTime
from xllm_lab.tallies import Tallies
from xllm_lab.workload import RequestId

# Steps planned ahead in a row, at most, in which nobody is asked whether to draft because drafts did not come.
MOST_UNASKED_STEPS = 16


class Asked(NamedTuple):
    """A request that wants drafts.

    Attributes:
        state: its tokens, all of them known; the last is the only one that is not in KV.
        depth: at most so many drafts.
        block_table: KV blocks that hold its tokens and `depth` more.
    """

    state: RequestState
    method: str
    depth: int
    block_table: Sequence[int]


class Proposer(Protocol):
    """Makes drafts: in the engine of tokens, in the simulator as many as an engine might."""

    @property
    def methods(self) -> Sequence[str]:
        """Some of `policies.draft.METHODS`."""
        ...

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """Drafts for each, at most `depth`, maybe none."""
        ...

    def forget(self, request: RequestId) -> None:
        """A request ended, or lost its KV and begins anew."""
        ...


@dataclass(slots=True, kw_only=True)
class PlannedStep:
    """A `DraftView`: what a batch policy planned, and what that leaves."""

    now_us: int
    decoding: Sequence[RequestState]
    num_tokens: int
    num_waiting: int
    tokens_left: int
    blocks_left: int
    block_size: int
    methods: Sequence[str]
    times: DraftTimes | None
    tallies: Tallies

    def tally(self, method: str) -> Tally:
        return self.tallies.of(method)


class Load(NamedTuple):
    """A step in sums: what its time depends on."""

    num_tokens: int
    num_seqs: int
    num_logits: int
    attention: float
    kv_read: int


class DraftTimes:
    """A `DraftTimesView`: what the machine's fitted times say of a step."""

    def __init__(self, step_time: StepTime, draft_time: DraftTime, load: Load) -> None:
        self._step_time, self._load = step_time, load
        # As they are: a policy asks for every draft that it weighs.
        self.row_us, self.draft_us = step_time.row_us, draft_time.us

    @property
    def step_us(self) -> float:
        return self._step_time.load_us(*self._load)


class Drafting:
    """A draft policy at work in one instance.

    Attributes:
        tallies: of all its requests.

    Raises:
        ConfigError: at construction, if the policy needs times and there are none.
    """

    def __init__(
        self,
        policy: DraftPolicy,
        proposer: Proposer,
        *,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
    ) -> None:
        if getattr(policy, "needs_step_time", False) and step_time is None:
            name = policy_name(policy)
            raise ConfigError(
                f"draft policy {name} needs step times, none are given; accepted: a machine's calibration"
            )
        self.policy, self.proposer, self.tallies = policy, proposer, Tallies()
        self._step_time, self._draft_time = step_time, draft_time or DraftTime()
        self._pause = self._num_unasked = 0

    def came(self, any_drafts: bool) -> None:
        """Drafts were asked for. Each time that none come, it is twice as long before a step waits for them again.

        Asking costs what planning ahead saves, and lookups in text that does not repeat itself find nothing for long.
        """
        self._pause = 0 if any_drafts else min(max(1, 2 * self._pause), MOST_UNASKED_STEPS)
        self._num_unasked = self._pause

    def is_waited_for(self) -> bool:
        """Whether the next step is planned ahead only if nobody wants to draft in it; else it counts as unasked."""
        if not self._num_unasked:
            return True
        self._num_unasked -= 1
        return False

    def decide(
        self,
        decoding: Sequence[RequestState],
        load: Load,
        *,
        now_us: int,
        num_waiting: int,
        tokens_left: int,
        blocks_left: int,
        block_size: int,
    ) -> DraftPlan:
        """The policy's plan for a step. PolicyError if it is illegal."""
        times = None if self._step_time is None else DraftTimes(self._step_time, self._draft_time, load)
        view = PlannedStep(
            now_us=now_us,
            decoding=decoding,
            num_tokens=load.num_tokens,
            num_waiting=num_waiting,
            tokens_left=tokens_left,
            blocks_left=blocks_left,
            block_size=block_size,
            methods=self.proposer.methods,
            times=times,
            tallies=self.tallies,
        )
        plan = self.policy.decide(view)
        if broken := draft_violations(view, plan):
            raise PolicyError(f"draft policy {policy_name(self.policy)}: {'; '.join(broken)}")
        return plan


def drafting_of(
    policy: DraftPolicy,
    proposer: Proposer | None,
    *,
    step_time: StepTime | None = None,
    draft_time: DraftTime | None = None,
) -> Drafting | None:
    """The policy at work; None where nobody ever drafts, and nobody needs to ask.

    Raises:
        ConfigError: there is nothing to draft with, or no times for a policy that needs them.
    """
    if isinstance(policy, Off):
        return None
    if proposer is None or not proposer.methods:
        raise ConfigError(
            f"draft policy {policy_name(policy)}: nothing is known of what becomes of drafts here; accepted: a "
            "calibration on runs with drafts, or a given acceptance"
        )
    method = getattr(policy, "method", None)
    if method in METHODS and method not in proposer.methods:
        known = ", ".join(proposer.methods)
        raise ConfigError(f"draft policy {policy_name(policy)}: method is {method!r}, accepted here: {known}")
    return Drafting(policy, proposer, step_time=step_time, draft_time=draft_time)
