"""Records that go to disk while a run goes on, so that memory does not grow with it.

Rows come out in order of (end, instance) for steps and of end for requests, in groups of equal size, whatever the order
in which spans came in: a run writes the same bytes with and without skipped steps.

    spans   |-- instance 0 --|      |-- instance 0 -----|
               |----- instance 1 ----------|     ...under way
    written ...........................^ low water: nothing that ended before can still come
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xllm_lab.copies import CopyRecord
from xllm_lab.expert_records import (
    EXPERT_LOADS_FILE,
    EXPERT_LOADS_SCHEMA,
    EXPERTS_FILE,
    ExpertLoadRecord,
    ExpertsRecord,
    expert_loads_table,
    experts_table,
)
from xllm_lab.records import (
    COPY_SCHEMA,
    REQUEST_SCHEMA,
    STEP_SCHEMA,
    TRANSFER_SCHEMA,
    RequestRecord,
    RoleChange,
    SentPrompt,
    copy_table,
    request_table,
    role_table,
    step_table,
    transfer_table,
)
from xllm_lab.step import Step

STEPS_FILE, REQUESTS_FILE, TRANSFERS_FILE = "steps.parquet", "requests.parquet", "transfers.parquet"
COPIES_FILE, ROLES_FILE = "copies.parquet", "roles.parquet"
# Of a row group, and of what is kept in memory until it is one. A step has many entries, one per request.
_STEPS_PER_GROUP, _REQUESTS_PER_GROUP, _LOADS_PER_GROUP = 1 << 15, 1 << 12, 1 << 6
_MOST_ENTRIES = 1 << 20


class RunWriter:
    """A `Recorder` that writes steps.parquet and requests.parquet of a run folder. Close it, or use it with `with`.

    Args:
        low_water_us: says that no step will come that ended at or before that time; without it, steps come in order.
        keep_steps: else steps.parquet has no rows.
        on_request: called for every request that ended.

    Attributes:
        decisions: on places of experts, so far.
    """

    def __init__(
        self,
        folder: Path,
        *,
        low_water_us: Callable[[], int] | None = None,
        keep_steps: bool = True,
        on_request: Callable[[], object] = lambda: None,
    ) -> None:
        self.low_water_us = low_water_us
        self._keeps_steps = keep_steps
        self._on_request = on_request
        self._folder = folder
        self._transfers: _Groups | None = None  # a run without links has no such file
        self._sent: list[SentPrompt] = []
        self._copies: _Groups | None = None  # nor has one without tiers
        self._asked: deque[CopyRecord] = deque()
        self._roles: list[RoleChange] = []  # nor one without roles
        self.decisions: list[ExpertsRecord] = []  # nor one without divided experts
        self._loads: list[ExpertLoadRecord] = []
        self._expert_loads: pq.ParquetWriter | None = None
        self._steps = _Groups(folder / STEPS_FILE, STEP_SCHEMA, _STEPS_PER_GROUP)
        self._requests = _Groups(folder / REQUESTS_FILE, REQUEST_SCHEMA, _REQUESTS_PER_GROUP)
        self._spans: list[Step] = []
        self._ended: list[RequestRecord] = []
        self._num_entries = 0

    def span(self, span: Step) -> None:
        if not self._keeps_steps:
            return
        self._spans.append(span)
        self._num_entries += len(span.ends_us) * (1 + len(span.decodes.ids) + len(span.others))
        if self._num_entries > _MOST_ENTRIES:
            self._write_steps(None if self.low_water_us is None else self.low_water_us())

    def transfer(self, sent: SentPrompt) -> None:
        """Something went over a link."""
        self._sent.append(sent)
        if len(self._sent) >= _REQUESTS_PER_GROUP:
            self._write_transfers()

    def role(self, change: RoleChange) -> None:
        """An instance got another role."""
        self._roles.append(change)

    def copy(self, record: CopyRecord) -> None:
        self._asked.append(record)
        if len(self._asked) >= 2 * _REQUESTS_PER_GROUP:
            self._write_copies(lambda copy: copy.end_us is not None)

    def experts(self, record: ExpertsRecord) -> None:
        self.decisions.append(record)

    def expert_load(self, record: ExpertLoadRecord) -> None:
        self._loads.append(record)
        if len(self._loads) >= _LOADS_PER_GROUP:
            self._write_loads()

    def request(self, record: RequestRecord) -> None:
        self._on_request()
        self._ended.append(record)
        if len(self._ended) >= _REQUESTS_PER_GROUP:
            self._write_requests()

    def close(self) -> None:
        """Write what is left. OSError or ArrowException if it cannot be written."""
        self._write_steps(None)
        self._write_requests()
        self._write_transfers()
        self._write_copies(lambda _: True)
        if self._roles:
            pq.write_table(role_table(self._roles), self._folder / ROLES_FILE, write_page_checksum=True)
        if self.decisions:
            pq.write_table(experts_table(self.decisions), self._folder / EXPERTS_FILE, write_page_checksum=True)
        self._write_loads()
        if self._expert_loads is not None:
            self._expert_loads.close()
        for file in self._files():
            file.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.close()
        finally:
            for file in self._files():
                file.let_go()

    def _files(self) -> list[_Groups]:
        return [f for f in (self._steps, self._requests, self._transfers, self._copies) if f is not None]

    def _write_steps(self, before_us: int | None) -> None:
        table = step_table(self._spans).sort_by([("end_us", "ascending"), ("instance", "ascending")])
        self._spans.clear()
        self._num_entries = 0
        self._steps.add(table, before_us)

    def _write_transfers(self) -> None:
        if not self._sent:
            return
        if self._transfers is None:
            self._transfers = _Groups(self._folder / TRANSFERS_FILE, TRANSFER_SCHEMA, _REQUESTS_PER_GROUP)
        self._transfers.add(transfer_table(self._sent), None)
        self._sent.clear()

    def _write_copies(self, is_settled: Callable[[CopyRecord], bool]) -> None:
        """In the order in which they were asked for, up to the first that is not settled."""
        settled: list[CopyRecord] = []
        while self._asked and is_settled(self._asked[0]):
            settled.append(self._asked.popleft())
        if not settled:
            return
        if self._copies is None:
            self._copies = _Groups(self._folder / COPIES_FILE, COPY_SCHEMA, _REQUESTS_PER_GROUP)
        self._copies.add(copy_table(settled), None)

    def _write_loads(self) -> None:
        if not self._loads:
            return
        if self._expert_loads is None:
            path, told = self._folder / EXPERT_LOADS_FILE, {"compression": "zstd", "write_page_checksum": True}
            self._expert_loads = pq.ParquetWriter(path, EXPERT_LOADS_SCHEMA, **told)
        self._expert_loads.write_table(expert_loads_table(self._loads))
        self._loads.clear()

    def _write_requests(self) -> None:
        self._requests.add(request_table(self._ended), None)
        self._ended.clear()


class _Groups:
    """A Parquet file in row groups of equal size, of tables that may overlap in time."""

    def __init__(self, path: Path, schema: pa.Schema, rows_per_group: int) -> None:
        # With checksums a flipped bit is an error, not another result.
        self._file = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
        self._rows_per_group = rows_per_group
        self._early = schema.empty_table()  # may still be overtaken
        self._settled = schema.empty_table()

    def add(self, table: pa.Table, before_us: int | None) -> None:
        """Write what nothing can come before any more: all of it if `before_us` is None."""
        if before_us is not None or self._early.num_rows:
            merged = pa.concat_tables([self._early, table])
            merged = merged.sort_by([("end_us", "ascending"), ("instance", "ascending")])
            num = merged.num_rows if before_us is None else int(pc.sum(_is_at_most(merged, before_us)).as_py() or 0)
            self._early, table = merged.slice(num), merged.slice(0, num)
        self._settled = pa.concat_tables([self._settled, table])
        while self._settled.num_rows >= self._rows_per_group:
            self._write(self._rows_per_group)

    def close(self) -> None:
        assert not self._early.num_rows, "rows are left that may be overtaken"
        if self._settled.num_rows:
            self._write(self._settled.num_rows)
        self._file.close()

    def let_go(self) -> None:
        """Be done with the file, whatever state it is in."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._file.close()
        # Or it would try again when it is collected, and print what stopped it.
        self._file.is_open = False

    def _write(self, num_rows: int) -> None:
        # In one piece: how it came in pieces must not show in the file.
        self._file.write_table(self._settled.slice(0, num_rows).combine_chunks(), row_group_size=num_rows)
        self._settled = self._settled.slice(num_rows)


def _is_at_most(table: pa.Table, before_us: int) -> Any:
    return pc.cast(pc.less_equal(table["end_us"], before_us), pa.int64())
