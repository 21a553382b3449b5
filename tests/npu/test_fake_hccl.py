"""Collectives of the real ProcessGroupHCCL between processes, against plain torch; and what goes wrong, does so aloud."""

from __future__ import annotations

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


def test_uneven_all_to_all() -> None:
    assert ranks.run(f"{HERE}:uneven_all_to_all", 2) == [[0, 100, 101], [1, 102]]


def test_lists_and_grouped_pairs() -> None:
    assert ranks.run(f"{HERE}:lists_and_pairs", 2) == [[[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]


def test_a_collective_in_a_graph_runs_at_every_replay() -> None:
    assert ranks.run(f"{HERE}:captured", 2) == [[6.0, 10.0, 14.0]] * 2


def test_a_fused_operator_finds_its_communicator_by_name() -> None:
    assert ranks.run(f"{HERE}:a_matmul_that_reduces", 2) == [[9.0, 9.0]] * 2


def test_ranks_that_disagree_about_the_size_are_told() -> None:
    for answer in ranks.run(f"{HERE}:different_sizes", 2):
        assert "507904" in answer


def test_the_death_of_a_rank_is_an_error_on_the_other() -> None:
    assert ranks.run(f"{HERE}:a_rank_that_dies", 2) == ["True", "gone"]
