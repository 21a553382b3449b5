"""xLLM's multi-SLO batching: who is about to miss a deadline goes first, within the time the tightest one leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, NamedTuple

from xllm_lab.policies.api import (
    BatchPlan,
    BatchView,
    Choice,
    Flag,
    Knob,
    Packing,
    RequestId,
    RequestView,
    StepTimeView,
    arrival_key,
    is_decoding,
    num_missing_tokens,
    refuse_below,
)

# A shorter chunk that does not finish its prompt is not worth a step (unified_policy.cpp at 3906f5a).
MIN_CHUNK_TOKENS = 50
# The step may last this fraction of the tightest TPOT promise even if a deadline is nearer (same file).
TPOT_BUDGET_FRAC = 0.65


class _Case(NamedTuple):
    request: RequestView
    decodes: bool
    remaining_us: float
    estimate_us: float
    slo_us: float
    holds_kv: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedSlo:
    """Urgent requests first (by value per microsecond), then the others by deadline, within a latency budget.

    xLLM's UnifiedPolicy, `priority_strategy=multi_slo_and_prio` (unified_policy.cpp:35-645 at 3906f5a; "SlideBatching"
    in the technical report). A request's deadline is `ttft_slo` after arrival until its first token, then
    `tpot_slo` per generated token after the first; no promise is no deadline. Requests whose promises weigh the
    same are assumed: xLLM's per-request weights are 1.

    Attributes:
        aggressive_coeff: a request is urgent if less than this many predicted loads remain.
        starve_threshold: a prompt is starved when it is late by this many times its promise.
        enable_starve_prevent: starved prompts go before other urgent prompts.
        max_preemptions: a request that lost its KV so often loses it to no newcomer again. xLLM has no such bound,
            and two requests that each need most of the pool can then take it from one another for ever.
    """

    decides: ClassVar[str] = "batch"
    needs_step_time: ClassVar[bool] = True
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {
        "enable_chunked_prefill": True,
        "enable_mix_batch": True,
        "enable_profile_step_time": True,
        "enable_latency_aware_schedule": True,
        "priority_strategy": "multi_slo_and_prio",
    }

    aggressive_coeff: Annotated[float, Knob(0.25, 4.0, log=True), Flag("aggressive_coeff")] = 1.0
    starve_threshold: Annotated[float, Knob(0.25, 8.0, log=True), Flag("starve_threshold")] = 1.0
    enable_starve_prevent: Annotated[bool, Choice(False, True), Flag("enable_starve_prevent")] = True
    max_preemptions: int = 3

    def __post_init__(self) -> None:
        refuse_below(
            0,
            aggressive_coeff=self.aggressive_coeff,
            starve_threshold=self.starve_threshold,
            max_preemptions=self.max_preemptions,
        )

    def decide(self, view: BatchView) -> BatchPlan:
        model = view.step_time
        assert model is not None, "the scheduler refuses this policy without step times"
        holders = {r.id for r in view.running}
        cases = [_case(view, r, model, r.id in holders) for r in (*view.running, *view.waiting)]
        if not cases:
            return Packing(view).plan("nothing to do")
        budget_us = _latency_budget_us(cases, model.constant_us)
        spare_us = max(budget_us - model.constant_us, 1e-6)
        total_us = sum(c.estimate_us for c in cases)
        load_us = total_us if budget_us == inf else total_us * budget_us / spare_us
        ranked = sorted(cases, key=lambda c: self._rank(c, load_us))
        return _pack(view, ranked, spare_us, model, self.max_preemptions)

    def _rank(self, case: _Case, load_us: float) -> tuple[float, ...]:
        is_urgent = case.remaining_us < self.aggressive_coeff * load_us
        if not is_urgent:
            return (1, 0, 0, case.remaining_us, *arrival_key(case.request))
        starved = (
            self.enable_starve_prevent and not case.decodes and case.remaining_us < -self.starve_threshold * case.slo_us
        )
        worth = case.remaining_us if starved else case.estimate_us  # density 1/estimate: the cheapest first
        return (0, 0 if case.decodes else 1, 0 if starved else 1, worth, *arrival_key(case.request))


def _case(view: BatchView, request: RequestView, model: StepTimeView, holds_kv: bool) -> _Case:
    decodes = is_decoding(request)
    if request.first_token_us is None:
        slo_us = inf if request.ttft_slo_us is None else request.ttft_slo_us
        deadline_us = request.arrival_us + slo_us
    else:
        slo_us = inf if request.tpot_slo_us is None else request.tpot_slo_us
        deadline_us = request.first_token_us + (request.num_tokens - request.num_prompt_tokens) * slo_us
    estimate_us = model.request_us(num_missing_tokens(request), request.num_computed_tokens)
    return _Case(request, decodes, deadline_us - view.now_us, estimate_us, slo_us, holds_kv)


def _latency_budget_us(cases: list[_Case], constant_us: float) -> float:
    reachable = [c.remaining_us for c in cases if c.remaining_us >= c.estimate_us + constant_us]
    promises = [c.request.tpot_slo_us for c in cases if c.request.tpot_slo_us is not None]
    floor_us = TPOT_BUDGET_FRAC * min(promises) if promises else 0.0
    return max(min(reachable, default=inf if not promises else 0.0), floor_us)


def _pack(
    view: BatchView, ranked: list[_Case], spare_us: float, model: StepTimeView, max_preemptions: int
) -> BatchPlan:
    packing = Packing(view)
    victims = deque(c for c in ranked if c.holds_kv)
    gone: set[RequestId] = set()
    for case in ranked:
        if case.request.id in gone:
            continue
        num_tokens = _chunk(case, packing, spare_us, model)
        if num_tokens == 0:
            break
        while not (fits := packing.grant(case.request, num_tokens)) and _may_take(case, victims, max_preemptions):
            victim = victims.pop().request
            packing.preempt(victim)
            gone.add(victim.id)
        if fits:
            spare_us -= model.request_us(num_tokens, case.request.num_computed_tokens)
        if victims and victims[0] is case:
            victims.popleft()  # served or not, nobody ranked below takes its KV
    return packing.plan("multi-SLO")


def _may_take(case: _Case, victims: deque[_Case], max_preemptions: int) -> bool:
    """The lowest-ranked holder of KV gives way to whoever ranks above it, to a newcomer only so often."""
    if not victims or victims[-1] is case:
        return False
    return case.holds_kv or victims[-1].request.num_preemptions < max_preemptions


def _chunk(case: _Case, packing: Packing, spare_us: float, model: StepTimeView) -> int:
    """The longest chunk whose predicted time fits; the first request of a step always gets one worth running."""
    request = case.request
    most = min(num_missing_tokens(request), packing.tokens_left)
    if most < 1 or packing.seqs_left < 1:
        return 0
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if model.request_us(middle, request.num_computed_tokens) <= spare_us:
            low = middle
        else:
            high = middle - 1
    if packing:
        return low if low > MIN_CHUNK_TOKENS or low == num_missing_tokens(request) else 0
    return max(low, min(most, MIN_CHUNK_TOKENS + 1))
