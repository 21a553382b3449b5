"""The policy interface: knobs, what a batch policy may see, and what it returns.

A policy is a frozen, keyword-only dataclass with one method, `decide(view) -> plan`. Its fields are its knobs,
annotated with the range a tuner may search; there is no other list of them:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class FewestBlocksFirst:
        '''Run the requests that hold the fewest KV blocks; ties by arrival, then id.'''

        decides: ClassVar[str] = "batch"
        max_tokens: Annotated[int, Knob(256, 8192, log=True)] = 2048

        def decide(self, view: BatchView) -> BatchPlan: ...

There are no phases. A request has `num_tokens` known tokens, of which `num_computed_tokens` are in the KV cache;
prefill, chunked prefill, decode and recomputation after a preemption are all "computed catches up with known".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NewType, Protocol, TypeVar

from xllm_lab.policies.ordered import ByAdmission, ByArrival

RequestId = NewType("RequestId", int)
# What there may be around a policy, and how many: stores of KV below the host, instances of the fleet, their outages.
Around = Literal["stores", "instances", "outages"]


@dataclass(frozen=True, slots=True)
class Knob:
    """A numeric field that a tuner may search between `low` and `high`, both included, on a log scale if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True, init=False)
class Choice:
    """A field that a tuner may set to one of `values`."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, slots=True)
class Needs:
    """A field without effect where fewer than `at_least` of these are around its policy: no tuner searches it there."""

    around: Around
    at_least: int = 1


@dataclass(frozen=True, slots=True)
class FewerThan:
    """A count, of which more than one fewer than these are around its policy is no different from that."""

    around: Around


@dataclass(frozen=True, slots=True)
class Flag:
    """xLLM's name for a field; its value there is ours divided by `divide_by`.

    Attributes:
        words: ours and xLLM's, for a value that is a word. xLLM has nothing like a word that is not among them.
    """

    name: str
    divide_by: int = 1
    words: tuple[tuple[str, str], ...] = ()


class StepTimeView(Protocol):
    """What the host knows of this machine's step times (fitted; see `xllm_lab.step_time`)."""

    @property
    def constant_us(self) -> float:
        """Time of a step whatever it holds."""
        ...

    def request_us(self, num_tokens: int, num_computed_tokens: int) -> float:
        """What `num_tokens` new tokens of one request add, given `num_computed_tokens` before them."""
        ...


class RequestView(Protocol):
    """What a server knows of one request. The true output length is not known."""

    @property
    def id(self) -> RequestId: ...
    @property
    def arrival_us(self) -> int: ...
    @property
    def priority(self) -> int:
        """1 is high, 2 normal, 3 low."""
        ...

    @property
    def ttft_slo_us(self) -> int | None: ...
    @property
    def tpot_slo_us(self) -> int | None: ...
    @property
    def is_running(self) -> bool:
        """Whether it holds KV; a waiting request holds none."""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, all of which must be in KV before the next one can be drawn."""
        ...

    @property
    def num_computed_tokens(self) -> int:
        """Tokens in KV. For a waiting request: those the prefix cache holds for it at this moment."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks of those tokens, shared ones included."""
        ...

    @property
    def num_idle_blocks(self) -> int:
        """Waiting requests: how many of `num_blocks` nobody uses now, so that taking them takes free blocks."""
        ...

    @property
    def num_private_blocks(self) -> int:
        """Running requests: blocks that a preemption would free."""
        ...

    @property
    def admitted_us(self) -> int:
        """Running requests: start of the step that admitted it (last)."""
        ...

    @property
    def first_token_us(self) -> int | None: ...
    @property
    def num_preemptions(self) -> int: ...


class BatchView(Protocol):
    """One instance at the start of a step. Requests come in no promised order: sort by a key that ends in the id."""

    @property
    def now_us(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones that nobody uses included."""
        ...

    @property
    def max_tokens_per_batch(self) -> int: ...
    @property
    def max_seqs_per_batch(self) -> int: ...
    @property
    def running(self) -> Sequence[RequestView]:
        """Requests that hold KV: those decoding, and those whose prompt is being computed."""
        ...

    @property
    def decoding(self) -> Sequence[RequestView]:
        """Running requests one token behind, a generated one (`is_decoding`)."""
        ...

    @property
    def prefilling(self) -> Sequence[RequestView]:
        """The other running requests."""
        ...

    @property
    def draining(self) -> Sequence[RequestView]:
        """Requests that hold KV and run no more: planned ahead, all their tokens are scheduled, the last is not there.

        None of them can be scheduled. One that is preempted gives its KV back and still gets its last token.
        """
        ...

    @property
    def num_decode_blocks(self) -> int:
        """Free blocks that one more token for every decoding request takes."""
        ...

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests that hold none: fresh and preempted ones."""
        ...

    @property
    def step_time(self) -> StepTimeView | None: ...

    def find(self, request: RequestId) -> RequestView | None:
        """The running or waiting request of that id."""
        ...


# For `BatchPlan.holds_for`: as long as nothing changes.
UNTIL_SOMETHING_CHANGES = 2**31


# Not frozen: that triples the time to make one, and a host makes one per step.
@dataclass(slots=True, kw_only=True)
class BatchPlan:
    """What one step does.

    Attributes:
        tokens: new tokens to compute per request, in the order in which they are packed.
        decode_all: every decoding request computes its one token, in order of admission and before `tokens`, which
            then lists none of them. Hosts do this in a time that does not grow with the batch.
        preempt: running requests that lose their KV first and wait again; it is recomputed later. Or draining ones.
        holds_for: for how many further steps `decide` would return this plan again, if no request arrives, ends, or
            is cancelled, and every block it takes is free. Only a plan that does nothing but `decode_all` may hold, or
            that computes one chunk of a prompt besides: then as long as the prompt lacks more than another such chunk.
        keeps_free_blocks: it holds only while so many blocks stay free.
        reason: one phrase for the decision log.
    """

    tokens: Mapping[RequestId, int] = field(default_factory=dict)
    decode_all: bool = False
    preempt: tuple[RequestId, ...] = ()
    holds_for: int = 0
    keeps_free_blocks: int = 0
    reason: str

    @property
    def is_empty(self) -> bool:
        """Whether it computes nothing."""
        return not self.tokens and not self.decode_all


class BatchPolicy(Protocol):
    """Which requests compute how many tokens in the next step."""

    decides: ClassVar[str]
    # Flags that make xLLM schedule like this, whatever the knobs say. A policy without them cannot be exported.
    # xllm_flags: ClassVar[Mapping[str, bool | str]]

    def decide(self, view: BatchView) -> BatchPlan:
        """A legal plan (see `checks.batch_violations`); empty only if nothing can run. Pure."""
        ...


R = TypeVar("R", bound=RequestView)


def arrival_key(request: RequestView) -> tuple[int, int]:
    return (request.arrival_us, request.id)


def admission_key(request: RequestView) -> tuple[int, int, int]:
    return (request.admitted_us, request.arrival_us, request.id)


def by_arrival(requests: Sequence[R]) -> Sequence[R]:
    """Sorted by (arrival_us, id). Hosts keep their queues so, and then this costs nothing."""
    return requests if isinstance(requests, ByArrival) else sorted(requests, key=arrival_key)


def by_admission(requests: Sequence[R]) -> Sequence[R]:
    """Sorted by (admitted_us, arrival_us, id). Hosts keep their queues so, and then this costs nothing."""
    return requests if isinstance(requests, ByAdmission) else sorted(requests, key=admission_key)


def ceil_div(amount: int, unit: int) -> int:
    return -(-amount // unit)


def blocks_to_take(view: BatchView, request: RequestView, num_new_tokens: int) -> int:
    """Free blocks that `num_new_tokens` more tokens of a request take, its idle cached blocks included.

    Two requests that share idle cached blocks count them twice: an upper bound, so a plan that fits is sure to. Only a
    prompt whose cached blocks the same plan's preemptions make idle takes more; the host then asks the policy again.
    """
    target = ceil_div(request.num_computed_tokens + num_new_tokens, view.block_size) - request.num_blocks
    return target if request.is_running else target + request.num_idle_blocks


class Packing:
    """A plan in the making: what is left of the step's tokens, sequences and blocks."""

    __slots__ = ("_decode_all", "_preempted", "_tokens", "_view", "blocks_left", "seqs_left", "tokens_left")

    def __init__(self, view: BatchView) -> None:
        self._view = view
        self._tokens: dict[RequestId, int] = {}
        self._decode_all = False
        self._preempted: list[RequestId] = []
        self.tokens_left = view.max_tokens_per_batch
        self.seqs_left = view.max_seqs_per_batch
        self.blocks_left = view.num_free_blocks

    def __bool__(self) -> bool:
        return self._decode_all or bool(self._tokens)

    @property
    def is_full(self) -> bool:
        """Whether nobody can be granted more, blocks or no blocks."""
        return not self.tokens_left or not self.seqs_left

    def grant_all_decoding(self) -> bool:
        """Give every decoding request its token, if there are any and all of them fit."""
        assert not self._tokens, "decodes are packed first"
        view = self._view
        count = len(view.decoding)
        if not count or count > self.tokens_left or count > self.seqs_left or view.num_decode_blocks > self.blocks_left:
            return False
        self._decode_all = True
        self.tokens_left -= count
        self.seqs_left -= count
        self.blocks_left -= view.num_decode_blocks
        return True

    def grant(self, request: RequestView, num_tokens: int) -> bool:
        """Give a request that has none yet `num_tokens`, if all of them fit."""
        assert request.id not in self._tokens, f"request {request.id} is packed already"
        blocks = blocks_to_take(self._view, request, num_tokens)
        if num_tokens > self.tokens_left or self.seqs_left < 1 or blocks > self.blocks_left:
            return False
        self._tokens[request.id] = num_tokens
        self.tokens_left -= num_tokens
        self.seqs_left -= 1
        self.blocks_left -= blocks
        return True

    def extend(self, request: RequestView, num_tokens: int) -> bool:
        """Give a packed request `num_tokens` more, if all of them fit."""
        had = self._tokens[request.id]
        blocks = blocks_to_take(self._view, request, had + num_tokens) - blocks_to_take(self._view, request, had)
        if num_tokens > self.tokens_left or blocks > self.blocks_left:
            return False
        self._tokens[request.id] = had + num_tokens
        self.tokens_left -= num_tokens
        self.blocks_left -= blocks
        return True

    def granted(self, request: RequestView) -> int:
        return self._tokens.get(request.id, 0)

    def preempt(self, request: RequestView) -> None:
        """Take a running request's KV away, and what it was granted in this plan."""
        had = self._tokens.pop(request.id, None)
        if had is not None:
            self.tokens_left += had
            self.seqs_left += 1
            self.blocks_left += blocks_to_take(self._view, request, had)
        self._preempted.append(request.id)
        self.blocks_left += request.num_private_blocks

    def plan(
        self, reason: str, *, repeats: bool = False, chunk_repeats: int = 0, keeps_free_blocks: int = 0
    ) -> BatchPlan:
        """The plan.

        Args:
            repeats: one that only decodes would be made again until something changes.
            chunk_repeats: one that decodes and computes one prompt's chunk would be made so many times again, while
                `keeps_free_blocks` stay free.
        """
        holds_for = 0
        if self._decode_all and not self._preempted:
            if not self._tokens:
                holds_for, keeps_free_blocks = UNTIL_SOMETHING_CHANGES if repeats else 0, 0
            elif len(self._tokens) == 1:
                holds_for = chunk_repeats
        return BatchPlan(
            tokens=self._tokens,
            decode_all=self._decode_all,
            preempt=tuple(self._preempted),
            holds_for=holds_for,
            keeps_free_blocks=keeps_free_blocks,
            reason=reason,
        )


def refuse_below(least: float, **values: float | None) -> None:
    """ValueError for a value below `least`; None is no value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, at least {least} is accepted")


def num_missing_tokens(request: RequestView) -> int:
    """Known tokens that are not in KV: 1 for a decoding request, more while its prompt is computed."""
    return request.num_tokens - request.num_computed_tokens


def is_decoding(request: RequestView) -> bool:
    """One token behind, and that token was generated."""
    return num_missing_tokens(request) == 1 and request.num_tokens > request.num_prompt_tokens


def ids_of(requests: Iterable[RequestView]) -> tuple[RequestId, ...]:
    return tuple(r.id for r in requests)
