"""A draft policy at work: what it asks for is made, verified and counted. The same in engine and simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from xllm_lab.draft_time import DraftTime
from xllm_lab.draft_view import DraftTimes, load_of, planned_step
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.ledger import Ledger
from xllm_lab.live_view import LiveView
from xllm_lab.policies.api import BatchPlan
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.draft import METHODS, Ask, DraftPolicy
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.draft_checks import draft_violations
from xllm_lab.request_state import RequestState
from xllm_lab.step import Draft
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

    def asks(self, view: LiveView, plan: BatchPlan) -> Mapping[RequestId, Ask]:
        """What the policy asks for in a step that is about to be planned so. PolicyError if that is illegal."""
        shown = planned_step(view, plan, methods=self.proposer.methods, tallies=self.tallies)
        if shown is None:
            return {}
        if self._step_time is not None:
            shown.times = DraftTimes(self._step_time, self._draft_time, load_of(view, plan))
        decided = self.policy.decide(shown)
        if broken := draft_violations(shown, decided):
            raise PolicyError(f"draft policy {policy_name(self.policy)}: {'; '.join(broken)}")
        return decided.asks

    def make(self, asks: Mapping[RequestId, Ask], asking: Sequence[RequestState], ledger: Ledger) -> tuple[Draft, ...]:
        """Have drafts made for `asking`, in this order; blocks are there for as many as were asked for."""
        for state in asking:
            ledger.grow(state.id, state.num_tokens + asks[state.id].depth)
        asked = [Asked(s, *asks[s.id], ledger.block_table(s.id)) for s in asking]
        made = [tuple(tokens) for tokens in self.proposer.propose(asked)]
        self._came(any(made))
        for (state, method, depth, _), tokens in zip(asked, made, strict=True):
            assert len(tokens) <= depth, f"{method} makes {len(tokens)} drafts of {depth}"
            # Who decodes has the blocks of what is in KV; the rest is taken as it is for anybody else.
            ledger.trim(state.id, state.num_tokens + len(tokens) if tokens else state.num_computed_tokens)
        return tuple([Draft(a.state.id, a.method, a.depth, tokens) for a, tokens in zip(asked, made, strict=True)])

    def settle(self, state: RequestState, draft: Draft, num_accepted: int, ledger: Ledger) -> None:
        """Drafts were verified: what was not kept leaves no block behind."""
        num_drafts = len(draft.token_ids)
        state.settle(draft.method, num_drafts, num_accepted)
        ledger.trim(state.id, state.num_computed_tokens)
        self.tallies.add(draft.method, num_drafts, num_accepted)

    def is_waited_for(self) -> bool:
        """Whether the next step is planned ahead only if nobody wants to draft in it; else it counts as unasked."""
        if not self._num_unasked:
            return True
        self._num_unasked -= 1
        return False

    def _came(self, any_drafts: bool) -> None:
        """Drafts were asked for. Each time that none come, it is twice as long before a step waits for them again.

        Asking costs what planning ahead saves, and lookups in text that does not repeat itself find nothing for long.
        """
        self._pause = 0 if any_drafts else min(max(1, 2 * self._pause), MOST_UNASKED_STEPS)
        self._num_unasked = self._pause


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
