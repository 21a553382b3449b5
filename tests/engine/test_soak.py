"""The benchmark that runs for half an hour, for as long as it takes to see everything once, on a tiny model."""

from __future__ import annotations

from itertools import islice

from benchmarks.soak import Scale, Tally, rounds
from tests.tiny_models import tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions

# The tiny model's steps take a millisecond.
TINY = Scale(
    num_requests=24,
    rate_per_s=400.0,
    most_prompt_tokens=120,
    patience_us=100_000,
    num_kv_blocks=20,
    block_size=8,
    max_model_len=512,
)


def test_bursts_with_cancellations_preemptions_and_oversized_requests_leave_nothing_behind() -> None:
    """Each round audits its ledger before every step, ends with all blocks free, and obeys the laws."""
    engine, tally = Engine(EngineOptions(model=str(tiny_model()), device="cpu")), Tally()
    for mode, records in islice(rounds(engine, TINY), 15):
        tally.add(mode, records)
    assert tally.num_requests == 15 * TINY.num_requests
    assert not tally.missing
