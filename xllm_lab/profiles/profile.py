"""What a profile holds, whichever profiler wrote it; a part that the profiler did not record is empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xllm_lab.operator_table import OperatorTable


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """All calls of one collective operation on one device, of one size where sizes are known.

    Attributes:
        collective: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, ...
        device: the profiler's number of the device; "" if not told.
        group: the communicator as the profiler calls it; "" if not told.
        num_ranks: devices that take part; None if not told.
        message_bytes: bytes of the input on one device; None if not told.
        total_us, min_us, max_us: over the calls. A source that gives a mean over calls gives one call that took it.
    """

    collective: str
    device: str = ""
    group: str = ""
    num_ranks: int | None = None
    message_bytes: int | None = None
    num_calls: int = 1
    total_us: float
    min_us: float
    max_us: float

    @property
    def mean_us(self) -> float:
        return self.total_us / self.num_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSplit:
    """Where the time of one marked step went on one device.

    Computing, communication that nothing hid, and free time add up to the step.

    Attributes:
        step: the profiler's mark; "" if steps were not marked, and this is the whole recording.
        overlapped_us: communication hidden behind computing.
    """

    device: str
    step: str
    computing_us: float
    communication_us: float
    not_overlapped_us: float
    overlapped_us: float
    free_us: float

    @property
    def step_us(self) -> float:
        return self.computing_us + self.not_overlapped_us + self.free_us


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOperator:
    """All calls of one framework operator, `aten::mm`, on the host.

    Attributes:
        host_us: spent in the operator itself, without those it calls.
        device_us: of the kernels that it launched itself.
    """

    operator: str
    num_calls: int
    host_us: float
    device_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePart:
    """One request's part of a batch. What a release of the profiler does not write is None.

    Attributes:
        request: the request's id.
        iteration: how many steps it took part in before.
        is_prefill: whether it still computes its prompt.
        num_tokens: computed in this step.
        num_computed_tokens: in KV before it.
        prompt_tokens: length of its prompt.
    """

    request: str
    iteration: int | None = None
    is_prefill: bool | None = None
    num_tokens: int | None = None
    num_computed_tokens: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One executed batch.

    Attributes:
        step_us: from its start to its end on the slowest device.
        parts: its requests, if the profiler listed them.
        num_prefills, prefill_tokens, num_decodes, decode_tokens: requests and tokens of this step; None if not told.
        used_blocks: KV blocks in use once it was scheduled, those of requests outside the batch included.
        basis: what the lengths of `parts` rest on, in a phrase; "" if they are what each request was recorded to have.
        line: of the file; of a table without lines, the row.
    """

    line: int
    step_us: float
    parts: tuple[SequencePart, ...] = ()
    num_prefills: int | None = None
    prefill_tokens: int | None = None
    num_decodes: int | None = None
    decode_tokens: int | None = None
    used_blocks: int | None = None
    basis: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRow:
    """One forward pass of the model on one device, and the idle time before it (None if not told)."""

    step_us: float
    idle_us: float | None
    batch_type: str
    num_seqs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One request as its server saw it; None for what was not recorded.

    Attributes:
        arrival_us: on the server's clock.
        cached_tokens: of its prompt, found in the prefix cache.
    """

    request: str
    prompt_tokens: int
    output_tokens: int
    arrival_us: int | None
    e2e_us: float
    queue_us: float | None
    ttft_us: float | None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows of a file that went into nothing, and why; `total_us` is the sum of their durations."""

    file: str
    reason: str
    num_rows: int
    total_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one profiler recorded.

    Attributes:
        source: the reader's name.
        operators: kernels, collectives excepted.
        collectives: each operation once, however many kernels carried it out.
        splits: per step and device, where its time went.
        num_steps: marked steps per device; 0 if none were marked.
        peak_used_blocks, num_blocks: KV blocks, in use at most and in all; None if not told.
        units: of the columns of times that were read, as `batch.csv: during_time` has `ms`.
        left_out: rows that were not used, by reason.
        notes: what else a user of the figures has to know.
    """

    source: str
    path: Path
    operators: OperatorTable = field(default_factory=OperatorTable)
    collectives: tuple[CollectiveRow, ...] = ()
    splits: tuple[StepSplit, ...] = ()
    num_steps: int = 0
    host_operators: tuple[HostOperator, ...] = ()
    batches: tuple[BatchRow, ...] = ()
    forwards: tuple[ForwardRow, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    peak_used_blocks: int | None = None
    num_blocks: int | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
