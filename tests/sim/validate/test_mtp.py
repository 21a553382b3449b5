"""xLLM's table of multi-token prediction: the server that it leaves us with, fitted to three of its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.cost.cost_laws import check_decode_steps, decode_batches
from tests.tiny_loop import said
from xllm_lab import verbs
from xllm_lab.sim.cost import batch_of
from xllm_lab.sim.validate import mtp
from xllm_lab.sim.validate.mtp_fit import BASE, DRAFTS, errors
from xllm_lab.sim.validate.mtp_server import Measured, ServerCost, fitted_server, serve, table
from xllm_lab.sim.validate.published import PublishedValidation
from xllm_lab.step_time import Chunk

SERVER = fitted_server()


def test_three_rows_are_fitted_to() -> None:
    rows = table()["rows"]
    assert [row["clients"] for row in rows] == [1, 2, 4, 8, 16, 20, 40, 80]
    assert [row["clients"] for row in rows if row.get("is_fitted")] == [1, 8, 40]


@given(decode_batches(), st.integers(1, 40))
def test_steps_together_are_steps_alone(batch: Any, num_steps: int) -> None:
    check_decode_steps(ServerCost(SERVER), batch, num_steps)


def test_a_step_costs_what_it_is() -> None:
    """Prompts by token, decodes by sequence, drafts by row."""
    cost = ServerCost(SERVER)
    decode_us = SERVER.decode_us + 3 * SERVER.sequence_us
    assert cost.step(batch_of([Chunk(1, 9)] * 3, 3)).us == decode_us
    assert cost.step(batch_of([Chunk(2, 9)] * 3, 6)).us == decode_us + 3 * SERVER.draft_row_us
    assert cost.step(batch_of([Chunk(50, 0)] * 2, 2)).us == SERVER.prefill_us + 100 * SERVER.prompt_token_us


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_lengths_have_their_mean(shape: float) -> None:
    lengths = replace(SERVER, length_shape=shape).lengths(80, 1455.0)
    assert len(lengths) == 80
    assert lengths == sorted(lengths)
    assert sum(lengths) / 80 == pytest.approx(1455, rel=0.01)


def test_a_draft_kept_at_70_percent_yields_17_tokens_in_ten_steps() -> None:
    """Where sequences and drafts cost nothing, TPOT is a step over that."""
    alike = replace(
        SERVER, sequence_us=1e-9, draft_row_us=1e-9, prefill_us=1.0, prompt_token_us=1e-9, length_shape=40.0
    )
    ours = serve(alike, 80, drafts=True)
    assert ours.tpot_ms * 1.7 == pytest.approx((alike.decode_us + alike.draft_us) / 1e3, rel=0.01)


def test_a_row_is_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tables of eight rows each, with MTP and without; means are over the rows that were not fitted to."""
    monkeypatch.setattr(
        mtp, "serve", lambda server, clients, drafts: Measured(clients + 0.5 * drafts, 1000.0 * clients, 7.0)
    )
    found = verbs.validate_mtp()
    assert len(found.points) == 3 * 16
    tpot = found.tables["mean TPOT of DeepSeek with and without MTP, ms"]
    by_name = {point.what: point for point in tpot}
    assert by_name["MTP, 16 clients"].predicted == 16.5
    assert by_name["MTP, 16 clients"].published == 57.04
    assert {point.what for point in tpot if point.is_fitted} == {
        f"{key}, {n} clients" for key in ("base", "MTP") for n in (1, 8, 40)
    }
    told = said("validate", "mtp")
    assert told.status == 0
    assert "assumed: all 80 requests" in told.out
    assert "constants were fitted: prefill_us" in told.out
    assert len(json.loads(said("validate", "mtp", "--json").out)) == 48


@pytest.fixture(scope="module")
def found() -> PublishedValidation:
    return verbs.validate_mtp()


@pytest.mark.slow
def test_the_other_rows_are_predicted(found: PublishedValidation) -> None:
    for name, most in (("mean TPOT of DeepSeek with and without MTP, ms", 0.10), ("output tokens per second", 0.10)):
        error = found.mean_error_frac(name, is_fitted=False)
        assert error is not None
        assert error < most


@pytest.mark.slow
@pytest.mark.parametrize(("names", "change"), [(BASE, 1.2), (DRAFTS, 1.2)])
def test_the_constants_are_the_best_there_are(names: tuple[str, ...], change: float) -> None:
    """None can be changed for the better, up or down."""
    drafts = names is DRAFTS
    best = (errors(SERVER, drafts=drafts) ** 2).sum()
    for name in names:
        for factor in (change, 1 / change):
            other = replace(SERVER, **{name: getattr(SERVER, name) * factor})
            assert (errors(other, drafts=drafts) ** 2).sum() > best, name
