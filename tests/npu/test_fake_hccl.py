"""Collectives of the real ProcessGroupHCCL between processes, against plain torch; and what goes wrong, says so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_cann import control, ranks
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.hccl_ranks import SIZES, TYPES

HERE = "tests.npu.hccl_ranks"


@pytest.mark.parametrize("order", ["program", "threads"])
def test_collectives_of_two_ranks_are_exact(order: str, ledger: Ledger) -> None:
    counts = ranks.run(f"{HERE}:every_collective", 2, ORDER=order)
    rounds = len(TYPES) * len(SIZES)
    for rank in range(2):
        assert counts[rank]["hccl:all_reduce"] >= 2 * rounds
        assert counts[rank]["hccl:all_gather"] == rounds
        assert counts[rank]["hccl:all_to_all"] == rounds
    ledger(f"collectives of one rank, {order}", control.Counts({k: control.Count(v, 0) for k, v in counts[0].items()}))


def test_three_ranks() -> None:
    ranks.run(f"{HERE}:every_collective", 3)


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return ranks.run(f"{HERE}:what_needs_two_ranks", 2)


def test_uneven_all_to_all(both: list[dict[str, Any]]) -> None:
    assert [one["uneven_all_to_all"] for one in both] == [[0, 100, 101], [1, 102]]


def test_lists_and_grouped_pairs(both: list[dict[str, Any]]) -> None:
    assert [one["lists_and_pairs"] for one in both] == [[[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]


def test_a_collective_in_a_graph_runs_at_every_replay(both: list[dict[str, Any]]) -> None:
    assert [one["captured"] for one in both] == [[6.0, 10.0, 14.0]] * 2


def test_a_fused_operator_finds_its_communicator_by_name(both: list[dict[str, Any]]) -> None:
    assert [one["a_matmul_that_reduces"] for one in both] == [[9.0, 9.0]] * 2


def test_ranks_that_disagree_about_the_size_are_told() -> None:
    with pytest.raises(
        ranks.RanksFailedError, match=r"calls another collective: operation 1 count 11 .* here 1 count 10"
    ):
        ranks.run(f"{HERE}:different_sizes", 2)


def test_the_death_of_a_rank_is_an_error_on_the_other() -> None:
    with pytest.raises(ranks.RanksFailedError, match=r"rank 0 of .* a peer is gone"):
        ranks.run(f"{HERE}:a_rank_that_dies", 2)
