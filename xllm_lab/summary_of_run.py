"""The summary of a run on disk, read a bounded number of rows at a time, for runs of millions of requests."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from xllm_lab.columns import batches, ints
from xllm_lab.errors import RunError
from xllm_lab.metrics import PageSums, Summary, Tally, moved_tokens
from xllm_lab.records import COPY_SCHEMA, REQUEST_SCHEMA, STEP_SCHEMA, FinishReason
from xllm_lab.request_columns import NAMES, columns_from
from xllm_lab.run_writer import COPIES_FILE, REQUESTS_FILE, STEPS_FILE
from xllm_lab.runs import Run

_REASONS = ("", *FinishReason)
# Each has a time for each of its tokens, often hundreds.
_REQUESTS_AT_A_TIME = 1 << 12


def summarize_run(run: Run) -> Summary:
    """As `metrics.summarize(run.records)`, without the records in memory: exact percentiles too.

    Raises:
        RunError: a file is not what the run's manifest says.
    """
    tally = Tally()
    path, count = run.path / REQUESTS_FILE, 0
    for batch in batches(path, REQUEST_SCHEMA, NAMES, _REQUESTS_AT_A_TIME):
        requests = columns_from(batch)
        for reason in np.setdiff1d(requests.finish_reason, _REASONS).tolist():
            raise RunError(f"{path}: finish_reason is {reason!r}; accepted: {', '.join(FinishReason)}")
        tally.add_requests(requests)
        count += len(requests.finish_reason)
    run.expect_all(REQUESTS_FILE, count)
    for batch in batches(
        run.path / STEPS_FILE, STEP_SCHEMA, ("start_us", "end_us", "page_maps", *PageSums._fields[1:])
    ):
        tally.add_steps(len(batch["end_us"]), int((ints(batch["end_us"]) - ints(batch["start_us"])).sum()))
        counts = {name: pc.sum(batch[name]).as_py() or 0 for name in PageSums._fields[1:]}
        late = ints(batch["page_maps"].flatten())[3::4]
        tally.add_pages(PageSums(int(late.sum()), **counts))
    if (run.path / COPIES_FILE).exists():
        for batch in batches(run.path / COPIES_FILE, COPY_SCHEMA, ("kind", "num_moved_tokens")):
            moved = zip(batch["kind"].to_pylist(), batch["num_moved_tokens"].to_pylist(), strict=True)
            tally.add_copies(moved_tokens(moved))
    return tally.summary()
