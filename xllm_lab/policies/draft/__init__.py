"""How speculation goes in the next step: who drafts how many tokens by which method; one file a policy beside it.

A draft is a guess at a request's next tokens. The step then computes them behind its last known token, `1 + drafts`
rows in place of one, keeps those that the model would have drawn, and draws one more:

    known    ... t      rows of the step    t  d1  d2  d3
    model agrees with d1 and d2             d1 d2  x            three tokens in one step, one row in vain

The batch policy goes first: drafts take what it leaves of the step's tokens and KV blocks, and displace nothing. A
policy is a frozen, keyword-only dataclass whose annotated fields are its knobs. Methods are named as in vLLM's
`--speculative-config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, NamedTuple, Protocol

from xllm_lab.policies.api import Choice, Flag, Knob, RequestId, ceil_div

# "ngram": what followed the request's last tokens when they came before. "suffix": what mostly did, here and in
# requests that ended. "draft_model": a smaller model. "mtp": the model's own prediction module.
METHODS = ("ngram", "suffix", "draft_model", "mtp")
# Of a request, what came of so many of its last drafts is shown: text begins to repeat itself, and ends to.
RECENT_VERIFICATIONS = 16

_ALGORITHM = Flag("speculative_algorithm", words=(("mtp", "MTP"), ("suffix", "Suffix")))
# xLLM adapts the depth of drafts whose probabilities it has, which those by suffix are without.
_ADAPTED = Flag("speculative_algorithm", words=(("mtp", "MTP"),))
# Fields that several policies have.
Method = Annotated[str, Choice(*METHODS), _ALGORITHM]
MethodOrAuto = Annotated[str, Choice("auto", *METHODS), _ADAPTED]
Depth = Annotated[int, Knob(1, 15, log=True), Flag("num_speculative_tokens")]


class Tally(NamedTuple):
    """Drafts that were verified, by their position behind the last known token, the first at 0.

    Attributes:
        drafted: how often one was there.
        accepted: how often it was kept, and so all before it were.
    """

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


class Ask(NamedTuple):
    """A request wants up to `depth` drafts, at least 1."""

    method: str
    depth: int


class DecodingView(Protocol):
    """A request that computes its last known token in the step, and draws the next. What is to come nobody knows."""

    @property
    def id(self) -> RequestId: ...
    @property
    def arrival_us(self) -> int: ...
    @property
    def priority(self) -> int:
        """1 is high, 2 normal, 3 low."""
        ...

    @property
    def tpot_slo_us(self) -> int | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """Known ones, prompt and output."""
        ...

    @property
    def num_computed_tokens(self) -> int:
        """In KV; `num_tokens - 1`."""
        ...

    @property
    def most_drafts(self) -> int:
        """More could not be kept: the request may ask for no more tokens, or its context ends."""
        ...

    def tally(self, method: str) -> Tally:
        """Of the last `RECENT_VERIFICATIONS` steps in which this request had drafts by the method."""
        ...


class DraftTimesView(Protocol):
    """What the host knows of this machine's times for the step, microseconds."""

    @property
    def step_us(self) -> float:
        """Of the step as it is planned, without drafts."""
        ...

    def row_us(self, num_tokens: int, num_computed_tokens: int) -> float:
        """What one more row adds for a request with so many tokens in KV, in a step that computes `num_tokens`."""
        ...

    def draft_us(self, method: str, num_requests: int, depth: int) -> float:
        """Of drafting up to `depth` tokens for each of so many requests."""
        ...


class DraftView(Protocol):
    """A step that the batch policy has planned.

    Requests come in no promised order: sort by a key that ends in the id. Nor do methods.
    """

    @property
    def now_us(self) -> int: ...
    @property
    def decoding(self) -> Sequence[DecodingView]:
        """Those that may draft."""
        ...

    @property
    def num_tokens(self) -> int:
        """That the step computes without drafts, of prompts and of those who decode."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that the step leaves waiting."""
        ...

    @property
    def tokens_left(self) -> int:
        """Of the step's budget; what all drafts together may have."""
        ...

    @property
    def blocks_left(self) -> int:
        """KV blocks, likewise."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def methods(self) -> Sequence[str]:
        """That the host can draft by, some of `METHODS`."""
        ...

    @property
    def times(self) -> DraftTimesView | None: ...
    def tally(self, method: str) -> Tally:
        """Of all requests of the instance, since it began; those that ended too."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """Who asks for drafts, and why, in one phrase for the log. A request that is not named has none."""

    asks: Mapping[RequestId, Ask] = field(default_factory=dict)
    reason: str


class DraftPolicy(Protocol):
    """Who drafts how many tokens in the next step. It may have `needs_step_time`, as a batch policy."""

    decides: ClassVar[str]  # "draft"
    # Flags that make xLLM do so, whatever the knobs say. A policy without them cannot be exported.
    # xllm_flags: ClassVar[Mapping[str, bool | str]]

    def decide(self, view: DraftView) -> DraftPlan:
        """A legal plan (see `draft_checks.draft_violations`). Pure."""
        ...


def drafting_key(request: DecodingView) -> tuple[int, int]:
    """An order of requests: by arrival, then id."""
    return (request.arrival_us, request.id)


def refuse_unknown(method: str, *others: str) -> None:
    """ValueError for what is neither one of `METHODS` nor of `others`."""
    if method not in (*others, *METHODS):
        raise ValueError(f"method is {method!r}, accepted: {', '.join((*others, *METHODS))}")


def blocks_for(request: DecodingView, depth: int, block_size: int) -> int:
    """KV blocks that `depth` drafts take beyond those of the request's one token."""
    behind = request.num_computed_tokens + 1
    return ceil_div(behind + depth, block_size) - ceil_div(behind, block_size)


class Room:
    """What the step's tokens and KV blocks still leave for drafts, as asks are granted."""

    __slots__ = ("_asks", "_blocks_left", "_view", "tokens_left")

    def __init__(self, view: DraftView) -> None:
        self._view = view
        self._asks: dict[RequestId, Ask] = {}
        self.tokens_left, self._blocks_left = view.tokens_left, view.blocks_left

    def grant(self, request: DecodingView, method: str, depth: int) -> int:
        """Give a request that has none up to `depth` drafts, as far as they fit and can be kept; returns how many."""
        assert request.id not in self._asks, f"request {request.id} drafts already"
        size = self._view.block_size
        depth = min(depth, request.most_drafts, self.tokens_left)
        # What its last block has room for, and so many further blocks.
        depth = min(depth, -(request.num_computed_tokens + 1) % size + self._blocks_left * size)
        if depth < 1:
            return 0
        self._asks[request.id] = Ask(method, depth)
        self.tokens_left -= depth
        self._blocks_left -= blocks_for(request, depth, size)
        return depth

    def plan(self, reason: str) -> DraftPlan:
        return DraftPlan(asks=self._asks, reason=reason)
