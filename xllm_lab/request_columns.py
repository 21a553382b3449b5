"""Requests' records as columns: what metrics are made of, of many requests at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xllm_lab.columns import ints
from xllm_lab.records import RequestRecord, request_table

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Columns of `records.REQUEST_SCHEMA`; output token ids, as many as token times, are not among them.
NAMES = (
    *("arrival_us", "prompt_tokens", "ttft_slo_us", "tpot_slo_us", "e2e_slo_us", "cached_tokens"),
    *("first_scheduled_us", "token_times_us", "num_preemptions", "finish_us", "finish_reason"),
    *("num_drafted", "num_accepted", "handed_over_us"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestColumns:
    """The fields of `RequestRecord` by the same names, shape [requests]; NaN where a record has None.

    Attributes:
        finish_reason: the empty text where a record has None.
        token_times_us: of all requests, one after the other, shape [tokens].
        output_tokens: how many of them each request has.
        num_verifications: of drafts, of all requests together; so the next three.
    """

    arrival_us: Floats
    prompt_tokens: Ints
    ttft_slo_us: Floats
    tpot_slo_us: Floats
    e2e_slo_us: Floats
    cached_tokens: Ints
    first_scheduled_us: Floats
    num_preemptions: Ints
    finish_us: Floats
    finish_reason: npt.NDArray[np.str_]
    token_times_us: Ints
    output_tokens: Ints
    num_verifications: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_handed_over: int

    @property
    def first_token_us(self) -> Floats:
        return self._token_us(np.cumsum(self.output_tokens) - self.output_tokens)

    @property
    def last_token_us(self) -> Floats:
        return self._token_us(np.cumsum(self.output_tokens) - 1)

    def of_tokens(self, flags: Flags) -> Flags:
        """A flag of each request, repeated for each of its tokens."""
        return np.repeat(flags, self.output_tokens)

    def _token_us(self, which: Ints) -> Floats:
        times = np.full(len(which), np.nan)
        has_any = self.output_tokens > 0
        times[has_any] = self.token_times_us[which[has_any]]
        return times


def columns_of(requests: Sequence[RequestRecord]) -> Iterator[RequestColumns]:
    """Records in memory as columns, in parts."""
    for batch in request_table(requests).select(NAMES).to_batches():
        yield columns_from(dict(zip(batch.schema.names, batch.columns, strict=True)))


def columns_from(batch: Mapping[str, Any]) -> RequestColumns:
    """Arrow columns `NAMES` of a table of requests."""
    token_times_us = batch["token_times_us"]
    whole = ("prompt_tokens", "cached_tokens", "num_preemptions")
    others = [n for n in NAMES if n.endswith("_us") and n not in ("token_times_us", "handed_over_us")]
    columns: dict[str, Any] = {name: ints(batch[name]) for name in whole}
    drafted = batch["num_drafted"]
    columns |= {name: batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in others}
    return RequestColumns(
        **columns,
        finish_reason=np.asarray(batch["finish_reason"].fill_null("").to_pylist(), dtype=np.str_),
        token_times_us=ints(token_times_us.flatten()),
        output_tokens=ints(pc.list_value_length(token_times_us)),
        # Every verification has a draft at the first position.
        num_verifications=int(_firsts(drafted).sum()),
        num_drafted_tokens=int(ints(drafted.flatten()).sum()),
        num_accepted_tokens=int(ints(batch["num_accepted"].flatten()).sum()),
        num_handed_over=len(batch["handed_over_us"]) - batch["handed_over_us"].null_count,
    )


def _firsts(lists: Any) -> Ints:
    """The first elements of the lists that have any."""
    return ints(pc.list_element(lists.filter(pc.greater(pc.list_value_length(lists), 0)), 0))
